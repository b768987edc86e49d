//! Rules for vCPUs: the next step and the verdict.

mod plug;
mod unplug;

use super::evidence::VcpuFacts;
use crate::hotplug::history::Return;
use crate::hotplug::lifecycle;
use crate::hotplug::outcome::{Conclusion, Ruling};
use crate::hotplug::{AcpiAnswer, Action, History, Require, Verdict};
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
            return match require {
                Require::Online => shown,
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
            Some(guest) => (guest.online.len() == *count && guest.vcpus.len() == *count)
                .then(|| format!("{what}, all {count} online in the guest{}", self.elapsed())),
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
                (seen_by_guest && (answered || has))
                    .then(|| format!("{what}, confirmed by the guest{}", self.elapsed()))
            }),
            Require::Online => used,
        }
    }

    fn elapsed(&self) -> String {
        match (self.history.calls().first(), self.facts.latest) {
            (Some(call), Some(latest)) => {
                format!(" after {}", seconds(latest.at.since(call.started)))
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
