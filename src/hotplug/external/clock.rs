//! The time that a guest has had to follow a change.

use std::time::Duration;

use crate::units::Timestamp;

/// Times of looks, counted by the clock. The last look is at the end of the grace period.
const LOOKS: [Duration; 6] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(30),
];

/// Interval between looks while the clock stands still: an event normally starts it again.
const STILL_LOOKS: Duration = Duration::from_secs(30);

/// Maximum number of times that a watch gets its grace period again.
const MAX_RESTARTS: u32 = 20;

/// The grace period of one change. It stands still while the guest cannot act.
#[derive(Debug, Clone)]
pub(super) struct GraceClock {
    grace: Duration,
    /// Time that passed before `since`.
    used: Duration,
    /// `None` while the clock stands still.
    since: Option<Timestamp>,
    /// Time on the clock from which looks are counted: the change, or the end of the last standstill.
    origin: Duration,
    /// Time on the clock at the start of the last look.
    looked: Duration,
    /// Start of the last look.
    looked_at: Timestamp,
    restarts: u32,
}

impl GraceClock {
    pub(super) fn new(grace: Duration, now: Timestamp, runs: bool) -> Self {
        Self {
            grace,
            used: Duration::ZERO,
            since: runs.then_some(now),
            origin: Duration::ZERO,
            looked: Duration::ZERO,
            looked_at: now,
            restarts: 0,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.since.is_some()
    }

    /// Starts or stops the clock.
    pub(super) fn set_running(&mut self, now: Timestamp, runs: bool) {
        match (self.since, runs) {
            (Some(_), true) | (None, false) => {}
            (Some(_), false) => {
                self.used = self.used(now);
                self.since = None;
            }
            (None, true) => {
                self.since = Some(now);
                // A guest that can act again is looked at as after the change.
                (self.origin, self.looked) = (self.used, self.used);
            }
        }
    }

    /// Gives the whole grace period again.
    pub(super) fn restart(&mut self, now: Timestamp) {
        if self.restarts < MAX_RESTARTS {
            self.restarts += 1;
            self.used = Duration::ZERO;
            self.since = self.since.map(|_| now);
            (self.origin, self.looked) = (Duration::ZERO, Duration::ZERO);
        }
    }

    fn used(&self, now: Timestamp) -> Duration {
        let since = self.since.map_or(Duration::ZERO, |since| now.since(since));
        self.used.saturating_add(since)
    }

    /// Returns the end of the grace period, if the clock runs on from now.
    pub(super) fn deadline(&self, now: Timestamp) -> Timestamp {
        let left = self.grace.saturating_sub(self.used);
        self.since.unwrap_or(now).after(left)
    }

    /// Records a look that was started then.
    pub(super) fn looked(&mut self, at: Timestamp) {
        self.looked = self.used(at);
        self.looked_at = at;
    }

    /// Returns the time of the next look.
    pub(super) fn next_look(&self, now: Timestamp) -> Timestamp {
        let Some(since) = self.since else {
            return self.looked_at.after(STILL_LOOKS);
        };
        let at = |point: Duration| since.after(point.saturating_sub(self.used));
        let points = LOOKS.map(|point| self.origin.saturating_add(point));
        let next = points
            .into_iter()
            .find(|point| *point > self.looked && *point < self.grace);
        next.map_or_else(|| self.deadline(now), at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn looks(clock: &mut GraceClock, until: i64) -> Vec<i64> {
        let mut times = Vec::new();
        let mut now = at(0);
        while now < at(until) {
            now = clock.next_look(now);
            clock.looked(now);
            times.push(now.as_millis());
        }
        times
    }

    #[test]
    fn looks_follow_the_change_and_end_with_the_grace() {
        let mut clock = GraceClock::new(GRACE, at(0), true);
        let expected = [500, 1_000, 2_000, 5_000, 15_000, 30_000, 60_000];
        assert_eq!(looks(&mut clock, 60_000), expected);
    }

    #[test]
    fn clock_stands_still_while_the_guest_cannot_act() {
        let mut clock = GraceClock::new(GRACE, at(0), true);
        clock.looked(at(10_000));
        clock.set_running(at(20_000), false);
        assert_eq!(clock.deadline(at(500_000)), at(540_000));
        clock.set_running(at(900_000), true);
        assert_eq!(clock.deadline(at(900_000)), at(940_000));
        assert_eq!(clock.next_look(at(900_000)), at(900_500));
    }

    #[test]
    fn grace_is_given_again_a_limited_number_of_times() {
        let mut clock = GraceClock::new(GRACE, at(0), true);
        for minute in 0..1000 {
            clock.restart(at(minute * 30_000));
        }
        assert!(clock.deadline(at(0)) < at(1_000_000));
    }
}
