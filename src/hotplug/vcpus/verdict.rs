//! What the signs prove about vCPUs.

use super::diagnosis;
use super::evidence::Signs;
use crate::domain::IdSet;
use crate::hotplug::history::{Call, Return};
use crate::hotplug::outcome::{Finding, Ruling, counted, seconds};
use crate::hotplug::trouble::{self, Failure};
use crate::hotplug::{
    Action, Agent, Answer, GuestVcpus, History, Moment, Observation, Require, Verdict,
};

/// How often CPUs are told to come online; each time it is others.
const MOST_ONLINE_CALLS: usize = 16;

/// What to do next about a request for `count` vCPUs.
pub(in crate::hotplug) fn judge(
    history: &History,
    count: u32,
    online: bool,
    now: Moment,
) -> Ruling {
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
    if let Some(finding) = trouble::at_deadline(history).filter(|_| case.over) {
        return Ruling::Found(finding);
    }
    match count < case.before {
        true => case.unplug(),
        false => case.plug(online),
    }
}

struct Case<'h> {
    history: &'h History,
    signs: Signs<'h>,
    count: u32,
    before: u32,
    now: Moment,
    over: bool,
}

impl Case<'_> {
    /// Why everything that was asked for is proven, if it is.
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
            .then(|| match shown {
                true => format!(
                    "{} gone, {count} left{}",
                    counted(needed, "vCPU"),
                    self.took()
                ),
                false if let_go => format!("the guest let {} go", counted(needed, "vCPU")),
                false => "libvirt has passed the request on to the guest".to_owned(),
            });
        }
        if !shown {
            return None;
        }
        // An agent that sees less is believed before everything that says more.
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

    /// Whether libvirt has taken the request for an unplug.
    fn submitted(&self) -> bool {
        let returned = self
            .history
            .calls()
            .last()
            .and_then(|call| call.returned.as_ref());
        match returned {
            Some((_, Return::Done)) => true,
            Some((_, Return::Failed { number, message })) => {
                matches!(trouble::failure(*number, message), Failure::UnplugTimedOut)
            }
            _ => false,
        }
    }

    // --- plug -----------------------------------------------------------------------------------

    fn plug(&self, online: bool) -> Ruling {
        let Some(latest) = self.signs.latest else {
            return Ruling::wait("a look at the domain");
        };
        if self.signs.plugged != self.count {
            let finding = Finding::new(
                Verdict::HypervisorError,
                format!(
                    "libvirt shows {} where {} were asked for",
                    counted(self.signs.plugged, "vCPU"),
                    self.count
                ),
            );
            return self.wait_or(finding, "libvirt to plug the vCPUs");
        }
        if let Some(finding) = self.refused(latest) {
            return Ruling::Found(finding);
        }
        match self.signs.guest {
            Some(guest) if !guest.offline().is_empty() => self.offline(&guest.offline(), online),
            Some(_) => self.wait_or(self.silent(), "the guest to take the vCPUs"),
            None => self.unseen(),
        }
    }

    /// The guest said no, or has thrown CPUs away.
    fn refused(&self, latest: &Observation) -> Option<Finding> {
        let signs = &self.signs;
        let patience = self.history.terms.patience;
        let refused = signs.answered(Answer::NotAdded);
        if !refused.is_empty() && (signs.all_answered() || self.over) {
            let status = refused
                .iter()
                .next()
                .and_then(|id| signs.answers.get(&id))
                .map_or("failure", |(.., ost)| ost.status_text());
            let message = format!("the guest refused vCPUs {refused}");
            return Some(
                self.partly_or(Verdict::GuestRefused, message)
                    .because(diagnosis::not_added(&refused, status)),
            );
        }
        // The guest confirmed more CPUs than it has. Only a look that was begun well after the
        // last answer counts against it.
        let guest = signs.guest?;
        let confirmed = signs.last_answer()?.after(patience.appear);
        let has = guest.vcpus.len();
        if has >= self.count || !signs.all_answered() || latest.at < confirmed {
            return None;
        }
        // Those that it has may still come online.
        let may_come = !guest.offline().is_empty() && latest.at < confirmed.after(patience.offline);
        if may_come && !self.over {
            return None;
        }
        let message = format!(
            "the guest has {} of the {} that are plugged: it threw the others away",
            has, self.count
        );
        Some(
            self.partly_or(Verdict::GuestRefused, message)
                .because(diagnosis::thrown_away(has, self.count)),
        )
    }

    /// The agent sees CPUs that the guest does not use.
    fn offline(&self, offline: &IdSet, online: bool) -> Ruling {
        let calls: Vec<&Call> = self
            .history
            .calls()
            .iter()
            .filter(|call| is_online(call))
            .collect();
        let tried = |ids: &IdSet| {
            calls.iter().any(|call| {
            matches!(&call.action, Action::OnlineVcpus { ids: told } if ids.without(told).is_empty())
        })
        };
        if online
            && !self.over
            && self.history.running_call().is_none()
            && !tried(offline)
            && calls.len() < MOST_ONLINE_CALLS
        {
            return Ruling::Call(Action::OnlineVcpus {
                ids: offline.clone(),
            });
        }
        let patience = self.history.terms.patience.offline;
        // From when on nothing more is awaited but that the guest brings them online.
        let told = calls
            .iter()
            .filter_map(|call| call.returned.as_ref())
            .map(|(at, _)| *at)
            .max();
        let since = told.or_else(|| self.first_seen_offline());
        let until = since.map(|since| since.after(patience));
        let error = calls.iter().rev().find_map(|call| match &call.returned {
            Some((_, Return::Failed { message, .. })) => Some(message.as_str()),
            _ => None,
        });
        // An agent that says it cannot will not do so later.
        let hopeless = error.is_some() && self.looked_after(told);
        if self.over || hopeless || until.is_some_and(|until| self.now >= until) {
            let message = format!(
                "the guest has {} and leaves {} offline",
                counted(self.count, "vCPU"),
                offline
            );
            let diagnosis = match calls.is_empty() {
                true => diagnosis::offline(offline),
                false => diagnosis::cannot_be_onlined(offline, error),
            };
            return Ruling::Found(
                self.partly_or(Verdict::GuestOffline, message)
                    .because(diagnosis),
            );
        }
        let awaiting = format!("the guest to bring CPUs {offline} online");
        match until {
            Some(until) => Ruling::wait_until(awaiting, until),
            None => Ruling::wait(awaiting),
        }
    }

    /// Whether the last look was begun after that moment.
    fn looked_after(&self, moment: Option<Moment>) -> bool {
        match (moment, self.signs.latest) {
            (Some(moment), Some(latest)) => latest.at >= moment,
            _ => false,
        }
    }

    /// When the agent first told that the guest has all CPUs and does not use all.
    fn first_seen_offline(&self) -> Option<Moment> {
        self.history
            .since_epoch()
            .find(|seen| {
                seen.guest().is_some_and(|guest| {
                    guest.vcpus.len() >= self.count && guest.online.len() < self.count
                })
            })
            .map(|seen| seen.at)
    }

    /// The agent does not tell: ACPI's answers and the time that vCPUs ran are all there is.
    fn unseen(&self) -> Ruling {
        let signs = &self.signs;
        let confirmed = signs.all_answered() && !signs.added.is_empty();
        let Some(last) = signs.last_answer().filter(|_| confirmed) else {
            return self.wait_or(self.silent(), "a sign of the guest");
        };
        let until = last.after(self.history.terms.patience.offline);
        let awaiting = "the new vCPUs to run in the guest";
        if !self.over && self.now < until {
            return Ruling::wait_until(awaiting, until);
        }
        if !signs.counts_time {
            return Ruling::Found(
                Finding::new(
                    Verdict::Unverifiable,
                    "the guest confirmed the vCPUs, and nothing tells whether it uses them",
                )
                .because(diagnosis::no_source(&self.tried())),
            );
        }
        let idle: IdSet = signs.added.without(&signs.running);
        // A CPU that was there and has nothing to do is no sign against the new ones, only none
        // for all: it is given until the deadline.
        if idle.is_empty() && !self.over {
            return Ruling::wait("the other vCPUs to run in the guest");
        }
        let idle = if idle.is_empty() { self.idle() } else { idle };
        let message = format!("the guest confirmed the vCPUs, and {idle} have not been running");
        Ruling::Found(
            self.partly_or(Verdict::GuestOffline, message)
                .because(diagnosis::never_ran(&idle)),
        )
    }

    fn idle(&self) -> IdSet {
        let ids = self.history.latest().domain.vcpus.plugged_ids();
        ids.without(&self.signs.running)
    }

    /// The deadline, and no sign against success nor for it.
    fn silent(&self) -> Finding {
        let signs = &self.signs;
        let tried = self.tried();
        let contradicts =
            |guest: &&GuestVcpus| guest.vcpus.len() > self.count || guest.online.len() > self.count;
        if let Some(guest) = signs.guest.filter(contradicts) {
            return Finding::new(
                Verdict::Unverifiable,
                format!(
                    "libvirt counts {} and the guest's agent {}: the two contradict each other",
                    counted(self.count, "vCPU"),
                    guest.vcpus.len()
                ),
            );
        }
        let sources = signs.guest.is_some() || signs.counts_time || self.history.monitor_events;
        if !sources {
            return Finding::new(
                Verdict::Unverifiable,
                "libvirt plugged the vCPUs, and this domain has nothing that tells more",
            )
            .because(diagnosis::no_source(&tried));
        }
        if self.count == self.before && signs.guest.is_none() {
            let idle = self.idle();
            return Finding::new(
                Verdict::GuestSilent,
                format!("the vCPUs are plugged, and {idle} have not been running"),
            )
            .because(diagnosis::never_ran(&idle));
        }
        let message = match (signs.all_answered() && !signs.added.is_empty(), signs.guest) {
            (true, Some(_)) => "the guest confirmed the vCPUs, and its agent does not see them yet",
            _ => "libvirt plugged the vCPUs, and the guest gave no sign until the deadline",
        };
        self.partly_or(Verdict::GuestSilent, message.to_owned())
            .because(diagnosis::silent_plug(&tried))
    }

    /// Some of what was asked for is in use: then that is the verdict.
    fn partly_or(&self, verdict: Verdict, message: String) -> Finding {
        let signs = &self.signs;
        let gained = match signs.guest {
            Some(guest) => {
                let before = self.history.before.guest();
                let used = before.map_or(self.before, |guest| guest.online.len());
                guest.online.len().saturating_sub(used)
            }
            None => signs.added.len() - signs.added.without(&signs.running).len(),
        };
        match gained {
            0 => Finding::new(verdict, message),
            gained => Finding::new(
                Verdict::PartiallyApplied,
                format!("{} more in use; {message}", counted(gained, "vCPU")),
            ),
        }
    }

    /// The sources that were tried, for people.
    fn tried(&self) -> String {
        let signs = &self.signs;
        let latest = self.history.latest();
        let agent = match (&latest.agent, latest.domain.agent.may_answer()) {
            (Agent::Answered(_), _) => "the guest agent answers",
            (Agent::Silent(_), _) => "the guest agent does not answer",
            (_, true) => "the guest agent was not asked",
            (_, false) => "no guest agent",
        };
        let ost = match (self.history.monitor_events, signs.last_answer()) {
            (false, _) => "ACPI's answers cannot be had",
            (true, None) => "no answer through ACPI",
            (true, Some(_)) => "answers through ACPI",
        };
        let time = match signs.counts_time {
            true => "time that vCPUs ran",
            false => "no time of vCPUs in the statistics",
        };
        format!("{agent}, {ost}, {time}")
    }

    /// At the deadline that finding, until then waiting.
    fn wait_or(&self, finding: Finding, awaiting: &str) -> Ruling {
        match self.over {
            true => Ruling::Found(finding),
            false => Ruling::wait(awaiting),
        }
    }

    // --- unplug ---------------------------------------------------------------------------------

    fn unplug(&self) -> Ruling {
        let signs = &self.signs;
        let needed = self.before - self.count;
        if !signs.kept.is_empty() {
            let status = signs.kept.iter().find_map(|id| signs.answers.get(&id));
            let status = status.map_or("failure", |(.., ost)| ost.status_text());
            let message = format!("the guest keeps vCPUs {} ({status})", signs.kept);
            let diagnosis = diagnosis::kept(&signs.kept, status);
            return Ruling::Found(
                self.partly_gone_or(Verdict::GuestRefused, message)
                    .because(diagnosis),
            );
        }
        if let Some(nudge) = self.nudge() {
            return Ruling::Call(nudge);
        }
        let all_gone = signs.gone_count() >= needed;
        let message = match all_gone {
            true => format!(
                "the guest let {} go, and libvirt still counts {}",
                counted(needed, "vCPU"),
                signs.plugged
            ),
            false => "the guest has not answered the request to let vCPUs go; it stands".to_owned(),
        };
        let finding = match all_gone {
            true => Finding::new(Verdict::Pending, message),
            false => self.partly_gone_or(Verdict::Pending, message),
        };
        self.wait_or(
            finding,
            match all_gone {
                true => "libvirt to notice that the vCPUs are gone",
                false => "the guest to let the vCPUs go",
            },
        )
    }

    fn partly_gone_or(&self, verdict: Verdict, message: String) -> Finding {
        let by_libvirt = self.before.saturating_sub(self.signs.plugged);
        match by_libvirt.max(self.signs.gone_count()) {
            0 => Finding::new(verdict, message),
            gone => Finding::new(
                Verdict::PartiallyApplied,
                format!("{} gone; {message}", counted(gone, "vCPU")),
            ),
        }
    }

    /// libvirt up to 12.3 takes a finished unplug of a vCPU for one that timed out, and goes on
    /// counting the vCPU; told again, it finds out that QEMU has it no more, and goes on to the
    /// next (measured). So it is told again when something else said that a vCPU went since it
    /// was last told; where nothing else can say so, once.
    fn nudge(&self) -> Option<Action> {
        let (signs, history) = (&self.signs, self.history);
        let timed_out = |call: &&Call| {
            matches!(&call.returned, Some((_, Return::Failed { number, message }))
                if matches!(trouble::failure(*number, message), Failure::UnplugTimedOut))
        };
        let last = history.calls().last().filter(timed_out)?;
        if self.over || !history.may_call() || signs.plugged <= self.count {
            return None;
        }
        let plugged = history.latest().domain.vcpus.plugged_ids();
        let gone_since = signs
            .gone
            .iter()
            .any(|(id, at)| plugged.contains(*id) && *at >= last.started);
        let fewer_by_agent = signs
            .guest
            .is_some_and(|guest| guest.vcpus.len() < signs.plugged)
            && self.looked_after(Some(last.started));
        let blind = !history.monitor_events && signs.guest.is_none();
        let tries = history.calls().len();
        let again = gone_since
            || (fewer_by_agent && tries <= usize::try_from(self.before).unwrap_or(usize::MAX))
            || (blind && tries < 2);
        again.then(|| last.action.clone())
    }
}

fn is_online(call: &Call) -> bool {
    matches!(call.action, Action::OnlineVcpus { .. })
}
