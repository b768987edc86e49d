//! Publisher of the `NodeVirtualization` of this daemon's Node.
//!
//! ```text
//!          snapshot │ connection │ condition differs      3 s later
//!  idle ─────────────────────────────────────────▶ due ────────────▶ sync ──▶ idle
//!    │     object changed by others                 ▲                 │
//!    └──────────────────────────────────────────────┘◀── backoff ── error
//!  sync:  [read the object] ─▶ compare ─▶ write if different, or the last write is an hour old
//! ```
//! * One task owns the published object and its watch, and blocks on calls to the API server only.
//! * Nothing is written before the first snapshot, or if nothing has changed.
//! * Failures are logged once and retried. They do not affect labels or hotplug: the cluster may have
//!   no definition of the kind, or the daemon no right to write it.

mod describe;
mod domains;
mod snapshot;
mod truncate;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::domains::domain_changes;
pub use self::snapshot::Snapshot;
use self::truncate::{STATUS_MAX, truncate};
use super::wait_until;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::objects::{Condition, NodeVirtualization, NodeVirtualizationStatus};
use crate::cluster::{Cluster, ClusterError, Retry};
use crate::external::NotTaken;
use crate::hypervisor::ConnectionState;
use crate::publish::metrics::VirtualizationMetrics;
use crate::units::Timestamp;

#[derive(Debug, Clone)]
pub struct VirtualizationPublisherOptions {
    /// Maximum random delay of the first write, which spreads the load of a cluster's nodes.
    pub start_jitter: Duration,
    /// Delay of a write after a change, so that a restart of libvirt costs one write instead of two.
    pub settle: Duration,
    /// Interval of writes that change only the time of the last probe, up to 10 % longer at random.
    pub refresh: Duration,
    pub retry: Retry,
}

impl Default for VirtualizationPublisherOptions {
    fn default() -> Self {
        Self {
            start_jitter: Duration::from_secs(10),
            settle: Duration::from_secs(3),
            refresh: Duration::from_secs(3600),
            retry: Retry {
                // The cluster may never have a definition of the kind.
                needs_people: Duration::from_secs(1800),
                ..Retry::default()
            },
        }
    }
}

/// Keeps the object of one Node equal to the newest snapshot.
pub struct VirtualizationPublisher {
    cluster: Cluster,
    metrics: Arc<VirtualizationMetrics>,
    options: VirtualizationPublisherOptions,

    /// `None` if the object must be read.
    published: Option<PublishedObject>,
    versions: Option<ObjectVersions>,
    hotplug: Option<watch::Receiver<Option<Condition>>>,
    not_taken: Option<watch::Receiver<Arc<[NotTaken]>>>,
    write_from: Instant,
    due: Option<Instant>,
    failures: u32,
    logged: Option<&'static str>,
    /// Times of writes that replaced the write of another client.
    repairs: VecDeque<Instant>,
    has_written: bool,
    /// End of the time in which nothing is written, because another client keeps writing.
    paused_until: Option<Instant>,
}

/// Maximum number of repairs within [`REPAIR_WINDOW`], as of labels.
const MAX_REPAIRS: usize = 3;
const REPAIR_WINDOW: Duration = Duration::from_secs(600);
/// The fixed metrics label of an object that another client keeps writing.
const CONTESTED: &str = "another-daemon";

/// The resource versions of the object from its watch.
type ObjectVersions = BoxStream<'static, Result<Option<String>, ClusterError>>;

/// The object in the API server.
struct PublishedObject {
    resource_version: String,
    /// The last written status, otherwise the status that was read. The API server's copy is not
    /// comparable with a new status: an older definition drops unknown fields.
    status: NodeVirtualizationStatus,
    refresh_at: Instant,
}

impl VirtualizationPublisher {
    /// Sends nothing before [`Self::run`]. Must be called within the runtime.
    pub fn new(
        cluster: Cluster,
        metrics: Arc<VirtualizationMetrics>,
        options: VirtualizationPublisherOptions,
    ) -> Self {
        let write_from = Instant::now() + options.start_jitter.mul_f64(fastrand::f64());
        Self {
            cluster,
            metrics,
            options,
            published: None,
            versions: None,
            hotplug: None,
            not_taken: None,
            write_from,
            due: None,
            failures: 0,
            logged: None,
            repairs: VecDeque::new(),
            has_written: false,
            paused_until: None,
        }
    }

    /// Adds the condition [`HOTPLUG_OBJECTS_WATCHED`] to the status.
    #[must_use]
    pub fn with_hotplug(self, condition: watch::Receiver<Option<Condition>>) -> Self {
        Self {
            hotplug: Some(condition),
            ..self
        }
    }

    /// Adds the domains whose guests have not taken a change to the status.
    #[must_use]
    pub fn with_domains(self, not_taken: watch::Receiver<Arc<[NotTaken]>>) -> Self {
        Self {
            not_taken: Some(not_taken),
            ..self
        }
    }

    /// Keeps the object equal to the newest snapshot until `token` is cancelled, and leaves it in the
    /// cluster afterwards.
    pub async fn run(
        mut self,
        snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        connection: watch::Receiver<ConnectionState>,
        token: CancellationToken,
    ) {
        token
            .run_until_cancelled_owned(self.keep_in_sync(snapshots, connection))
            .await;
    }

    async fn keep_in_sync(
        &mut self,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut connection: watch::Receiver<ConnectionState>,
    ) {
        snapshots.mark_changed();
        loop {
            tokio::select! {
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let snapshot = snapshots.borrow_and_update().clone();
                    let connection = *connection.borrow();
                    if snapshot.is_some_and(|snapshot| self.differs(&snapshot, connection)) {
                        self.schedule(self.options.settle);
                    }
                }
                changed = connection.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.schedule(self.options.settle);
                }
                () = changed(&mut self.hotplug) => self.schedule(self.options.settle),
                () = changed(&mut self.not_taken) => self.schedule(self.options.settle),
                version = next(&mut self.versions) => self.handle(version),
                () = wait_until(self.due) => {
                    self.due = None;
                    if let Some(until) = self.paused_until.filter(|at| Instant::now() < *at) {
                        self.due = Some(until);
                        continue;
                    }
                    self.paused_until = None;
                    let snapshot = snapshots.borrow().clone();
                    let connection = *connection.borrow();
                    if let Some(snapshot) = snapshot {
                        self.sync(&snapshot, connection).await;
                    }
                }
            }
        }
    }

    /// Schedules a sync after this time, unless an earlier one is scheduled.
    fn schedule(&mut self, wait: Duration) {
        // The backoff is not shortened.
        if self.failures > 0 && self.due.is_some() {
            return;
        }
        let at = Instant::now() + wait;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// True if a sync would write this snapshot, or the published object is unknown.
    fn differs(&self, snapshot: &Snapshot, connection: ConnectionState) -> bool {
        match &self.published {
            None => true,
            Some(published) => {
                let status = self.status(snapshot, &published.status, connection);
                published.needs_write(&status)
            }
        }
    }

    /// Returns the status to publish in place of `before`.
    fn status(
        &self,
        snapshot: &Snapshot,
        before: &NodeVirtualizationStatus,
        connection: ConnectionState,
    ) -> NodeVirtualizationStatus {
        let mut status = snapshot.status(before, connection, jiff::Timestamp::now());
        let hotplug = self.hotplug.as_ref().and_then(|it| it.borrow().clone());
        let hotplug = hotplug.map(|condition| condition.after(&before.conditions));
        // Shortly after a start the condition is not known yet.
        let former = || Condition::find(&before.conditions, HOTPLUG_OBJECTS_WATCHED).cloned();
        status.conditions.extend(hotplug.or_else(former));
        if let Some(not_taken) = &self.not_taken {
            status.domains = domain_changes(&not_taken.borrow());
            truncate(&mut status, STATUS_MAX);
        }
        status
    }

    /// Handles a version from the watch. Errors are not reported: the next write has the same.
    fn handle(&mut self, version: Result<Option<String>, ClusterError>) {
        let Ok(version) = version else { return };
        let known = self.published.as_ref();
        let known = known.map(|published| published.resource_version.as_str());
        // The watch may be behind an own write, which costs one read.
        if version.as_deref() != known {
            self.published = None;
            self.schedule(self.options.settle);
        }
    }

    async fn sync(&mut self, snapshot: &Snapshot, connection: ConnectionState) {
        self.metrics.attempts.inc();
        match self.write(snapshot, connection).await {
            Ok(()) if self.paused_until.is_some() => self.due = self.paused_until,
            Ok(()) => {
                self.failures = 0;
                if self.logged.take().is_some() {
                    tracing::info!(
                        node = self.cluster.node(),
                        "NodeVirtualization is published again"
                    );
                }
                if self.versions.is_none() {
                    self.versions = Some(self.cluster.watch_virtualization().boxed());
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Writes the object if necessary.
    async fn write(
        &mut self,
        snapshot: &Snapshot,
        connection: ConnectionState,
    ) -> Result<(), ClusterError> {
        let was_known = self.published.is_some();
        let published = match self.published.take() {
            Some(published) => published,
            None => match self.cluster.virtualization().await? {
                Some(object) => PublishedObject::new(object, None, &self.options),
                None => PublishedObject::missing(),
            },
        };
        let status = self.status(snapshot, &published.status, connection);
        let needs_write = published.needs_write(&status);
        self.published = Some(published);
        if !needs_write {
            return Ok(());
        }
        let early = self.write_from.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            self.schedule(early);
            return Ok(());
        }
        if !was_known && self.has_written && !self.may_repair() {
            return Ok(());
        }
        // The owner needs the uid: without an owner the object would outlive the Node.
        let node = self.cluster.observe().await?;
        let object = self
            .cluster
            .apply_virtualization(&status, &node.uid)
            .await?;
        tracing::info!(node = self.cluster.node(), "NodeVirtualization written");
        self.has_written = true;
        self.published = Some(PublishedObject::new(object, Some(status), &self.options));
        Ok(())
    }

    /// Counts a repair of the object that another client has changed or deleted. False if that was
    /// repaired too often: then the repair is made up after the window.
    fn may_repair(&mut self) -> bool {
        let now = Instant::now();
        self.repairs
            .retain(|at| now.saturating_duration_since(*at) < REPAIR_WINDOW);
        if self.repairs.len() < MAX_REPAIRS {
            self.repairs.push_back(now);
            return true;
        }
        if self.logged.replace(CONTESTED) != Some(CONTESTED) {
            self.metrics.failures.with_label_values(&[CONTESTED]).inc();
            tracing::warn!(
                node = self.cluster.node(),
                "another client keeps writing this Node's NodeVirtualization, most likely a second \
                 virtnode daemon for this Node; leaving it for {REPAIR_WINDOW:?}"
            );
        }
        let oldest = self.repairs.front().copied().unwrap_or(now);
        self.paused_until = Some(oldest + REPAIR_WINDOW);
        false
    }

    fn failed(&mut self, error: &ClusterError) {
        let code = error.code();
        self.metrics.failures.with_label_values(&[code]).inc();
        if self.logged.replace(code) != Some(code) {
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "cannot publish the NodeVirtualization, retrying; labels are not affected"
            );
        }
        if matches!(error, ClusterError::NotFound { .. }) {
            // There is nothing to watch.
            self.versions = None;
        }
        self.published = None;
        self.failures += 1;
        self.due = Some(Instant::now() + self.options.retry.delay(self.failures, error));
    }
}

impl PublishedObject {
    fn new(
        object: NodeVirtualization,
        sent: Option<NodeVirtualizationStatus>,
        options: &VirtualizationPublisherOptions,
    ) -> Self {
        let status = sent.unwrap_or(object.spec.facts);
        let now = Timestamp::from(jiff::Timestamp::now());
        let age = status.last_probe_time.map(|at| now.since(at));
        let late = 1.0 + 0.1 * fastrand::f64();
        let rest = options
            .refresh
            .mul_f64(late)
            .saturating_sub(age.unwrap_or_default());
        Self {
            resource_version: object.metadata.resource_version.unwrap_or_default(),
            status,
            refresh_at: Instant::now() + rest,
        }
    }

    fn missing() -> Self {
        Self {
            resource_version: String::new(),
            status: NodeVirtualizationStatus::default(),
            refresh_at: Instant::now(),
        }
    }

    /// True if a status differs in more than the time of the probe, or that time must be refreshed.
    fn needs_write(&self, status: &NodeVirtualizationStatus) -> bool {
        if Instant::now() >= self.refresh_at {
            return *status != self.status;
        }
        let last_probe_time = self.status.last_probe_time;
        NodeVirtualizationStatus {
            last_probe_time,
            ..status.clone()
        } != self.status
    }
}

/// Waits for a change of a value.
async fn changed<T>(value: &mut Option<watch::Receiver<T>>) {
    if let Some(value) = value
        && value.changed().await.is_ok()
    {
        return;
    }
    // Without a sender it never changes.
    std::future::pending().await
}

async fn next(versions: &mut Option<ObjectVersions>) -> Result<Option<String>, ClusterError> {
    if let Some(stream) = versions
        && let Some(version) = stream.next().await
    {
        return version;
    }
    // The stream never ends.
    std::future::pending().await
}
