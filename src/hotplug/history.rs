//! The observations, events and calls of one operation, in order. The journal keeps the history,
//! and the verdict depends on nothing else.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Action, Amount, Event, HotplugRequest, Observation, Ost, Plan, Terms, Verdict};
use crate::domain::CallError;
use crate::units::Timestamp;

/// Maximum numbers of entries, so that a long operation does not grow without bound.
const MAX_OBSERVATIONS: usize = 96;
const MAX_EVENTS: usize = 512;
/// The same for a change by another client: many domains may be watched at a time.
const MAX_EXTERNAL_OBSERVATIONS: usize = 16;
const MAX_CALLS: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    pub request: HotplugRequest,
    pub terms: Terms,
    /// The calls that the preflight planned.
    pub plan: Plan,
    /// The last observation before the first call.
    pub before: Observation,
    /// The result of the last finished operation on the same resource of the domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<Earlier>,
    /// True if QEMU's events are received. Without them there are no answers through ACPI.
    pub monitor_events: bool,
    /// True if another client made the change. Its calls stand for that client's, and none is made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_another: bool,
    observations: Vec<Observation>,
    events: Vec<(Timestamp, Event)>,
    calls: Vec<Call>,
    contact: Option<(Timestamp, Contact)>,
}

/// The result of an earlier operation on the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Earlier {
    pub verdict: Verdict,
    pub after: Amount,
}

/// A call to the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    pub action: Action,
    /// The time just before the call.
    pub started: Timestamp,
    /// The time and the result; `None` while the call runs.
    pub returned: Option<(Timestamp, Return)>,
}

/// The result of a call that returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Return {
    /// The hypervisor did its part. That proves nothing about the guest.
    Done,
    Failed(CallError),
}

impl Call {
    pub(super) fn error(&self) -> Option<&CallError> {
        match &self.returned {
            Some((_, Return::Failed(error))) => Some(error),
            Some((_, Return::Done)) | None => None,
        }
    }

    /// True if the hypervisor may still be working on the call.
    pub(super) fn is_running(&self) -> bool {
        self.returned.is_none() || matches!(self.error(), Some(CallError::Overdue { .. }))
    }

    /// True if only observing the domain shows what became of the call.
    pub(super) fn is_lost(&self) -> bool {
        self.error().is_some_and(CallError::is_lost)
    }

    /// True if libvirt stopped waiting for an unplug that it had requested.
    pub(super) fn is_pending_unplug(&self) -> bool {
        matches!(self.error(), Some(CallError::UnplugPending { .. }))
    }
}

/// The reason why a domain could not be observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Contact {
    /// The domain does not exist, or no longer does.
    Absent,
    /// The hypervisor did not answer, with the reason.
    Unreachable(String),
    /// The hypervisor answers, but not about this domain: a job holds it.
    Held,
}

impl History {
    pub fn new(
        request: HotplugRequest,
        terms: Terms,
        plan: Plan,
        before: Observation,
        monitor_events: bool,
    ) -> Self {
        Self {
            request,
            terms,
            plan,
            before,
            earlier: None,
            monitor_events,
            by_another: false,
            observations: Vec::new(),
            events: Vec::new(),
            calls: Vec::new(),
            contact: None,
        }
    }

    /// Makes the history of a change by another client. Its calls count as carried out at `at`.
    pub(super) fn by_another(
        request: HotplugRequest,
        terms: Terms,
        before: Observation,
        monitor_events: bool,
    ) -> Self {
        Self {
            by_another: true,
            ..Self::new(request, terms, Plan::default(), before, monitor_events)
        }
    }

    /// Sets the target of a change by another client. Evidence counts from the first change on.
    pub(super) fn set_target(&mut self, request: HotplugRequest, plan: Plan, at: Timestamp) {
        let started = self.calls.first().map_or(at, |first| first.started);
        let call = |action: &Action| Call {
            action: action.clone(),
            started,
            returned: Some((started, Return::Done)),
        };
        self.calls = plan.actions.iter().map(call).collect();
        self.request = request;
        self.plan = plan;
    }

    /// Appends an observation. A long history keeps the first, the last, and some in between.
    pub fn observed(&mut self, observation: Observation) {
        self.contact = None;
        self.add_remembered_answers(&observation);
        self.observations.push(observation);
        let most = if self.by_another {
            MAX_EXTERNAL_OBSERVATIONS
        } else {
            MAX_OBSERVATIONS
        };
        if self.observations.len() > most {
            let recent = most / 2;
            let mut index = 0;
            self.observations.retain(|_| {
                index += 1;
                index > recent || index % 2 == 1
            });
        }
    }

    /// Adds the guest's answers that QEMU remembers and no event reported, as of the observation.
    /// After a reset an answer may be that of the guest before it.
    fn add_remembered_answers(&mut self, observation: &Observation) {
        let (Some(before), Some(now)) = (&self.before.answers, &observation.answers) else {
            return;
        };
        if observation.at < self.epoch() || self.reset().is_some() {
            return;
        }
        let heard = |answer: &Ost| {
            self.events()
                .any(|(_, event)| matches!(event, Event::Ost(heard) if heard.is_of_slot(answer)))
        };
        let news: Vec<Ost> = now
            .iter()
            .filter(|answer| !before.contains(answer) && !heard(answer))
            .cloned()
            .collect();
        for answer in news {
            self.happened(observation.ended(), Event::Ost(answer));
        }
    }

    /// Records that the domain could not be observed.
    pub fn out_of_contact(&mut self, at: Timestamp, contact: Contact) {
        self.contact = Some((at, contact));
    }

    /// Appends an event.
    pub fn happened(&mut self, at: Timestamp, event: Event) {
        if self.events.len() < MAX_EVENTS {
            self.events.push((at, event));
        }
    }

    /// Appends a call that is about to be made. Write the journal before making the call.
    ///
    /// Calls that prepare the evidence come before the first change, so the observation before that
    /// change is the last one after them.
    pub fn called(&mut self, at: Timestamp, action: Action) {
        let amount = |seen: &Observation| self.request.amount_of(seen).without_guest();
        let is_first_change = action.changes_guest() && self.changes().next().is_none();
        if is_first_change && amount(self.latest()) == amount(&self.before) {
            self.before = self.latest().clone();
        }
        if self.calls.len() < MAX_CALLS {
            self.calls.push(Call {
                action,
                started: at,
                returned: None,
            });
        }
    }

    /// Records the result of the last call. An overdue call may return a second time.
    pub fn returned(&mut self, at: Timestamp, how: Return) {
        if let Some(call) = self.calls.last_mut() {
            call.returned = Some((at, how));
        }
    }

    /// Records that the last call, if it still runs, will never return: virtnode was restarted.
    pub fn lost(&mut self, at: Timestamp) {
        if self.running_call().is_some() {
            let error = CallError::Lost("virtnode ended during the call".to_owned());
            self.returned(at, Return::Failed(error));
        }
    }

    /// True if the answer to the last call was lost and it is too early to know if the call was
    /// carried out. Observe the domain again.
    pub fn is_unsettled(&self) -> bool {
        self.calls
            .last()
            .is_some_and(|call| super::lifecycle::is_unsettled(self, call))
    }

    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Returns the calls that change what the guest has.
    pub(super) fn changes(&self) -> impl DoubleEndedIterator<Item = &Call> {
        self.calls.iter().filter(|call| call.action.changes_guest())
    }

    /// True if the history has room for another call. No operation needs that many.
    pub(super) fn may_call(&self) -> bool {
        self.calls.len() < MAX_CALLS
    }

    /// Returns the number of times that the answer to this call was lost.
    pub(super) fn times_lost(&self, action: &Action) -> usize {
        let lost = |call: &&Call| call.action == *action && call.is_lost();
        self.calls.iter().filter(lost).count()
    }

    /// Returns the number of observations that were started since a time.
    pub(super) fn observations_since(&self, moment: Timestamp) -> usize {
        let since = self.observations.iter().rev();
        since.take_while(|seen| seen.at >= moment).count()
    }

    /// Returns the largest number of vCPUs that a call of this operation asked for.
    pub(super) fn most_vcpus(&self) -> u32 {
        let asked = self.calls.iter().filter_map(|call| match call.action {
            Action::SetVcpus { count, .. } => Some(count),
            _ => None,
        });
        asked.max().unwrap_or(0)
    }

    /// True if the hypervisor has carried out this call.
    pub(super) fn is_done(&self, action: &Action) -> bool {
        let done = |call: &Call| {
            call.action == *action && matches!(call.returned, Some((_, Return::Done)))
        };
        self.calls.iter().any(done)
    }

    pub(super) fn running_call(&self) -> Option<&Call> {
        self.calls.last().filter(|call| call.is_running())
    }

    /// Returns the first planned action that was never called.
    pub(super) fn next_planned(&self) -> Option<&Action> {
        self.plan
            .actions
            .iter()
            .find(|action| self.calls.iter().all(|call| call.action != **action))
    }

    /// Returns the time from which evidence counts: the first change, or a later reset of the guest.
    pub(super) fn epoch(&self) -> Timestamp {
        let start = self
            .changes()
            .next()
            .map_or(self.before.at, |call| call.started);
        self.reset().map_or(start, |reset| reset.max(start))
    }

    /// Returns the end of the guest's grace period, counted from `since` or from the last resume: a
    /// paused guest cannot act.
    pub(super) fn patient_until(&self, since: Timestamp, patience: Duration) -> Timestamp {
        let resumed = self.events().filter(|(_, event)| **event == Event::Resumed);
        let resumed = resumed.map(|(at, _)| at).max();
        resumed.map_or(since, |at| at.max(since)).after(patience)
    }

    /// Returns the time of the guest's last reset.
    pub(super) fn reset(&self) -> Option<Timestamp> {
        self.events
            .iter()
            .rfind(|(at, event)| *event == Event::Reset && *at >= self.before.at)
            .map(|(at, _)| *at)
    }

    /// Returns the last observation.
    pub fn latest(&self) -> &Observation {
        self.observations.last().unwrap_or(&self.before)
    }

    /// Returns the last observation if it was started after the epoch.
    pub(super) fn fresh(&self) -> Option<&Observation> {
        Some(self.latest()).filter(|latest| latest.at >= self.epoch())
    }

    /// Returns the observations since the epoch, in order. If nothing was called, this includes the
    /// one before.
    pub(super) fn since_epoch(&self) -> impl Iterator<Item = &Observation> {
        let epoch = self.epoch();
        std::iter::once(&self.before)
            .chain(&self.observations)
            .filter(move |observation| observation.at >= epoch)
    }

    /// Returns all observations, including the one before the first call.
    pub(super) fn observations(&self) -> impl Iterator<Item = &Observation> {
        std::iter::once(&self.before).chain(&self.observations)
    }

    /// Returns the events since the epoch.
    pub(super) fn events(&self) -> impl DoubleEndedIterator<Item = (Timestamp, &Event)> {
        let epoch = self.epoch();
        self.all_events().filter(move |(at, _)| *at >= epoch)
    }

    /// Returns the events since the operation started.
    pub(super) fn all_events(&self) -> impl DoubleEndedIterator<Item = (Timestamp, &Event)> {
        self.events
            .iter()
            .filter(|(at, _)| *at >= self.before.at)
            .map(|(at, event)| (*at, event))
    }

    /// Returns the reason why the domain cannot be observed at present.
    pub(super) fn contact(&self) -> Option<&Contact> {
        self.contact.as_ref().map(|(_, contact)| contact)
    }

    /// True if part of the plan was not called or has not returned.
    pub(super) fn plan_is_running(&self) -> bool {
        self.next_planned().is_some() || self.running_call().is_some()
    }

    /// Returns the last error text of the hypervisor, even if a later call succeeded.
    pub(super) fn last_error(&self) -> Option<String> {
        let mut texts = self.calls.iter().rev().filter_map(Call::error);
        texts.find_map(CallError::text).map(str::to_owned)
    }

    /// True if the deadline has passed.
    pub(super) fn is_over(&self, now: Timestamp) -> bool {
        now >= self.terms.deadline
    }
}
