//! DomainHotplug objects of this node: each is given to the executor once, and told what came of it.
//!
//! One loop watches, in the order in which objects were made; what happens to one object afterwards
//! is its `life`. What an object asks for is read in `request`, what is said of it is decided in
//! `status`, both without a server. The API server is not needed for an operation to go on: what
//! came of it is told when the server is back.
//!
//! After a restart the journal and the objects are brought together by the objects' uids: what the
//! journal knows is not done again, and what it knows better is told.

mod client;
mod reconcile;
mod request;
mod status;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::client::ObjectClient;
use self::reconcile::{Cause, Changing, Life};
use self::request::Refusal;
use self::status::{Hold, is_finished};
use crate::cluster::objects::Condition;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::{ClusterError, HotplugChange, HotplugObject, HotplugObjects, Retry};
use crate::executor::{Executor, SubmitError};
use crate::hypervisor::DomainBackend;
use crate::operation::Record;
use crate::publish::events::EventRecorder;
use crate::telemetry::Metrics;
use crate::units::Timestamp;

/// So many errors of the watch in a row are worth telling.
const WATCH_ERRORS: u32 = 3;

/// A watch that had an error works again if there is none for so long: what fails is tried again
/// within half a minute, and fails within the deadline of a call.
const QUIET: Duration = Duration::from_secs(60);

/// How the controller goes about it.
#[derive(Debug, Clone)]
pub struct ControllerOptions {
    /// The first look is delayed at random by up to this, so that the nodes of a cluster do not all
    /// ask at once.
    pub start_jitter: Duration,
    /// When to try again what failed.
    pub retry: Retry,
    /// When to look again for objects of a kind that the cluster does not know, or does not let us
    /// see.
    pub look_again: Retry,
    /// When to try again to take on what the executor could not.
    pub take_on_again: Duration,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        Self {
            start_jitter: Duration::from_secs(10),
            retry: Retry::default(),
            look_again: Retry {
                first: Duration::from_secs(5),
                longest: Duration::from_secs(600),
                needs_people: Duration::from_secs(600),
            },
            take_on_again: Duration::from_secs(5),
        }
    }
}

/// Watches the objects of one node.
pub struct Controller<C> {
    executor: Arc<Executor<C>>,
    objects: HotplugObjects,
    shared: Arc<ObjectClient>,
    metrics: Arc<Metrics>,
    options: ControllerOptions,
    known: HashMap<String, Known>,
    lives: JoinSet<()>,
    /// What could not be taken on yet, in the order in which it was made.
    postponed: BTreeMap<(Timestamp, String), HotplugObject>,
    /// Why.
    postponed_for: Option<SubmitError>,
    watch: Watch,
    watched: watch::Sender<Option<Condition>>,
}

/// An object that is looked after.
struct Known {
    changing: watch::Sender<Changing>,
    /// Why there is no operation, if there is none.
    hold: Option<Hold>,
    task: AbortHandle,
}

type Stream = BoxStream<'static, Result<HotplugChange, ClusterError>>;

/// The watch and how it does.
#[derive(Default)]
struct Watch {
    /// None while it is not worth trying.
    stream: Option<Stream>,
    again: Option<Instant>,
    /// Errors in a row, and when it is to be taken to work if there are no more.
    errors: u32,
    works_at: Option<Instant>,
    told: Option<&'static str>,
}

impl<C: DomainBackend> Controller<C> {
    /// Nothing is asked before [`Self::run`].
    pub fn new(
        objects: HotplugObjects,
        executor: Arc<Executor<C>>,
        events: EventRecorder,
        metrics: Arc<Metrics>,
        options: ControllerOptions,
    ) -> Self {
        let shared =
            ObjectClient::new(objects.clone(), options.retry, events, Arc::clone(&metrics));
        Self {
            executor,
            objects,
            shared: Arc::new(shared),
            metrics,
            options,
            known: HashMap::new(),
            lives: JoinSet::new(),
            postponed: BTreeMap::new(),
            postponed_for: None,
            watch: Watch::default(),
            watched: watch::Sender::default(),
        }
    }

    /// Whether the objects are seen, as a condition of the node, once that is known. What passes by
    /// itself, such as an API server that is away, is no change.
    pub fn watched(&self) -> watch::Receiver<Option<Condition>> {
        self.watched.subscribe()
    }

    /// Looks after the objects until `stop` is cancelled. Operations go on.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled_owned(self.look_after()).await;
        self.metrics.hotplug.objects_watched(false);
    }

    async fn look_after(&mut self) {
        sleep(self.options.start_jitter.mul_f64(fastrand::f64())).await;
        if self.objects.by_field() {
            info!(
                node = self.objects.node(),
                "the node's name is longer than a label can be: its DomainHotplug objects are found by \
                 spec.nodeName, which needs Kubernetes 1.31 or newer"
            );
        }
        self.watch.stream = Some(self.objects.watch().boxed());
        let shared = Arc::clone(&self.shared);
        let mut take_on_again = pin!(sleep(Duration::ZERO));
        loop {
            let again = self.watch.again.unwrap_or_else(Instant::now);
            let works_at = self.watch.works_at.unwrap_or_else(Instant::now);
            tokio::select! {
                change = next(&mut self.watch.stream) => match change {
                    Ok(change) => {
                        self.watch_told(&change);
                        if self.postponed.is_empty() {
                            let at = Instant::now() + self.options.take_on_again;
                            take_on_again.as_mut().reset(at);
                        }
                        self.meet(change).await;
                    }
                    Err(error) => self.watch_failed(&error),
                },
                () = sleep_until(works_at), if self.watch.works_at.is_some() => self.watch_works(),
                () = sleep_until(again), if self.watch.again.is_some() => self.watch_anew(),
                // It may wait for half a minute yet, and the API server is there now.
                () = shared.back.notified(), if self.watch.errors > 0 => self.watch_anew(),
                () = take_on_again.as_mut(), if !self.postponed.is_empty() => {
                    self.take_on_postponed().await;
                    let at = Instant::now() + self.options.take_on_again;
                    take_on_again.as_mut().reset(at);
                }
                Some(ended) = self.lives.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "an object is not looked after any more until the next start");
                    }
                }
            }
        }
    }

    async fn meet(&mut self, change: HotplugChange) {
        match change {
            HotplugChange::Listed(mut objects) => {
                let there: HashSet<_> = objects.iter().map(|object| &object.uid).collect();
                let gone = self.known.keys().filter(|uid| !there.contains(uid));
                for uid in gone.cloned().collect::<Vec<_>>() {
                    self.forget(&uid);
                }
                objects.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
                for object in objects {
                    self.look_at(object).await;
                }
            }
            HotplugChange::Changed(object) => self.look_at(*object).await,
            HotplugChange::Deleted(uid) => self.forget(&uid),
        }
    }

    async fn look_at(&mut self, object: HotplugObject) {
        let Some(known) = self.known.get(&object.uid) else {
            return self.begin(object).await;
        };
        let changing = Changing::from(&object);
        known.changing.send_if_modified(|last| {
            let news = *last != changing;
            *last = changing;
            news
        });
        match &known.hold {
            None => {}
            Some(Hold::Later(_)) => self.postpone(object),
            // Somebody may have put it right.
            Some(Hold::Refused(refusal)) => {
                let now = request::order(&object, self.objects.node());
                if now.as_ref().err() != Some(refusal) {
                    self.begin(object).await;
                }
            }
        }
    }

    /// Finds out what is to be done about an object, and begins it.
    async fn begin(&mut self, object: HotplugObject) {
        let told = object.status.as_ref();
        let was_taken_on = told.is_some_and(|status| status.operation.is_some());
        let noted = told.and_then(|status| status.observed_generation);
        if let Some(record) = self.record_of(&object) {
            let taken_on = noted.unwrap_or(object.generation);
            return self.attend(object, Cause::Operation(record), taken_on);
        }
        if told.is_some_and(is_finished) {
            let taken_on = noted.unwrap_or(object.generation);
            return self.attend(object, Cause::Past, taken_on);
        }
        let order = match request::order(&object, self.objects.node()) {
            Ok(order) => order,
            // Its label was changed after another node had taken it on.
            Err(Refusal::WrongNode { .. }) if was_taken_on => return,
            Err(refusal) => {
                warn!(object = object.name, reason = refusal.reason(), %refusal, "an object is refused");
                return self.hold(object, Hold::Refused(refusal));
            }
        };
        if object.leaving {
            return;
        }
        if was_taken_on {
            warn!(
                object = object.name,
                "the journal knows nothing of an object that was taken on: it is asked for again"
            );
        }
        let submitted = match &self.postponed_for {
            // None overtakes those that were made before.
            Some(error) if !self.postponed.is_empty() => Err(error.clone()),
            _ => self.executor.submit(order).await,
        };
        let (id, taken_on) = match submitted {
            Ok(id) => (id, object.generation),
            // Its spec was changed meanwhile; what was taken on is what counts.
            Err(SubmitError::KeyReused(id)) => {
                (id, noted.unwrap_or(object.generation.saturating_sub(1)))
            }
            Err(error) => {
                self.postponed_for = Some(error.clone());
                self.postpone(object.clone());
                let hold = Hold::Later(error);
                let known = self.known.get(&object.uid);
                if known.is_none_or(|known| known.hold.as_ref() != Some(&hold)) {
                    warn!(
                        object = object.name,
                        ?hold,
                        "an object cannot be taken on yet"
                    );
                    self.hold(object, hold);
                }
                return;
            }
        };
        let cause = match self.executor.watch(&id) {
            Some(record) => Cause::Operation(record),
            // So many came at once that it is forgotten already.
            None => Cause::Past,
        };
        self.attend(object, cause, taken_on);
    }

    /// The operation of an object, if it is known here.
    fn record_of(&self, object: &HotplugObject) -> Option<watch::Receiver<Record>> {
        let asker = request::asker(&object.name);
        let id = self.executor.find_by_key(&asker, &object.uid)?;
        self.executor.watch(&id)
    }

    fn hold(&mut self, object: HotplugObject, hold: Hold) {
        let generation = object.generation;
        self.attend(object, Cause::Held(hold), generation);
    }

    /// Looks after an object from now on.
    fn attend(&mut self, object: HotplugObject, cause: Cause, taken_on: i64) {
        let hold = match &cause {
            Cause::Held(hold) => Some(hold.clone()),
            Cause::Operation(_) | Cause::Past => None,
        };
        if !matches!(hold, Some(Hold::Later(_))) {
            self.postponed.remove(&place(&object));
        }
        let uid = object.uid.clone();
        let changing = watch::Sender::new(Changing::from(&object));
        let life = Life::new(
            Arc::clone(&self.shared),
            object,
            cause,
            taken_on,
            changing.subscribe(),
        );
        let known = Known {
            changing,
            hold,
            task: self.lives.spawn(life.run()),
        };
        if let Some(before) = self.known.insert(uid, known) {
            before.task.abort();
        }
    }

    /// An object is gone, or no longer this node's. Its operation goes on.
    fn forget(&mut self, uid: &str) {
        if let Some(known) = self.known.remove(uid) {
            known.task.abort();
        }
        self.postponed.retain(|_, object| object.uid != uid);
    }

    fn postpone(&mut self, object: HotplugObject) {
        self.postponed.insert(place(&object), object);
    }

    /// In the order in which they were made, so that none overtakes another.
    async fn take_on_postponed(&mut self) {
        for (_, object) in std::mem::take(&mut self.postponed) {
            match self.postponed.is_empty() {
                true => self.begin(object).await,
                false => self.postpone(object),
            }
        }
    }

    fn watch_anew(&mut self) {
        self.watch.again = None;
        self.watch.stream = Some(self.objects.watch().boxed());
    }

    /// A watch that failed may only have listed what it is to watch.
    fn watch_told(&mut self, change: &HotplugChange) {
        match change {
            HotplugChange::Listed(_) if self.watch.errors > 0 => {
                self.watch.works_at = Some(Instant::now() + QUIET);
            }
            _ => self.watch_works(),
        }
    }

    fn watch_works(&mut self) {
        self.watch.errors = 0;
        self.watch.works_at = None;
        self.metrics.hotplug.objects_watched(true);
        self.tell_of_watch(
            true,
            "Watched",
            "DomainHotplug objects for this node are seen.",
        );
        if self.watch.told.take().is_some() {
            info!(
                node = self.objects.node(),
                "DomainHotplug objects are watched"
            );
        }
    }

    fn watch_failed(&mut self, error: &ClusterError) {
        let code = error.code();
        let watch = &mut self.watch;
        watch.errors += 1;
        watch.works_at = Some(Instant::now() + QUIET);
        self.metrics.hotplug.object_call_failed("watch", code);
        let blocked = Blocked::by(error);
        if blocked.is_some() {
            let delay = self.options.look_again.delay(watch.errors, error);
            watch.stream = None;
            watch.again = Some(Instant::now() + delay);
            watch.works_at = None;
        } else if watch.errors < WATCH_ERRORS {
            return;
        }
        if watch.told != Some(code) {
            watch.told = Some(code);
            self.metrics.hotplug.objects_watched(false);
            tell(self.objects.node(), error, blocked);
        }
        // An API server that has just started knows no rights yet.
        if let Some(blocked) = blocked
            && self.watch.errors >= WATCH_ERRORS
        {
            let (reason, message) = blocked.in_words(error);
            self.tell_of_watch(false, reason, &message);
        }
    }

    fn tell_of_watch(&self, holds: bool, reason: &str, message: &str) {
        self.watched.send_if_modified(|told| {
            let known = told.as_ref().is_some_and(|told| told.reason == reason);
            if !known {
                let (kind, now) = (HOTPLUG_OBJECTS_WATCHED, client::now());
                *told = Some(Condition::new(kind, holds, reason, message, now));
            }
            !known
        });
    }
}

/// Why objects cannot be seen until people do something about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocked {
    /// The API server cannot select objects by their node, which has too long a name for a label.
    NodeNameTooLong,
    /// The cluster does not know such objects.
    NotDefined,
    /// They may not be seen.
    NotAllowed,
}

impl Blocked {
    fn by(error: &ClusterError) -> Option<Self> {
        match error {
            ClusterError::Rejected { message, .. }
                if message.contains("field label not supported") =>
            {
                Some(Self::NodeNameTooLong)
            }
            ClusterError::NotFound { .. } => Some(Self::NotDefined),
            error if error.needs_people() => Some(Self::NotAllowed),
            _ => None,
        }
    }

    /// As a condition has it.
    fn in_words(self, error: &ClusterError) -> (&'static str, String) {
        match self {
            Self::NodeNameTooLong => ("NodeNameTooLong", NODE_NAME_TOO_LONG.to_owned()),
            Self::NotDefined => ("NotDefined", error.to_string()),
            Self::NotAllowed => ("NotAllowed", error.to_string()),
        }
    }
}

const NODE_NAME_TOO_LONG: &str = "DomainHotplug objects for this node are not seen: its name is longer than a label can be, and this \
     API server cannot select them by spec.nodeName (Kubernetes 1.31 and newer can); use the command \
     line or the local API on the node";

/// Says once what keeps objects from being seen.
fn tell(node: &str, error: &ClusterError, blocked: Option<Blocked>) {
    let code = error.code();
    match blocked {
        Some(Blocked::NotDefined) => info!(
            node,
            "this cluster does not know DomainHotplug objects (manifests/base/crds.yaml defines them); \
             looking for them now and then"
        ),
        Some(Blocked::NodeNameTooLong) => warn!(node, "{NODE_NAME_TOO_LONG}"),
        Some(Blocked::NotAllowed) | None => warn!(
            node, code, %error,
            "DomainHotplug objects cannot be watched: new ones are seen late; operations go on"
        ),
    }
}

/// Where an object stands among others.
fn place(object: &HotplugObject) -> (Timestamp, String) {
    (object.created, object.name.clone())
}

/// The next change; waits for ever while there is no watch.
async fn next(stream: &mut Option<Stream>) -> Result<HotplugChange, ClusterError> {
    match stream {
        // A watch never ends.
        Some(stream) => match stream.next().await {
            Some(change) => change,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}
