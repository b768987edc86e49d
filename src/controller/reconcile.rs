//! The life of one object: what is said of it, who owns it, and when it goes.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::client::{ObjectClient, is_gone, now};
use super::status::{Hold, News, ending, expires, held, news, of};
use crate::cluster::objects::DomainHotplugStatus;
use crate::cluster::{ClusterError, HotplugObject, ObjectId};
use crate::operation::Record;

/// An operation that has its verdict by then is told of once, with the verdict.
const SETTLE: Duration = Duration::from_millis(300);

/// A clock that is put right is noticed after so long.
const LONGEST_NAP: Duration = Duration::from_secs(3600);

/// Where what is said of an object comes from.
pub(super) enum Cause {
    /// Its operation.
    Operation(watch::Receiver<Record>),
    /// There is no operation, and why.
    Held(Hold),
    /// An operation that is no longer known here: what was said of it stays.
    Past,
}

/// What of an object may change during its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changing {
    pub(super) version: String,
    pub(super) generation: i64,
    pub(super) owned: bool,
}

impl From<&HotplugObject> for Changing {
    fn from(object: &HotplugObject) -> Self {
        Self {
            version: object.version.clone(),
            generation: object.generation,
            owned: object.owned,
        }
    }
}

/// One object and all that is to be done about it.
pub(super) struct Life {
    shared: Arc<ObjectClient>,
    name: String,
    uid: String,
    cause: Cause,
    /// The generation that was taken on.
    taken_on: i64,
    changing: watch::Receiver<Changing>,
    /// The latest that is known.
    version: String,
    time_to_live: Option<Duration>,
    /// What the API server has; evidence and what else is of no use here left out.
    shown: Option<DomainHotplugStatus>,
    began: Instant,
    /// When a call may be made again after one that failed, and how many did in a row.
    not_before: Instant,
    failures: u32,
    /// Whether nothing more is to be done about its owner.
    owned: bool,
    own_not_before: Instant,
}

/// What is to be done next.
enum Step {
    Write(Box<DomainHotplugStatus>),
    Delete,
    Own,
    /// Nothing before that, unless something happens.
    Wait(Option<Instant>),
}

impl Life {
    pub(super) fn new(
        shared: Arc<ObjectClient>,
        object: HotplugObject,
        cause: Cause,
        taken_on: i64,
        changing: watch::Receiver<Changing>,
    ) -> Self {
        let began = Instant::now();
        Self {
            shared,
            time_to_live: super::request::time_to_live(&object.spec),
            version: object.version,
            name: object.name,
            uid: object.uid,
            cause,
            taken_on,
            changing,
            shown: object.status.map(without_details),
            began,
            not_before: began,
            failures: 0,
            owned: object.owned,
            own_not_before: began,
        }
    }

    /// Returns when the object is gone.
    pub(super) async fn run(mut self) {
        loop {
            let done = match self.next() {
                Step::Wait(until) => {
                    self.changed_or(until).await;
                    continue;
                }
                Step::Own => {
                    self.own().await;
                    continue;
                }
                Step::Write(_) | Step::Delete if Instant::now() < self.not_before => {
                    let until = self.not_before;
                    self.changed_or(Some(until)).await;
                    continue;
                }
                Step::Write(status) => self.write(*status).await,
                Step::Delete => self.delete().await,
            };
            match done {
                Ok(()) => self.failures = 0,
                Err(error) if is_gone(&error) => return,
                Err(error @ ClusterError::Conflict { .. }) => match self.look().await {
                    // At once, the first time.
                    Ok(true) if self.failures == 0 => self.failures = 1,
                    Ok(true) => self.failed(&error),
                    Ok(false) => return,
                    Err(error) => self.failed(&error),
                },
                // Such as a policy that knows objects by their spec, which names another node: told
                // in the log, and tried again by the next daemon.
                Err(error) if error.needs_people() && self.is_refused() => return,
                Err(error) => self.failed(&error),
            }
        }
    }

    fn is_refused(&self) -> bool {
        matches!(self.cause, Cause::Held(Hold::Refused(_)))
    }

    fn failed(&mut self, error: &ClusterError) {
        self.failures += 1;
        let delay = self.shared.retry.delay(self.failures, error);
        self.not_before = Instant::now() + delay;
    }

    /// Finds out what it is that changed; whether the object is still there.
    async fn look(&mut self) -> Result<bool, ClusterError> {
        let looked = self
            .shared
            .call("status", self.shared.objects.look(&self.name))
            .await;
        match looked {
            Ok(object) if object.uid == self.uid => {
                self.version = object.version;
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn next(&mut self) -> Step {
        let changing = self.changing.borrow_and_update().clone();
        // The watch may tell of a write of our own later than its answer did.
        if is_newer(&changing.version, &self.version) {
            self.version.clone_from(&changing.version);
        }
        let wanted = match &mut self.cause {
            Cause::Operation(record) => {
                let changed = changing.generation > self.taken_on;
                Some(of(&record.borrow_and_update(), self.taken_on, changed))
            }
            Cause::Held(hold) => Some(held(hold, changing.generation, now())),
            Cause::Past => None,
        };
        let mut until = None;
        if let Some(wanted) = wanted {
            let settled = self.began + SETTLE;
            match news(self.shown.as_ref(), &wanted) {
                News::Soon if Instant::now() < settled => until = Some(settled),
                News::None => {}
                News::Soon | News::Now => return Step::Write(Box::new(wanted)),
            }
        }
        let shown = self.shown.as_ref();
        if let Some(end) = shown.and_then(|shown| expires(shown, self.time_to_live)) {
            let left = end.since(now());
            if left.is_zero() {
                return Step::Delete;
            }
            until = sooner(until, Instant::now() + left.min(LONGEST_NAP));
        }
        if !self.owned && !changing.owned {
            if Instant::now() >= self.own_not_before {
                return Step::Own;
            }
            until = sooner(until, self.own_not_before);
        }
        Step::Wait(until)
    }

    fn target(&self) -> ObjectId<'_> {
        ObjectId {
            name: &self.name,
            uid: &self.uid,
        }
    }

    async fn write(&mut self, status: DomainHotplugStatus) -> Result<(), ClusterError> {
        let objects = &self.shared.objects;
        let call = objects.write_status(self.target(), &self.version, &status);
        self.version = self.shared.call("status", call).await?;
        // What a status says is told by whoever wrote it first, whatever restarts there are.
        if let Some(ending) = ending(self.shown.as_ref(), &status) {
            let note = status.message.as_deref().unwrap_or_default();
            self.shared.emit_event(self.target(), ending, note);
        }
        self.shown = Some(without_details(status));
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), ClusterError> {
        let call = self.shared.objects.delete(self.target());
        self.shared.call("delete", call).await?;
        tracing::info!(
            object = self.name,
            "an object was deleted after its time to live"
        );
        // The watch will tell that it is gone, or a finalizer keeps it and it need not be told again.
        self.time_to_live = None;
        Ok(())
    }

    /// Nothing depends on its success, so it is tried on only where trying on can help.
    async fn own(&mut self) {
        let shared = Arc::clone(&self.shared);
        let own = async {
            let node = shared.node_uid().await?;
            let call = shared.objects.own(self.target(), &node);
            shared.call("own", call).await
        };
        match own.await {
            Ok(version) => {
                self.version = version;
                self.owned = true;
            }
            Err(error) if error.needs_people() || is_gone(&error) => self.owned = true,
            Err(error) => {
                let delay = self.shared.retry.delay(u32::MAX, &error);
                self.own_not_before = Instant::now() + delay;
            }
        }
    }

    /// Returns when something happened, or at that moment.
    async fn changed_or(&mut self, until: Option<Instant>) {
        let at = until.unwrap_or_else(Instant::now);
        let changing = self.changing.changed();
        tokio::select! {
            known = changed(&mut self.cause) => {
                if !known {
                    self.cause = Cause::Past;
                }
            }
            // Its sender goes with the controller, and this task then ends too.
            Ok(()) = changing => {}
            () = sleep_until(at), if until.is_some() => {}
        }
    }
}

/// Returns when the operation changed; whether it is still known.
async fn changed(cause: &mut Cause) -> bool {
    match cause {
        Cause::Operation(record) => record.changed().await.is_ok(),
        Cause::Held(_) | Cause::Past => std::future::pending().await,
    }
}

/// Whether a version is newer than another. They are numbers, by promise from Kubernetes 1.35 on and
/// in fact ever since (KEP-5504); where they are not, what came last is taken to be.
fn is_newer(version: &str, than: &str) -> bool {
    match (version.parse::<u64>(), than.parse::<u64>()) {
        (Ok(version), Ok(than)) => version > than,
        _ => version != than,
    }
}

fn sooner(until: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(until.map_or(other, |until| until.min(other)))
}

/// What is compared and reckoned with later; an object at rest keeps no more.
fn without_details(status: DomainHotplugStatus) -> DomainHotplugStatus {
    DomainHotplugStatus {
        evidence: Vec::new(),
        diagnosis: None,
        hypervisor_error: None,
        ..status
    }
}
