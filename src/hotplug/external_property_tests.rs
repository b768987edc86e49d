//! Properties that hold for every change by another client, guest and order of inputs.

use proptest::prelude::*;
use proptest::sample::select;

use super::external::{
    DomainChanges, ExternalAction, ExternalChange, ExternalOptions, LookResult, MAX_DETACHES,
    OwnChange, OwnChanges,
};
use super::external_tests::{GRACE, Watched};
use super::property_tests::behavior;
use super::simulation::{GuestBehavior, World, WorldChange, mib, ms};
use super::*;
use crate::domain::{AttachedDevice, AttachedKind, DomainState};

fn change() -> impl Strategy<Value = WorldChange> {
    prop_oneof![
        4 => (1_u32..5).prop_map(WorldChange::AnotherSets),
        3 => select(&[0_u64, 128, 512, 1024][..]).prop_map(|size| WorldChange::AnotherResizes(mib(size))),
        1 => Just(WorldChange::Destroy),
        1 => Just(WorldChange::Pause),
        2 => Just(WorldChange::Resume),
        1 => Just(WorldChange::Reset),
        1 => Just(WorldChange::AgentDies),
        1 => Just(WorldChange::LosesLibvirt),
        2 => Just(WorldChange::FindsLibvirt),
        1 => (1_u32..4).prop_map(WorldChange::Onlines),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// A change is `Verified` only if the guest has it at that time.
    #[test]
    fn verified_change_is_really_there(
        behavior in behavior(),
        vcpus in 1_u32..4,
        misses_removals: bool,
        changes in prop::collection::vec((0_u64..40_000, change()), 1..5),
    ) {
        let nr_cpus = behavior.nr_cpus.max(vcpus);
        let mut world = World::new(vcpus, GuestBehavior { nr_cpus, ..behavior });
        world.misses_removals = misses_removals;
        let mut watched = Watched::new(world);
        for (after, change) in changes {
            watched.run(ms(after));
            watched.world = watched.world.at(ms(1), change);
            for _ in 0..60 {
                let known: Vec<_> = watched.records.iter().map(|(n, c)| (*n, c.verdict)).collect();
                watched.run(ms(50));
                for (number, change) in &watched.records {
                    let had = known.iter().find(|(known, _)| known == number);
                    let had = had.and_then(|(_, verdict)| *verdict);
                    if change.verdict == Some(Verdict::Verified) && had != change.verdict {
                        check(&watched.world, change)?;
                    }
                }
            }
        }
        let open = watched.changes.open();
        prop_assert!(open <= 2);
    }
}

fn check(world: &World, change: &ExternalChange) -> Result<(), TestCaseError> {
    match change.requested {
        Some(Amount::Vcpus { vcpus, .. }) => {
            let count = |set: &std::collections::BTreeSet<u32>| u32::try_from(set.len()).unwrap();
            if change.action == ExternalAction::Plug {
                prop_assert_eq!(count(&world.online), vcpus, "{:#?}", change);
            } else {
                prop_assert!(count(&world.has) <= vcpus, "{:#?}", change);
            }
        }
        Some(Amount::Memory { memory, .. }) => {
            prop_assert_eq!(world.domain.memory.plugged(), memory, "{:#?}", change);
        }
        None => {}
    }
    Ok(())
}

/// An input, possible or not.
#[derive(Debug, Clone)]
enum Input {
    Look(u32, u64, bool, usize, usize),
    Failed(Contact),
    Happened(Event, bool),
    Started(bool),
    Redefined,
    Agent(bool),
    Missed,
    Statistics(u32, bool),
    Own(u32, bool),
}

fn input() -> impl Strategy<Value = Input> {
    let event = prop_oneof![
        (
            0_u32..5,
            select(&[0_u32, 1, 3, 0x103][..]),
            select(&[0_u32, 1, 0x84][..])
        )
            .prop_map(|(slot, source, status)| Event::Ost(Ost {
                device: Some(format!("vcpu{slot}")),
                slot,
                kind: SlotKind::Cpu,
                source,
                status,
            })),
        "(vcpu[0-4]|ua-vol[0-9]|\u{202e}x)".prop_map(|device| Event::UnplugFailed { device }),
        "(vcpu[0-4]|ua-vol[0-9])".prop_map(|device| Event::DeviceDeleted {
            device: Some(device),
            path: String::new()
        }),
        Just(Event::Reset),
        Just(Event::Paused),
        Just(Event::Resumed),
        any::<u64>().prop_map(|size| Event::MemorySize {
            device: "ua-mem0".to_owned(),
            size: crate::units::Bytes::new(size),
        }),
        Just(Event::Stopped("x".to_owned())),
    ];
    prop_oneof![
        6 => (0_u32..5, 0_u64..2048, any::<bool>(), 0_usize..20, 0_usize..20)
            .prop_map(|(v, m, r, a, d)| Input::Look(v, m, r, a, d)),
        1 => select(vec![Contact::Held, Contact::Absent, Contact::Unreachable("x".to_owned())])
            .prop_map(Input::Failed),
        6 => (event, any::<bool>()).prop_map(|(event, early)| Input::Happened(event, early)),
        1 => any::<bool>().prop_map(Input::Started),
        1 => Just(Input::Redefined),
        1 => any::<bool>().prop_map(Input::Agent),
        1 => Just(Input::Missed),
        2 => (0_u32..5, any::<bool>()).prop_map(|(count, runs)| Input::Statistics(count, runs)),
        1 => (0_u32..5, any::<bool>()).prop_map(|(count, done)| Input::Own(count, done)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// No order of inputs panics, and what is kept of a domain is bounded.
    #[test]
    fn any_order_of_inputs_is_bounded(
        inputs in prop::collection::vec((0_u64..20_000, input()), 0..120),
        defines_devices: bool,
    ) {
        let world = World::new(2, GuestBehavior::default());
        let options = ExternalOptions { grace: GRACE, patience: Patience::default(), defines_devices };
        let mut changes = DomainChanges::new(options, world.now);
        let mut own = OwnChanges::default();
        let mut now = world.now;
        let devices = |count: usize| -> Vec<AttachedDevice> {
            (0..count)
                .map(|n| AttachedDevice {
                    kind: if n % 2 == 0 { AttachedKind::Disk } else { AttachedKind::Interface },
                    key: format!("vd{n}"),
                    alias: Some(format!("ua-vol{n}")),
                })
                .collect()
        };
        for (after, input) in inputs {
            now = now.after(ms(after));
            changes.own(now, &own);
            match input {
                Input::Look(vcpus, memory, runs, attached, defined) => {
                    let mut seen = world.observe();
                    seen.at = now;
                    seen.persistent = true;
                    if !runs {
                        seen.domain.state = DomainState::Paused;
                    }
                    for vcpu in &mut seen.domain.vcpus.each {
                        vcpu.enabled = vcpu.id < vcpus;
                    }
                    seen.domain.memory.devices[0].requested = Some(mib(memory));
                    let (attached, defined) = (devices(attached), Some(devices(defined)));
                    changes.observed(now, LookResult { seen, attached, defined }, &own);
                }
                Input::Failed(contact) => changes.unobserved(now, &contact),
                Input::Happened(event, early) => {
                    let at = if early { world.now } else { now };
                    changes.happened(now, at, event, &own);
                }
                Input::Started(boots) => changes.started(now, boots),
                Input::Redefined => changes.redefined(now),
                Input::Agent(connected) => changes.agent_changed(now, connected),
                Input::Missed => changes.missed_events(now),
                Input::Statistics(count, runs) => {
                    let mut stats = world.observe().stats.unwrap();
                    stats.vcpu_count = Some(count);
                    let state = if runs { DomainState::Running } else { DomainState::Paused };
                    changes.compared(now, (now, &stats, state), None);
                }
                Input::Own(vcpus, done) => own.set(OwnChange {
                    before: None,
                    requested: Amount::Vcpus { vcpus, online: None },
                    finished: done.then_some(now),
                    proven: false,
                }),
            }
            prop_assert!(changes.open() <= 2 + MAX_DETACHES);
            prop_assert!(changes.not_taken().count() <= 2 + MAX_DETACHES);
            for (_, change) in changes.news() {
                let bytes = serde_json::to_vec(&change).unwrap().len();
                prop_assert!(bytes < 16 << 10);
            }
            let _due = changes.next_look(now);
        }
    }
}
