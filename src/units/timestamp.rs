//! Points in time. They come from outside: nothing here reads a clock.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time in milliseconds, written and serialized as RFC 3339 in UTC.
///
/// Within one operation time never goes backwards: the executor adds a monotonic clock's time to
/// one reading of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "jiff::Timestamp", into = "jiff::Timestamp")]
pub struct Timestamp(i64);

impl Timestamp {
    /// Makes a timestamp from milliseconds since 1970, limited to the range of RFC 3339.
    pub fn from_millis(millis: i64) -> Self {
        // whole seconds, well inside
        let first = (jiff::Timestamp::MIN.as_second() + 1) * 1000;
        let last = (jiff::Timestamp::MAX.as_second() - 1) * 1000;
        Self(millis.clamp(first, last))
    }

    pub fn as_millis(self) -> i64 {
        self.0
    }

    pub fn as_seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// Adds a duration, limited to the last possible timestamp.
    pub fn after(self, span: Duration) -> Self {
        let millis = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        Self::from_millis(self.0.saturating_add(millis))
    }

    /// Returns the time since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        let millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }
}

impl From<Timestamp> for jiff::Timestamp {
    fn from(moment: Timestamp) -> Self {
        // cannot fail: every timestamp is within the range
        Self::from_millisecond(moment.0).unwrap_or(Self::UNIX_EPOCH)
    }
}

impl From<jiff::Timestamp> for Timestamp {
    fn from(timestamp: jiff::Timestamp) -> Self {
        Self::from_millis(timestamp.as_millisecond())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        jiff::Timestamp::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamp_is_added_subtracted_and_formatted() {
        let moment = Timestamp::from_millis(1_795_260_166_250);
        assert_eq!(moment.to_string(), "2026-11-21T11:22:46.25Z");
        let later = moment.after(Duration::from_millis(1_750));
        assert_eq!(later.as_seconds(), 1_795_260_168);
        assert_eq!(later.since(moment), Duration::from_millis(1_750));
        assert_eq!(moment.since(later), Duration::ZERO);
        let json = serde_json::to_string(&later).unwrap();
        assert_eq!(json, "\"2026-11-21T11:22:48Z\"");
        assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), later);
    }

    #[test]
    fn timestamp_stays_in_range() {
        let last = Timestamp::from_millis(i64::MAX);
        assert_eq!(last.after(Duration::MAX), last);
        assert!(last.to_string().starts_with("9999-12-30T"), "{last}");
        assert_eq!(Timestamp::from_millis(i64::MIN).since(last), Duration::ZERO);
    }
}
