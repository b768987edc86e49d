//! The API client that the reconcilers of all objects share.
//!
//! It limits concurrent calls, counts them, and logs a failure once until a call succeeds again.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::ObjectMetrics;
use crate::cluster::{ClusterError, EventKind, HotplugObjects, ObjectEvent, ObjectId, Retry};
use crate::publish::events::EventRecorder;
use crate::units::Timestamp;

/// Maximum concurrent calls, so that a restart with many objects does not flood the API server.
const CALLS_MAX: usize = 4;

/// Time for which the uid of the Node is cached: enough for the objects of a rollout.
const NODE_UID_TTL: Duration = Duration::from_secs(60);

pub(super) struct ObjectClient {
    pub(super) objects: HotplugObjects,
    pub(super) retry: Retry,
    pub(super) metrics: Arc<ObjectMetrics>,
    /// Notified by the first successful call after a failure.
    pub(super) recovered: Notify,
    events: EventRecorder,
    calls: Semaphore,
    logged_failure: Mutex<Option<&'static str>>,
    logged_owner_failure: AtomicBool,
    node_uid: tokio::sync::Mutex<Option<(String, Instant)>>,
}

impl ObjectClient {
    pub(super) fn new(
        objects: HotplugObjects,
        retry: Retry,
        events: EventRecorder,
        metrics: Arc<ObjectMetrics>,
    ) -> Self {
        Self {
            objects,
            retry,
            metrics,
            recovered: Notify::new(),
            events,
            calls: Semaphore::new(CALLS_MAX),
            logged_failure: Mutex::default(),
            logged_owner_failure: AtomicBool::new(false),
            node_uid: tokio::sync::Mutex::default(),
        }
    }

    /// Awaits a permit, then `answer`. `call` is the metrics label.
    pub(super) async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, ClusterError>>,
    ) -> Result<T, ClusterError> {
        // The semaphore is never closed.
        let _permit = self.calls.acquire().await;
        self.metrics.calls.with_label_values(&[call]).inc();
        let answer = answer.await;
        match &answer {
            Ok(_) => self.succeeded(),
            // Someone deleted the object, which is not a failure.
            Err(error) if is_deleted(error) => {}
            Err(error) => self.failed(call, error),
        }
        answer
    }

    /// Records an event about an object.
    pub(super) fn record_event(&self, id: ObjectId<'_>, kind: EventKind, reason: &str, note: &str) {
        self.events.record(ObjectEvent {
            about: self.objects.reference(id),
            related: None,
            kind,
            reason: reason.to_owned(),
            action: "Hotplug",
            note: note.to_owned(),
        });
    }

    /// Returns the uid of the Node, at most [`NODE_UID_TTL`] old.
    pub(super) async fn node_uid(&self) -> Result<String, ClusterError> {
        let mut cached = self.node_uid.lock().await;
        if let Some((uid, read_at)) = &*cached
            && read_at.elapsed() < NODE_UID_TTL
        {
            return Ok(uid.clone());
        }
        let uid = self.call("own", self.objects.node_uid()).await?;
        *cached = Some((uid.clone(), Instant::now()));
        Ok(uid)
    }

    fn succeeded(&self) {
        if self.logged_failure().take().is_some() {
            tracing::info!("calls about DomainHotplug objects succeed again");
            self.recovered.notify_one();
        }
    }

    fn failed(&self, call: &'static str, error: &ClusterError) {
        let code = error.code();
        self.metrics.failed(call, code);
        if call == "own" {
            // Nothing depends on the owner of an object.
            if !self.logged_owner_failure.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    code, %error,
                    "cannot set the Node as owner of a DomainHotplug: the object will outlive the Node"
                );
            }
            return;
        }
        if self.logged_failure().replace(code) != Some(code) {
            tracing::warn!(
                call, code, %error,
                "call about a DomainHotplug failed, retrying; operations continue"
            );
        }
    }

    fn logged_failure(&self) -> std::sync::MutexGuard<'_, Option<&'static str>> {
        self.logged_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// True if the object no longer exists, or another one has its name.
pub(super) fn is_deleted(error: &ClusterError) -> bool {
    match error {
        ClusterError::NotFound { .. } => true,
        // "uid mismatch …", "the UID in the precondition …"
        ClusterError::Conflict { message, .. } => message.to_lowercase().contains("uid"),
        _ => false,
    }
}

pub(super) fn now() -> Timestamp {
    jiff::Timestamp::now().into()
}
