//! What an object's status is to say, and whether that is worth a write. Pure.

use std::time::Duration;

use super::request::{Refusal, in_words};
use crate::cluster::EventKind;
use crate::cluster::objects::domain_hotplug::EvidenceStatus;
use crate::cluster::objects::{Condition, DomainHotplugStatus};
use crate::executor::SubmitError;
use crate::hotplug::Verdict;
use crate::operation::{Record, State};
use crate::units::{Timestamp, shortened};

/// How much evidence a status holds; an object of the cluster has bounds, the journal has all of it.
const MOST_EVIDENCE: usize = 200;

/// The longest text from outside that is passed on.
const LONGEST_TEXT: usize = 2000;

/// Why there is no operation for an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hold {
    /// Nothing will be done, unless the object is put right.
    Refused(Refusal),
    /// It will be taken on later.
    Later(SubmitError),
}

impl Hold {
    fn condition(&self) -> (&'static str, &'static str) {
        match self {
            Self::Refused(refusal) => ("False", refusal.reason()),
            Self::Later(SubmitError::TooMany(_)) => ("Unknown", "TooManyOperations"),
            Self::Later(_) => ("Unknown", "CannotBegin"),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Refused(refusal) => format!("nothing was done: {refusal}"),
            Self::Later(error) => format!("not taken on yet: {error}"),
        }
    }
}

/// The status of an object that was not taken on.
pub(super) fn held(hold: &Hold, generation: i64, now: Timestamp) -> DomainHotplugStatus {
    let (accepted, reason) = hold.condition();
    let message = hold.message();
    let succeeded = match hold {
        Hold::Refused(_) => "False",
        Hold::Later(_) => "Unknown",
    };
    let conditions = Conditions {
        generation,
        all: Vec::new(),
    };
    DomainHotplugStatus {
        observed_generation: Some(generation),
        message: Some(message.clone()),
        conditions: conditions
            .and("Accepted", accepted, reason, &message, now)
            .and("Progressing", "False", reason, &message, now)
            .and("Succeeded", succeeded, reason, &message, now)
            .all,
        ..DomainHotplugStatus::default()
    }
}

/// The status of an object whose operation is that one. `taken_on` is the generation of the object
/// when it was taken on, `changed` whether its spec is another one by now.
pub(super) fn of(record: &Record, taken_on: i64, changed: bool) -> DomainHotplugStatus {
    let request = in_words(&record.request);
    let message = match (&record.message, &record.awaiting) {
        (Some(message), _) => shortened(message, LONGEST_TEXT),
        (None, Some(awaiting)) => {
            format!("waiting for {}", shortened(&awaiting.what, LONGEST_TEXT))
        }
        (None, None) => "waiting for its turn".to_owned(),
    };
    let (accepted, taken) = match changed {
        false => ("Accepted", format!("{request} was taken on")),
        true => (
            "SpecChanged",
            format!(
                "{request} was taken on, as generation {taken_on} of the object asked for; the spec was \
                 changed afterwards, which has no effect: make another object"
            ),
        ),
    };
    let (progressing, succeeded, reason) = match (record.state, record.verdict) {
        (State::Done, Some(Verdict::Verified)) => ("False", "True", Verdict::Verified.as_str()),
        (State::Done, Some(verdict)) => ("False", "False", verdict.as_str()),
        (State::Queued, _) => ("True", "Unknown", "Queued"),
        _ => ("True", "Unknown", "Running"),
    };
    let ended = record.finished.unwrap_or(record.created);
    // A verdict that was put right became Verified then.
    let judged = record.corrected.unwrap_or(ended);
    let conditions = Conditions {
        generation: taken_on,
        all: Vec::new(),
    };
    DomainHotplugStatus {
        observed_generation: Some(taken_on),
        operation: Some(record.id.to_string()),
        request: Some(request),
        start_time: Some(record.created),
        completion_time: record.finished.map(|_| judged),
        verdict: record.verdict.map(|verdict| verdict.as_str().to_owned()),
        message: Some(message.clone()),
        before: record.before.map(Into::into),
        requested: Some(record.requested.into()),
        after: record.after.map(Into::into),
        evidence: evidence(record),
        hypervisor_error: record
            .hypervisor_error
            .as_deref()
            .map(|text| shortened(text, LONGEST_TEXT)),
        diagnosis: record.diagnosis.clone().map(Into::into),
        conditions: conditions
            .and("Accepted", "True", accepted, &taken, record.created)
            .and("Progressing", progressing, reason, &message, ended)
            .and("Succeeded", succeeded, reason, &message, judged)
            .all,
    }
}

fn evidence(record: &Record) -> Vec<EvidenceStatus> {
    // What was seen last is what decided.
    let skipped = record.evidence.len().saturating_sub(MOST_EVIDENCE);
    let kept = record.evidence.iter().skip(skipped);
    kept.map(|evidence| {
        let mut witness = EvidenceStatus::from(evidence.clone());
        witness.detail = shortened(&witness.detail, LONGEST_TEXT);
        witness
    })
    .collect()
}

struct Conditions {
    generation: i64,
    all: Vec<Condition>,
}

impl Conditions {
    fn and(mut self, kind: &str, status: &str, reason: &str, message: &str, at: Timestamp) -> Self {
        self.all.push(Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            last_transition_time: at,
            observed_generation: Some(self.generation),
        });
        self
    }
}

/// Whether an object's status says that nothing more will come: its operation has a verdict.
pub(super) fn is_finished(status: &DomainHotplugStatus) -> bool {
    status.completion_time.is_some()
}

/// When an object is to be deleted: so long after the verdict, or after it was refused.
pub(super) fn expires(
    status: &DomainHotplugStatus,
    time_to_live: Option<Duration>,
) -> Option<Timestamp> {
    let was_refused = || Some(refused(status)?.last_transition_time);
    let ended = status.completion_time.or_else(was_refused)?;
    Some(ended.after(time_to_live?))
}

/// What people should see on the object itself of a status that takes the place of another: that
/// there is a verdict, or another one, or that it was refused; as a kind and a reason.
pub(super) fn ending(
    former: Option<&DomainHotplugStatus>,
    written: &DomainHotplugStatus,
) -> Option<(EventKind, String)> {
    let reason = |status: &DomainHotplugStatus| {
        let refused = || Some(refused(status)?.reason.clone());
        status.verdict.clone().or_else(refused)
    };
    let now = reason(written)?;
    if former.and_then(reason).as_ref() == Some(&now) {
        return None;
    }
    let kind = match now == Verdict::Verified.as_str() {
        true => EventKind::Normal,
        false => EventKind::Warning,
    };
    Some((kind, now))
}

/// Why an object was refused, if it was.
fn refused(status: &DomainHotplugStatus) -> Option<&Condition> {
    Condition::find(&status.conditions, "Accepted").filter(|accepted| accepted.status == "False")
}

/// What is worth a write in what `wanted` says beyond what is `shown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing, or only what is waited for.
    None,
    /// It was taken on: worth telling, unless the verdict comes at once.
    Soon,
    /// A step further, a verdict, or another one.
    Now,
}

/// Compares what is to be said with what is shown.
pub(super) fn news(shown: Option<&DomainHotplugStatus>, wanted: &DomainHotplugStatus) -> News {
    let progressing = Condition::find(&wanted.conditions, "Progressing");
    let is_open = progressing.is_some_and(Condition::holds);
    let Some(shown) = shown.filter(|shown| !shown.conditions.is_empty()) else {
        return if is_open { News::Soon } else { News::Now };
    };
    let reasons = |status: &DomainHotplugStatus| -> Vec<(String, String)> {
        let reason = |it: &Condition| (it.kind.clone(), it.reason.clone());
        status.conditions.iter().map(reason).collect()
    };
    let same_step = shown.operation == wanted.operation && reasons(shown) == reasons(wanted);
    let same_words = || shown.message == wanted.message;
    let same_end = || shown.completion_time == wanted.completion_time;
    match same_step && (is_open || (same_words() && same_end())) {
        true => News::None,
        false => News::Now,
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
