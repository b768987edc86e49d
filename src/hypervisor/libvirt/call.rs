//! A call, and the states of the connection that it is made over.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::limits::{AgentPlace, Class};
use crate::hypervisor::CallError;

/// The state of the primary handle, which carries the events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Primary {
    /// Calls wait.
    Opening,
    /// Calls are made. The number is the connection's generation.
    Up(u64),
    /// Calls are answered at once, with this reason.
    Down(String),
}

/// The end of a handle.
pub(super) struct Lost {
    pub(super) generation: u64,
    pub(super) reason: String,
}

/// A call's name in the metrics, and what it may wait for.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) class: Class,
    /// The UUID of the domain that the call is about.
    pub(super) domain: Option<String>,
    pub(super) deadline: Duration,
    /// Maximum time until the call is made; its deadline then counts from there. `None` if the
    /// deadline is for both.
    pub(super) wait: Option<Duration>,
    /// The place of a call to a guest agent, if it is not any.
    pub(super) agent_place: Option<AgentPlace>,
}

/// Turns a panic of the crate `virt` into an error of this call.
pub(super) fn no_panic<T>(
    call: &'static str,
    work: impl FnOnce() -> Result<T, CallError>,
) -> Result<T, CallError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(CallError::Failed {
            call: call.into(),
            code: virt::sys::VIR_ERR_INTERNAL_ERROR.to_string(),
            text: "the call panicked".to_owned(),
        })
    })
}

/// Returns the error of a call whose worker will not answer.
pub(super) fn worker_ended() -> CallError {
    CallError::Unavailable("the thread that makes the call ended".to_owned())
}
