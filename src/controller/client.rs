//! What the lives of all objects share: the way to the API server, and what is told of it.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::cluster::{ClusterError, EventKind, HotplugObjects, ObjectEvent, ObjectId, Retry};
use crate::publish::events::EventRecorder;
use crate::telemetry::Metrics;
use crate::units::Timestamp;

/// So many calls to the API server are under way at once.
const CALLS: usize = 4;

/// How long the Node is taken to be the one that was last seen.
const SAME_NODE: Duration = Duration::from_secs(60);

/// What the lives of all objects share.
pub(super) struct ObjectClient {
    pub(super) objects: HotplugObjects,
    pub(super) retry: Retry,
    /// Told when the API server does again what it is asked.
    pub(super) back: Notify,
    events: EventRecorder,
    metrics: Arc<Metrics>,
    calls: Semaphore,
    trouble: Mutex<Option<&'static str>>,
    cannot_own: AtomicBool,
    node: tokio::sync::Mutex<Option<(String, Instant)>>,
}

impl ObjectClient {
    pub(super) fn new(
        objects: HotplugObjects,
        retry: Retry,
        events: EventRecorder,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            objects,
            retry,
            back: Notify::new(),
            events,
            metrics,
            calls: Semaphore::new(CALLS),
            trouble: Mutex::default(),
            cannot_own: AtomicBool::new(false),
            node: tokio::sync::Mutex::default(),
        }
    }

    /// Makes a call when it is its turn; counts it, and tells what goes wrong once.
    pub(super) async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, ClusterError>>,
    ) -> Result<T, ClusterError> {
        // Never closed.
        let _turn = self.calls.acquire().await;
        self.metrics.hotplug.object_call(call);
        let answer = answer.await;
        match &answer {
            Ok(_) => self.worked(),
            // Deleted by somebody: nobody's fault.
            Err(error) if is_gone(error) => {}
            Err(error) => self.failed(call, error),
        }
        answer
    }

    /// Tells how an object ended, in an event about it.
    pub(super) fn emit_event(
        &self,
        target: ObjectId<'_>,
        (kind, reason): (EventKind, String),
        note: &str,
    ) {
        self.events.record(ObjectEvent {
            about: self.objects.reference(target),
            kind,
            reason,
            action: "Hotplug",
            note: note.to_owned(),
        });
    }

    /// The uid of the Node as it is now, or was a moment ago.
    pub(super) async fn node_uid(&self) -> Result<String, ClusterError> {
        let mut node = self.node.lock().await;
        if let Some((uid, seen)) = &*node
            && seen.elapsed() < SAME_NODE
        {
            return Ok(uid.clone());
        }
        let uid = self.call("own", self.objects.node_uid()).await?;
        *node = Some((uid.clone(), Instant::now()));
        Ok(uid)
    }

    fn worked(&self) {
        if self.trouble().take().is_some() {
            tracing::info!("the API server takes what is said of DomainHotplug objects again");
            self.back.notify_one();
        }
    }

    fn failed(&self, call: &'static str, error: &ClusterError) {
        let code = error.code();
        self.metrics.hotplug.object_call_failed(call, code);
        if call == "own" {
            // Nothing depends on who owns an object.
            if !self.cannot_own.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    code, %error,
                    "the Node cannot be made the owner of a DomainHotplug object: it will stay when the \
                     Node goes"
                );
            }
            return;
        }
        let mut trouble = self.trouble();
        if *trouble != Some(code) {
            *trouble = Some(code);
            tracing::warn!(
                call, code, %error,
                "a call about a DomainHotplug object failed; trying again, operations go on"
            );
        }
    }

    fn trouble(&self) -> std::sync::MutexGuard<'_, Option<&'static str>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the object is not there any more, or another one has its name.
pub(super) fn is_gone(error: &ClusterError) -> bool {
    match error {
        ClusterError::NotFound { .. } => true,
        // "uid mismatch …", "the UID in the precondition …"
        ClusterError::Conflict { message, .. } => message.to_lowercase().contains("uid"),
        _ => false,
    }
}

/// The time as objects have it.
pub(super) fn now() -> Timestamp {
    jiff::Timestamp::now().into()
}
