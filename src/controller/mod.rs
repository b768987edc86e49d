//! The controller of this node's DomainHotplug objects.
//!
//! ```text
//!  API server ──watch──▶ Controller ──submit──▶ executor
//!      ▲                     │                      │
//!      │              one task for each object      │ record (watch channel)
//!      └──status, owner, delete── Reconciler ◀──────┘
//! ```
//! The states of an object:
//!
//! ```text
//!            invalid                    spec corrected
//!  new ──────────────────▶ rejected ──────────────────▶ new
//!   │  executor is full                 5 s later
//!   ├──────────────────▶ postponed ───────────────────▶ new
//!   │  accepted                verdict          time to live
//!   └──────────▶ operation ──────────▶ finished ──────────────▶ deleted
//! ```
//! * The controller owns the set of tracked objects and submits them in the order of their creation.
//!   Its loop blocks on nothing but the executor's journal (`submit`).
//! * A [`Reconciler`] owns the status, the owner reference and the deletion of one object.
//! * `request` validates a spec, `status` computes a status; both are pure.
//! * Operations never depend on the API server: after an outage the reconcilers write the current
//!   status. A deleted object does not stop its operation.
//! * After a restart the journal is matched with the objects by uid, which is the idempotency key: an
//!   operation in the journal is not executed again, and an outdated status is replaced.

mod client;
mod metrics;
mod reconcile;
mod request;
mod status;
mod watch;

pub use self::metrics::ObjectMetrics;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch::{Receiver, Sender};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::client::ObjectClient;
use self::reconcile::{ObjectVersion, Reconciler, StatusSource};
use self::request::ObjectError;
use self::status::{NotAccepted, is_finished};
use self::watch::ObjectWatch;
use crate::cluster::objects::Condition;
use crate::cluster::{HotplugChange, HotplugObject, HotplugObjects, Retry};
use crate::executor::{Executor, SubmitError};
use crate::hypervisor::DomainBackend;
use crate::operation::Record;
use crate::publish::events::EventRecorder;
use crate::units::Timestamp;

#[derive(Debug, Clone)]
pub struct ControllerOptions {
    /// Maximum random delay of the first list, which spreads the load of a cluster's nodes.
    pub start_jitter: Duration,
    /// Backoff of calls about objects.
    pub retry: Retry,
    /// Backoff of the watch while the kind is not defined or the daemon lacks the right to watch.
    pub watch_retry: Retry,
    /// Interval between attempts to submit postponed objects.
    pub submit_interval: Duration,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        Self {
            start_jitter: Duration::from_secs(10),
            retry: Retry::default(),
            watch_retry: Retry {
                first: Duration::from_secs(5),
                longest: Duration::from_secs(600),
                needs_people: Duration::from_secs(600),
            },
            submit_interval: Duration::from_secs(5),
        }
    }
}

pub struct Controller<C> {
    executor: Arc<Executor<C>>,
    client: Arc<ObjectClient>,
    options: ControllerOptions,
    watch: ObjectWatch,
    /// By uid.
    tracked: HashMap<String, TrackedObject>,
    reconcilers: JoinSet<()>,
    /// Objects that the executor could not accept yet, in the order of their creation.
    postponed: BTreeMap<(Timestamp, String), HotplugObject>,
    postponed_because: Option<SubmitError>,
}

struct TrackedObject {
    /// Informs the reconciler of changes.
    version: Sender<ObjectVersion>,
    not_accepted: Option<NotAccepted>,
    reconciler: AbortHandle,
}

impl<C: DomainBackend> Controller<C> {
    /// Nothing is sent before [`Self::run`].
    pub fn new(
        objects: HotplugObjects,
        executor: Arc<Executor<C>>,
        events: EventRecorder,
        metrics: Arc<ObjectMetrics>,
        options: ControllerOptions,
    ) -> Self {
        let client = Arc::new(ObjectClient::new(objects, options.retry, events, metrics));
        Self {
            executor,
            watch: ObjectWatch::new(Arc::clone(&client), options.watch_retry),
            client,
            options,
            tracked: HashMap::new(),
            reconcilers: JoinSet::new(),
            postponed: BTreeMap::new(),
            postponed_because: None,
        }
    }

    /// Returns the condition `HotplugObjectsWatched`, `None` until it is known. An outage of the API
    /// server does not change it.
    pub fn condition(&self) -> Receiver<Option<Condition>> {
        self.watch.condition()
    }

    /// Runs until `stop` is cancelled. Operations continue afterwards.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled_owned(self.run_loop()).await;
        self.client.metrics.watched.set(0);
    }

    async fn run_loop(&mut self) {
        sleep(self.options.start_jitter.mul_f64(fastrand::f64())).await;
        if self.client.objects.are_selected_by_field() {
            info!(
                node = self.client.objects.node(),
                "node name is longer than a label value: selecting DomainHotplug objects by \
                 spec.nodeName, which requires Kubernetes 1.31 or newer"
            );
        }
        let submit_interval = self.options.submit_interval;
        let mut submit_again = pin!(sleep(Duration::ZERO));
        loop {
            tokio::select! {
                change = self.watch.next_change() => {
                    if self.postponed.is_empty() {
                        submit_again.as_mut().reset(Instant::now() + submit_interval);
                    }
                    self.handle(change).await;
                }
                () = submit_again.as_mut(), if !self.postponed.is_empty() => {
                    self.submit_postponed().await;
                    submit_again.as_mut().reset(Instant::now() + submit_interval);
                }
                Some(ended) = self.reconcilers.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "reconciler of an object panicked; restart the daemon to resume it");
                    }
                }
            }
        }
    }

    async fn handle(&mut self, change: HotplugChange) {
        match change {
            HotplugChange::Listed(mut objects) => {
                let listed: HashSet<_> = objects.iter().map(|object| &object.uid).collect();
                let deleted = self.tracked.keys().filter(|uid| !listed.contains(uid));
                for uid in deleted.cloned().collect::<Vec<_>>() {
                    self.untrack(&uid);
                }
                objects.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
                for object in objects {
                    self.object_changed(object).await;
                }
            }
            HotplugChange::Changed(object) => self.object_changed(*object).await,
            HotplugChange::Deleted(uid) => self.untrack(&uid),
        }
    }

    async fn object_changed(&mut self, object: HotplugObject) {
        let Some(tracked) = self.tracked.get(&object.uid) else {
            return self.accept(object).await;
        };
        let version = ObjectVersion::from(&object);
        tracked.version.send_if_modified(|last| {
            let changed = *last != version;
            *last = version;
            changed
        });
        match &tracked.not_accepted {
            None => {}
            Some(NotAccepted::Postponed(_)) => self.postpone(object),
            // An API server without immutable specs lets people correct it.
            Some(NotAccepted::Rejected(before)) => {
                let order = request::order(&object, self.client.objects.node());
                if order.as_ref().err() != Some(before) {
                    self.accept(object).await;
                }
            }
        }
    }

    /// Finds the operation of an object or submits one, and starts the object's reconciler.
    async fn accept(&mut self, object: HotplugObject) {
        let status = object.status.as_ref();
        let was_accepted = status.is_some_and(|status| status.operation.is_some());
        let observed = status.and_then(|status| status.observed_generation);
        let generation = observed.unwrap_or(object.generation);
        if let Some(record) = self.record_of(&object) {
            return self.track(object, StatusSource::Operation(record), generation);
        }
        if status.is_some_and(is_finished) {
            return self.track(object, StatusSource::Past, generation);
        }
        let order = match request::order(&object, self.client.objects.node()) {
            Ok(order) => order,
            // Its label was changed after another node had accepted it.
            Err(ObjectError::WrongNode { .. }) if was_accepted => return,
            Err(error) => {
                warn!(object = object.name, reason = error.reason(), %error, "DomainHotplug rejected");
                return self.track_not_accepted(object, NotAccepted::Rejected(error));
            }
        };
        if object.is_deleting {
            return;
        }
        if was_accepted {
            warn!(
                object = object.name,
                "the journal has no operation of an accepted DomainHotplug; submitting it again"
            );
        }
        let submitted = match &self.postponed_because {
            // An object must not overtake older ones.
            Some(error) if !self.postponed.is_empty() => Err(error.clone()),
            _ => self.executor.submit(order).await,
        };
        let (id, generation) = match submitted {
            Ok(id) => (id, object.generation),
            // The spec was changed since; the accepted one counts.
            Err(SubmitError::KeyReused(id)) => {
                (id, observed.unwrap_or(object.generation.saturating_sub(1)))
            }
            Err(error) => {
                self.postponed_because = Some(error.clone());
                self.postpone(object.clone());
                let before = self.tracked.get(&object.uid);
                let before = before.and_then(|tracked| tracked.not_accepted.as_ref());
                let reason = NotAccepted::Postponed(error);
                if before != Some(&reason) {
                    warn!(object = object.name, ?reason, "DomainHotplug postponed");
                    self.track_not_accepted(object, reason);
                }
                return;
            }
        };
        let source = match self.executor.watch(&id) {
            Some(record) => StatusSource::Operation(record),
            // The executor has already dropped it: many more were submitted in the meantime.
            None => StatusSource::Past,
        };
        self.track(object, source, generation);
    }

    fn record_of(&self, object: &HotplugObject) -> Option<Receiver<Record>> {
        let asker = request::asker(&object.name);
        let id = self.executor.find_by_key(&asker, &object.uid)?;
        self.executor.watch(&id)
    }

    fn track_not_accepted(&mut self, object: HotplugObject, reason: NotAccepted) {
        let generation = object.generation;
        self.track(object, StatusSource::NotAccepted(reason), generation);
    }

    /// Starts the reconciler of an object, which replaces an earlier one.
    fn track(&mut self, object: HotplugObject, source: StatusSource, generation: i64) {
        let not_accepted = match &source {
            StatusSource::NotAccepted(reason) => Some(reason.clone()),
            StatusSource::Operation(_) | StatusSource::Past => None,
        };
        if !matches!(not_accepted, Some(NotAccepted::Postponed(_))) {
            self.postponed.remove(&creation_order(&object));
        }
        let uid = object.uid.clone();
        let version = Sender::new(ObjectVersion::from(&object));
        let reconciler = Reconciler::new(
            Arc::clone(&self.client),
            object,
            source,
            generation,
            version.subscribe(),
        );
        let tracked = TrackedObject {
            version,
            not_accepted,
            reconciler: self.reconcilers.spawn(reconciler.run()),
        };
        if let Some(before) = self.tracked.insert(uid, tracked) {
            before.reconciler.abort();
        }
    }

    /// Stops the reconciler of an object that was deleted or assigned to another node.
    fn untrack(&mut self, uid: &str) {
        if let Some(tracked) = self.tracked.remove(uid) {
            tracked.reconciler.abort();
        }
        self.postponed.retain(|_, object| object.uid != uid);
    }

    fn postpone(&mut self, object: HotplugObject) {
        self.postponed.insert(creation_order(&object), object);
    }

    /// Submits postponed objects in the order of their creation, up to the first failure.
    async fn submit_postponed(&mut self) {
        for (_, object) in std::mem::take(&mut self.postponed) {
            if self.postponed.is_empty() {
                self.accept(object).await;
            } else {
                self.postpone(object);
            }
        }
    }
}

fn creation_order(object: &HotplugObject) -> (Timestamp, String) {
    (object.created, object.name.clone())
}
