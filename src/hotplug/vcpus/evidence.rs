//! What a history shows about vCPUs.

use std::collections::BTreeMap;

use crate::domain::{IdSet, VcpuStats};
use crate::hotplug::{Answer, Event, GuestVcpus, History, Observation, Ost, SlotKind};
use crate::units::Timestamp;

/// The signs of one operation, as they stand.
pub(super) struct Signs<'h> {
    /// The last that was seen of the domain since the first call.
    pub(super) latest: Option<&'h Observation>,
    /// How many are plugged, by the live XML.
    pub(super) plugged: u32,
    /// Which are plugged now and were not before.
    pub(super) added: IdSet,
    /// The last answer through ACPI for each vCPU.
    pub(super) answers: BTreeMap<u32, (Timestamp, Answer, &'h Ost)>,
    /// Those that QEMU or the guest said are gone, and when.
    pub(super) gone: BTreeMap<u32, Timestamp>,
    /// Those that the guest keeps.
    pub(super) kept: IdSet,
    /// The agent's answer in the last look.
    pub(super) guest: Option<&'h GuestVcpus>,
    /// Those of the plugged that have been seen running.
    pub(super) running: IdSet,
    /// Those that ran between the last two looks, which is not enough to tell.
    pub(super) stirring: IdSet,
    /// Whether the statistics count how long vCPUs run.
    pub(super) counts_time: bool,
}

impl<'h> Signs<'h> {
    pub(super) fn read(history: &'h History) -> Self {
        let latest = history.fresh();
        let seen = latest.unwrap_or(&history.before);
        let ids = seen.domain.vcpus.plugged_ids();
        let added = ids.without(&history.before.domain.vcpus.plugged_ids());
        let use_of = |id| use_of(history, id, added.contains(id));
        let with = |wanted| ids.iter().filter(|id| use_of(*id) == wanted).collect();
        let mut signs = Self {
            latest,
            plugged: ids.len(),
            answers: BTreeMap::new(),
            gone: BTreeMap::new(),
            kept: IdSet::default(),
            guest: latest.and_then(Observation::guest),
            running: with(Use::Runs),
            stirring: with(Use::Stirs),
            counts_time: seen.stats.as_ref().is_some_and(|stats| {
                stats
                    .vcpus
                    .values()
                    .any(|vcpu| vcpu.time.is_some() || vcpu.exits.is_some())
            }),
            added,
        };
        signs.read_events(history);
        signs
    }

    fn read_events(&mut self, history: &'h History) {
        // What became of each vCPU last: whether it is gone, or kept.
        let mut fate = BTreeMap::new();
        for (at, event) in history.events() {
            match event {
                Event::Ost(ost) if ost.kind == SlotKind::Cpu => {
                    let Some(answer) = ost.answer() else { continue };
                    let id = ost.device.as_deref().and_then(vcpu_of).unwrap_or(ost.slot);
                    self.answers.insert(id, (at, answer, ost));
                    match answer {
                        Answer::Gone => fate.insert(id, (true, at)),
                        Answer::Kept => fate.insert(id, (false, at)),
                        Answer::Leaving | Answer::Added | Answer::NotAdded => fate.remove(&id),
                    };
                }
                Event::DeviceDeleted { device, path } => {
                    let name = device.as_deref().or_else(|| peripheral(path));
                    if let Some(id) = name.and_then(vcpu_of) {
                        fate.insert(id, (true, at));
                    }
                }
                Event::UnplugFailed { device } => {
                    if let Some(id) = vcpu_of(device) {
                        fate.insert(id, (false, at));
                    }
                }
                _ => {}
            }
        }
        for (id, (gone, at)) in fate {
            match gone {
                true => drop(self.gone.insert(id, at)),
                false => self.kept.insert(id),
            }
        }
    }

    /// Those of the added to which the guest answered so.
    pub(super) fn answered(&self, wanted: Answer) -> IdSet {
        let answer = |id: &u32| self.answers.get(id).map(|(_, answer, _)| *answer);
        self.added
            .iter()
            .filter(|id| answer(id) == Some(wanted))
            .collect()
    }

    /// When the guest last answered through ACPI.
    pub(super) fn last_answer(&self) -> Option<Timestamp> {
        self.answers.values().map(|(at, ..)| *at).max()
    }

    /// Whether the guest answered for every vCPU that was added.
    pub(super) fn all_answered(&self) -> bool {
        self.added.iter().all(|id| self.answers.contains_key(&id))
    }

    /// How many are gone.
    pub(super) fn gone_count(&self) -> u32 {
        u32::try_from(self.gone.len()).unwrap_or(u32::MAX)
    }

    /// Whether every plugged vCPU has been seen running.
    pub(super) fn all_run(&self) -> bool {
        self.running.len() == self.plugged
    }
}

/// `vcpu2` is vCPU 2: so libvirt names them in QEMU.
pub(super) fn vcpu_of(device: &str) -> Option<u32> {
    device.strip_prefix("vcpu")?.parse().ok()
}

/// The device in `/machine/peripheral/vcpu2/lapic`. QEMU 10 tells only of this part of a vCPU
/// that goes, not of the vCPU itself (measured).
pub(super) fn peripheral(path: &str) -> Option<&str> {
    path.strip_prefix("/machine/peripheral/")?.split('/').next()
}

/// Whether a vCPU has been seen running since the operation began.
///
/// Once is enough for one that was there. A new one may run for a moment without the guest's
/// system knowing it: a firmware with Secure Boot starts each new CPU once to set it up, and then
/// lets it wait. So a new one must have run at two different times.
///
/// After a reset the firmware runs all of them, some firmwares for as long as they are at work:
/// only what runs when there was time to boot counts.
fn use_of(history: &History, id: u32, new: bool) -> Use {
    let booted = history
        .reset()
        .map(|reset| history.patient_until(reset, history.terms.patience.offline));
    let before = history.before.stats.as_ref();
    let (mut last, needed) = match (booted, new) {
        (Some(_), _) => (None, 2),
        (None, true) => (Some(NEVER_RAN), 2),
        (None, false) => (before.and_then(|stats| stats.vcpus.get(&id)).copied(), 1),
    };
    let (mut grown, mut stirs) = (0, false);
    for seen in history.since_epoch() {
        let now = seen.stats.as_ref().and_then(|stats| stats.vcpus.get(&id));
        let Some(now) = now.filter(|_| booted.is_none_or(|booted| seen.at >= booted)) else {
            continue;
        };
        stirs = last.is_some_and(|last| grew(last, *now));
        grown += u32::from(stirs);
        last = Some(*now);
    }
    match grown >= needed {
        true => Use::Runs,
        false if stirs => Use::Stirs,
        false => Use::None,
    }
}

/// What a vCPU's time says about its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// It runs in the guest's system.
    Runs,
    /// It has run since the look before the last: that may be more than a moment.
    Stirs,
    /// It does nothing.
    None,
}

const NEVER_RAN: VcpuStats = VcpuStats {
    time: Some(0),
    exits: Some(0),
};

fn grew(before: VcpuStats, now: VcpuStats) -> bool {
    let more = |before: Option<u64>, now: Option<u64>| matches!((before, now), (Some(b), Some(n)) if n > b);
    more(before.time, now.time) || more(before.exits, now.exits)
}
