//! The core's judgement of real guests: what it says is what the guest itself says.

use std::time::Duration;

use virtnode::hotplug::{HotplugRequest, Outcome, Rejection, Require, Source, Verdict};
use virtnode::units::Bytes;

use crate::support::by_virsh::{ByVirsh, Ended};
use crate::support::guest::{Guest, GuestConfig, MorePossible};
use crate::support::libvirtd::Libvirtd;

const WITHIN: Duration = Duration::from_secs(30);

fn mib(mib: u64) -> Bytes {
    Bytes::from_mib(mib).expect("a small number")
}

/// A guest with what is asked of it.
struct Lab<'l> {
    guest: Guest<'l>,
    virsh: ByVirsh<'l>,
}

impl<'l> Lab<'l> {
    async fn start(libvirtd: &'l Libvirtd, config: &GuestConfig<'_>) -> Self {
        let guest = Guest::start(libvirtd, config).await.unwrap();
        let virsh = ByVirsh::new(libvirtd, config.name).unwrap();
        Self { guest, virsh }
    }

    fn ask(&self, request: HotplugRequest, within: Duration) -> Ended {
        let ended = self.virsh.carry_out(request, Require::Online, within);
        ended.unwrap()
    }

    fn vcpus(&self, count: u32) -> Outcome {
        let request = HotplugRequest::Vcpus {
            count,
            online: false,
        };
        let ended = self.ask(request, WITHIN);
        show(ended.outcome());
        ended.outcome().clone()
    }

    fn memory(&self, size: Bytes, within: Duration) -> Outcome {
        let ended = self.ask(HotplugRequest::Memory { size }, within);
        show(ended.outcome());
        ended.outcome().clone()
    }

    fn online(&self) -> String {
        self.guest.witness().unwrap().online
    }
}

/// For who runs a test to read it.
fn show(outcome: &Outcome) {
    println!("{}: {}", outcome.verdict, outcome.message);
    for piece in &outcome.evidence {
        println!("    {} {}: {}", piece.time, piece.source, piece.detail);
    }
    if let Some(diagnosis) = &outcome.diagnosis {
        println!("    {}: {}", diagnosis.seen, diagnosis.remedy);
    }
}

fn diagnosis(outcome: &Outcome) -> &str {
    outcome
        .diagnosis
        .as_ref()
        .map_or("none", |diagnosis| &diagnosis.code)
}

fn guest<'c>(words: &'c str) -> GuestConfig<'c> {
    GuestConfig {
        words,
        ..GuestConfig::default()
    }
}

#[tokio::test]
async fn a_guest_that_onlines_by_itself_and_gives_back() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=online")).await;
    let outcome = lab.vcpus(3);
    assert_eq!(outcome.verdict, Verdict::Verified);
    lab.guest.sees(|sees| sees.online == "0-2").await.unwrap();
    assert!(
        outcome
            .evidence
            .iter()
            .any(|piece| piece.source == Source::AcpiOst)
    );

    // libvirt says it timed out; afterwards it agrees.
    let outcome = lab.vcpus(2);
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert!(outcome.hypervisor_error.is_some());
    lab.guest.sees(|sees| sees.present == "0-1").await.unwrap();
    assert_eq!(lab.vcpus(1).verdict, Verdict::Verified);
    lab.guest.sees(|sees| sees.present == "0").await.unwrap();
    let count = libvirtd.virsh(&["vcpucount", "guest", "--live", "--active"]);
    assert_eq!(count.unwrap().trim(), "1");
    assert_eq!(lab.vcpus(1).verdict, Verdict::Verified, "asked again");

    let infeasible = |count| {
        let request = HotplugRequest::Vcpus {
            count,
            online: false,
        };
        let ended = lab.ask(request, WITHIN);
        assert!(matches!(ended, Ended::Rejected(Rejection::Infeasible(_))));
    };
    infeasible(0);
    infeasible(5);
}

#[tokio::test]
async fn a_guest_that_onlines_by_itself_without_an_agent() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=online lab.agent=no")).await;
    let outcome = lab.vcpus(3);
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert_eq!(lab.online(), "0-2");
    assert!(
        outcome
            .evidence
            .iter()
            .any(|piece| piece.source == Source::VcpuTime)
    );
}

#[tokio::test]
async fn a_guest_that_leaves_cpus_offline() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=offline")).await;
    let outcome = lab.vcpus(3);
    assert_eq!(
        (outcome.verdict, diagnosis(&outcome)),
        (Verdict::GuestOffline, "cpus-offline")
    );
    assert_eq!(lab.online(), "0");
    let request = HotplugRequest::Vcpus {
        count: 3,
        online: true,
    };
    let ended = lab.ask(request, WITHIN);
    show(ended.outcome());
    assert_eq!(ended.outcome().verdict, Verdict::Verified);
    lab.guest.sees(|sees| sees.online == "0-2").await.unwrap();
}

#[tokio::test]
async fn a_guest_that_leaves_cpus_offline_without_an_agent() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.agent=no")).await;
    assert_eq!(lab.vcpus(3).verdict, Verdict::GuestOffline);
    assert_eq!(lab.online(), "0");
}

#[tokio::test]
async fn a_guest_whose_cpus_cannot_be_brought_online() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=stuck")).await;
    let request = HotplugRequest::Vcpus {
        count: 2,
        online: true,
    };
    let ended = lab.ask(request, WITHIN);
    let outcome = ended.outcome();
    show(outcome);
    assert_eq!(outcome.verdict, Verdict::GuestOffline);
    assert_eq!(diagnosis(outcome), "cpus-cannot-be-onlined");
    assert_eq!(lab.online(), "0");
}

#[tokio::test]
async fn a_guest_that_throws_cpus_away() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("nr_cpus=1 lab.cpus=online")).await;
    let outcome = lab.vcpus(3);
    assert_eq!(
        (outcome.verdict, diagnosis(&outcome)),
        (Verdict::GuestRefused, "nr-cpus")
    );
    assert_eq!(lab.guest.witness().unwrap().present, "0");
}

#[tokio::test]
async fn a_guest_that_throws_one_of_two_cpus_away() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("nr_cpus=2 lab.cpus=online")).await;
    let outcome = lab.vcpus(3);
    assert_eq!(
        (outcome.verdict, diagnosis(&outcome)),
        (Verdict::PartiallyApplied, "nr-cpus")
    );
    assert_eq!(lab.online(), "0-1");
}

#[tokio::test]
async fn a_guest_that_throws_cpus_away_without_an_agent() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("nr_cpus=1 lab.agent=no")).await;
    assert_eq!(lab.vcpus(3).verdict, Verdict::GuestOffline);
}

#[tokio::test]
async fn a_guest_that_keeps_a_cpu() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=online lab.deadline=3")).await;
    assert_eq!(lab.vcpus(3).verdict, Verdict::Verified);
    lab.guest.says("lab: 3 deadline tasks").await.unwrap();
    let outcome = lab.vcpus(2);
    assert_eq!(
        (outcome.verdict, diagnosis(&outcome)),
        (Verdict::GuestRefused, "cpu-in-use")
    );
    let (first, last) = (&outcome.evidence[0], outcome.evidence.last().unwrap());
    assert!(last.time.since(first.time) < Duration::from_secs(1));
    assert_eq!(lab.online(), "0-2");
}

#[tokio::test]
async fn a_guest_that_cannot_hear() {
    let libvirtd = Libvirtd::start().unwrap();
    let guest = Guest::boot(&libvirtd, &guest("lab.cpus=online")).unwrap();
    let virsh = ByVirsh::new(&libvirtd, "guest").unwrap();
    let vcpus = |count, within| {
        let request = HotplugRequest::Vcpus {
            count,
            online: false,
        };
        virsh
            .carry_out(request, Require::Online, Duration::from_millis(within))
            .unwrap()
    };
    // Still in its firmware.
    let ended = vcpus(2, 600);
    show(ended.outcome());
    assert_ne!(ended.outcome().verdict, Verdict::Verified);
    // Paused.
    libvirtd.virsh(&["suspend", "guest"]).unwrap();
    assert!(matches!(
        vcpus(3, 600),
        Ended::Rejected(Rejection::NotRunning(..))
    ));
    libvirtd.virsh(&["resume", "guest"]).unwrap();
    // What it missed it finds when it boots.
    guest.ready().await.unwrap();
    let ended = vcpus(2, 20_000);
    show(ended.outcome());
    assert_eq!(ended.outcome().verdict, Verdict::Verified);
    assert_eq!(guest.witness().unwrap().online, "0-1");
}

#[tokio::test]
async fn virtio_mem_whose_blocks_come_online() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.blocks=online")).await;
    let before = lab.guest.witness().unwrap().total_kib;
    let outcome = lab.memory(mib(1024), WITHIN);
    assert_eq!(outcome.verdict, Verdict::Verified);
    let sees = lab
        .guest
        .sees(|sees| sees.total_kib > before + 500 * 1024)
        .await;
    sees.unwrap();
    assert_eq!(
        lab.memory(mib(1024), WITHIN).verdict,
        Verdict::Verified,
        "asked again"
    );
    let outcome = lab.memory(mib(512), Duration::from_secs(60));
    assert!(matches!(
        outcome.verdict,
        Verdict::Verified | Verdict::PartiallyApplied
    ));
    for (size, code) in [
        (mib(1023), "memory-block"),
        (mib(8192), "above-maximum-memory"),
    ] {
        match lab.ask(HotplugRequest::Memory { size }, WITHIN) {
            Ended::Rejected(Rejection::Infeasible(limit)) => assert_eq!(limit.code(), code),
            _ => panic!("{size} is not feasible"),
        }
    }
}

#[tokio::test]
async fn virtio_mem_whose_blocks_stay_offline() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.blocks=offline")).await;
    for _ in 0..2 {
        let outcome = lab.memory(mib(1024), WITHIN);
        assert_eq!(outcome.verdict, Verdict::GuestOffline);
        assert_eq!(diagnosis(&outcome), "memory-offline");
    }
}

#[tokio::test]
async fn virtio_mem_without_a_driver() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.virtio_mem=no lab.blocks=online")).await;
    let outcome = lab.memory(mib(1024), Duration::from_secs(8));
    assert_eq!(outcome.verdict, Verdict::GuestSilent);
    assert_eq!(diagnosis(&outcome), "no-virtio-mem-driver");
}

#[tokio::test]
async fn virtio_mem_that_cannot_all_be_given_back() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.blocks=online lab.pin=yes")).await;
    assert_eq!(lab.memory(mib(1024), WITHIN).verdict, Verdict::Verified);
    lab.guest.says("lab: pinned").await.unwrap();
    let outcome = lab.memory(mib(512), Duration::from_secs(60));
    assert_eq!(outcome.verdict, Verdict::PartiallyApplied);
    assert!(outcome.message.contains("are left"), "{}", outcome.message);
}

#[tokio::test]
async fn a_dimm_that_is_used_or_not() {
    let libvirtd = Libvirtd::start().unwrap();
    for (words, verdict) in [
        ("lab.blocks=online", Verdict::Verified),
        ("lab.blocks=offline", Verdict::GuestOffline),
    ] {
        let config = GuestConfig {
            memory: MorePossible::Dimms,
            ..guest(words)
        };
        let lab = Lab::start(&libvirtd, &config).await;
        assert_eq!(lab.memory(mib(1024), WITHIN).verdict, verdict);
        let size = mib(1024 + 100);
        let ended = lab.ask(HotplugRequest::Memory { size }, WITHIN);
        assert!(matches!(ended, Ended::Rejected(Rejection::Infeasible(_))));
    }
}

#[tokio::test]
async fn a_guest_that_is_reset_in_the_middle() {
    let libvirtd = Libvirtd::start().unwrap();
    let lab = Lab::start(&libvirtd, &guest("lab.cpus=offline")).await;
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while lab.guest.witness().unwrap().present != "0-2" {
                std::thread::sleep(Duration::from_millis(50));
            }
            libvirtd.virsh(&["reset", "guest"]).unwrap();
        });
        lab.vcpus(3)
    });
    // It boots with all that is there; that is no proof before it has booted.
    assert_eq!(outcome.verdict, Verdict::Verified);
    assert_eq!(lab.online(), "0-2");
}
