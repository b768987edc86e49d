//! Publisher of the labels on the Kubernetes Node.
//!
//! ```text
//!          new set │ Node changed │ watch failed │ fallback interval
//!  idle ────────────────────────────────────────────────▶ sync ──▶ idle
//!                                                          │ ▲
//!                                                    error ▼ │ backoff
//!                                                        failing
//!  sync:  read the Node ─▶ decide ─▶ apply ─▶ report, remember
//!              ▲                       │
//!              └── conflict, ≤ 5 times ┘
//! ```
//! * One task owns the desired set, the memory of published labels, and the watch of the Node.
//!   It blocks on calls to the API server only; each has a timeout.
//! * [`crate::label::ownership`] decides what to write; this module decides when.
//! * On failure the labels stay as they are. A failure is logged once until its code changes, and
//!   retried with backoff; the state shows it as [`SyncProblem`].
//! * Of two daemons with one Node, the one that was started first stands back until its next start,
//!   is not ready and says so ([`rival`]).
//! * The watch is a hint: it may be old, stalled or failing, so each sync reads the Node. Without any
//!   sign of life of the watch, the Node is read every ten minutes.

mod failures;
mod report;
mod rival;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::failures::PublishFailures;
use self::rival::{RivalDetector, RivalWrite};
use super::events::EventRecorder;
use super::wait_until;
use crate::cluster::{ApplyConflicts, Cluster, ClusterError, NodeChange, NodeState, Owners};
use crate::label::LabelSet;
use crate::label::ownership::{
    Decision, DecisionInput, LabelWrite, ObservedLabels, OwnershipHistory, decide,
};
use crate::publish::metrics::SyncMetrics;
use crate::telemetry::now_seconds;

pub use self::report::{SyncProblem, SyncState};
pub use crate::cluster::Retry;

/// Maximum applies of one sync: each is refused only if the Node changed after it was read.
const ROUNDS: usize = 5;
/// Consecutive errors of the watch that are logged, while calls succeed.
const WATCH_ERRORS: u32 = 3;
/// Time without an error after which a watch that delivers works again. One that ends at once does so
/// within a second.
const WATCH_WORKS_AFTER: Duration = Duration::from_secs(2);
/// The same for a watch that delivers nothing: a retry comes within half a minute and fails within the
/// timeout of a call.
const WATCH_QUIET: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct NodePublisherOptions {
    /// Take labels from other field managers that own them with another value.
    pub force_conflicts: bool,
    /// Maximum random delay of the first write, which spreads the load of a cluster's nodes.
    pub start_jitter: Duration,
    /// Interval between reads of the Node if the watch shows no sign of life, ±10 % at random.
    pub fallback: Duration,
    pub retry: Retry,
}

impl Default for NodePublisherOptions {
    fn default() -> Self {
        Self {
            force_conflicts: false,
            start_jitter: Duration::from_secs(10),
            fallback: Duration::from_secs(600),
            retry: Retry::default(),
        }
    }
}

/// Keeps the labels of one Node equal to the desired set.
pub struct NodePublisher {
    cluster: Cluster,
    events: EventRecorder,
    metrics: Arc<SyncMetrics>,
    options: NodePublisherOptions,
    state: watch::Sender<SyncState>,

    desired: Option<Arc<LabelSet>>,
    memory: OwnershipHistory,
    /// The Node that `memory` belongs to; empty before the first read.
    uid: String,
    failures: Option<PublishFailures>,
    rivals: RivalDetector,
    /// True after another daemon answered the writes of this one: nothing more is written.
    stands_back: bool,
    started: Instant,
    write_from: Instant,
    /// Time of the next sync.
    due: Instant,
    /// True if the next sync is only the periodic fallback.
    is_fallback: bool,
    watch: NodeWatch,
}

struct NodeWatch {
    changes: BoxStream<'static, Result<NodeChange, ClusterError>>,
    /// Consecutive errors.
    errors: u32,
    logged: bool,
    /// Time from which on the watch works again, unless another error comes first.
    works_at: Option<Instant>,
    /// True if the watch has delivered a change since the last read of the Node.
    delivered: bool,
    /// Time and version of that read.
    read_at: Instant,
    version: String,
}

impl NodeWatch {
    fn new(cluster: &Cluster) -> Self {
        Self {
            changes: cluster.watch().boxed(),
            errors: 0,
            logged: false,
            works_at: None,
            delivered: true,
            read_at: Instant::now(),
            version: String::new(),
        }
    }
}

enum SyncOutcome {
    InSync,
    /// A write is due before the end of the start jitter.
    TooEarly,
    /// Another daemon publishes to this Node.
    StandsBack,
}

impl NodePublisher {
    /// Sends nothing before [`Self::run`]. Must be called within the runtime.
    pub fn new(
        cluster: Cluster,
        events: EventRecorder,
        metrics: Arc<SyncMetrics>,
        options: NodePublisherOptions,
    ) -> Self {
        let started = Instant::now();
        Self {
            events,
            watch: NodeWatch::new(&cluster),
            cluster,
            metrics,
            state: watch::Sender::new(SyncState::default()),
            desired: None,
            memory: OwnershipHistory::default(),
            uid: String::new(),
            failures: None,
            rivals: RivalDetector::default(),
            stands_back: false,
            started,
            write_from: started + options.start_jitter.mul_f64(fastrand::f64()),
            due: started,
            is_fallback: false,
            options,
        }
    }

    /// Returns the state of the publication. Must be called before [`Self::run`].
    pub fn state(&self) -> watch::Receiver<SyncState> {
        self.state.subscribe()
    }

    /// Keeps the Node's labels equal to `desired` until `token` is cancelled, and leaves them on the
    /// Node afterwards. `None` and the empty set change nothing.
    ///
    /// `already_published` is [`SyncState::published`] of the last run: labels that are virtnode's
    /// even if someone has edited them in the meantime.
    pub async fn run(
        mut self,
        desired: watch::Receiver<Option<Arc<LabelSet>>>,
        already_published: LabelSet,
        token: CancellationToken,
    ) {
        self.state
            .send_modify(|state| state.published = Arc::new(already_published.clone()));
        self.memory = OwnershipHistory::new(already_published);
        token
            .run_until_cancelled_owned(self.keep_in_sync(desired))
            .await;
    }

    async fn keep_in_sync(&mut self, mut desired: watch::Receiver<Option<Arc<LabelSet>>>) {
        self.desired = desired.borrow_and_update().clone();
        let mut is_last_set = false;
        loop {
            tokio::select! {
                changed = desired.changed(), if !is_last_set => {
                    is_last_set = changed.is_err();
                    if !is_last_set {
                        self.desired = desired.borrow_and_update().clone();
                        self.sync_now();
                    }
                }
                Some(change) = self.watch.changes.next() => self.handle(change),
                () = wait_until(self.watch.works_at) => self.watch_works(),
                () = sleep_until(self.due) => {
                    let wait = match self.skipped_fallback() {
                        Some(wait) => wait,
                        None => self.sync().await,
                    };
                    self.due = Instant::now() + wait;
                }
            }
        }
    }

    fn sync_now(&mut self) {
        self.due = Instant::now();
        self.is_fallback = false;
    }

    /// Returns the time until the next fallback if this one is unnecessary, because the watch is alive
    /// and has not reported a change.
    fn skipped_fallback(&self) -> Option<Duration> {
        if !self.is_fallback {
            return None;
        }
        let age = self.cluster.node_watch_age()?;
        let wait = self.options.fallback.checked_sub(age)?;
        if self.state.borrow().synced {
            self.metrics.last_success.set(now_seconds());
        }
        // The next bookmark may be a minute away.
        Some(wait.max(self.options.fallback / 2))
    }

    /// Returns the labels to publish, if any.
    fn to_publish(&self) -> Option<Arc<LabelSet>> {
        let desired = self.desired.clone().filter(|_| !self.stands_back);
        desired.filter(|labels| !labels.is_empty())
    }

    /// Handles a change of the Node or an error of the watch: schedules a sync if it may help.
    fn handle(&mut self, change: Result<NodeChange, ClusterError>) {
        let failure = self.failures.as_ref().map(PublishFailures::code);
        let needs_sync = match change {
            Ok(change) => {
                self.watch_delivered();
                match (failure, change) {
                    (None, NodeChange::Node(node)) => self.differs(&node),
                    // The failed sync has found the same.
                    (_, NodeChange::Missing) => failure.is_none(),
                    // The cause of the failure no longer exists. Other failures wait for their backoff.
                    (Some(code), NodeChange::Node(_)) => {
                        matches!(code, "api-unreachable" | "api-node-not-found")
                    }
                }
            }
            Err(error) => {
                self.watch_failed(&error);
                failure.is_none()
            }
        };
        if needs_sync && self.to_publish().is_some() {
            self.sync_now();
        }
    }

    /// True if the Node, as the watch shows it, is not in the desired state.
    fn differs(&self, node: &NodeState) -> bool {
        let Some(desired) = self.to_publish() else {
            return false;
        };
        let differs = node.uid != self.uid
            || !self
                .decide(&desired, &node.shown, &ApplyConflicts::new())
                .is_noop();
        if !differs && self.state.borrow().synced {
            self.metrics.last_success.set(now_seconds());
        }
        differs
    }

    fn watch_delivered(&mut self) {
        self.watch.delivered = true;
        if self.watch.errors > 0 {
            let works_at = Instant::now() + WATCH_WORKS_AFTER;
            let earlier = self.watch.works_at.map_or(works_at, |at| at.min(works_at));
            self.watch.works_at = Some(earlier);
        }
    }

    fn watch_works(&mut self) {
        self.watch.works_at = None;
        self.watch.errors = 0;
        if std::mem::take(&mut self.watch.logged) {
            tracing::info!(node = self.cluster.node(), "watching the Node again");
            self.state.send_modify(|state| state.watch_problem = None);
        }
    }

    fn watch_failed(&mut self, error: &ClusterError) {
        let code = error.code();
        self.metrics.watch_failures.with_label_values(&[code]).inc();
        self.watch.errors += 1;
        self.watch.works_at = Some(Instant::now() + WATCH_QUIET);
        // If calls fail too, that is already logged.
        if self.watch.errors >= WATCH_ERRORS && self.failures.is_none() && !self.watch.logged {
            self.watch.logged = true;
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "cannot watch the Node, retrying: edited labels are restored late"
            );
            let message = error.to_string();
            self.state
                .send_modify(|state| state.watch_problem = Some(SyncProblem { code, message }));
        }
    }

    /// Syncs the Node. Returns the time until the next sync.
    async fn sync(&mut self) -> Duration {
        self.is_fallback = false;
        let Some(desired) = self.to_publish() else {
            return self.until_fallback();
        };
        self.metrics.attempts.inc();
        match self.apply(&desired).await {
            Ok(SyncOutcome::InSync) => {
                self.metrics.last_success.set(now_seconds());
                self.succeeded();
                self.until_fallback()
            }
            Ok(SyncOutcome::TooEarly) => {
                self.succeeded();
                self.write_from.saturating_duration_since(Instant::now())
            }
            Ok(SyncOutcome::StandsBack) => {
                self.stand_back();
                self.until_fallback()
            }
            Err(error) => self.failed(&error),
        }
    }

    async fn apply(&mut self, desired: &LabelSet) -> Result<SyncOutcome, ClusterError> {
        let mut refused = ApplyConflicts::new();
        for round in 1.. {
            let node = self.cluster.observe().await?;
            self.node_read(&node);
            let version = &node.resource_version;
            match self.rivals.observe(&node.shown, version, Instant::now()) {
                RivalWrite::None => {}
                RivalWrite::First => self.rival_seen(),
                RivalWrite::Repeated => return Ok(SyncOutcome::StandsBack),
            }
            let decision = self.decide(desired, &node.shown, &refused);
            if let LabelWrite::Apply { force } = decision.action {
                if Instant::now() < self.write_from {
                    return Ok(SyncOutcome::TooEarly);
                }
                let owners = if force {
                    Owners::Override {
                        version: &node.resource_version,
                    }
                } else {
                    Owners::Respect
                };
                self.rivals.record_sent(&decision.labels);
                match self
                    .cluster
                    .apply(&decision.labels, &node.uid, owners)
                    .await
                {
                    Ok(_) => {}
                    Err(ClusterError::Conflict { conflicts, .. }) if round < ROUNDS => {
                        refused.extend(conflicts);
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            self.rivals.record_sent(&decision.labels);
            self.report(&decision);
            self.memory.record(decision, self.started.elapsed());
            break;
        }
        Ok(SyncOutcome::InSync)
    }

    fn decide(
        &self,
        desired: &LabelSet,
        shown: &ObservedLabels,
        refused: &ApplyConflicts,
    ) -> Decision {
        decide(DecisionInput {
            desired,
            shown,
            memory: &self.memory,
            refused,
            force_conflicts: self.options.force_conflicts,
            now: self.started.elapsed(),
        })
    }

    /// Handles a read of the Node: detects a replaced Node and a stalled watch.
    fn node_read(&mut self, node: &NodeState) {
        if self.uid != node.uid {
            if !self.uid.is_empty() {
                tracing::info!(
                    node = self.cluster.node(),
                    "the Node was replaced by another one of the same name"
                );
                self.memory.reset();
                self.rivals.reset();
            }
            self.uid.clone_from(&node.uid);
        }
        // After this time a working watch has delivered each change since the last read.
        let is_overdue = self.watch.read_at.elapsed() > self.options.fallback / 2;
        if is_overdue && !self.watch.delivered && self.watch.version != node.resource_version {
            tracing::debug!(
                node = self.cluster.node(),
                "node watch stalled, restarting it"
            );
            self.watch = NodeWatch::new(&self.cluster);
        }
        self.watch.delivered = false;
        self.watch.read_at = Instant::now();
        self.watch.version.clone_from(&node.resource_version);
    }

    fn until_fallback(&mut self) -> Duration {
        self.is_fallback = true;
        self.options.fallback.mul_f64(0.9 + 0.2 * fastrand::f64())
    }
}
