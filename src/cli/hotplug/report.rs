//! Formats an operation for people.

use std::fmt::Write;

use crate::domain::plain;
use crate::hotplug::{HotplugRequest, Verdict};
use crate::operation::{Record, State};
use crate::units::{Timestamp, seconds};

/// Formats a finished operation.
pub(super) fn report(record: &Record) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ok = write(&mut text, record);
    text
}

fn write(text: &mut String, record: &Record) -> std::fmt::Result {
    let message = record.message.as_deref().unwrap_or_default();
    match record.verdict {
        Some(verdict) => writeln!(text, "{verdict}: {}\n", plain(message))?,
        None => writeln!(text, "No verdict yet: {}\n", plain(&awaited(record)))?,
    }
    let mut fact = |name: &str, value: &str| writeln!(text, "  {name:<10} {value}");
    let uuid = record.domain.uuid.as_ref();
    let uuid = uuid.map_or_else(String::new, |uuid| format!(" ({})", plain(uuid)));
    fact(
        "domain",
        &format!("{}{uuid}", plain(&record.domain.display_name())),
    )?;
    fact(record.requested.kind().title(), &change(record))?;
    fact(
        "operation",
        &format!(
            "{}, requested by {}, required proof: {}",
            record.id,
            plain(&record.asked_by.to_string()),
            record.require.as_str().to_ascii_lowercase()
        ),
    )?;
    let ended = record.finished.map_or_else(
        || format!("; the deadline is {}", record.deadline),
        |finished| {
            format!(
                "; verdict after {}",
                seconds(finished.since(record.created))
            )
        },
    );
    fact("requested", &format!("{}{ended}", record.created))?;
    if let Some(corrected) = record.corrected {
        fact(
            "corrected",
            &format!("{corrected}: the guest adopted the change later"),
        )?;
    }
    if !record.evidence.is_empty() {
        writeln!(text, "\nEvidence, by time since the request:")?;
    }
    for piece in &record.evidence {
        let after = seconds(piece.time.since(record.created));
        writeln!(
            text,
            "  {:>9}  {:<15}  {}",
            format!("+{after}"),
            piece.source,
            plain(&piece.detail)
        )?;
    }
    // A proof outweighs the error of an earlier call, which is in the evidence.
    let is_proven = record.verdict == Some(Verdict::Verified);
    if let Some(error) = record.hypervisor_error.as_ref().filter(|_| !is_proven) {
        writeln!(text, "\nHypervisor error: {}", plain(error))?;
    }
    if let Some(diagnosis) = &record.diagnosis {
        writeln!(text, "\nDiagnosis: {}", plain(&diagnosis.seen))?;
        writeln!(text, "Remedy:    {}", plain(&diagnosis.remedy))?;
    }
    Ok(())
}

/// Formats the state of an operation at `now`, on one line.
pub(super) fn progress(record: &Record, now: Timestamp) -> String {
    let name = plain(&record.domain.display_name());
    let since = record.awaiting.as_ref().map(|awaiting| awaiting.since);
    let since = since.unwrap_or(record.created);
    let passed = now.since(since).as_secs();
    let left = record.deadline.since(now).as_secs();
    format!(
        "{name}: {} ({passed} s, verdict within {left} s)",
        plain(&awaited(record))
    )
}

fn awaited(record: &Record) -> String {
    match (&record.awaiting, record.state) {
        (Some(awaiting), _) => format!("waiting for {}", awaiting.what),
        (None, State::Queued) => "waiting for its turn".to_owned(),
        (None, State::Running) => "observing the domain".to_owned(),
        (None, State::Done) => "done".to_owned(),
    }
}

/// Formats a request in a few words.
pub(in crate::cli) fn request(request: &HotplugRequest) -> String {
    match request {
        HotplugRequest::Vcpus { count, online } => {
            let online = if *online { ", online" } else { "" };
            format!("vcpus {count}{online}")
        }
        HotplugRequest::Memory { size, force: true } => format!("memory {size} --force"),
        HotplugRequest::Memory { size, .. } => format!("memory {size}"),
    }
}

/// Formats the change: `1 → 3, requested 3`.
fn change(record: &Record) -> String {
    let requested = record.requested;
    match (record.before, record.after) {
        (Some(before), Some(after)) => {
            format!("{before} → {after}, requested {requested}")
        }
        (Some(before), None) => format!("{before} before, requested {requested}"),
        _ => format!("requested {requested}; the current amount is unknown"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::ConnectionId;
    use crate::hotplug::{Amount, Diagnosis, Evidence, Outcome, Require, Source, Verdict};
    use crate::operation::{AskedBy, OperationId, Order, TargetDomain};
    use crate::units::Bytes;

    const BEGIN: i64 = 1_795_260_166_250;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(BEGIN + millis)
    }

    fn vcpus(vcpus: u32, online: Option<u32>) -> Amount {
        Amount::Vcpus { vcpus, online }
    }

    fn record_of(request: HotplugRequest) -> Record {
        let order = Order {
            domain: "vm1".parse().unwrap(),
            request,
            require: Require::Online,
            persistent: false,
            timeout: Duration::from_secs(60),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        let mut record = Record::new(OperationId::new(0x1a2b_3c4d, 7), &order, at(0));
        record.domain = TargetDomain {
            connection: ConnectionId::Host,
            name: "vm1".to_owned(),
            uuid: Some("9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7".to_owned()),
        };
        record
    }

    fn evidence(source: Source, millis: i64, detail: &str) -> Evidence {
        Evidence {
            source,
            detail: detail.to_owned(),
            time: at(millis),
        }
    }

    fn three() -> HotplugRequest {
        HotplugRequest::Vcpus {
            count: 3,
            online: false,
        }
    }

    fn refused() -> Record {
        let mut record = record_of(three());
        let outcome = Outcome {
            verdict: Verdict::GuestRefused,
            message: "the guest confirmed vCPUs 1-2 and threw them away".into(),
            before: vcpus(1, Some(1)),
            requested: vcpus(3, None),
            after: vcpus(3, Some(1)),
            evidence: vec![
                evidence(Source::LiveXml, 12, "1 vCPU plugged: 0"),
                evidence(Source::HypervisorCall, 64, "set-vcpus 3 returned"),
                evidence(Source::AcpiOst, 180, "slot 1: source 1, status 0"),
                evidence(Source::GuestAgent, 1_240, "online 0 of 0"),
            ],
            hypervisor_error: None,
            diagnosis: Some(Diagnosis {
                code: "nr-cpus".into(),
                seen: "the guest's kernel has room for 1 CPU".into(),
                remedy: "raise nr_cpus= on its command line and boot it again".into(),
            }),
        };
        record.conclude(outcome, at(1_310));
        record
    }

    #[test]
    fn refused_operation_shows_evidence_and_remedy() {
        insta::assert_snapshot!(report(&refused()), @r#"
        GuestRefused: the guest confirmed vCPUs 1-2 and threw them away

          domain     vm1 (9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7)
          vCPUs      1 (1 online) → 3 (1 online), requested 3
          operation  00001a2b3c4d00000007, requested by uid 0, required proof: online
          requested  2026-11-21T11:22:46.25Z; verdict after 1.3 s

        Evidence, by time since the request:
             +0.0 s  live-xml         1 vCPU plugged: 0
             +0.1 s  hypervisor-call  set-vcpus 3 returned
             +0.2 s  acpi-ost         slot 1: source 1, status 0
             +1.2 s  guest-agent      online 0 of 0

        Diagnosis: the guest's kernel has room for 1 CPU
        Remedy:    raise nr_cpus= on its command line and boot it again
        "#);
    }

    #[test]
    fn verified_operation_shows_change_and_correction() {
        let size = Bytes::from_mib(1536).unwrap();
        let mut record = record_of(HotplugRequest::Memory { size, force: false });
        let memory = |mib, total| Amount::Memory {
            memory: Bytes::from_mib(mib).unwrap(),
            guest_total: Bytes::from_mib(total),
        };
        let outcome = Outcome {
            verdict: Verdict::Verified,
            message: "the guest took 512MiB, and its total grew".into(),
            before: memory(1024, 978),
            requested: record.requested,
            after: memory(1536, 1490),
            evidence: vec![evidence(
                Source::VirtioMem,
                420,
                "ua-vmem0: 512MiB of 512MiB",
            )],
            hypervisor_error: None,
            diagnosis: None,
        };
        record.conclude(outcome, at(700));
        record.corrected = Some(at(90_000));
        insta::assert_snapshot!(report(&record), @r#"
        Verified: the guest took 512MiB, and its total grew

          domain     vm1 (9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7)
          memory     1GiB (the guest sees 978MiB) → 1536MiB (the guest sees 1490MiB), requested 1536MiB
          operation  00001a2b3c4d00000007, requested by uid 0, required proof: online
          requested  2026-11-21T11:22:46.25Z; verdict after 0.7 s
          corrected  2026-11-21T11:24:16.25Z: the guest adopted the change later

        Evidence, by time since the request:
             +0.4 s  virtio-mem       ua-vmem0: 512MiB of 512MiB
        "#);
    }

    #[test]
    fn unobserved_domain_has_unknown_amount() {
        let mut record = record_of(three());
        record.domain.uuid = None;
        record.end(Verdict::DomainNotFound, "there is no domain \"vm1\"", at(3));
        insta::assert_snapshot!(report(&record), @r#"
        DomainNotFound: there is no domain "vm1"

          domain     vm1
          vCPUs      requested 3; the current amount is unknown
          operation  00001a2b3c4d00000007, requested by uid 0, required proof: online
          requested  2026-11-21T11:22:46.25Z; verdict after 0.0 s
        "#);
    }

    #[test]
    fn hypervisor_error_is_quoted() {
        let mut record = refused();
        record.verdict = Some(Verdict::HypervisorError);
        record.message = Some("libvirt refused the call".into());
        record.hypervisor_error = Some("internal error: unable to execute QEMU command".into());
        record.diagnosis = None;
        record.evidence.truncate(1);
        insta::assert_snapshot!(report(&record), @r#"
        HypervisorError: libvirt refused the call

          domain     vm1 (9d6c5a4e-0c1f-4f0e-8a52-d9a5d0d3b1a7)
          vCPUs      1 (1 online) → 3 (1 online), requested 3
          operation  00001a2b3c4d00000007, requested by uid 0, required proof: online
          requested  2026-11-21T11:22:46.25Z; verdict after 1.3 s

        Evidence, by time since the request:
             +0.0 s  live-xml         1 vCPU plugged: 0

        Hypervisor error: internal error: unable to execute QEMU command
        "#);
    }

    #[test]
    fn progress_shows_awaited_event_and_time() {
        let mut record = record_of(three());
        assert_eq!(
            progress(&record, at(1_000)),
            "vm1: waiting for its turn (1 s, verdict within 59 s)"
        );
        record.state = State::Running;
        record.awaits("the guest to bring vCPUs 1-2 online", at(2_000));
        assert_eq!(
            progress(&record, at(7_500)),
            "vm1: waiting for the guest to bring vCPUs 1-2 online (5 s, verdict within 52 s)"
        );
    }

    #[test]
    fn control_characters_are_escaped() {
        let mut record = refused();
        record.domain.name = "a\u{1b}[2J\r\nb".into();
        record.message = Some("bad \u{1b}]0;x\u{7} text\nwith lines".into());
        let text = report(&record);
        assert!(!text.contains(['\u{1b}', '\u{7}', '\r']), "{text:?}");
        assert!(!progress(&record, at(0)).contains(char::is_control));
        assert!(text.contains("a\\u{1b}[2J\\r\\nb"), "{text}");
    }
}
