//! The watch of a changed amount of vCPUs or memory, until its verdict and after it.

use std::cmp::Ordering;
use std::time::Duration;

use super::change::{ChangeNumber, ExternalAction, ExternalChange};
use super::clock::GraceClock;
use crate::domain::DomainState;
use crate::hotplug::{
    Amount, Contact, Event, History, HotplugRequest, Observation, Patience, Plan, Require, Step,
    Terms, Verdict, judge,
};
use crate::units::Timestamp;

/// Pauses between looks after a verdict that may be corrected, each twice as long as the one before.
const FOLLOW_PAUSES: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(300));

/// A change of an amount that is judged, or was judged and may be corrected.
#[derive(Debug)]
pub(super) struct AmountWatch {
    pub(super) number: ChangeNumber,
    pub(super) change: ExternalChange,
    history: History,
    pub(super) clock: GraceClock,
    /// The latest time to judge again, by the rules.
    until: Option<Timestamp>,
    follow: FollowLooks,
}

/// The looks after a verdict.
#[derive(Debug, Clone, Copy)]
pub(super) struct FollowLooks {
    next: Timestamp,
    pause: Duration,
}

/// The result of judging a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judged {
    /// Nothing new for a reader of the record.
    Same,
    /// The record changed.
    Changed,
    /// There is nothing more to follow.
    Ended,
}

impl FollowLooks {
    pub(super) fn start(now: Timestamp) -> Self {
        let pause = FOLLOW_PAUSES.0;
        Self {
            next: now.after(pause),
            pause,
        }
    }

    pub(super) fn looked(&mut self, now: Timestamp) {
        if now >= self.next {
            self.pause = (self.pause * 2).min(FOLLOW_PAUSES.1);
            self.next = now.after(self.pause);
        }
    }

    pub(super) fn next(self) -> Timestamp {
        self.next
    }
}

impl AmountWatch {
    /// Starts a watch at `before`. [`Self::set_target`] gives it a target, unless it is a state that
    /// was found.
    pub(super) fn new(
        number: ChangeNumber,
        request: HotplugRequest,
        before: Observation,
        noticed: Timestamp,
        clock: GraceClock,
        patience: Patience,
        found: bool,
    ) -> Self {
        let resource = request.kind().into();
        let terms = Terms {
            require: Require::Online,
            deadline: clock.deadline(noticed),
            patience,
        };
        Self {
            number,
            change: ExternalChange::new(resource, ExternalAction::Plug, noticed, found),
            history: History::by_another(request, terms, before, true),
            clock,
            until: None,
            follow: FollowLooks::start(noticed),
        }
    }

    /// Sets what the hypervisor now has as the target. `from` is the amount that it replaces.
    pub(super) fn set_target(
        &mut self,
        request: HotplugRequest,
        plan: Plan,
        from: Amount,
        at: Timestamp,
    ) {
        let is_less = request.amount().compare(from) == Some(Ordering::Less);
        self.change.action = if is_less {
            ExternalAction::Unplug
        } else {
            ExternalAction::Plug
        };
        self.change.before = Some(request.amount_of(&self.history.before));
        self.change.requested = Some(request.amount());
        self.history.set_target(request, plan, at);
        self.clock.restart(at);
        self.until = None;
    }

    pub(super) fn target(&self) -> Amount {
        self.history.request.amount()
    }

    /// True before the verdict.
    pub(super) fn is_open(&self) -> bool {
        self.change.verdict.is_none()
    }

    /// Returns the observation before the first change.
    pub(super) fn before(&self) -> &Observation {
        &self.history.before
    }

    pub(super) fn latest(&self) -> &Observation {
        self.history.latest()
    }

    pub(super) fn happened(&mut self, at: Timestamp, event: Event) {
        if event == Event::Reset {
            self.clock.restart(at);
            self.follow = FollowLooks::start(at);
        }
        self.history.happened(at, event);
    }

    pub(super) fn observed(&mut self, seen: Observation) {
        self.clock.looked(seen.at);
        self.follow.looked(seen.at);
        self.history.observed(seen);
    }

    pub(super) fn is_absent(&mut self, now: Timestamp) {
        self.history.out_of_contact(now, Contact::Absent);
    }

    pub(super) fn next_look(&self, now: Timestamp) -> Timestamp {
        if !self.is_open() {
            return self.follow.next();
        }
        let until = self.until.filter(|until| {
            let seen = self.latest().at;
            self.clock.runs() && *until > seen && *until < self.clock.deadline(now)
        });
        let next = self.clock.next_look(now);
        until.map_or(next, |until| until.min(next))
    }

    /// Judges the watch by what was observed so far.
    pub(super) fn judge(&mut self, now: Timestamp) -> Judged {
        if self.is_open() {
            let deadline = self.clock.deadline(now);
            let has_last_look = self.clock.runs() && self.latest().at >= deadline;
            self.history.terms.deadline = if has_last_look {
                deadline
            } else {
                deadline.max(now.after(Duration::from_millis(1)))
            };
        }
        let outcome = match judge(&self.history, now) {
            Step::Done(outcome) => outcome,
            Step::Wait { awaiting, until } => {
                self.until = Some(until);
                let news = self.change.awaiting.as_ref() != Some(&awaiting);
                if self.is_open() && news {
                    self.change.awaiting = Some(awaiting);
                    return Judged::Changed;
                }
                return Judged::Same;
            }
            // Nothing is called for another client.
            Step::Call(_) => return Judged::Same,
        };
        let is_proven = outcome.verdict == Verdict::Verified;
        let stopped = outcome.verdict == Verdict::DomainNotRunning;
        if stopped && self.has_ended() {
            if self.is_open() {
                self.change.conclude_outcome(*outcome, now);
            }
            return Judged::Ended;
        }
        if !self.is_open() {
            if is_proven {
                self.change.conclude_outcome(*outcome, now);
                return Judged::Ended;
            }
            return Judged::Same;
        }
        // While the clock stands still only a proof or the end of the domain counts.
        let counts = is_proven || self.clock.runs();
        if !counts || stopped {
            return Judged::Same;
        }
        self.change.conclude_outcome(*outcome, now);
        self.follow = FollowLooks::start(now);
        if self.change.verdict.is_some_and(Verdict::may_change) {
            Judged::Changed
        } else {
            Judged::Ended
        }
    }

    /// True if the domain ended, restarted or no longer exists.
    fn has_ended(&self) -> bool {
        let latest = &self.latest().domain;
        let stopped = |(_, event): (_, &Event)| matches!(event, Event::Stopped(_));
        self.history.contact() == Some(&Contact::Absent)
            || self.history.all_events().any(stopped)
            || latest.id != self.history.before.domain.id
            || matches!(latest.state, DomainState::ShutOff | DomainState::Crashed)
    }
}
