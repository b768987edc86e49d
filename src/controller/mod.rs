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
//!       invalid or expired              spec corrected
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
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch::{Receiver, Sender};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::client::{ObjectClient, is_deleted, now};
use self::reconcile::{EXPIRY_WAIT_MAX, ObjectVersion, Reconciler, StatusSource};
use self::request::ObjectError;
use self::status::{NotAccepted, is_finished};
use self::watch::ObjectWatch;
use crate::cluster::objects::Condition;
use crate::cluster::{
    HotplugChange, HotplugObject, HotplugObjects, ListOptions, ObjectStub, Retry,
};
use crate::executor::{Executor, SubmitError};
use crate::hypervisor::DomainBackend;
use crate::operation::{Order, Record};
use crate::publish::events::EventRecorder;
use crate::publish::wait_until;
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
    /// Maximum number of objects in memory: more than the executor's operations without a verdict.
    /// Further ones wait, the oldest first, until one has nothing left to do.
    pub max_tracked: usize,
    /// Maximum number of objects of which only the name is in memory, about 0.4 kB each. Further
    /// ones are found by another list when these have had their turn.
    pub max_waiting: usize,
    /// Minimum interval between such lists.
    pub list_interval: Duration,
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
            max_tracked: 512,
            max_waiting: 8192,
            list_interval: Duration::from_secs(300),
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
    /// Each returns the time at which its object expires.
    reconcilers: JoinSet<Option<Timestamp>>,
    /// Objects without a place.
    waiting: BTreeSet<ObjectStub>,
    /// Objects that gave their place to others, by the time of their expiry.
    expiring: BTreeSet<(Timestamp, ObjectStub)>,
    /// Time of the last list.
    listed_at: Instant,
    /// True if objects were left out because there were too many.
    has_unknown: bool,
    /// True while objects wait for a place.
    crowded: Sender<bool>,
    /// Time of the next attempt to read a waiting object.
    read_at: Option<Instant>,
    /// Objects that the executor could not accept yet, in the order of their creation.
    postponed: BTreeMap<(Timestamp, String), HotplugObject>,
    postponed_because: Option<SubmitError>,
}

struct TrackedObject {
    /// Informs the reconciler of changes.
    version: Sender<ObjectVersion>,
    not_accepted: Option<NotAccepted>,
    reconciler: AbortHandle,
    stub: ObjectStub,
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
            watch: ObjectWatch::new(
                Arc::clone(&client),
                options.watch_retry,
                ListOptions {
                    max: options.max_tracked,
                    max_stubs: options.max_waiting,
                    in_pages: false,
                },
            ),
            client,
            options,
            tracked: HashMap::new(),
            reconcilers: JoinSet::new(),
            waiting: BTreeSet::new(),
            expiring: BTreeSet::new(),
            listed_at: Instant::now(),
            has_unknown: false,
            crowded: Sender::new(false),
            read_at: Some(Instant::now()),
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
            let can_read = self.has_place() && !self.waiting.is_empty();
            let (read_at, next_expiry) = (self.read_at, self.next_expiry());
            let list_at = self.next_list();
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
                () = wait_until(read_at), if can_read => {
                    self.read_oldest_waiting().await;
                }
                () = wait_until(next_expiry) => self.expire(),
                () = wait_until(list_at) => {
                    self.has_unknown = false;
                    self.listed_at = Instant::now();
                    self.watch.restart();
                }
                Some(ended) = self.reconcilers.join_next_with_id() => self.reconciler_ended(ended),
            }
        }
    }

    async fn handle(&mut self, change: HotplugChange) {
        match change {
            HotplugChange::Listed {
                objects,
                rest,
                is_complete,
            } => {
                self.listed_at = Instant::now();
                self.has_unknown = !is_complete;
                let rest_uids = rest.iter().map(|stub| &stub.uid);
                let uids = objects.iter().map(|object| &object.uid).chain(rest_uids);
                let listed: HashSet<_> = uids.collect();
                // Otherwise a call about the object finds out that it is deleted.
                if is_complete {
                    self.expiring.retain(|(_, stub)| listed.contains(&stub.uid));
                    let deleted = self.tracked.keys().filter(|uid| !listed.contains(uid));
                    for uid in deleted.cloned().collect::<Vec<_>>() {
                        self.untrack(&uid);
                    }
                }
                self.waiting.clear();
                for object in objects {
                    self.object_changed(object).await;
                }
                for stub in rest {
                    if !self.tracked.contains_key(&stub.uid) {
                        self.await_place(stub);
                    }
                }
            }
            HotplugChange::Changed(object) => self.object_changed(*object).await,
            HotplugChange::Deleted(uid) => self.untrack(&uid),
        }
        self.update_crowded();
    }

    /// Returns the time of a list of the objects that were left out. `None` while others wait, or
    /// while most names are of finished objects that will expire.
    fn next_list(&self) -> Option<Instant> {
        let has_room = self.expiring.len() <= self.options.max_waiting / 2;
        let is_due = self.has_unknown && self.waiting.is_empty() && has_room;
        is_due.then(|| self.listed_at + self.options.list_interval)
    }

    /// Adds an object that waits for a place. The newest one gives way if there are too many.
    fn await_place(&mut self, stub: ObjectStub) {
        self.waiting.insert(stub);
        if self.waiting.len() > self.options.max_waiting {
            self.waiting.pop_last();
            self.has_unknown = true;
        }
    }

    fn has_place(&self) -> bool {
        self.tracked.len() < self.options.max_tracked
    }

    async fn object_changed(&mut self, object: HotplugObject) {
        let Some(tracked) = self.tracked.get(&object.uid) else {
            let stub = ObjectStub::from(&object);
            self.expiring.retain(|(_, expiring)| *expiring != stub);
            if self.has_place() && self.waiting.is_empty() {
                return self.accept(object).await;
            }
            self.await_place(stub);
            return;
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
            Some(NotAccepted::Rejected(before))
                if self.order(&object).as_ref().err() == Some(before) => {}
            Some(NotAccepted::Rejected(_)) => self.accept(object).await,
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
        let order = match self.order(&object) {
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

    /// Validates an object, and its age unless a daemon has accepted it.
    fn order(&self, object: &HotplugObject) -> Result<Order, ObjectError> {
        let order = request::order(object, self.client.objects.node())?;
        let status = object.status.as_ref();
        if status.is_none_or(|status| status.operation.is_none()) {
            request::check_age(object, now())?;
        }
        Ok(order)
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
        let stub = ObjectStub::from(&object);
        let version = Sender::new(ObjectVersion::from(&object));
        let reconciler = Reconciler::new(
            Arc::clone(&self.client),
            object,
            source,
            generation,
            version.subscribe(),
            self.crowded.subscribe(),
        );
        let tracked = TrackedObject {
            version,
            not_accepted,
            reconciler: self.reconcilers.spawn(reconciler.run()),
            stub,
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
        self.waiting.retain(|stub| stub.uid != uid);
        self.expiring.retain(|(_, stub)| stub.uid != uid);
    }

    /// Frees the place of an object that is deleted or has nothing left to do.
    fn reconciler_ended(&mut self, ended: Result<(Id, Option<Timestamp>), JoinError>) {
        let (id, expiry) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                if error.is_panic() {
                    error!(%error, "reconciler of an object panicked; restart the daemon to resume it");
                }
                return;
            }
        };
        if !*self.crowded.borrow() {
            return;
        }
        let mut tracked = self.tracked.iter();
        let Some((uid, _)) = tracked.find(|(_, object)| object.reconciler.id() == id) else {
            return;
        };
        let uid = uid.clone();
        if let Some(object) = self.tracked.remove(&uid)
            && let Some(expiry) = expiry
        {
            self.expiring.insert((expiry, object.stub));
            if self.expiring.len() > self.options.max_waiting {
                self.expiring.pop_last();
                self.has_unknown = true;
            }
        }
    }

    fn update_crowded(&mut self) {
        let crowded = !self.waiting.is_empty();
        let changed = self.crowded.send_if_modified(|before| {
            let changed = *before != crowded;
            *before = crowded;
            changed
        });
        if changed && crowded {
            self.tracked
                .retain(|_, object| !object.reconciler.is_finished());
            info!(
                maximum = self.options.max_tracked,
                waiting = self.waiting.len(),
                "more DomainHotplug objects than places: the oldest come first"
            );
        }
    }

    /// Reads and accepts the waiting object that was created first.
    async fn read_oldest_waiting(&mut self) {
        let Some(stub) = self.waiting.first().cloned() else {
            return;
        };
        let get = self.client.objects.get(&stub.name);
        match self.client.call("get", get).await {
            Ok(object) => {
                self.waiting.remove(&stub);
                // Another object may have the name by now, which the watch reports.
                if object.uid == stub.uid && !self.tracked.contains_key(&stub.uid) {
                    self.accept(object).await;
                }
            }
            Err(error) if is_deleted(&error) => {
                self.waiting.remove(&stub);
            }
            Err(_) => self.read_at = Some(Instant::now() + self.options.submit_interval),
        }
        self.update_crowded();
    }

    fn next_expiry(&self) -> Option<Instant> {
        let (expiry, _) = self.expiring.first()?;
        let left = expiry.since(now()).min(EXPIRY_WAIT_MAX);
        Some(Instant::now() + left)
    }

    /// Lets the objects that have expired wait for a place, to be deleted.
    fn expire(&mut self) {
        let now = now();
        while let Some((expiry, _)) = self.expiring.first()
            && *expiry <= now
            && let Some((_, stub)) = self.expiring.pop_first()
        {
            self.await_place(stub);
        }
        self.update_crowded();
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
