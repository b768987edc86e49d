use serde_json::json;

use super::*;
use crate::hotplug::{Amount, Diagnosis, Evidence, HotplugRequest, Outcome, Require, Source};
use crate::operation::{AskedBy, OperationId, Order};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(1_795_260_166_250 + seconds * 1000)
}

fn queued_record() -> Record {
    let order = Order {
        domain: "vm1".parse().unwrap(),
        request: HotplugRequest::Vcpus {
            count: 4,
            online: true,
        },
        require: Require::Online,
        persistent: false,
        timeout: Duration::from_secs(60),
        idempotency_key: Some("uid".into()),
        asked_by: AskedBy::Object {
            object: "domainhotplug/x".into(),
            user: None,
        },
    };
    Record::new(OperationId::new(1, 2), &order, at(0))
}

fn finished_record(verdict: Verdict) -> Record {
    let vcpus = |vcpus| Amount::Vcpus {
        vcpus,
        online: Some(1),
    };
    let mut record = queued_record();
    let outcome = Outcome {
        verdict,
        message: "the guest has 1 of 4".into(),
        before: vcpus(1),
        requested: vcpus(4),
        after: vcpus(4),
        evidence: vec![Evidence {
            source: Source::AcpiOst,
            detail: "vcpu1: success".into(),
            time: at(1),
        }],
        hypervisor_error: None,
        diagnosis: Some(Diagnosis {
            code: "no-room".into(),
            seen: "1 CPU".into(),
            remedy: "raise nr_cpus".into(),
        }),
    };
    record.conclude(outcome, at(2));
    record
}

fn reasons(status: &DomainHotplugStatus) -> Vec<(&str, &str, &str)> {
    status
        .conditions
        .iter()
        .map(|it| (it.kind.as_str(), it.status.as_str(), it.reason.as_str()))
        .collect()
}

#[test]
fn conditions_reflect_the_state_of_the_operation() {
    let mut record = queued_record();
    let status = operation_status(&record, 1, false);
    assert_eq!(
        reasons(&status),
        [
            ("Accepted", "True", "Accepted"),
            ("Progressing", "True", "Queued"),
            ("Succeeded", "Unknown", "Queued"),
        ]
    );
    assert_eq!(status.request.as_deref(), Some("vcpus=4,online"));
    assert_eq!((status.verdict, status.completion_time), (None, None));

    record.state = State::Running;
    record.awaits("the guest to take 3 vCPUs", at(1));
    let status = operation_status(&record, 1, false);
    assert_eq!(reasons(&status)[2], ("Succeeded", "Unknown", "Running"));
    let waiting = "waiting for the guest to take 3 vCPUs";
    assert_eq!(status.message.as_deref(), Some(waiting));
}

#[test]
fn verdict_is_the_reason_and_only_verified_succeeds() {
    for verdict in Verdict::ALL {
        let status = operation_status(&finished_record(verdict), 1, false);
        let success = if verdict == Verdict::Verified {
            "True"
        } else {
            "False"
        };
        assert_eq!(
            reasons(&status)[1..],
            [
                ("Progressing", "False", verdict.as_str()),
                ("Succeeded", success, verdict.as_str()),
            ]
        );
        assert_eq!(status.verdict.as_deref(), Some(verdict.as_str()));
        assert!(is_finished(&status));
    }
}

#[test]
fn finished_operation_yields_a_complete_status() {
    let status = serde_json::to_value(operation_status(
        &finished_record(Verdict::GuestRefused),
        3,
        false,
    ))
    .unwrap();
    let expected = json!({
        "observedGeneration": 3,
        "operation": "00000000000100000002",
        "request": "vcpus=4,online",
        "startTime": "2026-11-21T11:22:46.25Z",
        "completionTime": "2026-11-21T11:22:48.25Z",
        "verdict": "GuestRefused",
        "message": "the guest has 1 of 4",
        "before": {"vcpus": 1, "online": 1},
        "requested": {"vcpus": 4, "online": 1},
        "after": {"vcpus": 4, "online": 1},
        "evidence": [{"source": "acpi-ost", "detail": "vcpu1: success", "time": "2026-11-21T11:22:47.25Z"}],
        "diagnosis": {"code": "no-room", "seen": "1 CPU", "remedy": "raise nr_cpus"},
    });
    let mut shown = status.clone();
    shown.as_object_mut().unwrap().remove("conditions");
    assert_eq!(shown, expected);
    assert_eq!(status["conditions"][2]["observedGeneration"], 3);
    assert_eq!(status["conditions"][2]["message"], "the guest has 1 of 4");
}

#[test]
fn later_spec_change_is_reported_and_has_no_effect() {
    let status = operation_status(&finished_record(Verdict::Verified), 1, true);
    assert_eq!(reasons(&status)[0], ("Accepted", "True", "SpecChanged"));
    assert!(
        status.conditions[0]
            .message
            .contains("create another object")
    );
    assert_eq!(status.observed_generation, Some(1));
    assert_eq!(reasons(&status)[2], ("Succeeded", "True", "Verified"));
}

#[test]
fn rejected_object_reports_the_reason() {
    let error = ObjectError::InvalidSpec("spec.vcpus.count is 0".into());
    let status = not_accepted_status(&NotAccepted::Rejected(error), 1, at(0));
    assert_eq!(
        reasons(&status),
        [
            ("Accepted", "False", "InvalidSpec"),
            ("Progressing", "False", "InvalidSpec"),
            ("Succeeded", "False", "InvalidSpec"),
        ]
    );
    let message = "rejected, nothing was changed: spec.vcpus.count is 0";
    assert_eq!(status.message.as_deref(), Some(message));
    assert!(!is_finished(&status));

    let postponed =
        not_accepted_status(&NotAccepted::Postponed(SubmitError::TooMany(256)), 1, at(0));
    assert_eq!(
        reasons(&postponed)[0],
        ("Accepted", "Unknown", "TooManyOperations")
    );
    assert_eq!(reasons(&postponed)[2].1, "Unknown");
}

#[test]
fn only_new_states_and_verdicts_are_written() {
    let queued = operation_status(&queued_record(), 1, false);
    assert_eq!(write_urgency(None, &queued), WriteUrgency::Delayed);
    let empty = DomainHotplugStatus::default();
    assert_eq!(write_urgency(Some(&empty), &queued), WriteUrgency::Delayed);
    assert_eq!(write_urgency(Some(&queued), &queued), WriteUrgency::None);

    let mut record = queued_record();
    record.state = State::Running;
    let running = operation_status(&record, 1, false);
    assert_eq!(
        write_urgency(Some(&queued), &running),
        WriteUrgency::Immediate
    );
    record.awaits("something else", at(1));
    assert_eq!(
        write_urgency(Some(&running), &operation_status(&record, 1, false)),
        WriteUrgency::None
    );

    let offline = finished_record(Verdict::GuestOffline);
    let shown = operation_status(&offline, 1, false);
    assert_eq!(write_urgency(None, &shown), WriteUrgency::Immediate);
    assert_eq!(
        write_urgency(Some(&running), &shown),
        WriteUrgency::Immediate
    );
    assert_eq!(write_urgency(Some(&shown), &shown), WriteUrgency::None);
    assert_eq!(
        write_urgency(Some(&shown), &operation_status(&offline, 1, true)),
        WriteUrgency::Immediate
    );
    let mut corrected = offline;
    corrected.verdict = Some(Verdict::Verified);
    corrected.corrected = Some(at(9));
    let verified = operation_status(&corrected, 1, false);
    assert_eq!(
        write_urgency(Some(&shown), &verified),
        WriteUrgency::Immediate
    );
    assert_eq!(verified.conditions[2].last_transition_time, at(9));
    assert_eq!(verified.conditions[1].last_transition_time, at(2));

    // A rejection is written once, independent of the time.
    let rejected = NotAccepted::Rejected(ObjectError::InvalidSpec("?".into()));
    let written = not_accepted_status(&rejected, 1, at(0));
    assert_eq!(write_urgency(None, &written), WriteUrgency::Immediate);
    assert_eq!(
        write_urgency(Some(&written), &not_accepted_status(&rejected, 1, at(99))),
        WriteUrgency::None
    );
}

#[test]
fn object_expires_after_its_verdict_or_rejection() {
    let hour = Some(Duration::from_secs(3600));
    let finished = operation_status(&finished_record(Verdict::Busy), 1, false);
    assert_eq!(expiry(&finished, hour), Some(at(2 + 3600)));
    assert_eq!(expiry(&finished, None), None);
    assert_eq!(
        expiry(&operation_status(&queued_record(), 1, false), hour),
        None
    );
    let rejected = NotAccepted::Rejected(ObjectError::InvalidSpec("?".into()));
    assert_eq!(
        expiry(&not_accepted_status(&rejected, 1, at(5)), hour),
        Some(at(3605))
    );
    let postponed = NotAccepted::Postponed(SubmitError::Stopping);
    assert_eq!(
        expiry(&not_accepted_status(&postponed, 1, at(5)), hour),
        None
    );
}

#[test]
fn status_is_smaller_than_64_kib() {
    let mut record = finished_record(Verdict::HypervisorError);
    record.message = Some("é".repeat(100_000));
    let one = record.evidence[0].clone();
    record.evidence = (0..10_000)
        .map(|number| Evidence {
            detail: number.to_string(),
            ..one.clone()
        })
        .collect();
    let status = operation_status(&record, 1, false);
    assert_eq!(status.evidence.len(), EVIDENCE_MAX);
    assert_eq!(status.evidence[EVIDENCE_MAX - 1].detail, "9999");
    assert!(serde_json::to_vec(&status).unwrap().len() < 64 << 10);
}

#[test]
fn each_new_verdict_yields_one_event() {
    let status = |verdict| operation_status(&finished_record(verdict), 1, false);
    let running = operation_status(&queued_record(), 1, false);
    let offline = status(Verdict::GuestOffline);
    let verified = status(Verdict::Verified);
    let warning = |reason: &str| Some((EventKind::Warning, reason.to_owned()));
    assert_eq!(new_ending(None, &running), None);
    assert_eq!(
        new_ending(Some(&running), &offline),
        warning("GuestOffline")
    );
    assert_eq!(new_ending(None, &offline), warning("GuestOffline"));
    assert_eq!(new_ending(Some(&offline), &offline), None);
    let normal = Some((EventKind::Normal, "Verified".to_owned()));
    assert_eq!(new_ending(Some(&offline), &verified), normal);

    let error = ObjectError::InvalidSpec("there is nothing".to_owned());
    let rejected = not_accepted_status(&NotAccepted::Rejected(error), 1, at(0));
    assert_eq!(new_ending(None, &rejected), warning("InvalidSpec"));
    assert_eq!(new_ending(Some(&rejected), &rejected), None);
    // Corrected on an API server without immutable specs.
    assert_eq!(new_ending(Some(&rejected), &verified), normal);
    let postponed = not_accepted_status(&NotAccepted::Postponed(SubmitError::TooMany(1)), 1, at(0));
    assert_eq!(new_ending(None, &postponed), None);
}
