//! Timestamps of operations.

use std::time::{Instant as StdInstant, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::units::Timestamp;

/// A monotonic clock: it reads the wall clock once and counts from there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Timestamp,
    at: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = since.map_or(0, |since| since.as_millis());
        Self {
            origin: Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX)),
            at: Instant::now(),
        }
    }

    /// Returns this clock, advanced if it runs behind a timestamp of another clock.
    pub(crate) fn not_before(self, timestamp: Timestamp) -> Self {
        let behind = timestamp.since(self.now());
        Self {
            origin: self.origin.after(behind),
            at: self.at,
        }
    }

    pub(crate) fn now(self) -> Timestamp {
        self.timestamp(Instant::now())
    }

    fn timestamp(self, at: Instant) -> Timestamp {
        self.origin.after(at.saturating_duration_since(self.at))
    }

    /// Returns the timestamp at which an event was received, never later than now.
    pub(crate) fn received(self, at: StdInstant) -> Timestamp {
        self.timestamp(Instant::from_std(at)).min(self.now())
    }

    /// Returns the instant of a timestamp, or now if it has passed.
    pub(crate) fn instant(self, timestamp: Timestamp) -> Instant {
        Instant::now() + timestamp.since(self.now())
    }
}
