//! What comes out of an operation, and what is to be done until then.

use serde::{Deserialize, Serialize};

use super::{Action, Amount, Evidence, Verdict};
use crate::units::Timestamp;

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Note the call in the history, write the journal, and make it.
    Call(Action),
    /// Wait for an event or a call to come back, look at the domain again, and ask again; at the
    /// latest at `until`, when the passing of time alone changes the answer.
    Wait {
        /// What is awaited, for people.
        awaiting: String,
        /// When to ask again in any case.
        until: Timestamp,
    },
    /// There is a verdict.
    Done(Box<Outcome>),
}

/// The result of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// One sentence for people.
    pub message: String,
    /// What there was before.
    pub before: Amount,
    /// What was asked for.
    pub requested: Amount,
    /// What there was when it was last looked at.
    pub after: Amount,
    /// What was seen, in order.
    pub evidence: Vec<Evidence>,
    /// The hypervisor's own error, if it had one, whether or not it was the last word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    /// What is wrong with the guest, and what to do, if it is the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

/// What is wrong, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// A short word for programs.
    pub code: String,
    /// What was seen.
    pub seen: String,
    /// What to do.
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

/// A verdict with its reasons, before the evidence is added.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    pub(super) message: String,
    pub(super) diagnosis: Option<Diagnosis>,
}

impl Finding {
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

/// What a judge of one resource says.
#[derive(Debug)]
pub(super) enum Ruling {
    Call(Action),
    Wait {
        awaiting: String,
        until: Option<Timestamp>,
    },
    Found(Finding),
}

impl Ruling {
    pub(super) fn wait(awaiting: impl Into<String>) -> Self {
        Self::Wait {
            awaiting: awaiting.into(),
            until: None,
        }
    }

    /// Waits until a guest was given time enough, and then for a look: what was seen before that
    /// says nothing against it.
    pub(super) fn wait_until_then_look(
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
