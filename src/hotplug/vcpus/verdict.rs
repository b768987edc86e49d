//! Rules for vCPUs: the next step and the verdict.

mod plug;
mod unplug;

use super::evidence::VcpuFacts;
use crate::domain::IdSet;
use crate::hotplug::history::Return;
use crate::hotplug::lifecycle;
use crate::hotplug::outcome::{Conclusion, Ruling};
use crate::hotplug::vcpus::diagnosis;
use crate::hotplug::{AcpiAnswer, Action, GuestVcpus, History, Observation, Require, Verdict};
use crate::units::Timestamp;
use crate::units::{counted, seconds};

/// Returns the next step of a request for `count` vCPUs.
pub(super) fn judge(history: &History, count: u32, online: bool, now: Timestamp) -> Ruling {
    let rules = VcpuRules {
        history,
        facts: VcpuFacts::read(history),
        count,
        before: history.before.domain.vcpus.plugged(),
        now,
        over: history.is_over(now),
    };
    if let Some(proof) = rules.proof() {
        return Ruling::Conclude(Conclusion::new(Verdict::Verified, proof));
    }
    if let Some(finding) = lifecycle::at_deadline(history).filter(|_| rules.over) {
        return Ruling::Conclude(finding);
    }
    if let Some(finding) = rules.changed_by_another() {
        return Ruling::Conclude(finding);
    }
    if !history.latest().domain.state.runs() {
        return Ruling::wait(history.latest().awaiting());
    }
    if count < rules.before {
        rules.unplug()
    } else {
        rules.plug(online)
    }
}

/// Returns the call that makes libvirt notice, after the verdict, that the guest released vCPUs.
pub(super) fn settle(history: &History, count: u32) -> Option<Action> {
    let rules = VcpuRules {
        history,
        facts: VcpuFacts::read(history),
        count,
        before: history.before.domain.vcpus.plugged(),
        now: history.latest().at,
        over: true,
    };
    (count < rules.before).then(|| rules.settle()).flatten()
}

struct VcpuRules<'h> {
    history: &'h History,
    facts: VcpuFacts<'h>,
    count: u32,
    before: u32,
    now: Timestamp,
    over: bool,
}

impl VcpuRules<'_> {
    /// Returns the reason why the request is proven.
    fn proof(&self) -> Option<String> {
        let Self { facts, count, .. } = self;
        let require = self.history.terms.require;
        let shown = facts.latest.is_some() && facts.plugged == *count;
        if *count < self.before {
            let needed = self.before - count;
            let let_go = facts.released_count() >= needed && facts.kept.is_empty();
            let observed = facts.latest.is_some();
            return match require {
                // Nobody makes an older libvirt notice it.
                Require::Online => shown || (self.history.by_another && let_go && observed),
                Require::Acknowledged => shown || let_go,
                Require::Accepted => shown || self.submitted(),
            }
            .then(|| {
                if shown {
                    format!(
                        "{} unplugged, {count} left{}",
                        counted(needed, "vCPU"),
                        self.elapsed()
                    )
                } else if let_go && self.history.by_another {
                    format!(
                        "the guest released {}, and libvirt still counts {}{}",
                        counted(needed, "vCPU"),
                        facts.plugged,
                        self.elapsed()
                    )
                } else if let_go {
                    format!("the guest released {}", counted(needed, "vCPU"))
                } else {
                    "libvirt has passed the request on to the guest".to_owned()
                }
            });
        }
        if !shown {
            return None;
        }
        // If the agent sees fewer CPUs, no other source counts.
        let seen_by_guest = facts.guest.is_none_or(|guest| guest.vcpus.len() >= *count);
        let what = match count - self.before {
            0 => format!("{} plugged already", counted(*count, "vCPU")),
            added => format!("{} added", counted(added, "vCPU")),
        };
        let used = match facts.guest {
            // A vCPU that the guest uses has run, whatever its agent reports.
            Some(guest) => (guest.online.len() == *count
                && guest.vcpus.len() == *count
                && facts.never_ran.is_empty())
            .then(|| format!("{what}, all {count} online in the guest{}", self.elapsed())),
            // An agent that claims too many proves nothing, and still counts against the guest.
            None if facts
                .false_claim
                .is_some_and(|guest| guest.online.len() < *count) =>
            {
                None
            }
            None => (facts.counts_time && facts.all_run())
                .then(|| format!("{what}, all {count} seen running{}", self.elapsed())),
        };
        match require {
            Require::Accepted => {
                (!self.history.plan_is_running()).then(|| format!("{what}, as libvirt reports"))
            }
            Require::Acknowledged => used.or_else(|| {
                let answered =
                    !facts.added.is_empty() && facts.answered(AcpiAnswer::Added) == facts.added;
                let has = facts.guest.is_some_and(|guest| guest.vcpus.len() >= *count);
                // The agent of a paused guest may have fewer CPUs to tell of when it runs again.
                let latest = &self.history.latest().domain;
                let is_muted = !latest.state.runs() && latest.agent.may_answer();
                (seen_by_guest && (has || answered && !is_muted))
                    .then(|| format!("{what}, confirmed by the guest{}", self.elapsed()))
            }),
            Require::Online => used,
        }
    }

    /// Returns a finding if another client changed the vCPUs after libvirt had what was requested, or
    /// while the guest was to take it. The guest is not to blame for that.
    fn changed_by_another(&self) -> Option<Conclusion> {
        // Then a further change is another target.
        if self.history.by_another {
            return None;
        }
        let (facts, count, before) = (&self.facts, self.count, self.before);
        let latest = facts.latest?;
        let reached = self.reached_at();
        let is_after = reached.is_some_and(|reached| latest.at >= reached);
        // Between the old number and the requested one libvirt may still be at work.
        let is_beyond = facts.plugged > before.max(count) || facts.plugged < before.min(count);
        if facts.plugged != count && (is_after || is_beyond) {
            let message = if is_after {
                format!(
                    "another client changed the domain to {} after libvirt had set {count}",
                    counted(facts.plugged, "vCPU"),
                )
            } else {
                format!(
                    "another client changed the domain to {} during the operation",
                    counted(facts.plugged, "vCPU"),
                )
            };
            let diagnosis = diagnosis::changed_by_another(facts.plugged);
            return Some(Conclusion::new(Verdict::HypervisorError, message).because(diagnosis));
        }
        // This operation asks the guest to release nothing.
        let released = facts.leaving.iter().filter(|id| !facts.kept.contains(*id));
        let released: IdSet = released.filter(|id| self.is_lacking(*id)).collect();
        if count >= before && !released.is_empty() {
            let gone = released.named("vCPU");
            let message = format!(
                "another client asked the guest to release {gone}, and it did: {} are left, and libvirt \
                 still counts {}",
                facts.plugged.saturating_sub(released.len()),
                facts.plugged,
            );
            return Some(
                Conclusion::new(Verdict::HypervisorError, message)
                    .because(diagnosis::released_for_another(&gone)),
            );
        }
        None
    }

    /// True if a vCPU left QEMU, or its guest has fewer CPUs than libvirt counts.
    fn is_lacking(&self, id: u32) -> bool {
        let fewer = |guest: &GuestVcpus| guest.vcpus.len() < self.facts.plugged;
        self.facts.gone.contains_key(&id) || self.facts.guest.is_some_and(fewer)
    }

    /// Returns the time from which libvirt had what was requested.
    fn reached_at(&self) -> Option<Timestamp> {
        let called = self.history.calls().iter().find_map(|call| {
            let is_ours = matches!(call.action, Action::SetVcpus { .. });
            match call.returned {
                Some((at, Return::Done)) if is_ours => Some(at),
                _ => None,
            }
        });
        let shown = |seen: &&Observation| seen.domain.vcpus.plugged() == self.count;
        let shown = self.history.since_epoch().find(shown).map(|seen| seen.at);
        [called, shown].into_iter().flatten().min()
    }

    fn elapsed(&self) -> String {
        match (self.history.calls().first(), self.facts.latest) {
            (Some(call), Some(latest)) => {
                format!(" after {}", seconds(latest.ended().since(call.started)))
            }
            _ => String::new(),
        }
    }

    /// True if libvirt accepted the unplug request.
    fn submitted(&self) -> bool {
        self.history.calls().last().is_some_and(|call| {
            matches!(call.returned, Some((_, Return::Done))) || call.is_pending_unplug()
        })
    }

    /// True if the last observation was started after that time.
    fn observed_since(&self, moment: Option<Timestamp>) -> bool {
        match (moment, self.facts.latest) {
            (Some(moment), Some(latest)) => latest.at >= moment,
            _ => false,
        }
    }

    /// Returns the finding at the deadline, and waits before.
    fn wait_or(&self, finding: Conclusion, awaiting: &str) -> Ruling {
        if self.over {
            Ruling::Conclude(finding)
        } else {
            Ruling::wait(awaiting)
        }
    }
}
