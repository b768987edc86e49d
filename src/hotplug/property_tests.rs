//! Properties that hold for every domain, guest and history.

use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;

use super::simulation::{Ended, GuestBehavior, World, WorldChange, mib, ms};
use super::*;
use crate::domain::{CallError, MemoryModel, VcpuStats};
use crate::units::{Bytes, KiB};

pub(super) fn behavior() -> impl Strategy<Value = GuestBehavior> {
    (
        (
            proptest::option::of(0_u64..12_000),
            1_u32..6,
            any::<bool>(),
            prop::bool::weighted(0.1),
            proptest::option::weighted(0.1, select(&[1_u32, 0x80, 0x82][..])),
            proptest::option::weighted(0.2, 1_u32..4),
            any::<bool>(),
        ),
        (
            prop::bool::weighted(0.8),
            any::<bool>(),
            select(&[0_u64, 22, 300][..]),
            select(&[0_u64, 200, 1 << 20][..]),
            prop::bool::weighted(0.8),
        ),
    )
        .prop_map(
            |((onlines, nr_cpus, stuck, unresponsive, refuses, keeps, agent), memory)| {
                let (virtio_mem, blocks_online, pinned, takes, reports_total) = memory;
                GuestBehavior {
                    onlines_after: onlines.map(ms),
                    nr_cpus,
                    stuck,
                    unresponsive,
                    refuses,
                    keeps,
                    agent,
                    agent_trouble: None,
                    virtio_mem,
                    blocks_online,
                    pinned: mib(pinned),
                    takes_at_most: mib(takes),
                    reports_total,
                }
            },
        )
}

fn change() -> impl Strategy<Value = WorldChange> {
    prop_oneof![
        Just(WorldChange::Destroy),
        Just(WorldChange::Pause),
        Just(WorldChange::Resume),
        Just(WorldChange::Reset),
        Just(WorldChange::AgentDies),
        Just(WorldChange::LosesLibvirt),
        Just(WorldChange::FindsLibvirt),
        (1_u32..4).prop_map(WorldChange::Onlines),
    ]
}

fn world(vcpus: u32) -> impl Strategy<Value = World> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let changes = prop::collection::vec((0_u64..30_000, change()), 0..3);
    (
        behavior(),
        flags,
        changes,
        select(&[20_u64, 400, 9_000, 40_000][..]),
    )
        .prop_map(
            move |(behavior, (events, times, misses_removals), changes, call_takes)| {
                // A guest has room for what it booted with.
                let nr_cpus = behavior.nr_cpus.max(vcpus);
                let mut world = World::new(
                    vcpus,
                    GuestBehavior {
                        nr_cpus,
                        ..behavior
                    },
                );
                world.monitor_events = events;
                world.counts_time = times;
                world.misses_removals = misses_removals;
                world.call_takes = ms(call_takes);
                changes
                    .into_iter()
                    .fold(world, |world, (at, change)| world.at(ms(at), change))
            },
        )
}

fn require() -> impl Strategy<Value = Require> {
    select(&Require::ALL[..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// `Verified` at the highest level means that the guest uses it, and there is a verdict in
    /// time.
    #[test]
    fn verified_vcpus_are_really_there(
        mut world in (1_u32..5).prop_flat_map(world),
        count in 0_u32..6,
        online: bool,
        require in require(),
        seconds in 1_u64..40,
    ) {
        let terms = world.terms(require, seconds);
        let ended = world.carry_out(HotplugRequest::Vcpus { count, online }, terms);
        prop_assert!(world.now <= terms.deadline);
        if let (Ended::Rejected(_), made) = (&ended, &world.made) {
            prop_assert!(made.is_empty());
        }
        if ended.verdict() == Verdict::Verified && require == Require::Online {
            prop_assert!(world.guest_uses(count), "{:?}: {:?}", world.behavior, ended.outcome());
        }
        if ended.verdict() == Verdict::Verified && require == Require::Acknowledged {
            let has = u32::try_from(world.has.len()).unwrap();
            prop_assert!(has == count || !world.behavior.agent, "{:?}", ended.outcome());
        }
        for action in &world.made {
            if let Action::SetVcpus { count: called, .. } = action {
                prop_assert_eq!(*called, count);
            }
        }
    }

    /// The same for memory.
    #[test]
    fn verified_memory_is_really_there(
        mut world in world(1),
        dimms: bool,
        first in 256_u64..3000,
        second in 256_u64..3000,
        require in require(),
        seconds in 1_u64..60,
    ) {
        if dimms {
            world = world.with_dimms();
        }
        let kernel = mib(512).saturating_sub(world.total);
        for size in [mib(first & !1), mib(second & !1)] {
            let terms = world.terms(require, seconds);
            let ended = world.carry_out(HotplugRequest::Memory { size, force: false }, terms);
            prop_assert!(world.now <= terms.deadline);
            if ended.verdict() == Verdict::Verified && require == Require::Online {
                let memory = &world.domain.memory;
                prop_assert_eq!(memory.plugged(), size);
                let uses = world.total.saturating_add(kernel) >= memory.plugged();
                // Without a total only the virtio-mem driver reports.
                let by_word = !dimms && ended.outcome().message.contains("as the guest's driver reports");
                let smaller = ended.outcome().message.contains("returned");
                prop_assert!(uses || by_word || smaller, "{:?}: {:?}", world.behavior, ended.outcome());
            }
        }
    }

    /// No plan exceeds the maximum, differs from the request, or splits a block.
    #[test]
    fn no_plan_exceeds_the_maximum(
        devices in prop::collection::vec((1_u64..5, 0_u64..1100, any::<bool>(), 0_u64..3), 0..5),
        maximum in 0_u64..9000,
        slots in 0_u32..4,
        size in any::<u32>().prop_map(|kib| KiB::new(u64::from(kib)).unwrap()),
        aligned: bool,
        plugged in 0_u32..5,
        count in any::<u32>(),
    ) {
        let mut world = World::new(plugged, GuestBehavior::default());
        let template = world.domain.memory.devices.pop().unwrap();
        for (index, (blocks, requested, dimm, block)) in devices.into_iter().enumerate() {
            let mut device = template.clone();
            device.alias = Some(format!("ua-{index}"));
            device.block = Some(mib(2 << block));
            device.size = mib((2 << block) * blocks * 64);
            device.requested = Some(mib((2 << block) * (requested % (blocks * 64))));
            if dimm {
                device.model = MemoryModel::Dimm;
                (device.requested, device.current, device.block) = (None, None, None);
            }
            world.domain.memory.devices.push(device);
        }
        world.domain.memory.maximum = Some(mib(maximum));
        world.domain.memory.slots = slots;
        let size = if aligned { Bytes::from(size).round_down(mib(2)) } else { size.into() };
        let seen = world.observe();
        let memory = &seen.domain.memory;
        let request = HotplugRequest::Memory { size, force: false };
        if let Preflight::Ready(plan) = preflight(&request, Scope::Live, &seen, &Host::default()) {
            let mut total = memory.asked();
            for action in &plan.actions {
                match action {
                    Action::ResizeVirtioMem { alias, requested, .. } => {
                        let device = memory.device(alias).unwrap();
                        let requested = Bytes::from(*requested);
                        prop_assert!(requested <= device.size);
                        prop_assert!(requested.is_multiple_of(device.block.unwrap()));
                        total = total.saturating_sub(device.asked()).saturating_add(requested);
                    }
                    Action::AttachDimm { size, alias, .. } => {
                        prop_assert!(memory.device(alias).is_none());
                        total = total.saturating_add((*size).into());
                        prop_assert!(total <= memory.maximum.unwrap());
                    }
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            prop_assert_eq!(total, size);
        }
        let request = HotplugRequest::Vcpus { count, online: false };
        if let Preflight::Ready(plan) = preflight(&request, Scope::Live, &seen, &Host::default()) {
            prop_assert!((1..=4).contains(&count));
            prop_assert_eq!(plan.actions.is_empty(), count == plugged);
            for action in plan.actions {
                prop_assert_eq!(action, Action::SetVcpus { count, persist: false });
            }
        }
    }
}

/// An input of a history, possible or not.
#[derive(Debug, Clone)]
enum Input {
    Seen {
        plugged: u32,
        has: u32,
        online: u32,
        answers: bool,
        ran: [u64; 4],
        runs: bool,
        memory: (u64, u64),
        total: u64,
    },
    Happened(Event),
    Returned(Return),
    OutOfContact(Contact),
}

fn event() -> impl Strategy<Value = Event> {
    let ost = (
        0_u32..4,
        any::<bool>(),
        any::<bool>(),
        0_u32..4,
        select(&[0_u32, 1, 0x82, 0x84][..]),
    );
    prop_oneof![
        ost.prop_map(|(slot, named, cpu, source, status)| Event::Ost(Ost {
            device: named.then(|| format!("vcpu{slot}")),
            slot,
            kind: if cpu { SlotKind::Cpu } else { SlotKind::Dimm },
            source,
            status,
        })),
        (0_u32..4).prop_map(|id| Event::DeviceDeleted {
            device: None,
            path: format!("/machine/peripheral/vcpu{id}/lapic"),
        }),
        "[a-z0-9]{0,6}".prop_map(|device| Event::UnplugFailed { device }),
        any::<u64>().prop_map(|size| Event::MemorySize {
            device: "ua-mem0".to_owned(),
            size: Bytes::new(size),
        }),
        Just(Event::Reset),
        Just(Event::Paused),
        Just(Event::Resumed),
        Just(Event::Stopped("shut down".to_owned())),
    ]
}

fn call_error() -> impl Strategy<Value = CallError> {
    let after = ms(30_000);
    ("(set-vcpus|update-device)", ".{0,20}", 0..11).prop_map(move |(call, text, variant)| {
        let (call, code) = (call.into(), "1".to_owned());
        match variant {
            0 => CallError::Unavailable(text),
            1 => CallError::Overdue { call, after },
            2 => CallError::Lost(text),
            3 => CallError::NotFound(text),
            4 => CallError::NotRunning(text),
            5 => CallError::Busy { call, text },
            6 => CallError::UnplugPending { call, text },
            7 => CallError::AgentSilent { call, text },
            8 => CallError::Denied { call, text },
            9 => CallError::Unsupported { call, text },
            _ => CallError::Failed { call, code, text },
        }
    })
}

fn input() -> impl Strategy<Value = Input> {
    let ids = || 0_u32..6;
    let seen = (
        (0_u32..5, ids(), ids(), any::<bool>()),
        any::<[u16; 4]>(),
        any::<bool>(),
        (0_u64..2048, 0_u64..2048),
        0_u64..3000,
    );
    prop_oneof![
        6 => seen.prop_map(|((plugged, has, online, answers), ran, runs, memory, total)| Input::Seen {
            plugged, has, online, answers, ran: ran.map(u64::from), runs, memory, total,
        }),
        3 => event().prop_map(Input::Happened),
        2 => prop_oneof![
            Just(Return::Done),
            call_error().prop_map(Return::Failed),
        ].prop_map(Input::Returned),
        1 => prop_oneof![
            Just(Contact::Absent),
            Just(Contact::Unreachable("gone".to_owned())),
        ].prop_map(Input::OutOfContact),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// No history panics, waits beyond the deadline, or has no verdict at the deadline; the journal
    /// gives the same verdict; and `Verified` needs the last observation to show it.
    #[test]
    fn any_history_has_true_verdict_by_deadline(
        inputs in prop::collection::vec((0_u64..3000, input()), 0..40),
        request in prop_oneof![
            (0_u32..6, any::<bool>()).prop_map(|(count, online)| HotplugRequest::Vcpus { count, online }),
            (256_u64..2048).prop_map(|size| HotplugRequest::Memory { size: mib(size * 2), force: false }),
        ],
        require in require(),
        vcpus in 1_u32..5,
        monitor_events: bool,
    ) {
        let world = World::new(vcpus, GuestBehavior::default());
        let before = world.observe();
        let plan = match preflight(&request, Scope::Live, &before, &Host::default()) {
            Preflight::Ready(plan) => plan,
            _ => Plan::default(), // what no preflight let pass is judged all the same
        };
        let terms = world.terms(require, 25);
        let mut history = History::new(request, terms, plan, before.clone(), monitor_events);
        let mut now = world.now;
        for (after, input) in inputs {
            check(&history, now)?;
            if let Step::Call(action) = judge(&history, now) {
                history.called(now, action);
            }
            now = now.after(ms(after));
            match input {
                Input::Seen { plugged, has, online, answers, ran, runs, memory, total } => {
                    let mut seen = before.clone();
                    seen.at = now;
                    let domain = &mut seen.domain;
                    if !runs {
                        domain.state = crate::domain::DomainState::Paused;
                    }
                    for vcpu in &mut domain.vcpus.each {
                        vcpu.enabled = vcpu.id < plugged;
                    }
                    domain.memory.devices[0].requested = Some(mib(memory.0));
                    domain.memory.devices[0].current = Some(mib(memory.1));
                    let stats = seen.stats.as_mut().unwrap();
                    stats.vcpus = (0..plugged)
                        .zip(ran)
                        .map(|(id, time)| (id, VcpuStats { time: Some(time), exits: None }))
                        .collect();
                    stats.balloon.total = Some(mib(total));
                    stats.balloon.updated = u64::try_from(now.as_seconds()).ok();
                    seen.agent = if answers { Agent::Answered(GuestVcpus {
                            vcpus: (0..has).collect(),
                            online: (0..online).collect(),
                        }) } else { Agent::Silent("no".to_owned()) };
                    history.observed(seen);
                }
                Input::Happened(event) => history.happened(now, event),
                Input::Returned(how) => history.returned(now, how),
                Input::OutOfContact(why) => history.out_of_contact(now, why),
            }
        }
        check(&history, now)?;
        let end = now.after(Duration::from_secs(100));
        let last = judge(&history, end);
        prop_assert!(matches!(last, Step::Done(_)), "at the deadline: {last:?}");
        let journal = serde_json::to_string(&history).unwrap();
        let again: History = serde_json::from_str(&journal).unwrap();
        prop_assert_eq!(judge(&again, end), last);
    }
}

fn check(history: &History, now: Timestamp) -> Result<(), TestCaseError> {
    let outcome = match judge(history, now) {
        Step::Done(outcome) => outcome,
        Step::Wait { until, .. } => {
            prop_assert!(until <= history.terms.deadline);
            prop_assert!(now < history.terms.deadline);
            return Ok(());
        }
        Step::Call(_) => {
            prop_assert!(now < history.terms.deadline);
            return Ok(());
        }
    };
    if outcome.verdict != Verdict::Verified {
        prop_assert!(!outcome.message.is_empty());
        return Ok(());
    }
    if history.terms.require < Require::Online {
        return Ok(());
    }
    let last = history.latest();
    match history.request {
        HotplugRequest::Vcpus { count, .. } => {
            prop_assert_eq!(last.domain.vcpus.plugged(), count);
            if count >= history.before.domain.vcpus.plugged() {
                let by_agent = last.guest().map(|guest| guest.online.len());
                // An agent that claims more is no evidence, and the run times are.
                prop_assert!(by_agent.is_none_or(|online| online >= count));
                let stats = last.stats.as_ref().unwrap();
                let ran = |id: &u32| stats.vcpus[id].time != Some(0);
                prop_assert!(by_agent.is_none() || (0..count).all(|id| ran(&id)));
            }
        }
        HotplugRequest::Memory { size, .. } => {
            prop_assert_eq!(last.domain.memory.asked(), size);
            prop_assert_eq!(last.domain.memory.plugged(), size);
        }
    }
    Ok(())
}
