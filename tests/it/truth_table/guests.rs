//! Behaviors of guests at a plug and an unplug, each with its verdicts. Every row runs on a real
//! libvirt with real QEMU and Linux, and on the hypervisor in memory, which keeps the latter correct.

use anyhow::ensure;
use rstest::rstest;
use virtnode::hypervisor::DomainBackend;

use Verdict::{
    DomainNotRunning, GuestOffline, GuestRefused, GuestSilent, Infeasible, PartiallyApplied,
    Unverifiable, Verified,
};

use super::*;
use crate::contract::{self, On, guest, without_agent};
use crate::support::backend::{Backend, InMemory, NAME, PLAIN, Real, Witness};
use crate::support::eventually;
use crate::support::fake_domains::{Blocks, Cpus, FakeGuest};
use crate::support::guest::Statistics;

#[rstest]
#[case::onlines_by_itself_with_an_agent(guest(Cpus::Onlines, Blocks::Onlines), vec![
    vcpus(0, Infeasible).says("at least 1"),
    vcpus(5, Infeasible).says("maximum of 4"),
    memory(513, Infeasible).says("blocks of 2MiB"),
    memory(256, Infeasible).says("booted with"),
    memory(8192, Infeasible).says("maxMemory").uses("0").more(0),
    vcpus(2, DomainNotRunning).paused().says("paused by a user: resume it first").uses("0"),
    vcpus(3, Verified).by(&["guest-agent", "acpi-ost", "hypervisor-call"]).uses("0-2"),
    vcpus(3, Verified).by(&["guest-agent"]),
    vcpus(2, Verified).by(&["guest-agent"]).uses("0-1"),
    vcpus(1, Verified).by(&["guest-agent"]).uses("0"),
    memory(1024, Verified).by(&["virtio-mem", "balloon-stats"]).more(512),
    memory(512, Verified).by(&["virtio-mem"]).more(0),
])]
#[case::onlines_by_itself_without_an_agent(without_agent(Cpus::Onlines), vec![
    vcpus(3, Verified).by(&["vcpu-time", "acpi-ost"]).uses("0-2"),
    vcpus(2, Verified).by(&["acpi-ost"]).uses("0-1"),
])]
#[case::leaves_offline_with_an_agent(guest(Cpus::LeavesOffline, Blocks::LeavesOffline), vec![
    vcpus(3, GuestOffline).says("ask again with online").by(&["guest-agent", "acpi-ost"]).uses("0"),
    onlined(3, Verified).uses("0-2"),
    memory(1024, GuestOffline).says("auto_online_blocks").more(0),
])]
#[case::leaves_offline_without_an_agent(without_agent(Cpus::LeavesOffline), vec![
    vcpus(3, GuestOffline).says("have not been running").uses("0"),
])]
#[case::booted_with_nr_cpus_and_an_agent_and_no_virtio_mem_driver(guest(Cpus::ThrowsAway, Blocks::NoDriver), vec![
    vcpus(3, GuestRefused).says("without nr_cpus=").by(&["guest-agent", "acpi-ost"]).has("0"),
    memory(1024, GuestSilent).within(10).says("virtio_mem); its kernel must have CONFIG_VIRTIO_MEM and be 5.8").more(0),
])]
#[case::booted_with_nr_cpus_without_an_agent(without_agent(Cpus::ThrowsAway), vec![
    vcpus(3, GuestOffline).says("nr_cpus").by(&["acpi-ost"]).has("0"),
])]
#[case::still_in_its_firmware_without_max_memory(FakeGuest { memory: MorePossible::No, ..without_agent(Cpus::Silent) }, vec![
    memory(1024, Infeasible).says("no <maxMemory>"),
    vcpus(2, GuestSilent).within(8).says("has booted"),
])]
#[case::keeps_half_of_its_memory(guest(Cpus::Onlines, Blocks::GivesHalfBack), vec![
    memory(1024, Verified).more(512),
    memory(512, PartiallyApplied).says("cannot move"),
])]
#[case::slots_for_dimms(with_dimms(Blocks::Onlines), vec![
    memory(641, Infeasible).says("blocks of 2MiB"),
    memory(1024, Verified).by(&["acpi-ost", "balloon-stats"]).more(512),
    memory(512, Infeasible).says("DIMMs stay"),
    memory(1024 + 64, GuestOffline).says("detach the DIMM (alias ua-virtnode-dimm1)").more(512),
])]
#[case::slots_for_dimms_that_are_left_offline(with_dimms(Blocks::LeavesOffline), vec![
    memory(1024, GuestOffline).says("auto_online_blocks").more(0),
])]
#[case::without_a_statistics_period(with_statistics(Statistics::Off, Blocks::Onlines), vec![
    memory(1024, Verified).by(&["balloon-stats", "virtio-mem"]).more(512),
    memory(1024, Verified).by(&["balloon-stats"]),
    memory(512, Verified).more(0),
])]
#[case::without_a_statistics_period_and_left_offline(with_statistics(Statistics::Off, Blocks::LeavesOffline), vec![
    memory(1024, GuestOffline).says("echo online > $state").more(0),
    memory(1024, GuestOffline).says("are missing").more(0),
])]
#[case::with_a_statistics_period_beyond_the_deadline(with_statistics(Statistics::Every(60), Blocks::Onlines), vec![
    memory(1024, Verified).within(20).by(&["balloon-stats"]).more(512),
])]
#[case::without_a_balloon(with_statistics(Statistics::NoBalloon, Blocks::LeavesOffline), vec![
    memory(1024, Unverifiable).says("<memballoon model='virtio'>").more(0),
    memory(1024, Unverifiable).says("<memballoon model='virtio'>").more(0),
    memory(512, Verified).more(0),
])]
#[tokio::test]
async fn each_guest_behavior_yields_its_true_verdict(
    #[case] guest: FakeGuest,
    #[case] steps: Vec<Step>,
    #[values(On::Memory, On::Libvirt)] on: On,
) {
    match on {
        On::Memory => row::<InMemory>(guest, steps).await,
        On::Libvirt => row::<Real>(guest, steps).await,
    }
}

fn with_statistics(statistics: Statistics, blocks: Blocks) -> FakeGuest {
    FakeGuest {
        statistics,
        ..guest(Cpus::Onlines, blocks)
    }
}

fn with_dimms(blocks: Blocks) -> FakeGuest {
    FakeGuest {
        memory: MorePossible::Dimms,
        ..guest(Cpus::Onlines, blocks)
    }
}

/// A request and its expected result.
struct Step {
    request: HotplugRequest,
    verdict: Verdict,
    paused: bool,
    within: u64,
    says: &'static str,
    proof: &'static [&'static str],
    uses: Option<&'static str>,
    has: Option<&'static str>,
    /// Memory of the guest beyond that at boot, in MiB.
    more: Option<u64>,
}

impl Step {
    /// Submits the request while the domain is paused.
    fn paused(self) -> Self {
        let paused = true;
        Self { paused, ..self }
    }

    /// Expects the verdict within this number of seconds.
    fn within(self, within: u64) -> Self {
        Self { within, ..self }
    }

    /// Expects this text in the message or the diagnosis.
    fn says(self, says: &'static str) -> Self {
        Self { says, ..self }
    }

    /// Expects evidence from these sources.
    fn by(self, proof: &'static [&'static str]) -> Self {
        Self { proof, ..self }
    }

    /// Expects the guest to report these CPUs as online.
    fn uses(self, cpus: &'static str) -> Self {
        let uses = Some(cpus);
        Self { uses, ..self }
    }

    /// Expects the guest to report no other CPUs, online or offline.
    fn has(self, cpus: &'static str) -> Self {
        let has = Some(cpus);
        Self { has, ..self }
    }

    /// Expects the guest to report this much more memory than at boot.
    fn more(self, mib: u64) -> Self {
        let more = Some(mib);
        Self { more, ..self }
    }
}

fn step(request: HotplugRequest, verdict: Verdict) -> Step {
    Step {
        request,
        verdict,
        paused: false,
        within: 60,
        says: "",
        proof: &[],
        uses: None,
        has: None,
        more: None,
    }
}

fn vcpus(count: u32, verdict: Verdict) -> Step {
    step(super::vcpus(count), verdict)
}

fn onlined(count: u32, verdict: Verdict) -> Step {
    let online = true;
    step(HotplugRequest::Vcpus { count, online }, verdict)
}

fn memory(mib: u64, verdict: Verdict) -> Step {
    let size = Bytes::from_mib(mib).unwrap();
    step(HotplugRequest::Memory { size, force: false }, verdict)
}

async fn row<B: Backend>(like: FakeGuest, steps: Vec<Step>) {
    let backend = B::start().await;
    let node = contract::Node::new(&backend, Options::default());
    let guest = backend.guest(&like).await;
    let boot = (like.cpus != Cpus::Silent).then(|| guest.total());
    for step in steps {
        let before = counted(&backend).await;
        if step.paused {
            guest.pause(true);
        }
        let record = node.ask(step.request.clone(), step.within).await;
        if step.paused {
            guest.pause(false);
        }
        is(&record, step.verdict);
        says(&record, step.says);
        for source in step.proof {
            has_evidence(&record, source);
        }
        let sources = record.evidence.iter().map(|piece| piece.source.as_str());
        let called = sources.clone().any(|source| source == "hypervisor-call");
        let untouched = [Infeasible, DomainNotRunning].contains(&step.verdict);
        let after = counted(&backend).await;
        if let HotplugRequest::Vcpus { count, online } = step.request {
            // libvirt reports the same amount, and received no needless call.
            assert_eq!(after, if untouched { before } else { count });
            assert!(!called || online || count != before, "{record:#?}");
        }
        assert!(!called || !untouched, "{record:#?}");
        if let Some(cpus) = step.uses {
            guest.uses(cpus).await;
        }
        if let Some(cpus) = step.has {
            guest.has(cpus).await;
        }
        let more = match step.verdict {
            PartiallyApplied => Some(left(&record)),
            _ => step.more,
        };
        if let (Some(more), Some(boot)) = (more, boot) {
            let (least, most) = (more - more / 42, more + 20);
            let at_least = boot.saturating_add(Bytes::from_mib(least).unwrap());
            let at_most = boot.saturating_add(Bytes::from_mib(most).unwrap());
            // The guest reports it a moment later.
            eventually(LONG, async || {
                let total = guest.total();
                ensure!(total >= at_least && total <= at_most, "{boot} → {total}");
                Ok(())
            })
            .await
            .unwrap();
        }
        if step.verdict == Verified {
            guest.keeps().await;
        }
    }
}

/// Returns the hypervisor's number of vCPUs.
async fn counted<B: Backend>(backend: &B) -> u32 {
    let control = backend.control();
    let id = control.find(NAME).await.unwrap();
    let seen = control.observe(&id, PLAIN).await;
    seen.live.unwrap().domain.vcpus.plugged()
}

/// Returns the memory that the guest did not return, by the record, in MiB: more than none and less
/// than all.
fn left(record: &Record) -> u64 {
    let Some(Amount::Memory { memory, .. }) = record.after else {
        panic!("{record:#?}");
    };
    let left = memory.saturating_sub(BOOT.parse().unwrap());
    assert!(
        left > Bytes::ZERO && memory < MORE.parse().unwrap(),
        "{record:#?}"
    );
    says(record, &format!("{left} remain"));
    left.get() >> 20
}

#[rstest]
#[tokio::test]
async fn cpu_released_after_refusal_corrects_verdict(#[values(On::Memory, On::Libvirt)] on: On) {
    match on {
        On::Memory => refusal::<InMemory>().await,
        On::Libvirt => refusal::<Real>().await,
    }
}

/// The verdict follows the guest's answer: libvirt waits for another 5 s and then reports only a
/// timeout.
async fn refusal<B: Backend>() {
    let backend = B::start().await;
    let node = contract::Node::new(&backend, Options::default());
    let guest = backend
        .guest(&guest(Cpus::KeepsThem, Blocks::Onlines))
        .await;
    is(&node.ask(super::vcpus(3), 60).await, Verified);
    guest.keeps().await;

    let id = node.submit(super::vcpus(2), 60, Require::Online).await;
    let record = node.becomes(&id, Record::is_done).await;
    is(&record, GuestRefused);
    says(&record, "busy");
    says(&record, "Offline failed");
    let libvirts_word = record.hypervisor_error.as_ref();
    assert_eq!(libvirts_word, None, "before libvirt gave up");
    let refused = last_evidence(&record, "acpi-ost").time;
    let took = record.finished.unwrap().since(refused);
    assert!(took < Duration::from_secs(1), "{took:?}");
    guest.uses("0-2").await;

    // The guest can release it now, and another client requests it.
    guest.gives_in(2).await;
    let verified = |record: &Record| record.verdict == Some(Verified);
    let record = node.becomes(&id, verified).await;
    assert!(record.corrected > record.finished, "{record:#?}");
    assert_eq!(counted(&backend).await, 2);
    guest.uses("0-1").await;
}
