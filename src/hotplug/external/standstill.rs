//! The reasons for which a guest cannot act on a change.

use std::time::Duration;

use crate::domain::Job;
use crate::hotplug::{Agent, Observation};
use crate::units::Timestamp;

/// Maximum time that a guest spends in its firmware and boots, unless its agent connects earlier. A guest
/// that boots finds what was plugged before by itself.
const BOOT: Duration = Duration::from_secs(60);

/// Everything that keeps the guest from acting, or virtnode from seeing it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Standstill {
    paused: bool,
    /// A job holds the domain.
    job: bool,
    unreachable: bool,
    /// An operation of virtnode holds the domain.
    held: bool,
    boots_until: Option<Timestamp>,
}

impl Standstill {
    /// True if the guest can act.
    pub(super) fn runs(self, now: Timestamp) -> bool {
        let boots = self.boots_until.is_some_and(|until| now < until);
        !(self.paused || self.job || self.unreachable || self.held || boots)
    }

    pub(super) fn is_paused(self) -> bool {
        self.paused
    }

    pub(super) fn is_unreachable(self) -> bool {
        self.unreachable
    }

    pub(super) fn is_held(self) -> bool {
        self.held
    }

    pub(super) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub(super) fn set_job(&mut self, job: bool) {
        self.job = job;
    }

    pub(super) fn set_unreachable(&mut self, unreachable: bool) {
        self.unreachable = unreachable;
    }

    pub(super) fn set_held(&mut self, held: bool) {
        self.held = held;
    }

    pub(super) fn boots(&mut self, now: Timestamp) {
        self.boots_until = Some(now.after(BOOT));
    }

    pub(super) fn has_booted(&mut self) {
        self.boots_until = None;
    }

    /// Takes what an observation shows.
    pub(super) fn observed(&mut self, seen: &Observation) {
        self.paused = !seen.domain.state.runs();
        self.job = seen.job.is_some_and(Job::holds_changes);
        self.unreachable = false;
        if matches!(seen.agent, Agent::Answered(_)) {
            self.has_booted();
        }
    }
}
