//! The reconciler of one object: its status, its owner, and its deletion.
//!
//! ```text
//!                 ┌────────────── wait for the operation, the object, a timer ◀──┐
//!                 ▼                                                              │
//!  compare wanted with written status ──▶ write status │ delete │ set owner ──▶ ok │ backoff
//! ```
//! It ends when the object is deleted. A status is written to the version that was observed, because
//! the API server does not compare the uid in a patch of the status; a conflict has the object read
//! again. Only a failed write or deletion delays the next one; failing to set the owner does not.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{ObjectClient, is_deleted, now};
use super::request::time_to_live;
use super::status::{
    NotAccepted, WriteUrgency, expiry, new_ending, not_accepted_status, operation_status,
    write_urgency,
};
use crate::cluster::objects::DomainHotplugStatus;
use crate::cluster::{ClusterError, HotplugObject, ObjectId};
use crate::operation::Record;
use crate::publish::wait_until;
use crate::units::Timestamp;

/// Delay of the first status: an operation with a verdict by then needs one write instead of two.
const FIRST_STATUS_DELAY: Duration = Duration::from_millis(300);

/// Maximum wait for the expiry, after which a clock adjustment is noticed.
pub(super) const EXPIRY_WAIT_MAX: Duration = Duration::from_secs(3600);

/// Time after a verdict in which the executor may correct it, with a margin.
const CORRECTION_TIME: Duration = Duration::from_secs(900);

/// The source of an object's status.
pub(super) enum StatusSource {
    Operation(watch::Receiver<Record>),
    NotAccepted(NotAccepted),
    /// The operation is finished and no longer in the journal: the status stays as it is.
    Past,
}

/// The properties of an object that may change while it is tracked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ObjectVersion {
    resource_version: String,
    generation: i64,
    has_owner: bool,
}

impl From<&HotplugObject> for ObjectVersion {
    fn from(object: &HotplugObject) -> Self {
        Self {
            resource_version: object.resource_version.clone(),
            generation: object.generation,
            has_owner: object.has_owner,
        }
    }
}

pub(super) struct Reconciler {
    client: Arc<ObjectClient>,
    name: String,
    uid: String,
    source: StatusSource,
    /// The generation that the operation was made from.
    accepted_generation: i64,
    observed: watch::Receiver<ObjectVersion>,
    /// The newest known version, from the watch or from a write.
    resource_version: String,
    time_to_live: Option<Duration>,
    /// The status in the API server, without details that are not compared.
    written: Option<DomainHotplugStatus>,
    started: Instant,
    retry_at: Instant,
    /// Consecutive failures.
    failures: u32,
    /// True if no further attempt to set the owner is needed.
    owner_done: bool,
    owner_retry_at: Instant,
    /// True while other objects wait for a place.
    crowded: watch::Receiver<bool>,
}

enum NextStep {
    WriteStatus(Box<DomainHotplugStatus>),
    Delete,
    SetOwner,
    /// Wait for a change, or until this time.
    Wait(Option<Instant>),
}

impl Reconciler {
    pub(super) fn new(
        client: Arc<ObjectClient>,
        object: HotplugObject,
        source: StatusSource,
        accepted_generation: i64,
        observed: watch::Receiver<ObjectVersion>,
        crowded: watch::Receiver<bool>,
    ) -> Self {
        let started = Instant::now();
        Self {
            client,
            time_to_live: time_to_live(&object.spec),
            resource_version: object.resource_version,
            name: object.name,
            uid: object.uid,
            source,
            accepted_generation,
            observed,
            written: object.status.map(without_details),
            started,
            retry_at: started,
            failures: 0,
            owner_done: object.has_owner,
            owner_retry_at: started,
            crowded,
        }
    }

    /// Returns when the object is deleted. While other objects wait for a place, it also returns when
    /// nothing is left to do before the object expires, with the time of that.
    pub(super) async fn run(mut self) -> Option<Timestamp> {
        loop {
            let result = match self.next_step() {
                NextStep::Wait(_) if *self.crowded.borrow_and_update() && self.is_settled() => {
                    return expiry(self.written.as_ref()?, self.time_to_live);
                }
                NextStep::Wait(until) => {
                    self.wait_for_change(until).await;
                    continue;
                }
                NextStep::SetOwner => {
                    self.set_owner().await;
                    continue;
                }
                NextStep::WriteStatus(_) | NextStep::Delete if Instant::now() < self.retry_at => {
                    self.wait_for_change(Some(self.retry_at)).await;
                    continue;
                }
                NextStep::WriteStatus(status) => self.write_status(*status).await,
                NextStep::Delete => self.delete().await,
            };
            match result {
                Ok(()) => self.failures = 0,
                Err(error) if is_deleted(&error) => return None,
                Err(error @ ClusterError::Conflict { .. }) => match self.read_version().await {
                    // The first retry is immediate.
                    Ok(true) if self.failures == 0 => self.failures = 1,
                    Ok(true) => self.back_off(&error),
                    Ok(false) => return None,
                    Err(error) => self.back_off(&error),
                },
                // For example an admission policy that compares the spec, which names another node.
                // The log has it; the next daemon retries.
                Err(error) if error.needs_people() && self.is_rejected() => return None,
                Err(error) => self.back_off(&error),
            }
        }
    }

    /// True if nothing but a change of the object, or its expiry, calls for another step.
    fn is_settled(&self) -> bool {
        let observed = self.observed.borrow();
        // An own write is reported by the watch as well, and is not to be taken for a change.
        if is_newer(&self.resource_version, &observed.resource_version)
            || !(self.owner_done || observed.has_owner)
        {
            return false;
        }
        match &self.source {
            StatusSource::Operation(record) => {
                let record = record.borrow();
                let is_final = record.verdict.is_some_and(|verdict| !verdict.may_change());
                let finished = record.finished.filter(|_| record.is_done());
                finished.is_some_and(|at| is_final || now().since(at) > CORRECTION_TIME)
            }
            StatusSource::NotAccepted(reason) => matches!(reason, NotAccepted::Rejected(_)),
            StatusSource::Past => true,
        }
    }

    fn is_rejected(&self) -> bool {
        matches!(
            self.source,
            StatusSource::NotAccepted(NotAccepted::Rejected(_))
        )
    }

    fn back_off(&mut self, error: &ClusterError) {
        self.failures += 1;
        self.retry_at = Instant::now() + self.client.retry.delay(self.failures, error);
    }

    /// Reads the current version after a conflict. False if the object no longer exists.
    async fn read_version(&mut self) -> Result<bool, ClusterError> {
        let get = self.client.objects.get(&self.name);
        match self.client.call("status", get).await {
            Ok(object) if object.uid == self.uid => {
                self.resource_version = object.resource_version;
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if is_deleted(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn next_step(&mut self) -> NextStep {
        let observed = self.observed.borrow_and_update().clone();
        // The watch may report an own write after its response.
        if is_newer(&observed.resource_version, &self.resource_version) {
            self.resource_version.clone_from(&observed.resource_version);
        }
        let wanted = match &mut self.source {
            StatusSource::Operation(record) => {
                let spec_changed = observed.generation > self.accepted_generation;
                let record = record.borrow_and_update();
                Some(operation_status(
                    &record,
                    self.accepted_generation,
                    spec_changed,
                ))
            }
            StatusSource::NotAccepted(reason) => {
                Some(not_accepted_status(reason, observed.generation, now()))
            }
            StatusSource::Past => None,
        };
        let mut until = None;
        if let Some(wanted) = wanted {
            let first_write_at = self.started + FIRST_STATUS_DELAY;
            match write_urgency(self.written.as_ref(), &wanted) {
                WriteUrgency::Delayed if Instant::now() < first_write_at => {
                    until = Some(first_write_at);
                }
                WriteUrgency::None => {}
                WriteUrgency::Delayed | WriteUrgency::Immediate => {
                    return NextStep::WriteStatus(Box::new(wanted));
                }
            }
        }
        let written = self.written.as_ref();
        if let Some(expiry) = written.and_then(|status| expiry(status, self.time_to_live)) {
            let left = expiry.since(now());
            if left.is_zero() {
                return NextStep::Delete;
            }
            until = earlier(until, Instant::now() + left.min(EXPIRY_WAIT_MAX));
        }
        if !self.owner_done && !observed.has_owner {
            if Instant::now() >= self.owner_retry_at {
                return NextStep::SetOwner;
            }
            until = earlier(until, self.owner_retry_at);
        }
        NextStep::Wait(until)
    }

    fn id(&self) -> ObjectId<'_> {
        ObjectId {
            name: &self.name,
            uid: &self.uid,
        }
    }

    async fn write_status(&mut self, status: DomainHotplugStatus) -> Result<(), ClusterError> {
        let objects = &self.client.objects;
        let write = objects.write_status(self.id(), &self.resource_version, &status);
        self.resource_version = self.client.call("status", write).await?;
        // The first writer of a status emits its event, so that a restart emits no second one.
        if let Some((kind, reason)) = new_ending(self.written.as_ref(), &status) {
            let note = status.message.as_deref().unwrap_or_default();
            self.client.record_event(self.id(), kind, &reason, note);
        }
        self.written = Some(without_details(status));
        Ok(())
    }

    async fn delete(&mut self) -> Result<(), ClusterError> {
        let delete = self.client.objects.delete(self.id());
        self.client.call("delete", delete).await?;
        tracing::info!(
            object = self.name,
            "DomainHotplug deleted after its time to live"
        );
        // Either the watch reports the deletion, or a finalizer delays it; one call suffices.
        self.time_to_live = None;
        Ok(())
    }

    async fn set_owner(&mut self) {
        let client = Arc::clone(&self.client);
        let set_owner = async {
            let node = client.node_uid().await?;
            let call = client.objects.set_owner(self.id(), &node);
            client.call("own", call).await
        };
        match set_owner.await {
            Ok(version) => {
                self.resource_version = version;
                self.owner_done = true;
            }
            // Optional: no retry where it cannot help.
            Err(error) if error.needs_people() || is_deleted(&error) => self.owner_done = true,
            Err(error) => {
                let delay = self.client.retry.delay(u32::MAX, &error);
                self.owner_retry_at = Instant::now() + delay;
            }
        }
    }

    /// Waits for a change of the operation or of the object, or until this time.
    async fn wait_for_change(&mut self, until: Option<Instant>) {
        tokio::select! {
            still_known = operation_changed(&mut self.source) => {
                if !still_known {
                    self.source = StatusSource::Past;
                }
            }
            // The sender is dropped with the controller, which aborts this task.
            Ok(()) = self.observed.changed() => {}
            Ok(()) = self.crowded.changed() => {}
            () = wait_until(until) => {}
        }
    }
}

/// Waits for a change of the operation. False if the executor has dropped the operation.
async fn operation_changed(source: &mut StatusSource) -> bool {
    match source {
        StatusSource::Operation(record) => record.changed().await.is_ok(),
        StatusSource::NotAccepted(_) | StatusSource::Past => std::future::pending().await,
    }
}

/// Compares resource versions. They are ordered numbers, by contract from Kubernetes 1.35 on and in
/// fact always (KEP-5504); any other version counts as newer.
fn is_newer(version: &str, than: &str) -> bool {
    match (version.parse::<u64>(), than.parse::<u64>()) {
        (Ok(version), Ok(than)) => version > than,
        _ => version != than,
    }
}

fn earlier(until: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(until.map_or(other, |until| until.min(other)))
}

/// Drops what is not compared, to keep idle objects small.
fn without_details(status: DomainHotplugStatus) -> DomainHotplugStatus {
    DomainHotplugStatus {
        evidence: Vec::new(),
        diagnosis: None,
        hypervisor_error: None,
        ..status
    }
}
