//! Facts about vCPUs in a history.

use std::collections::BTreeMap;

use crate::domain::{IdSet, VcpuStats};
use crate::hotplug::{AcpiAnswer, Event, GuestVcpus, History, Observation, Ost, SlotKind};
use crate::units::Timestamp;

/// The facts about vCPUs in one history.
pub(super) struct VcpuFacts<'h> {
    /// The last observation since the first call.
    pub(super) latest: Option<&'h Observation>,
    /// The number of plugged vCPUs in the live XML.
    pub(super) plugged: u32,
    /// vCPUs that are plugged now and were not before.
    pub(super) added: IdSet,
    /// The last answer through ACPI for each vCPU.
    pub(super) answers: BTreeMap<u32, (Timestamp, AcpiAnswer, &'h Ost)>,
    /// vCPUs that QEMU or the guest reported as released, and when.
    pub(super) gone: BTreeMap<u32, Timestamp>,
    /// vCPUs that the guest keeps.
    pub(super) kept: IdSet,
    /// The agent's answer in the last observation, if the agent is a witness.
    pub(super) guest: Option<&'h GuestVcpus>,
    /// The same answer if the agent has claimed CPUs that the domain does not have: then nothing that
    /// it reports is evidence.
    pub(super) false_claim: Option<&'h GuestVcpus>,
    /// Plugged vCPUs that never executed anything, by the statistics of the last observation.
    pub(super) never_ran: IdSet,
    /// vCPUs that the guest was asked to release, or released.
    pub(super) leaving: IdSet,
    /// Plugged vCPUs that were observed running.
    pub(super) running: IdSet,
    /// vCPUs that ran between the last two observations, which proves nothing yet.
    pub(super) running_briefly: IdSet,
    /// True if the statistics count the run time of vCPUs.
    pub(super) counts_time: bool,
}

impl<'h> VcpuFacts<'h> {
    pub(super) fn read(history: &'h History) -> Self {
        let latest = history.fresh();
        let seen = latest.unwrap_or(&history.before);
        let ids = seen.domain.vcpus.plugged_ids();
        let added = ids.without(&history.before.domain.vcpus.plugged_ids());
        let use_of = |id| use_of(history, id, added.contains(id));
        let with = |wanted| ids.iter().filter(|id| use_of(*id) == wanted).collect();
        let answer = latest.and_then(Observation::guest);
        let is_false = claims_too_many(history);
        let mut facts = Self {
            latest,
            plugged: ids.len(),
            answers: BTreeMap::new(),
            gone: BTreeMap::new(),
            kept: IdSet::default(),
            guest: answer.filter(|_| !is_false),
            false_claim: answer.filter(|_| is_false),
            never_ran: never_ran(seen, &ids),
            leaving: IdSet::default(),
            running: with(VcpuUse::Runs),
            running_briefly: with(VcpuUse::RunsBriefly),
            counts_time: seen.stats.as_ref().is_some_and(|stats| {
                stats
                    .vcpus
                    .values()
                    .any(|vcpu| vcpu.time.is_some() || vcpu.exits.is_some())
            }),
            added,
        };
        facts.read_events(history);
        facts
    }

    fn read_events(&mut self, history: &'h History) {
        // The last fate of each vCPU: released or kept.
        let mut fate = BTreeMap::new();
        for (at, event) in history.events() {
            match event {
                Event::Ost(ost) if ost.kind == SlotKind::Cpu => {
                    let Some(answer) = ost.answer() else { continue };
                    let id = ost.device.as_deref().and_then(vcpu_of).unwrap_or(ost.slot);
                    self.answers.insert(id, (at, answer, ost));
                    if matches!(answer, AcpiAnswer::Leaving | AcpiAnswer::Gone) {
                        self.leaving.insert(id);
                    }
                    match answer {
                        AcpiAnswer::Gone => fate.insert(id, (true, at)),
                        AcpiAnswer::Kept => fate.insert(id, (false, at)),
                        AcpiAnswer::Leaving | AcpiAnswer::Added | AcpiAnswer::NotAdded => {
                            fate.remove(&id)
                        }
                    };
                }
                Event::DeviceDeleted { device, path } => {
                    let name = device.as_deref().or_else(|| peripheral(path));
                    if let Some(id) = name.and_then(vcpu_of) {
                        fate.insert(id, (true, at));
                        self.leaving.insert(id);
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
            if gone {
                self.gone.insert(id, at);
            } else {
                self.kept.insert(id);
            }
        }
    }

    /// Returns the added vCPUs with this answer.
    pub(super) fn answered(&self, wanted: AcpiAnswer) -> IdSet {
        let answer = |id: &u32| self.answers.get(id).map(|(_, answer, _)| *answer);
        self.added
            .iter()
            .filter(|id| answer(id) == Some(wanted))
            .collect()
    }

    /// Returns the time of the guest's last answer through ACPI.
    pub(super) fn last_answer(&self) -> Option<Timestamp> {
        self.answers.values().map(|(at, ..)| *at).max()
    }

    /// True if the guest answered for every added vCPU.
    pub(super) fn all_answered(&self) -> bool {
        self.added.iter().all(|id| self.answers.contains_key(&id))
    }

    pub(super) fn released_count(&self) -> u32 {
        u32::try_from(self.gone.len()).unwrap_or(u32::MAX)
    }

    /// True if every plugged vCPU was observed running.
    pub(super) fn all_run(&self) -> bool {
        self.running.len() == self.plugged
    }
}

/// True if the agent has reported more CPUs than the domain can have given it: before the operation,
/// or twice during it, since a change by another client may fall between the two parts of a single
/// observation.
fn claims_too_many(history: &History) -> bool {
    let had = history.before.domain.vcpus.plugged();
    let most = had.max(history.most_vcpus());
    let claims = |seen: &Observation, has: u32| {
        let guest = seen.guest();
        guest.is_some_and(|guest| guest.vcpus.len().max(guest.online.len()) > has)
    };
    let during = history
        .since_epoch()
        .filter(|seen| claims(seen, most.max(seen.domain.vcpus.plugged())));
    claims(&history.before, had) || during.count() > 1
}

/// Returns the vCPUs without any run time, by statistics that count it.
fn never_ran(seen: &Observation, ids: &IdSet) -> IdSet {
    let stats = seen.stats.as_ref();
    let idle = |id: &u32| {
        let vcpu = stats.and_then(|stats| stats.vcpus.get(id));
        vcpu.is_some_and(|vcpu| {
            let counted = vcpu.time.or(vcpu.exits).is_some();
            counted && vcpu.time.unwrap_or(0) == 0 && vcpu.exits.unwrap_or(0) == 0
        })
    };
    ids.iter().filter(idle).collect()
}

/// Parses libvirt's name of a vCPU in QEMU: `vcpu2`.
pub(in crate::hotplug) fn vcpu_of(device: &str) -> Option<u32> {
    device.strip_prefix("vcpu")?.parse().ok()
}

/// Returns the device in `/machine/peripheral/vcpu2/lapic`. QEMU 10 reports the removal of only
/// this part of a vCPU (measured).
pub(in crate::hotplug) fn peripheral(path: &str) -> Option<&str> {
    path.strip_prefix("/machine/peripheral/")?.split('/').next()
}

/// Returns the use of a vCPU since the operation started.
///
/// A vCPU that existed before is in use if it ran once. A new one may run for a moment without the
/// guest's system: a firmware with Secure Boot starts each new CPU once to set it up. So a new vCPU
/// must run at two different times.
///
/// After a reset the firmware runs all vCPUs, some firmwares as long as they are active. So only
/// run time after the guest had time to boot counts.
fn use_of(history: &History, id: u32, new: bool) -> VcpuUse {
    let booted = history
        .reset()
        .map(|reset| history.patient_until(reset, history.terms.patience.offline));
    let before = history.before.stats.as_ref();
    let (mut last, needed) = match (booted, new) {
        (Some(_), _) => (None, 2),
        (None, true) => (Some(NEVER_RAN), 2),
        (None, false) => (before.and_then(|stats| stats.vcpus.get(&id)).copied(), 1),
    };
    let (mut grown, mut runs_briefly) = (0, false);
    for seen in history.since_epoch() {
        let now = seen.stats.as_ref().and_then(|stats| stats.vcpus.get(&id));
        let Some(now) = now.filter(|_| booted.is_none_or(|booted| seen.at >= booted)) else {
            continue;
        };
        runs_briefly = last.is_some_and(|last| grew(last, *now));
        grown += u32::from(runs_briefly);
        last = Some(*now);
    }
    if grown >= needed {
        VcpuUse::Runs
    } else if runs_briefly {
        VcpuUse::RunsBriefly
    } else {
        VcpuUse::None
    }
}

/// The use of a vCPU by its run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VcpuUse {
    /// The guest's system runs it.
    Runs,
    /// It ran since the last observation but one, which may be only a moment.
    RunsBriefly,
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
