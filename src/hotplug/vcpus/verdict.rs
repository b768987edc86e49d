//! Rules for vCPUs: the next step and the verdict.

mod plug;
mod unplug;

use super::evidence::Signs;
use crate::hotplug::history::Return;
use crate::hotplug::lifecycle;
use crate::hotplug::outcome::{Finding, Ruling};
use crate::hotplug::{Action, Answer, History, Require, Verdict};
use crate::units::Timestamp;
use crate::units::{counted, seconds};

/// Returns the next step of a request for `count` vCPUs.
pub(super) fn judge(history: &History, count: u32, online: bool, now: Timestamp) -> Ruling {
    let case = Case {
        history,
        signs: Signs::read(history),
        count,
        before: history.before.domain.vcpus.plugged(),
        now,
        over: history.is_over(now),
    };
    if let Some(proof) = case.proof() {
        return Ruling::Found(Finding::new(Verdict::Verified, proof));
    }
    if let Some(finding) = lifecycle::at_deadline(history).filter(|_| case.over) {
        return Ruling::Found(finding);
    }
    if !history.latest().domain.state.runs() {
        return Ruling::wait(history.latest().awaiting());
    }
    if count < case.before {
        case.unplug()
    } else {
        case.plug(online)
    }
}

/// Returns the call that makes libvirt notice, after the verdict, that the guest released vCPUs.
pub(super) fn settle(history: &History, count: u32) -> Option<Action> {
    let case = Case {
        history,
        signs: Signs::read(history),
        count,
        before: history.before.domain.vcpus.plugged(),
        now: history.latest().at,
        over: true,
    };
    (count < case.before).then(|| case.settle()).flatten()
}

struct Case<'h> {
    history: &'h History,
    signs: Signs<'h>,
    count: u32,
    before: u32,
    now: Timestamp,
    over: bool,
}

impl Case<'_> {
    /// Returns the reason why the request is proven.
    fn proof(&self) -> Option<String> {
        let Self { signs, count, .. } = self;
        let require = self.history.terms.require;
        let shown = signs.latest.is_some() && signs.plugged == *count;
        if *count < self.before {
            let needed = self.before - count;
            let let_go = signs.gone_count() >= needed && signs.kept.is_empty();
            return match require {
                Require::Online => shown,
                Require::Acknowledged => shown || let_go,
                Require::Accepted => shown || self.submitted(),
            }
            .then(|| {
                if shown {
                    format!(
                        "{} gone, {count} left{}",
                        counted(needed, "vCPU"),
                        self.took()
                    )
                } else if let_go {
                    format!("the guest let {} go", counted(needed, "vCPU"))
                } else {
                    "libvirt has passed the request on to the guest".to_owned()
                }
            });
        }
        if !shown {
            return None;
        }
        // If the agent sees fewer CPUs, no other source counts.
        let seen_by_guest = signs.guest.is_none_or(|guest| guest.vcpus.len() >= *count);
        let what = match count - self.before {
            0 => format!("{} plugged already", counted(*count, "vCPU")),
            added => format!("{} added", counted(added, "vCPU")),
        };
        let used = match signs.guest {
            Some(guest) => (guest.online.len() == *count && guest.vcpus.len() == *count)
                .then(|| format!("{what}, all {count} online in the guest{}", self.took())),
            None => (signs.counts_time && signs.all_run())
                .then(|| format!("{what}, all {count} seen running{}", self.took())),
        };
        match require {
            Require::Accepted => {
                (!self.history.plan_is_running()).then(|| format!("{what}, by libvirt's word"))
            }
            Require::Acknowledged => used.or_else(|| {
                let answered =
                    !signs.added.is_empty() && signs.answered(Answer::Added) == signs.added;
                let has = signs.guest.is_some_and(|guest| guest.vcpus.len() >= *count);
                (seen_by_guest && (answered || has))
                    .then(|| format!("{what}, confirmed by the guest{}", self.took()))
            }),
            Require::Online => used,
        }
    }

    fn took(&self) -> String {
        match (self.history.calls().first(), self.signs.latest) {
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
    fn looked_after(&self, moment: Option<Timestamp>) -> bool {
        match (moment, self.signs.latest) {
            (Some(moment), Some(latest)) => latest.at >= moment,
            _ => false,
        }
    }

    /// Returns the finding at the deadline, and waits before.
    fn wait_or(&self, finding: Finding, awaiting: &str) -> Ruling {
        if self.over {
            Ruling::Found(finding)
        } else {
            Ruling::wait(awaiting)
        }
    }
}
