//! The watch of this node's objects, its failures, and the condition that reports them.
//!
//! ```text
//!            error                     third error in a row
//!  working ─────────▶ failing ─────────────────────────────▶ failing, logged
//!     ▲                  │                                         │
//!     └──────────────────┴── change, or no error for 60 s ─────────┘
//! ```
//! An error that someone has to fix (no definition, no right, a node name that cannot be selected)
//! is logged at once, closes the watch, and has it restarted with a backoff of minutes. Each failure
//! is logged once. Any other success of the API client restarts the watch early.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::client::{ObjectClient, now};
use crate::cluster::objects::Condition;
use crate::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use crate::cluster::{ClusterError, HotplugChange, ListOptions, Retry};
use crate::publish::wait_until;

/// Consecutive errors before a failing watch is logged.
const ERRORS_BEFORE_LOG: u32 = 3;

/// Time without an error after which a failing watch counts as working again: a retry comes within
/// half a minute and fails within the timeout of a call.
const QUIET: Duration = Duration::from_secs(60);

/// The same after a change was delivered: a watch that ends at once does so within a second.
const QUIET_AFTER_CHANGE: Duration = Duration::from_secs(2);

type ObjectChanges = BoxStream<'static, Result<HotplugChange, ClusterError>>;

pub(super) struct ObjectWatch {
    client: Arc<ObjectClient>,
    retry: Retry,
    list: ListOptions,
    /// `None` until [`Self::restart_at`].
    changes: Option<ObjectChanges>,
    restart_at: Option<Instant>,
    /// Consecutive errors.
    errors: u32,
    /// When the watch counts as working, unless another error comes first.
    working_at: Option<Instant>,
    logged: Option<&'static str>,
    condition: watch::Sender<Option<Condition>>,
}

impl ObjectWatch {
    /// Nothing is sent before the first [`Self::next_change`].
    pub(super) fn new(client: Arc<ObjectClient>, retry: Retry, list: ListOptions) -> Self {
        Self {
            client,
            retry,
            list,
            changes: None,
            restart_at: Some(Instant::now()),
            errors: 0,
            working_at: None,
            logged: None,
            condition: watch::Sender::default(),
        }
    }

    pub(super) fn condition(&self) -> watch::Receiver<Option<Condition>> {
        self.condition.subscribe()
    }

    /// Returns the next change, and handles errors of the watch meanwhile. Cancel safe.
    pub(super) async fn next_change(&mut self) -> HotplugChange {
        loop {
            tokio::select! {
                change = next(&mut self.changes) => match change {
                    Ok(change) => {
                        self.delivered(&change);
                        return change;
                    }
                    Err(error) => self.failed(&error),
                },
                () = wait_until(self.working_at) => self.recovered(),
                () = wait_until(self.restart_at) => self.restart(),
                // The watch itself may not retry for another half a minute.
                () = self.client.recovered.notified(), if self.errors > 0 => self.restart(),
            }
        }
    }

    /// Begins a new watch, with a list of all objects.
    pub(super) fn restart(&mut self) {
        self.restart_at = None;
        self.changes = Some(self.client.objects.watch(self.list).boxed());
    }

    fn delivered(&mut self, change: &HotplugChange) {
        if self.errors == 0 {
            return self.recovered();
        }
        // A list may succeed where the watch after it fails, and a watch may deliver a change and end.
        let quiet = match change {
            HotplugChange::Listed { .. } => QUIET,
            HotplugChange::Changed(_) | HotplugChange::Deleted(_) => QUIET_AFTER_CHANGE,
        };
        let working_at = Instant::now() + quiet;
        self.working_at = Some(self.working_at.map_or(working_at, |at| at.min(working_at)));
    }

    fn recovered(&mut self) {
        self.errors = 0;
        self.working_at = None;
        self.client.metrics.watched.set(1);
        self.set_condition(
            true,
            "Watched",
            "The daemon watches the DomainHotplug objects of this node.",
        );
        if self.logged.take().is_some() {
            info!(
                node = self.client.objects.node(),
                "watching DomainHotplug objects again"
            );
        }
    }

    fn failed(&mut self, error: &ClusterError) {
        if matches!(error, ClusterError::AnswerTooLarge { .. }) && !self.list.in_pages {
            info!(
                node = self.client.objects.node(), %error,
                "reading the DomainHotplug objects in pages"
            );
            self.list.in_pages = true;
            self.changes = None;
            self.restart_at = Some(Instant::now() + self.retry.delay(1, error));
            return;
        }
        let code = error.code();
        self.errors += 1;
        self.working_at = Some(Instant::now() + QUIET);
        self.client.metrics.failed("watch", code);
        let blocker = WatchBlocker::of(error);
        if blocker.is_some() {
            let delay = self.retry.delay(self.errors, error);
            self.changes = None;
            self.restart_at = Some(Instant::now() + delay);
            self.working_at = None;
        } else if self.errors < ERRORS_BEFORE_LOG {
            return;
        }
        if self.logged.replace(code) != Some(code) {
            self.client.metrics.watched.set(0);
            log_failure(self.client.objects.node(), error, blocker);
        }
        // An API server that has just started denies everything for a moment.
        if let Some(blocker) = blocker
            && self.errors >= ERRORS_BEFORE_LOG
        {
            self.set_condition(false, blocker.reason(), &blocker.message(error));
        }
    }

    fn set_condition(&self, holds: bool, reason: &str, message: &str) {
        self.condition.send_if_modified(|condition| {
            let is_known = condition.as_ref().is_some_and(|it| it.reason == reason);
            if !is_known {
                let kind = HOTPLUG_OBJECTS_WATCHED;
                *condition = Some(Condition::new(kind, holds, reason, message, now()));
            }
            !is_known
        });
    }
}

/// An error of the watch that lasts until someone changes the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WatchBlocker {
    /// The node's name exceeds a label value, and the API server cannot select by `spec.nodeName`.
    NodeNameTooLong,
    /// The cluster has no definition of DomainHotplug.
    NotDefined,
    NotAllowed,
}

impl WatchBlocker {
    fn of(error: &ClusterError) -> Option<Self> {
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

    /// Returns the reason of the condition.
    fn reason(self) -> &'static str {
        match self {
            Self::NodeNameTooLong => "NodeNameTooLong",
            Self::NotDefined => "NotDefined",
            Self::NotAllowed => "NotAllowed",
        }
    }

    fn message(self, error: &ClusterError) -> String {
        match self {
            Self::NodeNameTooLong => NODE_NAME_TOO_LONG.to_owned(),
            Self::NotDefined | Self::NotAllowed => error.to_string(),
        }
    }
}

const NODE_NAME_TOO_LONG: &str = "cannot watch the DomainHotplug objects of this node: its name is longer than a label value, and \
     this API server cannot select objects by spec.nodeName (Kubernetes 1.31 and newer can); use the \
     command line or the local API on the node";

fn log_failure(node: &str, error: &ClusterError, blocker: Option<WatchBlocker>) {
    let code = error.code();
    match blocker {
        Some(WatchBlocker::NotDefined) => info!(
            node,
            "the cluster has no definition of DomainHotplug (manifests/base/crds.yaml); checking again \
             every few minutes"
        ),
        Some(WatchBlocker::NodeNameTooLong) => warn!(node, "{NODE_NAME_TOO_LONG}"),
        Some(WatchBlocker::NotAllowed) | None => warn!(
            node, code, %error,
            "cannot watch DomainHotplug objects, retrying: new objects are delayed, operations continue"
        ),
    }
}

async fn next(changes: &mut Option<ObjectChanges>) -> Result<HotplugChange, ClusterError> {
    if let Some(stream) = changes
        && let Some(change) = stream.next().await
    {
        return change;
    }
    // The stream never ends.
    std::future::pending().await
}
