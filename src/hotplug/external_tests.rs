//! Changes by another client, on the simulated guest.

use std::collections::BTreeMap;
use std::time::Duration;

use super::external::{
    ChangeNumber, ChangedResource, DomainChanges, ExternalAction, ExternalChange, ExternalOptions,
    LookResult, OwnChange, OwnChanges,
};
use super::simulation::{GuestBehavior, World, WorldChange, mib, ms, onlines, without_agent};
use super::*;
use crate::domain::{AttachedDevice, AttachedKind};

pub(super) const GRACE: Duration = Duration::from_secs(60);

/// A simulated domain, and what is known about changes by others.
pub(super) struct Watched {
    pub(super) world: World,
    pub(super) changes: DomainChanges,
    own: OwnChanges,
    attached: Vec<AttachedDevice>,
    defined: Vec<AttachedDevice>,
    pub(super) records: BTreeMap<ChangeNumber, ExternalChange>,
    /// Times of the looks.
    looks: Vec<Timestamp>,
    agent_questions: usize,
}

impl Watched {
    pub(super) fn new(world: World) -> Self {
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

    pub(super) fn run(&mut self, span: Duration) {
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
