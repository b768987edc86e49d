//! Everything that was seen and done in one operation, in order. It can be written to the journal
//! and read again: what is judged is only this.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Action, Event, HotplugRequest, Observation, Ost, Plan, Terms};
use crate::domain::CallError;
use crate::units::Timestamp;

/// Bounds for what is kept; an operation that takes its time is looked at many times.
const MOST_OBSERVATIONS: usize = 96;
const MOST_EVENTS: usize = 512;
const MOST_CALLS: usize = 256;

/// The history of one operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// What was asked for.
    pub request: HotplugRequest,
    /// How much proof, and by when.
    pub terms: Terms,
    /// What the preflight decided to call.
    pub plan: Plan,
    /// What was seen before anything was called.
    pub before: Observation,
    /// Whether QEMU's own events reach us; without them ACPI's answers do not.
    pub monitor_events: bool,
    observations: Vec<Observation>,
    events: Vec<(Timestamp, Event)>,
    calls: Vec<Call>,
    contact: Option<(Timestamp, Contact)>,
}

/// A call that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// What was called.
    pub action: Action,
    /// When it was about to be called.
    pub started: Timestamp,
    /// When and how it came back; `None` while it runs.
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

/// Why the domain could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Contact {
    /// The hypervisor knows no such domain (any more).
    Absent,
    /// The hypervisor could not be asked, and why.
    Unreachable(String),
    /// The hypervisor answers, but not about this domain: something is being done to it.
    Held,
}

impl History {
    /// An operation of which only the beginning is known.
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
            monitor_events,
            observations: Vec::new(),
            events: Vec::new(),
            calls: Vec::new(),
            contact: None,
        }
    }

    /// Notes what was seen of the domain. Of very many observations only the first, the last and
    /// some between them are kept.
    pub fn observed(&mut self, observation: Observation) {
        self.contact = None;
        self.learn(&observation);
        self.observations.push(observation);
        if self.observations.len() > MOST_OBSERVATIONS {
            let recent = MOST_OBSERVATIONS / 2;
            let mut index = 0;
            self.observations.retain(|_| {
                index += 1;
                index > recent || index % 2 == 1
            });
        }
    }

    /// What QEMU remembers of the guest's answers and nobody heard counts as heard when it was
    /// looked at. After a reset it may be the answer of who was there before.
    fn learn(&mut self, observation: &Observation) {
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
            self.happened(observation.at, Event::Ost(answer));
        }
    }

    /// Notes that the domain could not be looked at.
    pub fn out_of_contact(&mut self, at: Timestamp, contact: Contact) {
        self.contact = Some((at, contact));
    }

    /// Notes an event of this domain.
    pub fn happened(&mut self, at: Timestamp, event: Event) {
        if self.events.len() < MOST_EVENTS {
            self.events.push((at, event));
        }
    }

    /// Notes that a call is about to be made. To be written to the journal before it is made.
    pub fn called(&mut self, at: Timestamp, action: Action) {
        if self.calls.len() < MOST_CALLS {
            self.calls.push(Call {
                action,
                started: at,
                returned: None,
            });
        }
    }

    /// Notes how the last call came back. A call that was overdue may do so twice.
    pub fn returned(&mut self, at: Timestamp, how: Return) {
        if let Some(call) = self.calls.last_mut() {
            call.returned = Some((at, how));
        }
    }

    /// Notes that nobody will hear any more how the last call came back, if that is not known yet:
    /// who made it has ended.
    pub fn lost(&mut self, at: Timestamp) {
        if self.running_call().is_some() {
            let error = CallError::Lost("virtnode ended during the call".to_owned());
            self.returned(at, Return::Failed(error));
        }
    }

    /// Whether the last call's answer was lost and it is too early to tell what became of it: look
    /// again.
    pub fn is_unsettled(&self) -> bool {
        self.calls
            .last()
            .is_some_and(|call| super::lifecycle::is_unsettled(self, call))
    }

    /// The calls made, in order.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// Whether there is room for another call; no operation needs as many.
    pub(super) fn may_call(&self) -> bool {
        self.calls.len() < MOST_CALLS
    }

    /// How often the answer to such a call was lost.
    pub(super) fn times_lost(&self, action: &Action) -> usize {
        let lost = |call: &&Call| call.action == *action && call.is_lost();
        self.calls.iter().filter(lost).count()
    }

    /// How many looks were begun since that moment.
    pub(super) fn looks_since(&self, moment: Timestamp) -> usize {
        let since = self.observations.iter().rev();
        since.take_while(|seen| seen.at >= moment).count()
    }

    /// The call that is running.
    pub(super) fn running_call(&self) -> Option<&Call> {
        self.calls.last().filter(|call| call.is_running())
    }

    /// The first action of the plan that was never called. What became of one that was, is
    /// observed.
    pub(super) fn next_planned(&self) -> Option<&Action> {
        self.plan
            .actions
            .iter()
            .find(|action| self.calls.iter().all(|call| call.action != **action))
    }

    /// From when on evidence counts: the first call; after a reset of the guest that.
    pub(super) fn epoch(&self) -> Timestamp {
        let start = self
            .calls
            .first()
            .map_or(self.before.at, |call| call.started);
        self.reset().map_or(start, |reset| reset.max(start))
    }

    /// Until when a guest that could act since `since` is given time. While the domain was
    /// paused it could not.
    pub(super) fn patient_until(&self, since: Timestamp, patience: Duration) -> Timestamp {
        let resumed = self.events().filter(|(_, event)| **event == Event::Resumed);
        let resumed = resumed.map(|(at, _)| at).max();
        resumed.map_or(since, |at| at.max(since)).after(patience)
    }

    /// When the guest was reset, if it was.
    pub(super) fn reset(&self) -> Option<Timestamp> {
        self.events
            .iter()
            .rfind(|(at, event)| *event == Event::Reset && *at >= self.before.at)
            .map(|(at, _)| *at)
    }

    /// The last that was seen of the domain.
    pub fn latest(&self) -> &Observation {
        self.observations.last().unwrap_or(&self.before)
    }

    /// The last that was seen, if it was seen after the epoch began.
    pub(super) fn fresh(&self) -> Option<&Observation> {
        Some(self.latest()).filter(|latest| latest.at >= self.epoch())
    }

    /// All that was seen since the epoch began, in order. What was seen before counts where
    /// nothing was called.
    pub(super) fn since_epoch(&self) -> impl Iterator<Item = &Observation> {
        let epoch = self.epoch();
        std::iter::once(&self.before)
            .chain(&self.observations)
            .filter(move |observation| observation.at >= epoch)
    }

    /// All that was seen, from before the first call on.
    pub(super) fn observations(&self) -> impl Iterator<Item = &Observation> {
        std::iter::once(&self.before).chain(&self.observations)
    }

    /// The events since the epoch began.
    pub(super) fn events(&self) -> impl DoubleEndedIterator<Item = (Timestamp, &Event)> {
        let epoch = self.epoch();
        self.all_events().filter(move |(at, _)| *at >= epoch)
    }

    /// All events since the operation began.
    pub(super) fn all_events(&self) -> impl DoubleEndedIterator<Item = (Timestamp, &Event)> {
        self.events
            .iter()
            .filter(|(at, _)| *at >= self.before.at)
            .map(|(at, event)| (*at, event))
    }

    /// Why the domain cannot be looked at, if that is so now.
    pub(super) fn contact(&self) -> Option<&Contact> {
        self.contact.as_ref().map(|(_, contact)| contact)
    }

    /// Whether something of the plan is not done: not called, or not come back.
    pub(super) fn plan_is_running(&self) -> bool {
        self.next_planned().is_some() || self.running_call().is_some()
    }

    /// The last error that libvirt gave, whether or not it was the last word.
    pub(super) fn last_error(&self) -> Option<String> {
        let mut texts = self.calls.iter().rev().filter_map(Call::error);
        texts.find_map(CallError::text).map(str::to_owned)
    }

    /// Whether the time is over.
    pub(super) fn is_over(&self, now: Timestamp) -> bool {
        now >= self.terms.deadline
    }
}
