//! Rules for vCPUs that are to be unplugged.

use super::VcpuRules;
use crate::hotplug::history::Call;
use crate::hotplug::lifecycle;
use crate::hotplug::outcome::{Conclusion, Ruling};
use crate::hotplug::vcpus::diagnosis;
use crate::hotplug::{Action, Verdict};
use crate::units::counted;

impl VcpuRules<'_> {
    pub(super) fn unplug(&self) -> Ruling {
        let facts = &self.facts;
        let needed = self.before - self.count;
        if !facts.kept.is_empty() {
            let status = facts.kept.iter().find_map(|id| facts.answers.get(&id));
            let status = status.map_or("failure", |(.., ost)| ost.status_text());
            let message = format!("the guest keeps {} ({status})", facts.kept.named("vCPU"));
            let diagnosis = diagnosis::kept(&facts.kept, status);
            return Ruling::Conclude(
                self.partial_unplug_or(Verdict::GuestRefused, message)
                    .because(diagnosis),
            );
        }
        if let Some((call, words)) = lifecycle::repeated_unplug_error(self.history) {
            return Ruling::Conclude(self.miscounted(call, words));
        }
        if let Some(repeated_call) = self.repeated_call() {
            return Ruling::Call(repeated_call);
        }
        let all_released = facts.released_count() >= needed;
        let message = if all_released {
            format!(
                "the guest released {}, and libvirt still counts {}",
                counted(needed, "vCPU"),
                facts.plugged
            )
        } else if self.is_lost() {
            "the connection or virtnode ended during the call: whether the guest was asked \
                 to release vCPUs is not known"
                .to_owned()
        } else {
            "the guest has not answered the unplug request, which is still pending".to_owned()
        };
        let finding = if all_released {
            Conclusion::new(Verdict::Pending, message)
        } else {
            self.partial_unplug_or(Verdict::Pending, message)
        };
        self.wait_or(
            finding,
            if all_released {
                "libvirt to notice that the vCPUs were released"
            } else {
                "the guest to release the vCPUs"
            },
        )
    }

    /// Returns the finding for a libvirt that keeps counting a released vCPU until its daemon is
    /// restarted.
    fn miscounted(&self, call: &Call, words: &str) -> Conclusion {
        let facts = &self.facts;
        let by_agent = facts
            .guest
            .map_or(0, |guest| facts.plugged.saturating_sub(guest.vcpus.len()));
        let gone = facts.released_count().max(by_agent);
        let verdict = match gone {
            0 => return lifecycle::error_finding(self.history, call, words),
            gone if gone < self.before - self.count => Verdict::PartiallyApplied,
            _ => Verdict::Pending,
        };
        let message = format!(
            "the guest released {}, and libvirt still counts {}",
            counted(gone, "vCPU"),
            facts.plugged
        );
        Conclusion::new(verdict, message).because(diagnosis::miscounted(words))
    }

    /// True if libvirt may or may not have received the last call.
    fn is_lost(&self) -> bool {
        let last = self.history.calls().last();
        last.is_some_and(Call::is_lost)
    }

    fn partial_unplug_or(&self, verdict: Verdict, message: String) -> Conclusion {
        let by_libvirt = self.before.saturating_sub(self.facts.plugged);
        match by_libvirt.max(self.facts.released_count()) {
            0 => Conclusion::new(verdict, message),
            gone => Conclusion::new(
                Verdict::PartiallyApplied,
                format!("{} unplugged; {message}", counted(gone, "vCPU")),
            ),
        }
    }

    /// Returns a repeated call that makes libvirt notice a released vCPU.
    ///
    /// libvirt up to 12.3 takes a finished unplug of a vCPU for one that timed out, and keeps
    /// counting the vCPU. A repeated call finds that QEMU no longer has it, and continues with the
    /// next (measured). So the call is repeated if another source reported a released vCPU since
    /// the last call, and once if there is no such source.
    fn repeated_call(&self) -> Option<Action> {
        let (facts, history) = (&self.facts, self.history);
        let last = history
            .calls()
            .last()
            .filter(|call| call.is_pending_unplug())?;
        if self.over || !history.may_call() || facts.plugged <= self.count {
            return None;
        }
        let plugged = history.latest().domain.vcpus.plugged_ids();
        let gone_since = facts
            .gone
            .iter()
            .any(|(id, at)| plugged.contains(*id) && *at >= last.started);
        let fewer_by_agent = facts
            .guest
            .is_some_and(|guest| guest.vcpus.len() < facts.plugged)
            && self.observed_since(Some(last.started));
        let blind = !history.monitor_events && facts.guest.is_none();
        let tries = history.calls().len();
        let again = gone_since
            || (fewer_by_agent && tries <= usize::try_from(self.before).unwrap_or(usize::MAX))
            || (blind && tries < 2);
        again.then(|| last.action.clone())
    }

    /// Does the same after the verdict, when others may have changed the domain: only if every
    /// requested vCPU is known to be released and libvirt still counts exactly the original ones.
    pub(super) fn settle(&self) -> Option<Action> {
        let (facts, history) = (&self.facts, self.history);
        let last = history.calls().last()?;
        let (returned, _) = last.returned.as_ref()?;
        let had = history.before.domain.vcpus.plugged_ids();
        let has = facts.latest?.domain.vcpus.plugged_ids();
        let useless = lifecycle::repeated_unplug_error(history).is_some();
        if history.running_call().is_some() || !history.may_call() || has != had || useless {
            return None;
        }
        let needed = usize::try_from(self.before - self.count).unwrap_or(usize::MAX);
        let heard = facts.gone.iter().filter(|(id, _)| has.contains(**id));
        let by_event = heard.clone().count() >= needed
            && facts.kept.is_empty()
            && heard.clone().any(|(_, at)| *at >= last.started);
        let by_agent = facts
            .guest
            .is_some_and(|guest| guest.vcpus.len() == self.count)
            && self.observed_since(Some(*returned));
        // Each released vCPU is a reason to repeat the call once; this bounds the number of calls.
        let calls = history.calls().len();
        let bound = usize::try_from(self.before).unwrap_or(usize::MAX);
        (by_event || by_agent && calls <= bound).then(|| last.action.clone())
    }
}
