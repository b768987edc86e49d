//! Reads files of version 1, in which a failed call was a libvirt error number and its English text.
//!
//! Version 2 keeps a typed [`CallError`]. Version 1 kept nothing else to classify by, so this is
//! the only place that interprets libvirt's texts.

use std::borrow::Cow;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::{Entry, Versioned};
use crate::domain::CallError;
use crate::hotplug::{Action, Return};
use crate::units::Timestamp;

/// The call of a version 1 history.
#[derive(Deserialize)]
struct CallV1 {
    action: Action,
    started: Timestamp,
    returned: Option<(Timestamp, ReturnV1)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum ReturnV1 {
    Done,
    Failed { number: u32, message: String },
    Overdue,
    Lost,
}

/// Parses a file of version 1.
pub(super) fn parse(text: &[u8]) -> Result<Entry, serde_json::Error> {
    let mut file: Versioned<Value> = serde_json::from_slice(text)?;
    let calls = file.entry.pointer_mut("/history/calls");
    for call in calls.and_then(Value::as_array_mut).into_iter().flatten() {
        let CallV1 {
            action,
            started,
            returned,
        } = CallV1::deserialize(&*call)?;
        let returned = returned.map(|(at, how)| (at, convert(how, &action, at.since(started))));
        call["returned"] = serde_json::to_value(returned)?;
    }
    Entry::deserialize(file.entry)
}

fn convert(how: ReturnV1, action: &Action, after: Duration) -> Return {
    let call = call_name(action);
    Return::Failed(match how {
        ReturnV1::Done => return Return::Done,
        ReturnV1::Failed { number, message } => classify(call, number, message),
        ReturnV1::Overdue => CallError::Overdue { call, after },
        ReturnV1::Lost => CallError::Lost("the connection or virtnode ended".to_owned()),
    })
}

/// Classifies by libvirt's error numbers (virterror.h). `VIR_ERR_OPERATION_TIMEOUT` has two
/// meanings, which only the text distinguishes (qemu_hotplug.c `qemuDomainHotplugDelVcpu`,
/// virdomainjob.c).
fn classify(call: Cow<'static, str>, number: u32, text: String) -> CallError {
    match number {
        3 => CallError::Unsupported { call, text },
        42 => CallError::NotFound(text),
        55 if text.contains("not running") => CallError::NotRunning(text),
        68 if text.contains("state change lock") => CallError::Busy { call, text },
        68 if text.contains("unplug") => CallError::UnplugPending { call, text },
        86 | 97 | 112 | 113 => CallError::AgentSilent { call, text },
        88 => CallError::Denied { call, text },
        _ => CallError::Failed {
            call,
            code: number.to_string(),
            text,
        },
    }
}

fn call_name(action: &Action) -> Cow<'static, str> {
    Cow::Borrowed(match action {
        Action::SetVcpus { .. } => "set-vcpus",
        Action::OnlineVcpus { .. } => "set-guest-vcpus",
        Action::ResizeVirtioMem { .. } => "update-device",
        Action::AttachDimm { .. } => "attach-device",
        Action::SetStatsPeriod { .. } => "set-stats-period",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hotplug::{Step, Verdict, judge};

    const INTERRUPTED_UNPLUG: &str =
        include_str!("../../tests/fixtures/journal-v1/interrupted-unplug.json");
    const LOCKED_PLUG: &str = include_str!("../../tests/fixtures/journal-v1/locked-plug.json");
    const ERRORS: &str = include_str!("../../tests/fixtures/journal-v1/errors.json");

    fn returns(entry: &Entry) -> Vec<&'static str> {
        let calls = entry.history.as_ref().unwrap().calls().iter();
        calls
            .map(|call| match &call.returned {
                None => "running",
                Some((_, Return::Done)) => "done",
                Some((_, Return::Failed(CallError::Lost(_)))) => "lost",
                Some((_, Return::Failed(error))) => error.code(),
            })
            .collect()
    }

    #[test]
    fn texts_of_version_1_become_variants() {
        let entry = parse(INTERRUPTED_UNPLUG.as_bytes()).unwrap();
        assert_eq!(returns(&entry), ["unplug-pending", "running"]);
        let entry = parse(LOCKED_PLUG.as_bytes()).unwrap();
        assert_eq!(returns(&entry), ["lost", "busy", "timeout"]);
        let Some((_, Return::Failed(overdue))) =
            &entry.history.as_ref().unwrap().calls()[2].returned
        else {
            panic!();
        };
        let (call, after) = ("set-vcpus".into(), Duration::from_secs(25));
        assert_eq!(*overdue, CallError::Overdue { call, after });
        let entry = parse(ERRORS.as_bytes()).unwrap();
        assert_eq!(
            returns(&entry),
            [
                "failed",
                "unsupported",
                "domain-not-found",
                "domain-not-running",
                "failed",
                "agent-unavailable",
                "denied",
                "done"
            ]
        );
    }

    #[test]
    fn finished_record_of_version_1_keeps_its_verdict() {
        let entry = parse(LOCKED_PLUG.as_bytes()).unwrap();
        assert_eq!(entry.record.verdict, Some(Verdict::Busy));
        let history = entry.history.unwrap();
        let Step::Done(outcome) = judge(
            &history,
            history.terms.deadline.after(Duration::from_secs(20)),
        ) else {
            panic!();
        };
        assert_eq!(outcome.verdict, Verdict::Busy);
        assert_eq!(Some(outcome.message), entry.record.message);
    }

    #[test]
    fn interrupted_unplug_of_version_1_resumes() {
        let mut history = parse(INTERRUPTED_UNPLUG.as_bytes())
            .unwrap()
            .history
            .unwrap();
        let restart = history.latest().at.after(Duration::from_secs(1));
        history.lost(restart);
        assert!(history.is_unsettled());
        for seconds in [1, 2] {
            let mut seen = history.latest().clone();
            seen.at = restart.after(Duration::from_secs(seconds));
            seen.domain.vcpus.each[2].enabled = false;
            history.observed(seen);
        }
        let Step::Done(outcome) = judge(&history, history.latest().at) else {
            panic!();
        };
        assert_eq!(outcome.verdict, Verdict::Verified);
        assert!(
            outcome
                .hypervisor_error
                .unwrap()
                .contains("unplug request timed out")
        );
    }

    #[test]
    fn missing_history_of_version_1_is_read() {
        let mut file: Value = serde_json::from_str(LOCKED_PLUG).unwrap();
        file["entry"].as_object_mut().unwrap().remove("history");
        let entry = parse(file.to_string().as_bytes()).unwrap();
        assert_eq!(entry.history, None);
        assert_eq!(entry.record.verdict, Some(Verdict::Busy));
    }
}
