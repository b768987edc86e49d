//! Joins what is done in a cluster: labels on the Node, the `NodeVirtualization`, events, and the
//! controller of DomainHotplug objects.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::tasks::Parts;
use crate::cluster::objects::Condition;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::{Cluster, HotplugObjects};
use crate::config::Config;
use crate::controller::{Controller, ControllerOptions};
use crate::executor::Executor;
use crate::hypervisor::{DomainBackend, NodeSource};
use crate::label::{LabelKey, LabelSet, LabelValue};
use crate::labeller::Outputs;
use crate::publish::events::EventRecorder;
use crate::publish::file::{self, LabelReport, NODE_LABELS_FILE};
use crate::publish::node::{NodePublisher, NodePublisherOptions, SyncState};
use crate::publish::node_events::report_hypervisor;
use crate::publish::virtualization::{VirtualizationPublisher, VirtualizationPublisherOptions};
use crate::telemetry::Metrics;

/// Between two attempts to see the Node for the first time.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What everything on the own Node has in common.
pub(super) struct OnNode {
    cluster: Cluster,
    events: EventRecorder,
    metrics: Arc<Metrics>,
    start_jitter: Duration,
}

impl OnNode {
    /// Starts what writes events.
    pub(super) fn start(
        cluster: Cluster,
        config: &Config,
        metrics: &Arc<Metrics>,
        parts: &mut Parts,
    ) -> Self {
        let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(metrics));
        parts.start("the writer of events", |stop| writer.run(stop));
        Self {
            cluster,
            events,
            metrics: Arc::clone(metrics),
            start_jitter: config.start_jitter,
        }
    }

    /// Where to tell what happens, and of which Node.
    pub(super) fn events(&self) -> (EventRecorder, ObjectReference) {
        (self.events.clone(), self.cluster.node_reference())
    }

    /// Starts the controller of DomainHotplug objects. Says whether they are seen, as it learns.
    pub(super) fn control<C: DomainBackend>(
        &self,
        executor: Arc<Executor<C>>,
        parts: &mut Parts,
    ) -> watch::Receiver<Option<Condition>> {
        let controller = Controller::new(
            HotplugObjects::new(&self.cluster),
            executor,
            self.events.clone(),
            Arc::clone(&self.metrics),
            ControllerOptions {
                start_jitter: self.start_jitter,
                ..ControllerOptions::default()
            },
        );
        let watched = controller.condition();
        parts.start("the controller of DomainHotplug objects", |stop| {
            controller.run(stop)
        });
        watched
    }

    /// Starts the publishers of labels and of the `NodeVirtualization`, which get what they publish
    /// through `outlets`, and the news of the hypervisor. What was published is kept in the state
    /// directory. Says how the labels do.
    pub(super) fn publish<H: NodeSource>(
        self,
        config: &Config,
        hypervisor: &Arc<H>,
        hotplug_watched: watch::Receiver<Option<Condition>>,
        outlets: &mut Outputs,
        parts: &mut Parts,
    ) -> watch::Receiver<SyncState> {
        let node = self.cluster.node_reference();
        let (events, connection) = (self.events.clone(), hypervisor.connection());
        parts.start("the news of the hypervisor", |stop| {
            report_hypervisor(events, node, connection, stop)
        });

        let (snapshots, to_publish) = watch::channel(None);
        outlets.snapshots = Some(snapshots);
        let options = VirtualizationPublisherOptions {
            start_jitter: self.start_jitter,
            ..VirtualizationPublisherOptions::default()
        };
        let (cluster, metrics) = (self.cluster.clone(), Arc::clone(&self.metrics));
        let publisher = VirtualizationPublisher::new(cluster, metrics, options);
        let publisher = publisher.with_hotplug(hotplug_watched);
        let connection = hypervisor.connection();
        parts.start("the NodeVirtualization's publisher", |stop| {
            publisher.run(to_publish, connection, stop)
        });
        self.publish_labels(config, outlets, parts)
    }

    fn publish_labels(
        self,
        config: &Config,
        outlets: &mut Outputs,
        parts: &mut Parts,
    ) -> watch::Receiver<SyncState> {
        let Self {
            cluster,
            events,
            metrics,
            start_jitter,
        } = self;
        let options = NodePublisherOptions {
            force_conflicts: config.force_conflicts,
            start_jitter,
            ..NodePublisherOptions::default()
        };
        let publisher = NodePublisher::new(cluster.clone(), events, Arc::clone(&metrics), options);
        let state = publisher.state();
        let (desired, to_publish) = watch::channel(None);
        let (found, existing_labels) = oneshot::channel();
        outlets.node = Some(desired);
        outlets.existing_labels = Some(existing_labels);

        let memory = config.state_directory.join(NODE_LABELS_FILE);
        let kept = remember(state.clone(), memory.clone());
        parts.start_endless("the memory of the Node's labels", kept);
        parts.start(
            "the Node's publisher",
            |stop: CancellationToken| async move {
                let look = found_on(&cluster, &metrics);
                let Some(on_node) = stop.run_until_cancelled(look).await else {
                    return;
                };
                // Ours are those that the Node shows as ours, and those that somebody edited while this
                // daemon was away.
                let mut ours = file::load(&memory).unwrap_or_default();
                ours.extend(on_node.clone());
                // The labeller goes away only when the daemon stops.
                let _stopping = found.send(on_node);
                publisher.run(to_publish, ours, stop).await;
            },
        );
        state
    }
}

/// What is told of DomainHotplug objects where nobody looks for them.
pub(super) fn not_watched(reason: &str, message: &str) -> watch::Receiver<Option<Condition>> {
    let (kind, now) = (HOTPLUG_OBJECTS_WATCHED, Timestamp::now().into());
    let condition = Condition::new(kind, false, reason, message, now);
    watch::channel(Some(condition)).1
}

/// Keeps what the Node has from us in a file, for the next run. A read-only state directory costs
/// only the knowledge which labels were edited while no daemon ran.
async fn remember(mut state: watch::Receiver<SyncState>, path: PathBuf) {
    let mut told = false;
    while state.changed().await.is_ok() {
        let published = Arc::clone(&state.borrow_and_update().published);
        if published.is_empty() {
            continue;
        }
        if let Err(error) = file::store(&path, &LabelReport::from_labels(&published))
            && !std::mem::replace(&mut told, true)
        {
            warn!(%error, "what is published on the Node cannot be kept for the next run");
        }
    }
    // Its sender ends with the publisher, which is told apart.
    std::future::pending::<()>().await;
}

/// What of ours the Node has: the labels that are ours by its field managers, with the values it
/// shows. Looks until it is told; the publisher reports what stands in the way from then on.
async fn found_on(cluster: &Cluster, metrics: &Metrics) -> LabelSet {
    let mut told = None;
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
                metrics.sync_attempts.inc();
                metrics
                    .sync_failures
                    .with_label_values(&[error.code()])
                    .inc();
                if told != Some(error.code()) {
                    warn!(node = cluster.node(), %error, "the Node cannot be seen yet; trying on");
                    told = Some(error.code());
                }
                sleep(LOOK_AGAIN.mul_f64(0.5 + fastrand::f64())).await;
            }
        }
    }
}
