//! Detection of another daemon that publishes to the same Node.
//!
//! Two daemons have one field manager, so the API server lets each remove and change the labels of the
//! other, and their conflict is not one of owners. A write of another daemon shows itself by keys
//! that this field manager owns and this process never sent, or by values of such keys that it never
//! sent. Nobody else can cause that: an edit of a label makes its editor the owner.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tokio::time::Instant;

use crate::label::LabelSet;
use crate::label::ownership::{ObservedLabels, REPAIR_WINDOW};

/// Maximum number of values of one key that are remembered: versions and limits change rarely.
const VALUES_MAX: usize = 16;
/// Number of foreign writes within [`REPAIR_WINDOW`] after which this daemon stands back. One can be
/// the last write of a daemon that this one replaces.
const WRITES_MAX: usize = 2;

/// The sent labels, and the foreign writes that were observed since.
#[derive(Debug, Default)]
pub(super) struct RivalDetector {
    sent: BTreeMap<String, BTreeSet<String>>,
    /// Times and resource versions of foreign writes.
    writes: VecDeque<(Instant, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RivalWrite {
    None,
    /// Reported, and answered by an own write.
    First,
    /// Another daemon answers each write of this one.
    Repeated,
}

impl RivalDetector {
    /// Records labels before they are sent: a write whose answer is lost counts as well.
    pub(super) fn record_sent(&mut self, labels: &LabelSet) {
        for (key, value) in labels {
            let values = self.sent.entry(key.as_str().to_owned()).or_default();
            if values.len() >= VALUES_MAX && !values.contains(value.as_str()) {
                values.clear();
            }
            values.insert(value.as_str().to_owned());
        }
    }

    /// Judges the Node's labels at one resource version.
    pub(super) fn observe(
        &mut self,
        shown: &ObservedLabels,
        version: &str,
        now: Instant,
    ) -> RivalWrite {
        if self.sent.is_empty() || !shown.owned.iter().any(|key| self.is_foreign(key, shown)) {
            return RivalWrite::None;
        }
        if self.writes.back().is_none_or(|(_, last)| last != version) {
            self.writes.push_back((now, version.to_owned()));
        }
        let is_recent = |at: Instant| now.saturating_duration_since(at) < REPAIR_WINDOW;
        self.writes.retain(|(at, _)| is_recent(*at));
        if self.writes.len() >= WRITES_MAX {
            RivalWrite::Repeated
        } else {
            RivalWrite::First
        }
    }

    /// True if the value of a key that virtnode's field manager owns was not sent by this process.
    fn is_foreign(&self, key: &str, shown: &ObservedLabels) -> bool {
        let Some(values) = self.sent.get(key) else {
            return true;
        };
        // A co-owner may have changed the value before this manager released it.
        let is_shared = shown.owners.contains_key(key);
        let value = shown.labels.get(key);
        !is_shared && value.is_some_and(|value| !values.contains(value))
    }

    /// Clears everything, for a new Node with the same name.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> LabelSet {
        let pair = |(key, value): &(&str, &str)| (key.parse().unwrap(), value.parse().unwrap());
        pairs.iter().map(pair).collect()
    }

    fn shown(pairs: &[(&str, &str)]) -> ObservedLabels {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        ObservedLabels {
            labels: pairs.iter().map(pair).collect(),
            owned: pairs.iter().map(|(key, _)| (*key).to_owned()).collect(),
            ..ObservedLabels::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keys_and_values_that_were_never_sent_are_foreign() {
        let mut detector = RivalDetector::default();
        let now = Instant::now();
        // The keys of the predecessor.
        let before = shown(&[("a.io/x", "1"), ("a.io/old", "1")]);
        assert_eq!(detector.observe(&before, "1", now), RivalWrite::None);
        detector.record_sent(&labels(&[("a.io/x", "1")]));
        detector.record_sent(&labels(&[("a.io/x", "2")]));
        for own in [&[("a.io/x", "1")], &[("a.io/x", "2")]] {
            assert_eq!(detector.observe(&shown(own), "2", now), RivalWrite::None);
        }
        let foreign = shown(&[("a.io/x", "3")]);
        assert_eq!(detector.observe(&foreign, "3", now), RivalWrite::First);
        // The same write, read again.
        assert_eq!(detector.observe(&foreign, "3", now), RivalWrite::First);
        let later = now + REPAIR_WINDOW;
        let foreign = shown(&[("a.io/x", "2"), ("a.io/y", "1")]);
        assert_eq!(detector.observe(&foreign, "4", later), RivalWrite::First);
        assert_eq!(detector.observe(&foreign, "5", later), RivalWrite::Repeated);
    }

    #[tokio::test(start_paused = true)]
    async fn value_of_a_shared_key_is_not_foreign() {
        let mut detector = RivalDetector::default();
        detector.record_sent(&labels(&[("a.io/x", "1")]));
        let mut shared = shown(&[("a.io/x", "2")]);
        shared.owners.insert("a.io/x".into(), Vec::new());
        assert_eq!(
            detector.observe(&shared, "1", Instant::now()),
            RivalWrite::None
        );
    }
}
