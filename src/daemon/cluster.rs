//! The daemon's tasks in a cluster: the publishers of labels, of the `NodeVirtualization` and of
//! events, and the controller of DomainHotplug objects.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Metrics;
use super::tasks::Tasks;
use crate::cluster::objects::Condition;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::{Cluster, HotplugObjects, LauncherPods};
use crate::config::Config;
use crate::controller::{Controller, ControllerOptions};
use crate::executor::Executor;
use crate::hypervisor::{DomainBackend, NodeSource};
use crate::label::{LabelKey, LabelSet, LabelValue};
use crate::labeller::Outputs;
use crate::publish::events::EventRecorder;
use crate::publish::file::{self, LabelReport, NODE_LABELS_FILE};
use crate::publish::metrics::SyncMetrics;
use crate::publish::node::{NodePublisher, NodePublisherOptions, SyncState};
use crate::publish::node_events::report_hypervisor;
use crate::publish::virtualization::{VirtualizationPublisher, VirtualizationPublisherOptions};

/// Mean interval between attempts to read the Node at the start.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Starts the tasks, and holds what they share.
pub(super) struct ClusterTasks {
    cluster: Cluster,
    events: EventRecorder,
    metrics: Arc<Metrics>,
    start_jitter: Duration,
    launcher_pods: Option<LauncherPods>,
}

impl ClusterTasks {
    /// Starts the event writer, and the watch of launcher Pods if the configuration enables it.
    pub(super) fn start(
        cluster: Cluster,
        config: &Config,
        metrics: &Arc<Metrics>,
        tasks: &mut Tasks,
    ) -> Self {
        let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(&metrics.events));
        tasks.start("the event writer", |stop| writer.run(stop));
        let launchers = &config.launchers;
        let launcher_pods = (launchers.enabled && launchers.verify_pods).then(|| {
            let pods = LauncherPods::default();
            let (following, cluster) = (pods.clone(), cluster.clone());
            tasks.start("the watch of launcher Pods", |stop| {
                following.follow(cluster, stop)
            });
            pods
        });
        Self {
            cluster,
            events,
            metrics: Arc::clone(metrics),
            start_jitter: config.start_jitter,
            launcher_pods,
        }
    }

    /// Returns the launcher Pods of the node, if the configuration enables their verification.
    pub(super) fn launcher_pods(&self) -> Option<LauncherPods> {
        self.launcher_pods.clone()
    }

    /// Returns the recorder of events, and the Node to record them on.
    pub(super) fn events(&self) -> (EventRecorder, ObjectReference) {
        (self.events.clone(), self.cluster.node_reference())
    }

    /// Starts the controller of DomainHotplug objects. Returns the condition that reports whether
    /// they are watched.
    pub(super) fn start_controller<C: DomainBackend>(
        &self,
        executor: Arc<Executor<C>>,
        tasks: &mut Tasks,
    ) -> watch::Receiver<Option<Condition>> {
        let controller = Controller::new(
            HotplugObjects::new(&self.cluster),
            executor,
            self.events.clone(),
            Arc::clone(&self.metrics.objects),
            ControllerOptions {
                start_jitter: self.start_jitter,
                ..ControllerOptions::default()
            },
        );
        let watched = controller.condition();
        tasks.start("the DomainHotplug controller", |stop| controller.run(stop));
        watched
    }

    /// Starts the publishers, which receive labels and snapshots through `outputs`. Returns the
    /// state of the labels on the Node.
    pub(super) fn start_publishers<H: NodeSource>(
        self,
        config: &Config,
        hypervisor: &Arc<H>,
        hotplug_watched: watch::Receiver<Option<Condition>>,
        outputs: &mut Outputs,
        tasks: &mut Tasks,
    ) -> watch::Receiver<SyncState> {
        let node = self.cluster.node_reference();
        let (events, connection) = (self.events.clone(), hypervisor.connection());
        tasks.start("the reporter of libvirt's connection", |stop| {
            report_hypervisor(events, node, connection, stop)
        });

        let (snapshots, to_publish) = watch::channel(None);
        outputs.snapshots = Some(snapshots);
        let options = VirtualizationPublisherOptions {
            start_jitter: self.start_jitter,
            ..VirtualizationPublisherOptions::default()
        };
        let (cluster, metrics) = (
            self.cluster.clone(),
            Arc::clone(&self.metrics.virtualization),
        );
        let publisher = VirtualizationPublisher::new(cluster, metrics, options);
        let mut publisher = publisher.with_hotplug(hotplug_watched);
        if config.external_changes.enabled {
            publisher = publisher.with_domains(self.metrics.external.log.not_taken());
        }
        let connection = hypervisor.connection();
        tasks.start("the NodeVirtualization publisher", |stop| {
            publisher.run(to_publish, connection, stop)
        });
        self.publish_labels(config, outputs, tasks)
    }

    fn publish_labels(
        self,
        config: &Config,
        outputs: &mut Outputs,
        tasks: &mut Tasks,
    ) -> watch::Receiver<SyncState> {
        let Self {
            cluster,
            events,
            metrics,
            start_jitter,
            ..
        } = self;
        let options = NodePublisherOptions {
            force_conflicts: config.force_conflicts,
            start_jitter,
            ..NodePublisherOptions::default()
        };
        let publisher =
            NodePublisher::new(cluster.clone(), events, Arc::clone(&metrics.sync), options);
        let state = publisher.state();
        let (desired, to_publish) = watch::channel(None);
        let (to_labeller, existing_labels) = oneshot::channel();
        outputs.node = Some(desired);
        outputs.existing_labels = Some(existing_labels);

        let path = config.state_directory.join(NODE_LABELS_FILE);
        let storing = store_published(state.clone(), path.clone());
        tasks.start_endless("the store of the Node's labels", storing);
        tasks.start("the Node publisher", |stop: CancellationToken| async move {
            let reading = read_existing(&cluster, &metrics.sync);
            let Some(existing) = stop.run_until_cancelled(reading).await else {
                return;
            };
            // The file adds the labels that someone edited while no daemon ran: the Node shows
            // another owner for them.
            let mut ours = file::load(&path).unwrap_or_default();
            ours.extend(existing.clone());
            // Fails only if the labeller has ended, and then the daemon stops.
            let _stopping = to_labeller.send(existing);
            publisher.run(to_publish, ours, stop).await;
        });
        state
    }
}

/// Returns the condition that DomainHotplug objects are not watched.
pub(super) fn not_watched(reason: &str, message: &str) -> watch::Receiver<Option<Condition>> {
    let (kind, now) = (HOTPLUG_OBJECTS_WATCHED, Timestamp::now().into());
    let condition = Condition::new(kind, false, reason, message, now);
    watch::channel(Some(condition)).1
}

/// Stores the labels on the Node in a file, for the next run. If the state directory is read-only,
/// the next daemon cannot restore labels that someone edited while no daemon ran.
async fn store_published(mut state: watch::Receiver<SyncState>, path: PathBuf) {
    let mut is_reported = false;
    while state.changed().await.is_ok() {
        let published = Arc::clone(&state.borrow_and_update().published);
        if published.is_empty() {
            continue;
        }
        if let Err(error) = file::store(&path, &LabelReport::from_labels(&published))
            && !std::mem::replace(&mut is_reported, true)
        {
            warn!(%error, "cannot store the labels of the Node for the next run");
        }
    }
    // The publisher has ended. The supervisor is to report it, not this task.
    std::future::pending::<()>().await;
}

/// Returns the labels on the Node that belong to virtnode's field manager. Retries until the API
/// server answers.
async fn read_existing(cluster: &Cluster, metrics: &SyncMetrics) -> LabelSet {
    let mut reported = None;
    loop {
        match cluster.observe().await {
            Ok(state) => {
                let owned = state.shown.owned.iter().filter_map(|key| {
                    let value = state.shown.labels.get(key)?;
                    let key: LabelKey = key.parse().ok()?;
                    let value: LabelValue = value.parse().ok()?;
                    Some((key, value))
                });
                return owned.collect();
            }
            Err(error) => {
                metrics.attempts.inc();
                metrics.failures.with_label_values(&[error.code()]).inc();
                if reported != Some(error.code()) {
                    warn!(node = cluster.node(), %error, "cannot read the Node, retrying");
                    reported = Some(error.code());
                }
                sleep(RETRY_INTERVAL.mul_f64(0.5 + fastrand::f64())).await;
            }
        }
    }
}
