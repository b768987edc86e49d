//! Rules for vCPUs that were plugged, or were plugged before.

use super::VcpuRules;
use crate::domain::CallError;
use crate::domain::IdSet;
use crate::hotplug::history::Call;
use crate::hotplug::outcome::{Conclusion, Ruling};
use crate::hotplug::vcpus::diagnosis;
use crate::hotplug::{AcpiAnswer, Action, Agent, GuestVcpus, Observation, Verdict};
use crate::units::Timestamp;
use crate::units::counted;

/// Maximum number of requests to the agent to bring CPUs online. Each is for other CPUs.
const MAX_ONLINE_CALLS: usize = 16;

impl VcpuRules<'_> {
    pub(super) fn plug(&self, online: bool) -> Ruling {
        let Some(latest) = self.facts.latest else {
            return Ruling::wait("an observation of the domain");
        };
        if self.facts.plugged != self.count {
            let finding = Conclusion::new(
                Verdict::HypervisorError,
                format!(
                    "libvirt shows {} where {} were asked for",
                    counted(self.facts.plugged, "vCPU"),
                    self.count
                ),
            );
            return self.wait_or(finding, "libvirt to plug the vCPUs");
        }
        if let Some(finding) = self.refused(latest) {
            return Ruling::Conclude(finding);
        }
        match self.facts.guest {
            Some(guest) if !guest.offline().is_empty() => self.offline(&guest.offline(), online),
            Some(guest) if guest.online.len() == self.count => {
                self.wait_or(self.silent(), "the new vCPUs to run in the guest")
            }
            Some(_) => self.wait_or(self.silent(), "the guest to take the vCPUs"),
            None => match self.unqueried() {
                Some(finding) => self.wait_or(finding, "the guest agent to be queried"),
                None => self.without_agent(),
            },
        }
    }

    /// Returns a finding if the guest rejected or dropped CPUs.
    fn refused(&self, latest: &Observation) -> Option<Conclusion> {
        let facts = &self.facts;
        let patience = self.history.terms.patience;
        let refused = facts.answered(AcpiAnswer::NotAdded);
        if !refused.is_empty() && (facts.all_answered() || self.over) {
            let status = refused
                .iter()
                .next()
                .and_then(|id| facts.answers.get(&id))
                .map_or("failure", |(.., ost)| ost.status_text());
            let message = format!("the guest refused {}", refused.named("vCPU"));
            return Some(
                self.partial_or(Verdict::GuestRefused, message)
                    .because(diagnosis::not_added(&refused, status)),
            );
        }
        // The guest confirmed more CPUs than it has. Only an observation that was started well
        // after the last answer counts against it.
        let guest = facts.guest?;
        let confirmed = self
            .history
            .patient_until(facts.last_answer()?, patience.appear);
        let has = guest.vcpus.len();
        if has >= self.count || !facts.all_answered() || latest.at < confirmed {
            return None;
        }
        // The CPUs that the guest has may still come online.
        let may_come = !guest.offline().is_empty() && latest.at < confirmed.after(patience.offline);
        if may_come && !self.over {
            return None;
        }
        // It took every new CPU and lacks some that libvirt counted before.
        let added = self.facts.added.len();
        let had = self.history.before.guest().map(|guest| guest.vcpus.len());
        if let Some(had) = had.filter(|had| *had < self.before && has >= had.saturating_add(added))
        {
            let message = format!(
                "the guest has {has} of the {} that libvirt counts, and had {had} of {} before",
                self.count, self.before
            );
            return Some(
                self.partial_or(Verdict::GuestSilent, message)
                    .because(diagnosis::fewer_than_counted(self.history.by_another)),
            );
        }
        let message = format!(
            "the guest has {} of the {} that are plugged: it dropped the others",
            has, self.count
        );
        Some(
            self.partial_or(Verdict::GuestRefused, message)
                .because(diagnosis::dropped(has, self.count)),
        )
    }

    /// The agent reports CPUs that the guest does not use.
    fn offline(&self, offline: &IdSet, online: bool) -> Ruling {
        let calls: Vec<&Call> = self
            .history
            .calls()
            .iter()
            .filter(|call| is_online(call))
            .collect();
        // A lost request may not have reached the agent, and repeating it does no harm.
        let tried = |ids: &IdSet| {
            calls.iter().any(|call| {
                !call.is_lost() && matches!(&call.action, Action::OnlineVcpus { ids: called } if ids.without(called).is_empty())
            })
        };
        if online
            && !self.over
            && self.history.running_call().is_none()
            && !tried(offline)
            && calls.len() < MAX_ONLINE_CALLS
        {
            return Ruling::Call(Action::OnlineVcpus {
                ids: offline.clone(),
            });
        }
        let patience = self.history.terms.patience.offline;
        // The start of the guest's time to bring the CPUs online.
        let called_at = calls
            .iter()
            .filter_map(|call| call.returned.as_ref())
            .map(|(at, _)| *at)
            .max();
        let since = called_at.or_else(|| self.first_seen_offline());
        let until = since.map(|since| self.history.patient_until(since, patience));
        let mut errors = calls.iter().rev().filter_map(|call| call.error());
        let error = errors.find_map(CallError::text);
        // An agent that failed will fail again.
        let hopeless = error.is_some() && self.observed_since(called_at);
        if self.over || hopeless || until.is_some_and(|until| self.observed_since(Some(until))) {
            let message = format!(
                "the guest has {} and leaves {} offline",
                counted(self.count, "vCPU"),
                offline
            );
            let diagnosis = if calls.is_empty() {
                diagnosis::offline(offline, self.history.by_another)
            } else {
                diagnosis::cannot_be_onlined(offline, error)
            };
            return Ruling::Conclude(
                self.partial_or(Verdict::GuestOffline, message)
                    .because(diagnosis),
            );
        }
        let awaiting = format!("the guest to bring {} online", offline.named("CPU"));
        Ruling::wait_until_observed_after(awaiting, until, self.now)
    }

    /// Returns the time when the agent first reported all CPUs, and some of them offline.
    fn first_seen_offline(&self) -> Option<Timestamp> {
        self.history
            .since_epoch()
            .find(|seen| {
                seen.guest().is_some_and(|guest| {
                    guest.vcpus.len() >= self.count && guest.online.len() < self.count
                })
            })
            .map(|seen| seen.at)
    }

    /// There is no answer from the agent: only ACPI and the run times remain.
    fn without_agent(&self) -> Ruling {
        let facts = &self.facts;
        let confirmed = facts.all_answered() && !facts.added.is_empty();
        let Some(last) = facts.last_answer().filter(|_| confirmed) else {
            return self.wait_or(self.silent(), "a reaction of the guest");
        };
        let until = self
            .history
            .patient_until(last, self.history.terms.patience.offline);
        let awaiting = "the new vCPUs to run in the guest";
        let runs_briefly = facts
            .added
            .iter()
            .any(|id| facts.running_briefly.contains(id));
        if !self.over && (runs_briefly || !self.observed_since(Some(until))) {
            return Ruling::wait_until_observed_after(awaiting, Some(until), self.now);
        }
        if !facts.counts_time {
            return Ruling::Conclude(
                Conclusion::new(
                    Verdict::Unverifiable,
                    "the guest confirmed the vCPUs, and no source shows if it uses them",
                )
                .because(diagnosis::no_source(&self.tried(), self.agent())),
            );
        }
        let idle: IdSet = facts.added.without(&facts.running);
        // An idle CPU that existed before does not count against the new ones, but proves nothing
        // either: wait until the deadline.
        if idle.is_empty() && !self.over {
            return Ruling::wait("the other vCPUs to run in the guest");
        }
        let idle = if idle.is_empty() { self.idle() } else { idle };
        let message = format!("the guest confirmed the vCPUs, and {}", not_running(&idle));
        Ruling::Conclude(
            self.partial_or(Verdict::GuestOffline, message)
                .because(diagnosis::never_ran(&idle, self.agent())),
        )
    }

    fn agent(&self) -> &Agent {
        &self.history.latest().agent
    }

    /// Returns the finding if the agent could not be asked: the other sources then do not count
    /// against the guest.
    fn unqueried(&self) -> Option<Conclusion> {
        let Agent::NotQueried(why) = self.agent() else {
            return None;
        };
        let message = "libvirt plugged the vCPUs, and the guest agent was not queried";
        Some(
            self.partial_or(Verdict::Unverifiable, message.to_owned())
                .because(diagnosis::not_queried(why)),
        )
    }

    fn idle(&self) -> IdSet {
        let ids = self.history.latest().domain.vcpus.plugged_ids();
        ids.without(&self.facts.running)
    }

    /// Returns the finding at the deadline without evidence for or against success.
    fn silent(&self) -> Conclusion {
        let facts = &self.facts;
        let tried = self.tried();
        let contradicts =
            |guest: &&GuestVcpus| guest.vcpus.len() > self.count || guest.online.len() > self.count;
        if let Some(guest) = facts.guest.or(facts.false_claim).filter(contradicts) {
            return Conclusion::new(
                Verdict::Unverifiable,
                format!(
                    "libvirt counts {} and the guest's agent {}: the two contradict each other",
                    counted(self.count, "vCPU"),
                    guest.vcpus.len()
                ),
            );
        }
        let all_online = |guest: &GuestVcpus| guest.online.len() == self.count;
        if facts.guest.is_some_and(all_online) && !facts.never_ran.is_empty() {
            return Conclusion::new(
                Verdict::Unverifiable,
                format!(
                    "the guest agent reports {count} CPUs online, and {} never ran",
                    facts.never_ran.named("vCPU"),
                    count = self.count
                ),
            )
            .because(diagnosis::contradicted(&facts.never_ran));
        }
        let sources = facts.guest.is_some() || facts.counts_time || self.history.monitor_events;
        if !sources {
            return Conclusion::new(
                Verdict::Unverifiable,
                "libvirt plugged the vCPUs, and this domain has no other source of evidence",
            )
            .because(diagnosis::no_source(&tried, self.agent()));
        }
        if self.count == self.before && facts.guest.is_none() {
            let idle = self.idle();
            return Conclusion::new(
                Verdict::GuestSilent,
                format!("the vCPUs are plugged, and {}", not_running(&idle)),
            )
            .because(diagnosis::never_ran(&idle, self.agent()));
        }
        let nothing_called = self.count == self.before && self.history.calls().is_empty();
        if let Some(guest) = facts.guest.filter(|_| nothing_called) {
            return Conclusion::new(
                Verdict::GuestSilent,
                format!(
                    "libvirt counts {} and the guest has {}",
                    counted(self.count, "vCPU"),
                    guest.vcpus.len()
                ),
            )
            .because(diagnosis::fewer_than_counted(self.history.by_another));
        }
        let message = match (facts.all_answered() && !facts.added.is_empty(), facts.guest) {
            (true, Some(_)) => "the guest confirmed the vCPUs, and its agent does not see them yet",
            _ => "libvirt plugged the vCPUs, and the guest did not react before the deadline",
        };
        let emulated = self.history.before.domain.virt_type == "qemu";
        self.partial_or(Verdict::GuestSilent, message.to_owned())
            .because(diagnosis::silent_plug(&tried, emulated))
    }

    /// Returns PartiallyApplied if part of the request is in use, or else the given verdict.
    fn partial_or(&self, verdict: Verdict, message: String) -> Conclusion {
        let facts = &self.facts;
        let gained = match facts.guest {
            Some(guest) => {
                let before = self.history.before.guest();
                let used = before.map_or(self.before, |guest| guest.online.len());
                guest.online.len().saturating_sub(used)
            }
            None => facts.added.len() - facts.added.without(&facts.running).len(),
        };
        match gained {
            0 => Conclusion::new(verdict, message),
            gained => Conclusion::new(
                Verdict::PartiallyApplied,
                format!("{} more in use; {message}", counted(gained, "vCPU")),
            ),
        }
    }

    /// Describes the sources that were tried.
    fn tried(&self) -> String {
        let facts = &self.facts;
        let latest = self.history.latest();
        let agent = match (&latest.agent, latest.domain.agent.may_answer()) {
            (Agent::Answered(_), _) if facts.false_claim.is_some() => {
                "the guest agent claims CPUs that the domain does not have"
            }
            (Agent::Answered(_), _) => "the guest agent answers",
            (Agent::Silent(_), _) => "the guest agent does not answer",
            (Agent::Refused(_), _) => "the guest agent rejects guest-get-vcpus",
            (Agent::NotQueried(_), _) => "the guest agent was not queried",
            (_, true) => "the guest agent was not asked",
            (_, false) => "no guest agent",
        };
        let ost = match (self.history.monitor_events, facts.last_answer()) {
            (false, _) => "ACPI's answers cannot be had",
            (true, None) => "no answer through ACPI",
            (true, Some(_)) => "answers through ACPI",
        };
        let time = if facts.counts_time {
            "time that vCPUs ran"
        } else {
            "no time of vCPUs in the statistics"
        };
        format!("{agent}, {ost}, {time}")
    }
}

fn not_running(idle: &IdSet) -> String {
    let verb = if idle.len() == 1 { "has" } else { "have" };
    format!("{} {verb} not been running", idle.named("vCPU"))
}

fn is_online(call: &Call) -> bool {
    matches!(call.action, Action::OnlineVcpus { .. })
}
