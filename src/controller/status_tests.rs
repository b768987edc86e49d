use serde_json::json;

use super::*;
use crate::hotplug::{Amount, Diagnosis, Evidence, HotplugRequest, Outcome, Require, Source};
use crate::operation::{AskedBy, OperationId, Order};

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_millis(1_795_260_166_250 + seconds * 1000)
}

fn asked() -> Record {
    let order = Order {
        domain: "vm1".parse().unwrap(),
        request: HotplugRequest::Vcpus {
            count: 4,
            online: true,
        },
        require: Require::Online,
        timeout: Duration::from_secs(60),
        idempotency_key: Some("uid".into()),
        asked_by: AskedBy::Object {
            object: "domainhotplug/x".into(),
            user: None,
        },
    };
    Record::new(OperationId::new(1, 2), &order, at(0))
}

fn ended(verdict: Verdict) -> Record {
    let vcpus = |vcpus| Amount::Vcpus {
        vcpus,
        online: Some(1),
    };
    let mut record = asked();
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
fn conditions_follow_the_operation() {
    let mut record = asked();
    let status = of(&record, 1, false);
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
    let status = of(&record, 1, false);
    assert_eq!(reasons(&status)[2], ("Succeeded", "Unknown", "Running"));
    let waiting = "waiting for the guest to take 3 vCPUs";
    assert_eq!(status.message.as_deref(), Some(waiting));
}

#[test]
fn every_verdict_is_the_reason_and_only_one_is_success() {
    for verdict in Verdict::ALL {
        let status = of(&ended(verdict), 1, false);
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
fn a_verdict_comes_with_all_that_led_to_it() {
    let status = serde_json::to_value(of(&ended(Verdict::GuestRefused), 3, false)).unwrap();
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
fn a_change_of_the_spec_is_told_and_changes_nothing() {
    let status = of(&ended(Verdict::Verified), 1, true);
    assert_eq!(reasons(&status)[0], ("Accepted", "True", "SpecChanged"));
    assert!(status.conditions[0].message.contains("make another object"));
    assert_eq!(status.observed_generation, Some(1));
    assert_eq!(reasons(&status)[2], ("Succeeded", "True", "Verified"));
}

#[test]
fn a_refused_object_says_why() {
    let refusal = Refusal::InvalidSpec("spec.vcpus.count is 0".into());
    let status = held(&Hold::Refused(refusal), 1, at(0));
    assert_eq!(
        reasons(&status),
        [
            ("Accepted", "False", "InvalidSpec"),
            ("Progressing", "False", "InvalidSpec"),
            ("Succeeded", "False", "InvalidSpec"),
        ]
    );
    let told = "nothing was done: spec.vcpus.count is 0";
    assert_eq!(status.message.as_deref(), Some(told));
    assert!(!is_finished(&status));

    let later = held(&Hold::Later(SubmitError::TooMany(256)), 1, at(0));
    assert_eq!(
        reasons(&later)[0],
        ("Accepted", "Unknown", "TooManyOperations")
    );
    assert_eq!(reasons(&later)[2].1, "Unknown");
}

#[test]
fn only_steps_and_verdicts_are_worth_a_write() {
    let queued = of(&asked(), 1, false);
    assert_eq!(news(None, &queued), News::Soon);
    let empty = DomainHotplugStatus::default();
    assert_eq!(news(Some(&empty), &queued), News::Soon);
    assert_eq!(news(Some(&queued), &queued), News::None);

    let mut record = asked();
    record.state = State::Running;
    let running = of(&record, 1, false);
    assert_eq!(news(Some(&queued), &running), News::Now);
    record.awaits("something else", at(1));
    assert_eq!(news(Some(&running), &of(&record, 1, false)), News::None);

    let offline = ended(Verdict::GuestOffline);
    let shown = of(&offline, 1, false);
    assert_eq!(news(None, &shown), News::Now);
    assert_eq!(news(Some(&running), &shown), News::Now);
    assert_eq!(news(Some(&shown), &shown), News::None);
    assert_eq!(news(Some(&shown), &of(&offline, 1, true)), News::Now);
    let mut corrected = offline;
    corrected.verdict = Some(Verdict::Verified);
    corrected.corrected = Some(at(9));
    let verified = of(&corrected, 1, false);
    assert_eq!(news(Some(&shown), &verified), News::Now);
    assert_eq!(verified.conditions[2].last_transition_time, at(9));
    assert_eq!(verified.conditions[1].last_transition_time, at(2));

    // A refusal is told once, whatever the time.
    let refusal = Hold::Refused(Refusal::InvalidSpec("?".into()));
    let told = held(&refusal, 1, at(0));
    assert_eq!(news(None, &told), News::Now);
    assert_eq!(news(Some(&told), &held(&refusal, 1, at(99))), News::None);
}

#[test]
fn an_object_goes_some_time_after_its_end() {
    let hour = Some(Duration::from_secs(3600));
    let ended = of(&ended(Verdict::Busy), 1, false);
    assert_eq!(expires(&ended, hour), Some(at(2 + 3600)));
    assert_eq!(expires(&ended, None), None);
    assert_eq!(expires(&of(&asked(), 1, false), hour), None);
    let refused = Hold::Refused(Refusal::InvalidSpec("?".into()));
    assert_eq!(expires(&held(&refused, 1, at(5)), hour), Some(at(3605)));
    let later = Hold::Later(SubmitError::Stopping);
    assert_eq!(expires(&held(&later, 1, at(5)), hour), None);
}

#[test]
fn a_status_has_bounds() {
    let mut record = ended(Verdict::HypervisorError);
    record.message = Some("é".repeat(100_000));
    let one = record.evidence[0].clone();
    record.evidence = (0..10_000)
        .map(|number| Evidence {
            detail: number.to_string(),
            ..one.clone()
        })
        .collect();
    let status = of(&record, 1, false);
    assert_eq!(status.evidence.len(), MOST_EVIDENCE);
    assert_eq!(status.evidence[MOST_EVIDENCE - 1].detail, "9999");
    assert!(serde_json::to_vec(&status).unwrap().len() < 64 << 10);
}

#[test]
fn people_see_the_verdict_once_and_each_new_one() {
    let status = |verdict| of(&ended(verdict), 1, false);
    let running = of(&asked(), 1, false);
    let offline = status(Verdict::GuestOffline);
    let verified = status(Verdict::Verified);
    let warning = |reason: &str| Some((EventKind::Warning, reason.to_owned()));
    assert_eq!(ending(None, &running), None);
    assert_eq!(ending(Some(&running), &offline), warning("GuestOffline"));
    assert_eq!(ending(None, &offline), warning("GuestOffline"));
    assert_eq!(ending(Some(&offline), &offline), None);
    let normal = Some((EventKind::Normal, "Verified".to_owned()));
    assert_eq!(ending(Some(&offline), &verified), normal);

    let refusal = Refusal::InvalidSpec("there is nothing".to_owned());
    let refused = held(&Hold::Refused(refusal), 1, at(0));
    assert_eq!(ending(None, &refused), warning("InvalidSpec"));
    assert_eq!(ending(Some(&refused), &refused), None);
    // Put right on an old API server.
    assert_eq!(ending(Some(&refused), &verified), normal);
    let later = held(&Hold::Later(SubmitError::TooMany(1)), 1, at(0));
    assert_eq!(ending(None, &later), None);
}
