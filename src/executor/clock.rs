//! The time as operations note it.

use std::time::{Instant as StdInstant, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::units::Timestamp;

/// A clock that never goes backwards: it asks the wall clock once, and counts from there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    origin: Timestamp,
    at: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = since.map_or(0, |since| since.as_millis());
        Self {
            origin: Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX)),
            at: Instant::now(),
        }
    }

    /// The same clock, put forward if it were before that moment: what another clock noted.
    pub(super) fn not_before(self, moment: Timestamp) -> Self {
        let behind = moment.since(self.now());
        Self {
            origin: self.origin.after(behind),
            at: self.at,
        }
    }

    pub(super) fn now(self) -> Timestamp {
        self.moment(Instant::now())
    }

    pub(super) fn moment(self, at: Instant) -> Timestamp {
        self.origin.after(at.saturating_duration_since(self.at))
    }

    /// When that was heard; never later than now.
    pub(super) fn heard(self, at: StdInstant) -> Timestamp {
        self.moment(Instant::from_std(at)).min(self.now())
    }

    /// When that moment comes; now if it has passed.
    pub(super) fn instant(self, moment: Timestamp) -> Instant {
        Instant::now() + moment.since(self.now())
    }
}
