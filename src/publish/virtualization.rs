//! The `NodeVirtualization` of the own Node: written when something changed, put back when
//! somebody else touched it, and left alone otherwise.
//!
//! Labels do not wait for it: without its definition in the cluster, or without the right to
//! write it, everything else goes on.

mod describe;
mod snapshot;
mod truncate;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub use self::snapshot::Snapshot;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::objects::{Condition, NodeVirtualization, NodeVirtualizationStatus};
use crate::cluster::{Cluster, ClusterError, Retry};
use crate::hypervisor::Connection;
use crate::telemetry::Metrics;
use crate::units::Timestamp;

/// How the object is written.
#[derive(Debug, Clone)]
pub struct VirtualizationPublisherOptions {
    /// The first write is delayed at random by up to this, so that the nodes of a cluster do not
    /// all write at once.
    pub start_jitter: Duration,
    /// So long a change waits for further ones: a libvirt that restarts is one write, not two.
    pub settle: Duration,
    /// If nothing changed but the time of the last probe, that is written after so long; up to a
    /// tenth later, at random.
    pub refresh: Duration,
    /// When to try again.
    pub retry: Retry,
}

impl Default for VirtualizationPublisherOptions {
    fn default() -> Self {
        Self {
            start_jitter: Duration::from_secs(10),
            settle: Duration::from_secs(3),
            refresh: Duration::from_secs(3600),
            retry: Retry {
                // The definition of the kind may be missing for good.
                needs_people: Duration::from_secs(1800),
                ..Retry::default()
            },
        }
    }
}

/// Keeps the object of one Node as it should be.
pub struct VirtualizationPublisher {
    cluster: Cluster,
    metrics: Arc<Metrics>,
    options: VirtualizationPublisherOptions,

    /// What is published, as far as it is known.
    published: Option<Published>,
    changes: Option<Changes>,
    beside: Option<Beside>,
    write_from: Instant,
    due: Option<Instant>,
    failures: u32,
    told: Option<&'static str>,
}

/// A condition that others than the probe tell of, once it is known.
type Beside = watch::Receiver<Option<Condition>>;

type Changes = BoxStream<'static, Result<Option<String>, ClusterError>>;

/// The object as the API server has it.
struct Published {
    resource_version: String,
    /// What it shows. An API server with an older definition drops what it does not know; so what
    /// was sent is kept too, and is what a new status is compared with.
    shown: NodeVirtualizationStatus,
    sent: Option<NodeVirtualizationStatus>,
    refresh_at: Instant,
}

impl VirtualizationPublisher {
    /// Nothing is sent before [`Self::run`]. To be called within the runtime.
    pub fn new(
        cluster: Cluster,
        metrics: Arc<Metrics>,
        options: VirtualizationPublisherOptions,
    ) -> Self {
        let write_from = Instant::now() + options.start_jitter.mul_f64(fastrand::f64());
        Self {
            cluster,
            metrics,
            options,
            published: None,
            changes: None,
            beside: None,
            write_from,
            due: None,
            failures: 0,
            told: None,
        }
    }

    /// Shows that condition too, of the type [`HOTPLUG_OBJECTS_WATCHED`].
    #[must_use]
    pub fn with_hotplug(self, condition: watch::Receiver<Option<Condition>>) -> Self {
        Self {
            beside: Some(condition),
            ..self
        }
    }

    /// Keeps the object equal to the newest snapshot until `token` is cancelled; then it stays as
    /// it is. Before the first snapshot nothing is done.
    pub async fn run(
        mut self,
        pictures: watch::Receiver<Option<Arc<Snapshot>>>,
        connection: watch::Receiver<Connection>,
        token: CancellationToken,
    ) {
        token
            .run_until_cancelled_owned(self.keep_true(pictures, connection))
            .await;
    }

    async fn keep_true(
        &mut self,
        mut pictures: watch::Receiver<Option<Arc<Snapshot>>>,
        mut connection: watch::Receiver<Connection>,
    ) {
        pictures.mark_changed();
        loop {
            tokio::select! {
                changed = pictures.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let snapshot = pictures.borrow_and_update().clone();
                    let connection = *connection.borrow();
                    if snapshot.is_some_and(|snapshot| self.is_news(&snapshot, connection)) {
                        self.look_in(self.options.settle);
                    }
                }
                changed = connection.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.look_in(self.options.settle);
                }
                () = changed(&mut self.beside) => self.look_in(self.options.settle),
                seen = next(&mut self.changes) => self.saw(seen),
                () = wait_until(self.due) => {
                    self.due = None;
                    let snapshot = pictures.borrow().clone();
                    let connection = *connection.borrow();
                    if let Some(snapshot) = snapshot {
                        self.look(&snapshot, connection).await;
                    }
                }
            }
        }
    }

    /// To look after this time, or earlier if that is planned.
    fn look_in(&mut self, wait: Duration) {
        // While it fails, its own time counts.
        if self.failures > 0 && self.due.is_some() {
            return;
        }
        let at = Instant::now() + wait;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Whether a snapshot is a reason to look: nothing is published yet, it shows something else,
    /// or what is published is old.
    fn is_news(&self, snapshot: &Snapshot, connection: Connection) -> bool {
        match &self.published {
            None => true,
            Some(published) => {
                let mut status = self.status(snapshot, published.known(), connection);
                published.differs(&mut status)
            }
        }
    }

    /// The status to publish after the one that is known.
    fn status(
        &self,
        snapshot: &Snapshot,
        known: &NodeVirtualizationStatus,
        connection: Connection,
    ) -> NodeVirtualizationStatus {
        let mut status = snapshot.status(known, connection, jiff::Timestamp::now());
        let told = self.beside.as_ref().and_then(|told| told.borrow().clone());
        let told = told.map(|condition| condition.after(&known.conditions));
        // A daemon that has just started has not found out yet.
        let former = || Condition::find(&known.conditions, HOTPLUG_OBJECTS_WATCHED).cloned();
        status.conditions.extend(told.or_else(former));
        status
    }

    fn saw(&mut self, seen: Result<Option<String>, ClusterError>) {
        // What the watch cannot do the next write cannot either, and that one tells.
        let Ok(version) = seen else { return };
        let known = self.published.as_ref();
        let known = known.map(|published| published.resource_version.as_str());
        // The snapshot may be an old one. A look is cheap, and rare.
        if version.as_deref() != known {
            self.published = None;
            self.look_in(self.options.settle);
        }
    }

    async fn look(&mut self, snapshot: &Snapshot, connection: Connection) {
        self.metrics.cluster.virtualization_attempts.inc();
        match self.sync(snapshot, connection).await {
            Ok(()) => {
                self.failures = 0;
                if self.told.take().is_some() {
                    tracing::info!(
                        node = self.cluster.node(),
                        "the NodeVirtualization is published again"
                    );
                }
                if self.changes.is_none() {
                    self.changes = Some(self.cluster.watch_virtualization().boxed());
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    async fn sync(
        &mut self,
        snapshot: &Snapshot,
        connection: Connection,
    ) -> Result<(), ClusterError> {
        let published = match self.published.take() {
            Some(published) => published,
            None => match self.cluster.virtualization().await? {
                Some(object) => Published::new(object, None, &self.options),
                None => Published::nothing(),
            },
        };
        let mut status = self.status(snapshot, published.known(), connection);
        let differs = published.differs(&mut status);
        self.published = Some(published);
        if !differs {
            return Ok(());
        }
        let early = self.write_from.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            self.look_in(early);
            return Ok(());
        }
        // An object without its Node would stay for ever.
        let node = self.cluster.observe().await?;
        let object = self
            .cluster
            .apply_virtualization(&status, &node.uid)
            .await?;
        tracing::info!(node = self.cluster.node(), "NodeVirtualization written");
        self.published = Some(Published::new(object, Some(status), &self.options));
        Ok(())
    }

    fn failed(&mut self, error: &ClusterError) {
        let code = error.code();
        self.metrics
            .cluster
            .virtualization_failures
            .with_label_values(&[code])
            .inc();
        if self.told != Some(code) {
            self.told = Some(code);
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "the NodeVirtualization cannot be published; trying again, labels go on"
            );
        }
        if matches!(error, ClusterError::NotFound { .. }) {
            // Nothing to watch.
            self.changes = None;
        }
        self.published = None;
        self.failures += 1;
        self.due = Some(Instant::now() + self.options.retry.delay(self.failures, error));
    }
}

impl Published {
    fn new(
        object: NodeVirtualization,
        sent: Option<NodeVirtualizationStatus>,
        options: &VirtualizationPublisherOptions,
    ) -> Self {
        let shown = object.spec.facts;
        let now = Timestamp::from(jiff::Timestamp::now());
        let age = shown.last_probe_time.map(|at| now.since(at));
        let late = 1.0 + 0.1 * fastrand::f64();
        let rest = options
            .refresh
            .mul_f64(late)
            .saturating_sub(age.unwrap_or_default());
        Self {
            resource_version: object.metadata.resource_version.unwrap_or_default(),
            shown,
            sent,
            refresh_at: Instant::now() + rest,
        }
    }

    fn nothing() -> Self {
        Self {
            resource_version: String::new(),
            shown: NodeVirtualizationStatus::default(),
            sent: None,
            refresh_at: Instant::now(),
        }
    }

    fn known(&self) -> &NodeVirtualizationStatus {
        self.sent.as_ref().unwrap_or(&self.shown)
    }

    /// Whether a status is worth a write.
    fn differs(&self, status: &mut NodeVirtualizationStatus) -> bool {
        let known = self.known();
        let probed = std::mem::replace(&mut status.last_probe_time, known.last_probe_time);
        let news = status != known;
        status.last_probe_time = probed;
        let refresh = Instant::now() >= self.refresh_at;
        news || refresh && probed != known.last_probe_time
    }
}

/// Returns when the condition changed.
async fn changed(condition: &mut Option<Beside>) {
    if let Some(condition) = condition
        && condition.changed().await.is_ok()
    {
        return;
    }
    // There is nobody who could tell another one.
    std::future::pending().await
}

async fn next(changes: &mut Option<Changes>) -> Result<Option<String>, ClusterError> {
    if let Some(stream) = changes
        && let Some(seen) = stream.next().await
    {
        return seen;
    }
    // It never ends; without one there is nothing to wait for.
    std::future::pending().await
}

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
