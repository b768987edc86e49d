//! Changes by another client, on the simulated guest.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::select;

use super::external::{
    ChangeNumber, ChangedResource, DomainChanges, ExternalAction, ExternalChange, ExternalOptions,
    LookResult, MAX_DETACHES, OwnChange, OwnChanges,
};
use super::simulation::{GuestBehavior, World, WorldChange, mib, ms, onlines, without_agent};
use super::*;
use crate::domain::{AttachedDevice, AttachedKind, DomainState};

const GRACE: Duration = Duration::from_secs(60);

/// A simulated domain, and what is known about changes by others.
struct Watched {
    world: World,
    changes: DomainChanges,
    own: OwnChanges,
    attached: Vec<AttachedDevice>,
    defined: Vec<AttachedDevice>,
    records: BTreeMap<ChangeNumber, ExternalChange>,
    /// Times of the looks.
    looks: Vec<Timestamp>,
    agent_questions: usize,
}

impl Watched {
    fn new(world: World) -> Self {
        let options = ExternalOptions {
            grace: GRACE,
            patience: Patience::default(),
            defines_devices: false,
        };
        let mut watched = Self {
            changes: DomainChanges::new(options, world.now),
            world,
            own: OwnChanges::default(),
            attached: Vec::new(),
            defined: Vec::new(),
            records: BTreeMap::new(),
            looks: Vec::new(),
            agent_questions: 0,
        };
        watched.run(ms(1000));
        watched
    }

    /// Applies a change, and runs on.
    fn after(mut self, change: WorldChange, span: Duration) -> Self {
        self.world = self.world.at(ms(1), change);
        self.run(span);
        self
    }

    fn run(&mut self, span: Duration) {
        let end = self.world.now.after(span);
        let mut last_statistics = self.world.now;
        while self.world.now < end {
            let due = self.changes.next_look(self.world.now).unwrap_or(end);
            let step = self.world.now.after(ms(50));
            let next = due.clamp(self.world.now.after(ms(1)), step.min(end));
            self.world.pass(next);
            let now = self.world.now;
            self.changes.own(now, &self.own);
            for (at, event) in self.world.events() {
                self.changes.happened(now, at, event, &self.own);
            }
            if now.since(last_statistics) >= ms(15_000) && self.world.contact().is_none() {
                last_statistics = now;
                let seen = self.world.observe();
                let stats = seen.stats.clone().unwrap();
                let details = Some((now, &seen.domain, &seen.agent));
                self.changes
                    .compared(now, (now, &stats, seen.domain.state), details);
            }
            if self.changes.next_look(now).is_some_and(|due| due <= now) {
                self.look();
            }
            for (number, change) in self.changes.news() {
                match change {
                    Some(change) => drop(self.records.insert(number, change)),
                    None => drop(self.records.remove(&number)),
                }
            }
        }
    }

    fn look(&mut self) {
        let now = self.world.now;
        self.looks.push(now);
        if let Some(contact) = self.world.contact() {
            return self.changes.unobserved(now, &contact);
        }
        let mut seen = self.world.observe();
        if self.changes.asks_agent(now) {
            self.agent_questions += 1;
        } else {
            seen.agent = Agent::NotAsked;
        }
        let look = LookResult {
            seen,
            attached: self.attached.clone(),
            defined: self.changes.asks_definition().then(|| self.defined.clone()),
        };
        self.changes.observed(now, look, &self.own);
    }

    fn only(&self) -> &ExternalChange {
        assert_eq!(self.records.len(), 1, "{:#?}", self.records);
        self.records.values().next().unwrap()
    }

    fn verdict(&self) -> Option<Verdict> {
        self.only().verdict
    }

    fn took(&self) -> Duration {
        let change = self.only();
        change.finished.unwrap().since(change.noticed)
    }

    fn not_taken(&self) -> Vec<ChangedResource> {
        self.changes.not_taken().map(|(_, c)| c.resource).collect()
    }
}

fn watched(vcpus: u32, behavior: GuestBehavior) -> Watched {
    Watched::new(World::new(vcpus, behavior))
}

fn disk() -> AttachedDevice {
    AttachedDevice {
        kind: AttachedKind::Disk,
        key: "vda".to_owned(),
        alias: Some("ua-vol1".to_owned()),
    }
}

/// A domain with a disk, in the running domain and in the definition.
fn with_disk() -> Watched {
    let mut world = World::new(1, onlines());
    world.persistent = true;
    let mut watched = Watched::new(World::new(1, onlines()));
    let options = ExternalOptions {
        grace: GRACE,
        patience: Patience::default(),
        defines_devices: false,
    };
    watched.changes = DomainChanges::new(options, world.now);
    watched.world = world;
    watched.attached = vec![disk()];
    watched.defined = vec![disk()];
    watched.run(ms(1000));
    watched
}

/// Removes the disk from the definition, as a detach that libvirt reports as done.
fn undefine_disk(watched: &mut Watched) {
    watched.defined.clear();
    watched.changes.redefined(watched.world.now);
}

#[test]
fn guest_that_onlines_is_verified_within_two_seconds() {
    let watched = watched(1, onlines()).after(WorldChange::AnotherSets(3), ms(5000));
    let change = watched.only();
    assert_eq!(change.verdict, Some(Verdict::Verified), "{change:#?}");
    assert_eq!(
        (change.resource, change.action),
        (ChangedResource::Vcpus, ExternalAction::Plug)
    );
    assert!(watched.took() < ms(2000));
    assert_eq!(
        change.message.as_deref(),
        Some("2 vCPUs added, all 3 online in the guest after 0.6 s")
    );
    let sources: Vec<Source> = change.evidence.iter().map(|piece| piece.source).collect();
    assert!(sources.contains(&Source::AcpiOst));
    assert!(!sources.contains(&Source::HypervisorCall), "{sources:?}");
    assert_eq!(watched.not_taken(), []);
    assert_eq!(watched.changes.open(), 0);
}

#[test]
fn guest_without_room_is_refused_and_corrected_when_it_has_booted_with_room() {
    let nr_cpus = GuestBehavior {
        nr_cpus: 1,
        ..onlines()
    };
    let mut watched = watched(1, nr_cpus).after(WorldChange::AnotherSets(3), ms(5000));
    assert_eq!(watched.verdict(), Some(Verdict::GuestRefused));
    let code = watched.only().diagnosis.as_ref().unwrap().code.clone();
    assert_eq!(code, "nr-cpus");
    assert_eq!(watched.not_taken(), [ChangedResource::Vcpus]);
    watched.run(ms(120_000));
    assert_eq!(watched.not_taken(), [ChangedResource::Vcpus]);
    watched.world.behavior.nr_cpus = 8;
    let watched = watched.after(WorldChange::Reset, ms(200_000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
    assert!(watched.only().corrected.is_some());
    assert_eq!(watched.not_taken(), []);
}

#[test]
fn offline_vcpus_are_offline_after_their_patience() {
    let watched =
        watched(1, GuestBehavior::default()).after(WorldChange::AnotherSets(2), ms(20_000));
    assert_eq!(watched.verdict(), Some(Verdict::GuestOffline));
    assert!(watched.took() < ms(16_000), "{:?}", watched.took());
}

#[test]
fn paused_guest_is_noticed_by_statistics_and_its_clock_stands_still() {
    let mut watched = watched(1, onlines());
    watched = watched.after(WorldChange::Pause, ms(100));
    watched = watched.after(WorldChange::AnotherSets(3), ms(400_000));
    assert_eq!(watched.verdict(), None, "{:#?}", watched.only());
    assert_eq!(watched.changes.open(), 1);
    watched = watched.after(WorldChange::Resume, ms(4000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
}

#[test]
fn silent_guest_is_silent_only_after_the_grace() {
    let silent = GuestBehavior {
        unresponsive: true,
        ..onlines()
    };
    let mut watched = watched(1, silent).after(WorldChange::AnotherSets(3), ms(58_000));
    assert_eq!(watched.verdict(), None);
    watched.run(ms(20_000));
    assert_eq!(watched.verdict(), Some(Verdict::GuestSilent));
    // An agent that does not answer is asked less and less.
    assert!(watched.agent_questions < 9, "{}", watched.agent_questions);
}

#[test]
fn further_change_extends_the_watch_to_one_verdict() {
    let mut world = World::new(1, onlines());
    world = world.at(ms(4000), WorldChange::AnotherSets(3));
    let watched = Watched::new(world).after(WorldChange::AnotherSets(2), ms(20));
    let mut watched = watched;
    watched.world.behavior.onlines_after = Some(ms(5000));
    watched.run(ms(20_000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
    let requested = watched.only().requested;
    assert_eq!(requested.unwrap().to_string(), "3");
}

#[test]
fn unplug_is_verified_although_libvirt_counts_on() {
    let watched = watched(3, onlines()).after(WorldChange::AnotherSets(2), ms(5000));
    let change = watched.only();
    assert_eq!(change.verdict, Some(Verdict::Verified), "{change:#?}");
    assert_eq!(change.action, ExternalAction::Unplug);
    let message = change.message.clone().unwrap();
    assert!(message.contains("libvirt still counts 3"), "{message}");
}

#[test]
fn unplug_that_the_guest_undoes_is_refused() {
    let keeps = GuestBehavior {
        keeps: Some(2),
        ..onlines()
    };
    let watched = watched(3, keeps).after(WorldChange::AnotherSets(2), ms(10_000));
    assert_eq!(watched.verdict(), Some(Verdict::GuestRefused));
    assert_eq!(watched.not_taken(), [ChangedResource::Vcpus]);
}

#[test]
fn memory_is_verified_with_driver_and_silent_without() {
    let with = watched(1, onlines()).after(WorldChange::AnotherResizes(mib(512)), ms(90_000));
    assert_eq!(
        with.verdict(),
        Some(Verdict::Verified),
        "{:#?}",
        with.only()
    );
    assert_eq!(with.agent_questions, 1, "memory needs no agent");
    let without = GuestBehavior {
        virtio_mem: false,
        ..onlines()
    };
    // Nothing but the definition shows it.
    let without = watched(1, without).after(WorldChange::AnotherResizes(mib(512)), ms(90_000));
    assert_eq!(without.verdict(), Some(Verdict::GuestSilent));
    assert_eq!(without.not_taken(), [ChangedResource::Memory]);
}

#[test]
fn reset_gives_the_guest_its_time_again() {
    let no_agent = without_agent(GuestBehavior {
        unresponsive: true,
        nr_cpus: 1,
        ..onlines()
    });
    let watched = watched(1, no_agent).after(WorldChange::AnotherSets(3), ms(50_000));
    let mut watched = watched.after(WorldChange::Reset, ms(100_000));
    assert_eq!(watched.verdict(), None);
    watched.run(ms(60_000));
    assert!(watched.verdict().is_some());
}

#[test]
fn state_at_first_sight_is_found_and_shown_only_if_the_guest_lacks_something() {
    let mut world = World::new(3, onlines());
    world.has = [0].into();
    world.online = [0].into();
    let mut lacking = Watched::new(world);
    lacking.run(ms(80_000));
    let change = lacking.only();
    assert!(change.found);
    assert_eq!(change.verdict, Some(Verdict::GuestSilent));
    assert_eq!(lacking.not_taken(), [ChangedResource::Vcpus]);

    let mut world = World::new(3, onlines());
    world.online = [0].into();
    let world = world
        .at(ms(3000), WorldChange::Onlines(1))
        .at(ms(3000), WorldChange::Onlines(2));
    let mut watched = Watched::new(world);
    watched.run(ms(80_000));
    assert!(watched.records.is_empty(), "{:#?}", watched.records);
    assert_eq!(watched.not_taken(), []);
}

#[test]
fn own_operations_and_their_late_effects_are_not_external() {
    let mut watched = watched(1, onlines());
    let amount = |vcpus| Amount::Vcpus {
        vcpus,
        online: None,
    };
    let own = OwnChange {
        before: Some(amount(1)),
        requested: amount(3),
        finished: None,
        proven: false,
    };
    watched.own.set(own);
    watched = watched.after(WorldChange::AnotherSets(3), ms(5000));
    let finished = Some(watched.world.now);
    watched.own.set(OwnChange { finished, ..own });
    watched.run(ms(5000));
    assert!(watched.records.is_empty(), "{:#?}", watched.records);
    // A pending unplug of ours that the guest follows minutes later.
    watched.own.set(OwnChange {
        before: Some(amount(3)),
        requested: amount(2),
        finished: Some(watched.world.now),
        proven: false,
    });
    watched.world.misses_removals = false;
    watched = watched.after(WorldChange::AnotherSets(2), ms(60_000));
    assert!(watched.records.is_empty(), "{:#?}", watched.records);
    // Another client's change is one.
    watched = watched.after(WorldChange::AnotherSets(4), ms(60_000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
}

#[test]
fn detached_disk_that_the_guest_keeps_is_silent_until_released() {
    let mut watched = with_disk();
    undefine_disk(&mut watched);
    watched.run(ms(58_000));
    assert_eq!(watched.verdict(), None);
    watched.run(ms(10_000));
    let change = watched.only().clone();
    assert_eq!(change.verdict, Some(Verdict::GuestSilent));
    assert_eq!(change.device.as_deref(), Some("vda (ua-vol1)"));
    let remedy = change.diagnosis.unwrap().remedy;
    assert!(remedy.contains("detach-device --live"), "{remedy}");
    assert_eq!(watched.not_taken(), [ChangedResource::Disk]);
    // The guest lets go.
    watched.attached.clear();
    let device = Some("ua-vol1".to_owned());
    let path = String::new();
    let (now, event) = (watched.world.now, Event::DeviceDeleted { device, path });
    watched.changes.happened(now, now, event, &watched.own);
    watched.run(ms(2000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
    assert!(watched.only().corrected.is_some());
    assert_eq!(watched.not_taken(), []);
}

#[test]
fn disk_of_the_running_domain_only_is_no_detach() {
    let mut watched = with_disk();
    let mut other = disk();
    other.key = "vdb".to_owned();
    watched.attached.push(other);
    watched.changes.redefined(watched.world.now);
    watched.run(ms(100_000));
    assert!(watched.records.is_empty(), "{:#?}", watched.records);
}

#[test]
fn definition_that_changes_during_a_look_is_read_again() {
    let mut watched = with_disk();
    let mut seen = watched.world.observe();
    undefine_disk(&mut watched);
    // The look was started before the change and ends after it.
    seen.at = watched.world.now;
    watched.world.now = watched.world.now.after(ms(20));
    watched.changes.redefined(watched.world.now);
    let look = LookResult {
        seen,
        attached: vec![disk()],
        defined: Some(vec![disk()]),
    };
    watched
        .changes
        .observed(watched.world.now, look, &watched.own);
    assert!(watched.changes.asks_definition());
    // The next look is due at once, and not at the next reading of the statistics.
    watched.run(ms(2_000));
    assert_eq!(watched.changes.open(), 1);
    watched.run(ms(80_000));
    assert_eq!(watched.verdict(), Some(Verdict::GuestSilent));
}

#[test]
fn disk_that_is_defined_again_has_no_verdict() {
    let mut watched = with_disk();
    undefine_disk(&mut watched);
    watched.run(ms(10_000));
    assert_eq!(watched.verdict(), None);
    watched.defined = vec![disk()];
    watched.changes.redefined(watched.world.now);
    watched.run(ms(100_000));
    assert!(watched.records.is_empty(), "{:#?}", watched.records);
}

#[test]
fn ended_domain_ends_its_watches() {
    let watched = watched(1, GuestBehavior::default()).after(WorldChange::AnotherSets(3), ms(3000));
    let watched = watched.after(WorldChange::Destroy, ms(3000));
    assert_eq!(watched.verdict(), Some(Verdict::DomainNotRunning));
    assert!(watched.changes.has_ended());
    assert_eq!(watched.changes.next_look(watched.world.now), None);
}

#[test]
fn lost_libvirt_costs_few_looks_and_no_verdict() {
    let mut watched = watched(1, onlines());
    watched.world = watched.world.at(ms(30), WorldChange::LosesLibvirt);
    let watched = watched.after(WorldChange::AnotherSets(3), ms(1000));
    let before = watched.looks.len();
    let mut watched = watched.after(WorldChange::Runs(0), ms(600_000));
    assert!(watched.looks.len() - before < 20);
    assert!(
        watched
            .records
            .values()
            .all(|change| change.verdict.is_none())
    );
    watched.world = watched.world.at(ms(1), WorldChange::FindsLibvirt);
    watched.run(ms(100));
    watched.changes.missed_events(watched.world.now);
    watched.run(ms(5000));
    assert_eq!(watched.verdict(), Some(Verdict::Verified));
}

#[test]
fn guest_that_sends_events_without_end_gets_few_looks() {
    let mut watched = watched(1, onlines());
    let before = watched.looks.len();
    for _ in 0..3000 {
        let (device, size) = ("ua-mem0".to_owned(), mib(2));
        let event = Event::MemorySize { device, size };
        let now = watched.world.now;
        watched.changes.happened(now, now, event, &watched.own);
        watched.run(ms(100));
    }
    let looks = watched.looks.len() - before;
    assert!(looks <= 30, "{looks} looks in five minutes");
}

fn behavior() -> impl Strategy<Value = GuestBehavior> {
    let cpus = (
        proptest::option::of(0_u64..20_000),
        1_u32..6,
        any::<bool>(),
        prop::bool::weighted(0.1),
        proptest::option::weighted(0.1, select(&[1_u32, 0x80][..])),
        proptest::option::weighted(0.2, 1_u32..4),
        any::<bool>(),
    );
    let memory = (
        prop::bool::weighted(0.8),
        any::<bool>(),
        select(&[0_u64, 300][..]),
        select(&[0_u64, 200, 1 << 20][..]),
        prop::bool::weighted(0.8),
    );
    (cpus, memory).prop_map(|(cpus, memory)| {
        let (onlines, nr_cpus, stuck, unresponsive, refuses, keeps, agent) = cpus;
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
    })
}

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
