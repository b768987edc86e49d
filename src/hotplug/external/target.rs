//! The amount of a resource that the hypervisor has, as a request.

use crate::domain::{Domain, MemoryModel};
use crate::hotplug::vcpus::{peripheral, vcpu_of};
use crate::hotplug::{
    AcpiAnswer, Action, Amount, Event, HotplugRequest, Observation, Ost, Plan, ResourceKind,
    SlotKind,
};
use crate::units::KiB;

/// Returns the amount that the hypervisor wants the guest to have.
pub(super) fn amount(kind: ResourceKind, domain: &Domain) -> Amount {
    match kind {
        ResourceKind::Vcpus => Amount::Vcpus {
            vcpus: domain.vcpus.plugged(),
            online: None,
        },
        ResourceKind::Memory => Amount::Memory {
            memory: domain.memory.asked(),
            guest_total: None,
        },
    }
}

/// Returns the request for an amount.
pub(super) fn request(amount: Amount) -> HotplugRequest {
    match amount {
        Amount::Vcpus { vcpus, .. } => vcpus_request(vcpus),
        Amount::Memory { memory, .. } => HotplugRequest::Memory {
            size: memory,
            force: true,
        },
    }
}

pub(super) fn vcpus_request(count: u32) -> HotplugRequest {
    HotplugRequest::Vcpus {
        count,
        online: false,
    }
}

pub(super) fn vcpus_plan(count: u32) -> Plan {
    let persist = false;
    Plan {
        actions: vec![Action::SetVcpus { count, persist }],
    }
}

/// Returns the calls that explain the difference between two states of a domain.
pub(super) fn plan(kind: ResourceKind, before: &Domain, now: &Domain) -> Plan {
    if kind == ResourceKind::Vcpus {
        return vcpus_plan(now.vcpus.plugged());
    }
    let changed = now.memory.devices.iter().filter_map(|device| {
        let alias = device.alias.clone()?;
        let had = before.memory.device(&alias);
        let asked = device.asked();
        if had.is_some_and(|had| had.asked() == asked) {
            return None;
        }
        let (size, persist) = (KiB::try_from(asked).ok()?, false);
        match device.model {
            MemoryModel::Dimm => Some(Action::AttachDimm {
                alias,
                size,
                node: device.node,
                persist,
            }),
            MemoryModel::VirtioMem => Some(Action::ResizeVirtioMem {
                alias,
                requested: size,
                persist,
            }),
            MemoryModel::Other(_) => None,
        }
    });
    Plan {
        actions: changed.collect(),
    }
}

/// True if the guest has less than the hypervisor gave it.
pub(super) fn lacks(kind: ResourceKind, seen: &Observation) -> bool {
    match kind {
        ResourceKind::Vcpus => seen
            .guest()
            .is_some_and(|guest| guest.online.len() < seen.domain.vcpus.plugged()),
        ResourceKind::Memory => seen.domain.memory.plugged() < seen.domain.memory.asked(),
    }
}

/// True if a guest sends this event because of the change between two states of its domain.
pub(super) fn is_caused_by(kind: ResourceKind, had: &Domain, has: &Domain, event: &Event) -> bool {
    match (kind, event) {
        (ResourceKind::Vcpus, Event::Ost(ost)) if ost.kind == SlotKind::Cpu => {
            let is_plug = matches!(ost.answer(), Some(AcpiAnswer::Added | AcpiAnswer::NotAdded));
            let added = has.vcpus.plugged_ids().without(&had.vcpus.plugged_ids());
            is_plug && added.contains(vcpu_of_answer(ost))
        }
        (ResourceKind::Memory, Event::Ost(ost)) => ost.kind == SlotKind::Dimm,
        (ResourceKind::Memory, Event::MemorySize { .. }) => true,
        _ => false,
    }
}

/// A vCPU that leaves the domain, by an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeavingVcpu {
    pub(super) id: u32,
    /// True if the guest has just been asked.
    pub(super) is_request: bool,
}

/// Returns the vCPU that an event says the guest was asked to release, or released, or keeps.
pub(super) fn leaving_vcpu(event: &Event) -> Option<LeavingVcpu> {
    let name = match event {
        Event::Ost(ost) if ost.kind == SlotKind::Cpu => {
            let answer = ost.answer()?;
            let is_plug = matches!(answer, AcpiAnswer::Added | AcpiAnswer::NotAdded);
            return (!is_plug).then(|| LeavingVcpu {
                id: vcpu_of_answer(ost),
                is_request: answer == AcpiAnswer::Leaving,
            });
        }
        Event::DeviceDeleted { device, path } => device.as_deref().or_else(|| peripheral(path))?,
        Event::UnplugFailed { device } => device,
        _ => return None,
    };
    Some(LeavingVcpu {
        id: vcpu_of(name)?,
        is_request: false,
    })
}

fn vcpu_of_answer(ost: &Ost) -> u32 {
    ost.device.as_deref().and_then(vcpu_of).unwrap_or(ost.slot)
}
