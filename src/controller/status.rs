//! The status of an object, and the decision whether to write it. Pure.

use std::time::Duration;

use super::request::{ObjectError, in_words};
use crate::cluster::EventKind;
use crate::cluster::objects::domain_hotplug::EvidenceStatus;
use crate::cluster::objects::{Condition, DomainHotplugStatus};
use crate::executor::SubmitError;
use crate::hotplug::Verdict;
use crate::operation::{Record, State};
use crate::units::{Timestamp, shortened};

/// Maximum evidence in a status, to bound the object's size. The journal keeps all of it.
const EVIDENCE_MAX: usize = 200;

/// Maximum characters of a text from libvirt or the guest.
const TEXT_MAX: usize = 2000;

/// The reason why an object has no operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotAccepted {
    /// Final, unless the object is corrected.
    Rejected(ObjectError),
    /// Retried periodically.
    Postponed(SubmitError),
}

/// Returns the status of an object without an operation.
pub(super) fn not_accepted_status(
    why: &NotAccepted,
    generation: i64,
    now: Timestamp,
) -> DomainHotplugStatus {
    let (status, reason, message) = match why {
        NotAccepted::Rejected(error) => (
            "False",
            error.reason(),
            format!("rejected, nothing was changed: {error}"),
        ),
        NotAccepted::Postponed(error) => {
            let reason = match error {
                SubmitError::TooMany(_) => "TooManyOperations",
                _ => "CannotBegin",
            };
            ("Unknown", reason, format!("not accepted yet: {error}"))
        }
    };
    let condition = |kind: &str, status| condition(kind, status, reason, &message, now, generation);
    DomainHotplugStatus {
        observed_generation: Some(generation),
        conditions: vec![
            condition("Accepted", status),
            condition("Progressing", "False"),
            condition("Succeeded", status),
        ],
        message: Some(message),
        ..DomainHotplugStatus::default()
    }
}

/// Returns the status of an object with an operation. `accepted` is the generation from which the
/// operation was made; `spec_changed` is true if the object has another spec by now.
pub(super) fn operation_status(
    record: &Record,
    accepted: i64,
    spec_changed: bool,
) -> DomainHotplugStatus {
    let request = in_words(&record.request);
    let message = match (&record.message, &record.awaiting) {
        (Some(message), _) => shortened(message, TEXT_MAX),
        (None, Some(awaiting)) => {
            format!("waiting for {}", shortened(&awaiting.what, TEXT_MAX))
        }
        (None, None) => "waiting for its turn".to_owned(),
    };
    let (accepted_reason, accepted_message) = if spec_changed {
        let message = format!(
            "{request} was accepted (generation {accepted}); the later change of the spec has no \
             effect: create another object"
        );
        ("SpecChanged", message)
    } else {
        ("Accepted", format!("{request} was accepted"))
    };
    let (progressing, succeeded, reason) = match (record.state, record.verdict) {
        (State::Done, Some(Verdict::Verified)) => ("False", "True", Verdict::Verified.as_str()),
        (State::Done, Some(verdict)) => ("False", "False", verdict.as_str()),
        (State::Queued, _) => ("True", "Unknown", "Queued"),
        _ => ("True", "Unknown", "Running"),
    };
    let finished = record.finished.unwrap_or(record.created);
    // A corrected verdict became Verified at the time of the correction.
    let judged = record.corrected.unwrap_or(finished);
    let condition = |kind: &str, status, reason: &str, message: &str, at| {
        condition(kind, status, reason, message, at, accepted)
    };
    DomainHotplugStatus {
        observed_generation: Some(accepted),
        operation: Some(record.id.to_string()),
        start_time: Some(record.created),
        completion_time: record.finished.map(|_| judged),
        verdict: record.verdict.map(|verdict| verdict.as_str().to_owned()),
        before: record.before.map(Into::into),
        requested: Some(record.requested.into()),
        after: record.after.map(Into::into),
        evidence: evidence(record),
        hypervisor_error: record
            .hypervisor_error
            .as_deref()
            .map(|text| shortened(text, TEXT_MAX)),
        diagnosis: record.diagnosis.clone().map(Into::into),
        conditions: vec![
            condition(
                "Accepted",
                "True",
                accepted_reason,
                &accepted_message,
                record.created,
            ),
            condition("Progressing", progressing, reason, &message, finished),
            condition("Succeeded", succeeded, reason, &message, judged),
        ],
        request: Some(request),
        message: Some(message),
    }
}

/// Returns the newest evidence, which decided the verdict.
fn evidence(record: &Record) -> Vec<EvidenceStatus> {
    let skipped = record.evidence.len().saturating_sub(EVIDENCE_MAX);
    let kept = record.evidence.iter().skip(skipped);
    kept.map(|evidence| {
        let mut evidence = EvidenceStatus::from(evidence.clone());
        evidence.detail = shortened(&evidence.detail, TEXT_MAX);
        evidence
    })
    .collect()
}

fn condition(
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    at: Timestamp,
    generation: i64,
) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: at,
        observed_generation: Some(generation),
    }
}

/// True if the operation has a verdict.
pub(super) fn is_finished(status: &DomainHotplugStatus) -> bool {
    status.completion_time.is_some()
}

/// Returns the time to delete the object: its time to live after the verdict or the rejection.
pub(super) fn expiry(
    status: &DomainHotplugStatus,
    time_to_live: Option<Duration>,
) -> Option<Timestamp> {
    let rejected = || Some(rejection(status)?.last_transition_time);
    let ended = status.completion_time.or_else(rejected)?;
    Some(ended.after(time_to_live?))
}

/// Returns kind and reason of the event about a status that replaces `before`: for a rejection, a
/// verdict, or a corrected verdict.
pub(super) fn new_ending(
    before: Option<&DomainHotplugStatus>,
    status: &DomainHotplugStatus,
) -> Option<(EventKind, String)> {
    let ending = |status: &DomainHotplugStatus| {
        let rejected = || Some(rejection(status)?.reason.clone());
        status.verdict.clone().or_else(rejected)
    };
    let reason = ending(status)?;
    if before.and_then(ending).as_ref() == Some(&reason) {
        return None;
    }
    let kind = if reason == Verdict::Verified.as_str() {
        EventKind::Normal
    } else {
        EventKind::Warning
    };
    Some((kind, reason))
}

/// Returns the condition `Accepted` if it is False.
fn rejection(status: &DomainHotplugStatus) -> Option<&Condition> {
    Condition::find(&status.conditions, "Accepted").filter(|accepted| accepted.status == "False")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteUrgency {
    /// Nothing changed but the awaited event.
    None,
    /// The object was accepted: worth a write unless the verdict follows at once.
    Delayed,
    /// Another state, a verdict, or a corrected verdict.
    Immediate,
}

/// Compares the wanted status with the written one.
pub(super) fn write_urgency(
    written: Option<&DomainHotplugStatus>,
    wanted: &DomainHotplugStatus,
) -> WriteUrgency {
    let progressing = Condition::find(&wanted.conditions, "Progressing");
    let is_open = progressing.is_some_and(Condition::holds);
    let Some(written) = written.filter(|written| !written.conditions.is_empty()) else {
        return if is_open {
            WriteUrgency::Delayed
        } else {
            WriteUrgency::Immediate
        };
    };
    let reasons = |status: &DomainHotplugStatus| -> Vec<(String, String)> {
        let reason = |it: &Condition| (it.kind.clone(), it.reason.clone());
        status.conditions.iter().map(reason).collect()
    };
    let same_state = written.operation == wanted.operation && reasons(written) == reasons(wanted);
    let same_ending =
        || written.message == wanted.message && written.completion_time == wanted.completion_time;
    if same_state && (is_open || same_ending()) {
        WriteUrgency::None
    } else {
        WriteUrgency::Immediate
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
