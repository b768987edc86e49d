//! The steps and the result of an operation.

use serde::{Deserialize, Serialize};

use super::{Action, Amount, Evidence, Verdict};
use crate::units::Timestamp;

/// The next step of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Append the call to the history, write the journal, and make the call.
    Call(Action),
    /// Wait for an event or for the call to return, observe the domain, and judge again.
    Wait {
        /// The awaited thing, for people.
        awaiting: String,
        /// The latest time to judge again: the passing of time alone may change the answer.
        until: Timestamp,
    },
    Done(Box<Outcome>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub verdict: Verdict,
    /// The reason in one sentence for people.
    pub message: String,
    pub before: Amount,
    pub requested: Amount,
    /// The amount at the last observation.
    pub after: Amount,
    pub evidence: Vec<Evidence>,
    /// The hypervisor's own error, even if a later call succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

/// The settings that block commands of qemu-guest-agent, by version and distribution.
pub const AGENT_SETTINGS: &str = "block-rpcs and allow-rpcs (blacklist before QEMU 8) in the guest's \
    /etc/qemu/qemu-ga.conf or among qemu-ga's options, BLACKLIST_RPC or FILTER_RPC_ARGS in \
    /etc/sysconfig/qemu-ga of Red Hat's systems";

/// A cause and its remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// A fixed word for programs.
    pub code: String,
    pub seen: String,
    pub remedy: String,
}

impl Diagnosis {
    pub(super) fn new(code: &str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            seen: seen.into(),
            remedy: remedy.into(),
        }
    }
}

/// A verdict with its reason, without the evidence.
#[derive(Debug)]
pub(super) struct Conclusion {
    pub(super) verdict: Verdict,
    pub(super) message: String,
    pub(super) diagnosis: Option<Diagnosis>,
}

impl Conclusion {
    pub(super) fn new(verdict: Verdict, message: impl Into<String>) -> Self {
        Self {
            verdict,
            message: message.into(),
            diagnosis: None,
        }
    }

    pub(super) fn because(self, diagnosis: Diagnosis) -> Self {
        Self {
            diagnosis: Some(diagnosis),
            ..self
        }
    }
}

/// The decision of the rules.
#[derive(Debug)]
pub(super) enum Ruling {
    Call(Action),
    Wait {
        awaiting: String,
        until: Option<Timestamp>,
    },
    Conclude(Conclusion),
}

impl Ruling {
    pub(super) fn wait(awaiting: impl Into<String>) -> Self {
        Self::Wait {
            awaiting: awaiting.into(),
            until: None,
        }
    }

    /// Waits until the end of a grace period and then for an observation: an earlier one does not
    /// count against the guest.
    pub(super) fn wait_until_observed_after(
        awaiting: impl Into<String>,
        until: Option<Timestamp>,
        now: Timestamp,
    ) -> Self {
        Self::Wait {
            awaiting: awaiting.into(),
            until: until.filter(|until| now < *until),
        }
    }

    pub(super) fn wait_until(awaiting: impl Into<String>, until: Timestamp) -> Self {
        Self::Wait {
            awaiting: awaiting.into(),
            until: Some(until),
        }
    }
}
