//! Conditions as all Kubernetes objects have them (`metav1.Condition`), and the schema of times.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Timestamp;

/// One aspect of the object's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Type of the condition, in CamelCase.
    #[serde(rename = "type")]
    pub kind: String,
    /// True, False or Unknown.
    pub status: String,
    /// Reason of the status as one word, for programs.
    pub reason: String,
    /// Reason of the status as a sentence, for people.
    pub message: String,
    /// Time at which the status last changed.
    #[schemars(with = "Time")]
    pub last_transition_time: Timestamp,
    /// Generation of the object that the condition refers to, where generations apply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

impl Condition {
    /// Returns a condition that has been true or false since `now`.
    pub fn new(
        kind: &str,
        holds: bool,
        reason: &str,
        message: impl Into<String>,
        now: Timestamp,
    ) -> Self {
        Self {
            kind: kind.to_owned(),
            status: if holds { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message: message.into(),
            last_transition_time: now,
            observed_generation: None,
        }
    }

    /// Returns the condition as successor of the `former` conditions: the time is kept until the
    /// status changes, and the message until the status or reason changes, because a message may
    /// contain numbers that differ each time.
    #[must_use]
    pub fn after(mut self, former: &[Self]) -> Self {
        let former = Self::find(former, &self.kind);
        if let Some(former) = former.filter(|former| former.status == self.status) {
            self.last_transition_time = former.last_transition_time;
            if former.reason == self.reason {
                self.message.clone_from(&former.message);
            }
        }
        self
    }

    /// Returns the condition of this type.
    pub fn find<'c>(conditions: &'c [Self], kind: &str) -> Option<&'c Self> {
        conditions.iter().find(|condition| condition.kind == kind)
    }

    pub fn holds(&self) -> bool {
        self.status == "True"
    }
}

/// The schema of an RFC 3339 time.
#[derive(JsonSchema)]
#[schemars(extend("format" = "date-time"))]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct Time(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unchanged_condition_keeps_its_time_and_message() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let first = Condition::new("Probed", true, "Read", "", at(0)).after(&[]);
        assert_eq!(first.last_transition_time, at(0));
        let after = |reason, message| {
            let same = Condition::new("Probed", true, reason, message, at(9));
            same.after(std::slice::from_ref(&first))
        };
        assert_eq!(after("Read", "7 s"), first);
        let other = after("Other", "7 s");
        assert_eq!(
            (other.last_transition_time, other.message.as_str()),
            (at(0), "7 s")
        );
        let flipped = Condition::new("Probed", false, "Lost", "", at(9)).after(&[other]);
        assert_eq!(flipped.last_transition_time, at(9));
        assert!(!flipped.holds() && first.holds());
    }
}
