//! Points in time, given from outside: nothing here looks at a clock.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point in time to the millisecond, shown and serialized as RFC 3339 in UTC.
///
/// Within one operation moments must not go backwards; whoever makes them adds what a monotonic
/// clock says to where the wall clock stood once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "jiff::Timestamp", into = "jiff::Timestamp")]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since 1970; cut to what RFC 3339 can write.
    pub fn from_millis(millis: i64) -> Self {
        // whole seconds, well inside
        let first = (jiff::Timestamp::MIN.as_second() + 1) * 1000;
        let last = (jiff::Timestamp::MAX.as_second() - 1) * 1000;
        Self(millis.clamp(first, last))
    }

    /// Milliseconds since 1970.
    pub fn as_millis(self) -> i64 {
        self.0
    }

    /// Whole seconds since 1970.
    pub fn as_seconds(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// The moment that much later; the last there is if that is too far.
    pub fn after(self, span: Duration) -> Self {
        let millis = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        Self::from_millis(self.0.saturating_add(millis))
    }

    /// How long after `earlier` this is; nothing if it is not.
    pub fn since(self, earlier: Self) -> Duration {
        let millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }
}

impl From<Timestamp> for jiff::Timestamp {
    fn from(moment: Timestamp) -> Self {
        // cannot fail: every moment is within the range
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
    fn moments_are_counted_and_shown() {
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
    fn no_moment_is_out_of_range() {
        let last = Timestamp::from_millis(i64::MAX);
        assert_eq!(last.after(Duration::MAX), last);
        assert!(last.to_string().starts_with("9999-12-30T"), "{last}");
        assert_eq!(Timestamp::from_millis(i64::MIN).since(last), Duration::ZERO);
    }
}
