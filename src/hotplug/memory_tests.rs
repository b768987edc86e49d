//! Truth table of memory on the simulated guest.

use std::time::Duration;

use super::simulation::{Ended, GuestBehavior, World, WorldChange, mib, ms};
use super::*;
use crate::domain::{MemoryDevice, MemoryModel};
use crate::units::{Bytes, KiB};

#[test]
fn virtio_mem_grows_and_shrinks_verified() {
    let mut world = World::new(1, GuestBehavior::default());
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert_eq!(world.total, mib(916));
    let outcome = ended.outcome();
    assert!(
        outcome
            .message
            .starts_with("512MiB added, and the guest's own total shows it")
    );
    let after = Amount::Memory {
        memory: mib(1024),
        guest_total: Some(mib(916)),
    };
    assert_eq!(outcome.after, after);
    let has = |source| outcome.evidence.iter().any(|piece| piece.source == source);
    assert!(has(Source::VirtioMem) && has(Source::BalloonStats) && has(Source::LiveXml));

    let ended = world.memory(mib(512));
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert_eq!(world.domain.memory.plugged(), mib(512));
    assert_eq!(
        world.made[1],
        Action::ResizeVirtioMem {
            alias: "ua-mem0".to_owned(),
            requested: KiB::new(0).unwrap(),
            persist: false,
        }
    );
}

#[test]
fn offline_memory_blocks_yield_guest_offline() {
    let behavior = GuestBehavior {
        blocks_online: false,
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    let ended = world.memory(mib(1024));
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::GuestOffline, "memory-offline")
    );
    let diagnosis = ended.outcome().diagnosis.as_ref().unwrap();
    assert!(diagnosis.remedy.contains("auto_online_blocks"));
    assert!(ended.took(&world) < ms(15_000));

    // A repeated request changes nothing and proves nothing.
    let calls = world.made.len();
    assert_eq!(world.memory(mib(1024)).verdict(), Verdict::GuestOffline);
    assert_eq!(world.made.len(), calls);

    // Memory that comes online later corrects the record.
    let mut history = ended.into_history();
    world.total = world.total.saturating_add(mib(512));
    let outcome = world.judge_later(&mut history, ms(60_000));
    assert_eq!(outcome.verdict, Verdict::Verified);
}

#[test]
fn missing_virtio_mem_driver_yields_guest_silent() {
    let behavior = GuestBehavior {
        virtio_mem: false,
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::GuestSilent);
    assert_eq!(ended.diagnosis(), "no-virtio-mem-driver");
    let remedy = &ended.outcome().diagnosis.as_ref().unwrap().remedy;
    assert!(remedy.contains("virtio_mem") && remedy.contains("5.8") && remedy.contains("5.16"));
    assert!(ended.took(&world) >= ms(60_000));
}

#[test]
fn partly_moved_memory_yields_partially_applied_with_amount() {
    let behavior = GuestBehavior {
        takes_at_most: mib(200),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::PartiallyApplied);
    assert_eq!(ended.outcome().message, "the guest took 200MiB of 512MiB");
    assert!(ended.took(&world) < ms(20_000));

    let behavior = GuestBehavior {
        pinned: mib(22),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    world.memory(mib(1024));
    let ended = world.memory(mib(512));
    assert_eq!(
        (ended.verdict(), ended.diagnosis()),
        (Verdict::PartiallyApplied, "memory-in-use")
    );
    assert_eq!(
        ended.outcome().message,
        "the guest returned 490MiB of 512MiB, 22MiB remain"
    );
    let mut history = ended.into_history();
    let mut world = world.at(ms(1000), WorldChange::FreesMemory);
    let outcome = world.judge_later(&mut history, ms(60_000));
    assert_eq!(outcome.verdict, Verdict::Verified);
}

#[test]
fn nothing_returned_yields_pending() {
    let behavior = GuestBehavior {
        pinned: mib(512),
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior);
    world.memory(mib(1024));
    let ended = world.memory(mib(512));
    assert_eq!(ended.verdict(), Verdict::Pending);
}

#[test]
fn dimm_in_guest_total_yields_verified() {
    let mut world = World::new(1, GuestBehavior::default()).with_dimms();
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::Verified, "{:?}", ended.outcome());
    assert_eq!(world.total, mib(916));
    let dimm = Action::AttachDimm {
        alias: "ua-virtnode-dimm0".to_owned(),
        size: KiB::new(512 * 1024).unwrap(),
        node: Some(0),
        persist: false,
    };
    assert_eq!(world.made, [dimm]);

    for (behavior, verdict, diagnosis) in [
        (
            GuestBehavior {
                blocks_online: false,
                ..GuestBehavior::default()
            },
            Verdict::GuestOffline,
            "memory-offline",
        ),
        (
            GuestBehavior {
                refuses: Some(1),
                ..GuestBehavior::default()
            },
            Verdict::GuestRefused,
            "dimm-refused",
        ),
        (
            GuestBehavior {
                unresponsive: true,
                ..GuestBehavior::default()
            },
            Verdict::GuestSilent,
            "guest-not-reporting",
        ),
    ] {
        let mut world = World::new(1, behavior).with_dimms();
        let ended = world.memory(mib(1024));
        assert_eq!((ended.verdict(), ended.diagnosis()), (verdict, diagnosis));
    }
}

#[test]
fn small_offline_dimm_is_not_mistaken_for_kernel_overhead() {
    let behavior = GuestBehavior {
        blocks_online: false,
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior).with_dimms();
    assert_eq!(world.memory(mib(640)).verdict(), Verdict::GuestOffline);
    assert_ne!(
        world.memory(mib(640)).verdict(),
        Verdict::Verified,
        "asked again"
    );
    // The same without an earlier total.
    let mut world = World::new(1, world.behavior).with_dimms();
    let before = world.observe();
    let request = HotplugRequest::Memory {
        size: mib(640),
        force: false,
    };
    let Preflight::Ready(plan) = preflight(&request, Scope::Live, &before, &Host::default()) else {
        panic!();
    };
    let mut unknown = before;
    unknown.stats = None;
    let terms = world.terms(Require::Online, 60);
    let mut history = History::new(request, terms, plan, unknown, true);
    let outcome = world.run(&mut history);
    assert_eq!(outcome.verdict, Verdict::Unverifiable);
}

#[test]
fn ballooned_memory_yields_balloon_diagnosis() {
    let mut world = World::new(
        1,
        GuestBehavior {
            blocks_online: false,
            ..GuestBehavior::default()
        },
    );
    let request = HotplugRequest::Memory {
        size: mib(1024),
        force: false,
    };
    let terms = world.terms(Require::Online, 60);
    let ended = world.carry_out(request, terms);
    let mut history = ended.into_history();
    let mut seen = world.observe();
    seen.at = world.now.after(ms(100));
    seen.stats.as_mut().unwrap().balloon.current = Some(mib(512));
    history.observed(seen);
    let Step::Done(outcome) = judge(&history, world.now.after(ms(200))) else {
        panic!();
    };
    assert_eq!(outcome.verdict, Verdict::GuestOffline);
    assert_eq!(outcome.diagnosis.unwrap().code, "balloon");
}

#[test]
fn reached_target_needs_no_call() {
    let mut world = World::new(1, GuestBehavior::default());
    assert_eq!(world.memory(mib(512)).verdict(), Verdict::Verified);
    world.memory(mib(1024));
    let calls = world.made.len();
    let ended = world.memory(mib(1024));
    assert_eq!(
        (ended.verdict(), ended.took(&world)),
        (Verdict::Verified, Duration::ZERO)
    );
    assert_eq!(world.made.len(), calls);
}

#[test]
fn impossible_request_is_infeasible_with_limit() {
    let infeasible = |size: Bytes, change: &dyn Fn(&mut World)| {
        let mut world = World::new(1, GuestBehavior::default());
        change(&mut world);
        match world.memory(size) {
            Ended::Rejected(Rejection::Infeasible(limit)) => {
                assert!(world.made.is_empty());
                (limit.code(), limit.to_string())
            }
            other => panic!("{:?}", other.verdict()),
        }
    };
    let dimms = |world: &mut World| world.domain.memory.devices.clear();
    let same = |_: &mut World| {};

    let (code, text) = infeasible(mib(256), &same);
    assert_eq!(code, "below-boot-memory");
    assert!(
        text.starts_with("256MiB are less than the 512MiB"),
        "{text}"
    );
    assert_eq!(infeasible(Bytes::ZERO, &same).0, "below-boot-memory");
    let (code, text) = infeasible(mib(3072), &same);
    assert_eq!(code, "above-maximum-memory");
    assert!(text.contains("which is 2560MiB"), "{text}");
    assert_eq!(
        infeasible(Bytes::new(u64::MAX), &same).0,
        "above-maximum-memory"
    );
    let (code, text) = infeasible(mib(1023), &same);
    assert_eq!(code, "memory-block");
    assert!(text.ends_with("ask for 1022MiB or 1GiB"), "{text}");
    assert_eq!(
        infeasible(Bytes::new((600 << 20) + 1), &same).0,
        "memory-block"
    );
    let none = |world: &mut World| {
        dimms(world);
        world.domain.memory.maximum = None;
    };
    let (code, text) = infeasible(mib(1024), &none);
    assert_eq!(code, "no-max-memory");
    assert!(
        text.contains("<maxMemory>") && text.contains("virtio-mem"),
        "{text}"
    );

    assert_eq!(infeasible(mib(8192), &dimms).0, "above-maximum-memory");
    let no_slot = |world: &mut World| {
        dimms(world);
        world.domain.memory.slots = 0;
    };
    assert_eq!(infeasible(mib(1024), &no_slot).0, "no-slot");
    let no_cell = |world: &mut World| {
        dimms(world);
        world.domain.memory.cells.clear();
    };
    assert_eq!(infeasible(mib(1024), &no_cell).0, "no-numa-cell");
    let no_acpi = |world: &mut World| {
        dimms(world);
        world.domain.acpi = false;
    };
    assert_eq!(infeasible(mib(1024), &no_acpi).0, "no-acpi");
    let s390 = |world: &mut World| {
        dimms(world);
        world.domain.machine = Some("s390-ccw-virtio-9.2".to_owned());
    };
    assert_eq!(infeasible(mib(1024), &s390).0, "no-dimms");
    let odd = Bytes::new((1024 << 20) + (1 << 19));
    assert_eq!(infeasible(odd, &dimms).0, "memory-block");
    // QEMU would reject it.
    let (code, text) = infeasible(mib(613), &dimms);
    assert_eq!(code, "memory-block");
    assert!(text.ends_with("ask for 612MiB or 614MiB"), "{text}");
    let has_dimm = |world: &mut World| {
        world.domain.memory.devices = vec![MemoryDevice {
            model: MemoryModel::Dimm,
            alias: None,
            size: mib(512),
            requested: None,
            current: None,
            block: None,
            node: Some(0),
            slot: Some(0),
        }];
    };
    let (code, text) = infeasible(mib(600), &has_dimm);
    assert_eq!(code, "cannot-shrink");
    assert!(text.contains("less than the 1GiB"), "{text}");
    let poor = |world: &mut World| world.host.available = Some(mib(100));
    let (code, text) = infeasible(mib(1024), &poor);
    assert_eq!(code, "node-memory");
    assert!(
        text.contains("512MiB more") && text.contains("100MiB available"),
        "{text}"
    );
}

#[test]
fn huge_pages_do_not_count_as_available_memory() {
    let mut world = World::new(1, GuestBehavior::default());
    world.host.available = Some(mib(100));
    world.domain.memory.huge_pages = true;
    assert_eq!(world.memory(mib(1024)).verdict(), Verdict::Verified);
}

#[test]
fn two_devices_grow_from_first_and_shrink_from_last() {
    let mut world = World::new(1, GuestBehavior::default());
    let mut second = world.domain.memory.devices[0].clone();
    second.alias = Some("ua-mem1".to_owned());
    world.domain.memory.devices.push(second);
    let plan = |world: &World, size| match preflight(
        &HotplugRequest::Memory { size, force: false },
        Scope::Live,
        &world.observe(),
        &Host::default(),
    ) {
        Preflight::Ready(plan) => plan
            .actions
            .iter()
            .map(|action| match action {
                Action::ResizeVirtioMem {
                    alias, requested, ..
                } => format!("{alias} {requested}"),
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        plan(&world, mib(512 + 3072)),
        ["ua-mem0 2GiB", "ua-mem1 1GiB"]
    );
    for device in &mut world.domain.memory.devices {
        device.requested = Some(mib(1024));
        device.current = Some(mib(1024));
    }
    assert_eq!(
        plan(&world, mib(512 + 512)),
        ["ua-mem1 0B", "ua-mem0 512MiB"]
    );
    assert_eq!(plan(&world, mib(512 + 1536)), ["ua-mem1 512MiB"]);
    let ended = world.memory(mib(512 + 512));
    assert_eq!(ended.verdict(), Verdict::Verified);
    assert_eq!(world.made.len(), 2);
}

#[test]
fn end_of_domain_ends_operation() {
    let behavior = GuestBehavior {
        virtio_mem: false,
        ..GuestBehavior::default()
    };
    let mut world = World::new(1, behavior).at(ms(700), WorldChange::Destroy);
    let ended = world.memory(mib(1024));
    assert_eq!(ended.verdict(), Verdict::DomainNotRunning);
    assert!(ended.took(&world) < ms(1000));
}
