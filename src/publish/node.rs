//! The labels on the Kubernetes Node: applied, watched over, put back.
//!
//! One loop looks, decides and applies whenever there is a reason to: a new set, a change of the
//! Node, a failure a while ago, or ten minutes without any. What is to be written is decided in
//! [`crate::label::ownership`]; when, here.

mod failures;
mod report;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::failures::PublishFailures;
use super::events::EventRecorder;
use crate::cluster::{ApplyConflicts, Cluster, ClusterError, NodeChange, NodeState, Owners};
use crate::label::LabelSet;
use crate::label::ownership::{
    Decision, DecisionInput, LabelWrite, ObservedLabels, OwnershipHistory, decide,
};
use crate::telemetry::metrics::{Metrics, now_seconds};

pub use self::report::{SyncProblem, SyncState};
pub use crate::cluster::Retry;

/// So often in a row an apply may be refused because the Node changed meanwhile.
const ROUNDS: usize = 5;
/// So many errors of the watch in a row, while everything else works, are worth telling.
const WATCH_ERRORS: u32 = 3;

/// How the Node is written to.
#[derive(Debug, Clone)]
pub struct NodePublisherOptions {
    /// Take labels from other field managers that own them with another value.
    pub force_conflicts: bool,
    /// The first write is delayed at random by up to this, so that the nodes of a cluster do not
    /// all write at once.
    pub start_jitter: Duration,
    /// After so long without a sign of life of the watch, more or less, the Node is looked at
    /// without any other reason.
    pub fallback: Duration,
    /// When to try again.
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

/// Keeps the labels of one Node as they should be.
pub struct NodePublisher {
    cluster: Cluster,
    events: EventRecorder,
    metrics: Arc<Metrics>,
    options: NodePublisherOptions,
    state: watch::Sender<SyncState>,

    desired: Option<Arc<LabelSet>>,
    memory: OwnershipHistory,
    /// Which Node `memory` is of; empty before the first look.
    uid: String,
    failures: Option<PublishFailures>,
    started: Instant,
    write_from: Instant,
    /// When to look at the Node next.
    due: Instant,
    /// Whether there is no other reason for it than that nothing happened for long.
    only_to_be_sure: bool,
    watch: Watch,
}

/// The watch of the Node and how it does.
struct Watch {
    stream: BoxStream<'static, Result<NodeChange, ClusterError>>,
    /// Errors in a row.
    errors: u32,
    told: bool,
    /// Whether it showed anything since the Node was last looked at.
    awake: bool,
    /// When that was, and which version of it.
    looked: Instant,
    version: String,
}

impl Watch {
    fn new(cluster: &Cluster) -> Self {
        Self {
            stream: cluster.watch().boxed(),
            errors: 0,
            told: false,
            awake: true,
            looked: Instant::now(),
            version: String::new(),
        }
    }
}

/// How a look at the Node ended.
enum Outcome {
    InSync,
    /// There is something to write, and it is too early.
    TooEarly,
}

impl NodePublisher {
    /// Nothing is sent before [`Self::run`]. To be called within the runtime.
    pub fn new(
        cluster: Cluster,
        events: EventRecorder,
        metrics: Arc<Metrics>,
        options: NodePublisherOptions,
    ) -> Self {
        let started = Instant::now();
        Self {
            events,
            watch: Watch::new(&cluster),
            cluster,
            metrics,
            state: watch::Sender::new(SyncState::default()),
            desired: None,
            memory: OwnershipHistory::default(),
            uid: String::new(),
            failures: None,
            started,
            write_from: started + options.start_jitter.mul_f64(fastrand::f64()),
            due: started,
            only_to_be_sure: false,
            options,
        }
    }

    /// What is published, and what stands in the way. To be called before [`Self::run`].
    pub fn state(&self) -> watch::Receiver<SyncState> {
        self.state.subscribe()
    }

    /// Keeps the Node's labels equal to `desired` until `token` is cancelled; then they stay as
    /// they are. `None` and the empty set change nothing.
    ///
    /// `already_published` is [`SyncState::published`] of the run before: labels that are ours
    /// even if somebody edited them meanwhile.
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
        let mut last_set = false;
        loop {
            tokio::select! {
                changed = desired.changed(), if !last_set => {
                    last_set = changed.is_err();
                    if !last_set {
                        self.desired = desired.borrow_and_update().clone();
                        self.look_now();
                    }
                }
                Some(seen) = self.watch.stream.next() => self.saw(seen),
                () = sleep_until(self.due) => {
                    let wait = match self.watched_for() {
                        Some(rest) => rest,
                        None => self.look().await,
                    };
                    self.due = Instant::now() + wait;
                }
            }
        }
    }

    fn look_now(&mut self) {
        self.due = Instant::now();
        self.only_to_be_sure = false;
    }

    /// For how long there need be no look, if nothing but the time is a reason for one: the watch
    /// was heard meanwhile, and told of nothing.
    fn watched_for(&self) -> Option<Duration> {
        if !self.only_to_be_sure {
            return None;
        }
        let rest = self
            .options
            .fallback
            .checked_sub(self.cluster.watch_heard()?)?;
        if self.state.borrow().synced {
            self.metrics.sync_last_success.set(now_seconds());
        }
        // Not for a moment only: the next bookmark may be a minute away.
        Some(rest.max(self.options.fallback / 2))
    }

    /// The labels to publish, if there are any.
    fn to_publish(&self) -> Option<Arc<LabelSet>> {
        self.desired.clone().filter(|labels| !labels.is_empty())
    }

    /// A change of the Node, or an error of the watch: is it time to look?
    fn saw(&mut self, seen: Result<NodeChange, ClusterError>) {
        let failures = self.failures.as_ref().map(PublishFailures::code);
        let look = match seen {
            Ok(seen) => {
                self.watch_is_back();
                match (failures, seen) {
                    (None, NodeChange::Node(node)) => self.is_news(&node),
                    // It tells the same as the failed look did.
                    (_, NodeChange::Missing) => failures.is_none(),
                    // It works again. Other troubles take the time they take.
                    (Some(code), NodeChange::Node(_)) => {
                        matches!(code, "api-unreachable" | "api-node-not-found")
                    }
                }
            }
            Err(error) => {
                self.watch_failed(&error);
                failures.is_none()
            }
        };
        if look && self.to_publish().is_some() {
            self.look_now();
        }
    }

    /// Whether the Node, as the watch shows it, is not as it should be. It may be an old snapshot.
    fn is_news(&self, node: &NodeState) -> bool {
        let Some(desired) = self.to_publish() else {
            return false;
        };
        let news = node.uid != self.uid
            || !self
                .decide(&desired, &node.shown, &ApplyConflicts::new())
                .is_noop();
        if !news && self.state.borrow().synced {
            self.metrics.sync_last_success.set(now_seconds());
        }
        news
    }

    fn watch_is_back(&mut self) {
        self.watch.awake = true;
        self.watch.errors = 0;
        if std::mem::take(&mut self.watch.told) {
            tracing::info!(node = self.cluster.node(), "the Node is watched again");
        }
    }

    fn watch_failed(&mut self, error: &ClusterError) {
        self.watch.errors += 1;
        // While nothing works, that is told already.
        if self.watch.errors == WATCH_ERRORS && self.failures.is_none() {
            self.watch.told = true;
            tracing::warn!(
                node = self.cluster.node(), code = error.code(), %error,
                "the Node cannot be watched: touched labels are put back late"
            );
        }
    }

    /// Looks at the Node and does what is to be done. Says when to look next.
    async fn look(&mut self) -> Duration {
        self.only_to_be_sure = false;
        let Some(desired) = self.to_publish() else {
            return self.until_fallback();
        };
        self.metrics.sync_attempts.inc();
        match self.sync(&desired).await {
            Ok(Outcome::InSync) => {
                self.metrics.sync_last_success.set(now_seconds());
                self.succeeded();
                self.until_fallback()
            }
            Ok(Outcome::TooEarly) => {
                self.succeeded();
                self.write_from.saturating_duration_since(Instant::now())
            }
            Err(error) => self.failed(&error),
        }
    }

    async fn sync(&mut self, desired: &LabelSet) -> Result<Outcome, ClusterError> {
        let mut refused = ApplyConflicts::new();
        for round in 1.. {
            let node = self.cluster.observe().await?;
            self.meet(&node);
            let decision = self.decide(desired, &node.shown, &refused);
            if let LabelWrite::Apply { force } = decision.action {
                if Instant::now() < self.write_from {
                    return Ok(Outcome::TooEarly);
                }
                let owners = match force {
                    true => Owners::Override {
                        seen: &node.resource_version,
                    },
                    false => Owners::Respect,
                };
                match self
                    .cluster
                    .apply(&decision.labels, &node.uid, owners)
                    .await
                {
                    Ok(_) => {}
                    Err(ClusterError::Conflict { refusal, .. }) if round < ROUNDS => {
                        refused.extend(refusal);
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            self.report(&decision);
            self.memory.record(decision, self.started.elapsed());
            break;
        }
        Ok(Outcome::InSync)
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

    /// Notices another Node by the same name, and a watch that is not told what happens.
    fn meet(&mut self, node: &NodeState) {
        if self.uid != node.uid {
            if !self.uid.is_empty() {
                tracing::info!(
                    node = self.cluster.node(),
                    "the Node was replaced by a new one"
                );
                self.memory.reset();
            }
            self.uid.clone_from(&node.uid);
        }
        // Long enough ago for the watch to have told of any change since.
        let quiet = self.watch.looked.elapsed() > self.options.fallback / 2;
        if quiet && !self.watch.awake && self.watch.version != node.resource_version {
            tracing::debug!("the watch of the Node is deaf");
            self.watch = Watch::new(&self.cluster);
        }
        self.watch.awake = false;
        self.watch.looked = Instant::now();
        self.watch.version.clone_from(&node.resource_version);
    }

    fn until_fallback(&mut self) -> Duration {
        self.only_to_be_sure = true;
        self.options.fallback.mul_f64(0.9 + 0.2 * fastrand::f64())
    }
}
