//! A condition, in the shape that every Kubernetes object has it (`metav1.Condition`).

use k8s_openapi::jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that is so, is not so, or is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// What it is about, in CamelCase.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Why, as one word in CamelCase for programs.
    pub reason: String,
    /// Why, as a sentence for people.
    pub message: String,
    /// When the status last became another one.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
}

impl Condition {
    /// A condition that holds or does not. It has no time yet: see [`Condition::after`].
    pub fn new(kind: &str, holds: bool, reason: &str, message: impl Into<String>) -> Self {
        Self {
            kind: kind.to_owned(),
            status: if holds { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message: message.into(),
            last_transition_time: String::new(),
        }
    }

    /// Gives it its time: that of the same condition among the `former` ones while the status is
    /// the same, else `now`.
    #[must_use]
    pub fn after(mut self, former: &[Self], now: Timestamp) -> Self {
        let former = Self::find(former, &self.kind).filter(|former| {
            former.status == self.status && !former.last_transition_time.is_empty()
        });
        self.last_transition_time = match former {
            Some(former) => former.last_transition_time.clone(),
            None => time(now),
        };
        self
    }

    /// The condition of this type.
    pub fn find<'c>(conditions: &'c [Self], kind: &str) -> Option<&'c Self> {
        conditions.iter().find(|condition| condition.kind == kind)
    }

    /// Whether it is `True`.
    pub fn holds(&self) -> bool {
        self.status == "True"
    }
}

/// A time as objects have it: RFC 3339, to the second, in UTC.
pub fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_condition_is_that_of_its_last_change() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let first = Condition::new("Probed", true, "Read", "").after(&[], at(0));
        assert_eq!(first.last_transition_time, "1970-01-01T00:00:00Z");
        let same =
            Condition::new("Probed", true, "Other", "").after(std::slice::from_ref(&first), at(9));
        assert_eq!(same.last_transition_time, first.last_transition_time);
        let flipped = Condition::new("Probed", false, "Lost", "").after(&[same], at(9));
        assert_eq!(flipped.last_transition_time, "1970-01-01T00:00:09Z");
        assert!(!flipped.holds() && first.holds());
    }
}
