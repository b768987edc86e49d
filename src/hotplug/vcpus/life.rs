//! The vCPUs that a domain had since its emulator started.
//!
//! Without KVM, QEMU registers the thread of each vCPU that it ever starts, never forgets one, and
//! aborts at the first beyond the domain's maximum (`tcg_register_thread`, QEMU 7.2 to 10.0,
//! measured). libvirt's live XML shows only the vCPUs that are plugged now.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::evidence::{peripheral, vcpu_of};
use crate::hotplug::{AcpiAnswer, Event, Observation, SlotKind};

/// The vCPUs of a domain in one life of its emulator, as far as they were observed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VcpuLife {
    /// libvirt's number of the running domain. It may return after a restart of libvirtd.
    id: Option<u32>,
    /// Run time of vCPU 0 at the last observation, which only a new emulator can undercut.
    time: u64,
    /// vCPUs in the live XML at the last observation.
    plugged: BTreeSet<u32>,
    /// vCPUs that were counted as released and not plugged again since.
    gone: BTreeSet<u32>,
    released: u32,
}

impl VcpuLife {
    /// Returns the number of vCPUs that left the domain; one that came and left twice counts twice.
    pub fn released(&self) -> u32 {
        self.released
    }

    /// Adds an observation. It starts a new life if the emulator is another one.
    pub fn observe(&mut self, seen: &Observation) {
        let stats = seen.stats.as_ref().and_then(|stats| stats.vcpus.get(&0));
        let time = stats.and_then(|vcpu| vcpu.time);
        let is_other = self.id.is_some() && self.id != seen.domain.id;
        if is_other || time.is_some_and(|time| time < self.time) {
            *self = Self::default();
        }
        let plugged: BTreeSet<u32> = seen.domain.vcpus.plugged_ids().iter().collect();
        for id in self.plugged.difference(&plugged) {
            // libvirt may notice long after the event.
            if self.gone.insert(*id) {
                self.released = self.released.saturating_add(1);
            }
        }
        for id in plugged.difference(&self.plugged) {
            self.gone.remove(id);
        }
        self.id = seen.domain.id;
        self.time = time.unwrap_or(self.time);
        self.plugged = plugged;
    }

    /// Adds an event. QEMU and libvirt both report a removal.
    pub fn happened(&mut self, event: &Event) {
        match event {
            Event::DeviceDeleted { device, path } => {
                let name = device.as_deref().or_else(|| peripheral(path));
                if let Some(id) = name.and_then(vcpu_of)
                    && self.gone.insert(id)
                {
                    self.released = self.released.saturating_add(1);
                }
            }
            Event::Ost(ost) if ost.kind == SlotKind::Cpu => {
                let id = ost.device.as_deref().and_then(vcpu_of);
                if let Some(AcpiAnswer::Added | AcpiAnswer::NotAdded) = ost.answer() {
                    self.gone.remove(&id.unwrap_or(ost.slot));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::VcpuStats;
    use crate::hotplug::Ost;
    use crate::hotplug::simulation::{World, onlines};

    fn seen(vcpus: u32, id: u32, time: u64) -> Observation {
        let mut seen = World::new(vcpus, onlines()).observe();
        seen.domain.id = Some(id);
        let time = Some(time);
        let stats = VcpuStats { time, exits: None };
        seen.stats.as_mut().unwrap().vcpus.insert(0, stats);
        seen
    }

    fn deleted(device: &str) -> Event {
        Event::DeviceDeleted {
            device: Some(device.to_owned()),
            path: String::new(),
        }
    }

    fn added(id: u32) -> Event {
        Event::Ost(Ost {
            device: Some(format!("vcpu{id}")),
            slot: id,
            kind: SlotKind::Cpu,
            source: 1,
            status: 0,
        })
    }

    #[test]
    fn each_departure_counts_once() {
        let mut life = VcpuLife::default();
        life.observe(&seen(3, 1, 10));
        assert_eq!(life.released(), 0);
        // QEMU and libvirt report it, and the live XML follows later.
        life.happened(&deleted("vcpu2"));
        life.happened(&deleted("vcpu2"));
        life.observe(&seen(3, 1, 20));
        life.observe(&seen(2, 1, 30));
        assert_eq!(life.released(), 1);
        // Another client plugs and unplugs it between two observations.
        life.happened(&added(2));
        life.happened(&deleted("vcpu2"));
        life.happened(&deleted("virtio-disk0"));
        life.observe(&seen(2, 1, 40));
        assert_eq!(life.released(), 2);
        // Without events the live XML shows it.
        life.observe(&seen(3, 1, 50));
        life.observe(&seen(1, 1, 60));
        assert_eq!(life.released(), 4);
    }

    #[test]
    fn restarted_domain_begins_anew() {
        for (id, time) in [(2, 60), (1, 5)] {
            let mut life = VcpuLife::default();
            life.observe(&seen(3, 1, 50));
            life.observe(&seen(1, 1, 50));
            assert_eq!(life.released(), 2);
            let journal = serde_json::to_string(&life).unwrap();
            let mut life: VcpuLife = serde_json::from_str(&journal).unwrap();
            life.observe(&seen(1, 1, 50));
            assert_eq!(life.released(), 2);
            life.observe(&seen(1, id, time));
            assert_eq!(life.released(), 0);
        }
    }
}
