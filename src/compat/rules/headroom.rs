//! Computes what can be plugged into the domain while it runs.

use serde::Serialize;

use super::memory::takes_slot;
use super::{RuleInput, vcpus};
use crate::domain::{AgentChannel, IdSet};
use crate::units::Bytes;

/// The resources that can be plugged into a running domain; the start fixes all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Headroom {
    pub vcpus: VcpuRoom,
    pub memory: MemoryRoom,
    /// Free PCIe root ports; each takes one device. `None` if the definition leaves its controllers
    /// to libvirt, or if the machine type has none.
    pub free_root_ports: Option<usize>,
    /// The guest agent's reports prove which resources the guest uses.
    pub agent: AgentChannel,
    /// Obstacles to plugging, each with a remedy.
    pub hints: Vec<String>,
}

/// Room for vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuRoom {
    /// Plugged now, or at start.
    pub plugged: u32,
    /// Fixed at start.
    pub maximum: u32,
    /// The numbers of the vCPUs that can be plugged.
    pub pluggable: IdSet,
}

/// Room for memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryRoom {
    /// Plugged now, or at start.
    pub plugged: Bytes,
    /// `<maxMemory>`.
    pub maximum: Option<Bytes>,
    /// The amount by which the virtio-mem devices can grow.
    pub virtio_mem: Bytes,
    /// The amount that new devices can add.
    pub for_devices: Bytes,
    /// DIMM slots without a DIMM.
    pub free_slots: u32,
}

pub(super) fn compute(input: &RuleInput<'_>) -> Option<Headroom> {
    let domain = input.domain.domain.as_ref()?;
    let mut hints = Vec::new();
    let vcpus = vcpu_room(input, &mut hints)?;
    let memory = memory_room(input, &mut hints)?;
    let ports = &input.domain.pci;
    let free_root_ports = Some(ports.free_root_ports())
        .filter(|_| !ports.root_ports.is_empty() && (input.is_q35() || input.is_virt()));
    if free_root_ports == Some(0) {
        hints.push(
            "no PCIe root port is free: add one <controller type='pci' model='pcie-root-port'/> \
             for each device to plug"
                .to_owned(),
        );
    }
    if domain.agent == AgentChannel::Absent {
        hints.push(
            "without a channel for the guest agent (org.qemu.guest_agent.0), fewer changes can be \
             verified in the guest"
                .to_owned(),
        );
    }
    Some(Headroom {
        vcpus,
        memory,
        free_root_ports,
        agent: domain.agent,
        hints,
    })
}

fn vcpu_room(input: &RuleInput<'_>, hints: &mut Vec<String>) -> Option<VcpuRoom> {
    let vcpus = &input.domain.domain.as_ref()?.vcpus;
    let plugged = vcpus.plugged();
    let mut pluggable: IdSet = vcpus
        .each
        .iter()
        .filter(|vcpu| !vcpu.enabled && vcpu.hotpluggable)
        .map(|vcpu| vcpu.id)
        .collect();
    let name = input.machine.unwrap_or_default();
    let plugs = match input.arch {
        Some("x86_64" | "i686") => !matches!(name, "microvm" | "isapc"),
        Some("s390x" | "ppc64" | "ppc64le" | "loongarch64") => true,
        Some(_) => false,
        None => return None,
    };
    if !plugs && plugged < vcpus.maximum {
        hints.push(format!(
            "machine type {name} cannot plug vCPUs into a running domain: {} vCPUs beyond those at \
             start stay unused",
            vcpus.maximum - plugged
        ));
        pluggable = IdSet::default();
    }
    if input.is_x86() && plugs && !input.domain.acpi && !pluggable.is_empty() {
        hints.push(
            "without ACPI the guest does not detect new vCPUs: add <acpi/> to <features>"
                .to_owned(),
        );
        pluggable = IdSet::default();
    }
    if input.is_x86()
        && vcpus::has_x2apic(input) == Some(false)
        && let Some(first) = vcpus::first_wide(input)
    {
        pluggable = pluggable
            .iter()
            .filter(|id| u64::from(*id) < first)
            .collect();
    }
    if plugs && plugged == vcpus.maximum {
        let all = match plugged {
            1 => "the only vCPU is".to_owned(),
            _ => format!("all {plugged} vCPUs are"),
        };
        hints.push(format!(
            "{all} plugged at start: for room to grow, write <vcpu current='{plugged}'> with a \
             larger maximum"
        ));
    }
    Some(VcpuRoom {
        plugged,
        maximum: vcpus.maximum,
        pluggable,
    })
}

fn memory_room(input: &RuleInput<'_>, hints: &mut Vec<String>) -> Option<MemoryRoom> {
    let memory = &input.domain.domain.as_ref()?.memory;
    let virtio_mem = memory.virtio_mem().fold(Bytes::ZERO, |sum, device| {
        sum.saturating_add(device.size.saturating_sub(device.asked()))
    });
    let used = memory
        .devices
        .iter()
        .fold(memory.boot, |sum, device| sum.saturating_add(device.size));
    let room = memory.maximum.unwrap_or_default().saturating_sub(used);
    let taken = memory
        .devices
        .iter()
        .filter(|device| takes_slot(device))
        .count();
    let taken = u32::try_from(taken).unwrap_or(u32::MAX);
    let (mut for_devices, mut free_slots) = (room, memory.slots.saturating_sub(taken));
    if room > Bytes::ZERO
        && let Some(obstacle) = no_dimms(input)
    {
        hints.push(obstacle);
        (for_devices, free_slots) = (Bytes::ZERO, 0);
    }
    let pending = memory.virtio_mem().fold(Bytes::ZERO, |sum, device| {
        sum.saturating_add(device.plugged().saturating_sub(device.asked()))
    });
    if pending > Bytes::ZERO {
        hints.push(format!(
            "the guest has not yet released {pending} of virtio-mem that it was asked for"
        ));
    }
    if memory.maximum.is_none() {
        hints.push(
            "memory is fixed: for room to grow, write <maxMemory slots='16' \
             unit='GiB'>…</maxMemory> and a virtio-mem device"
                .to_owned(),
        );
    } else if memory.virtio_mem().next().is_none() {
        hints.push(
            "there is no virtio-mem device: memory grows by whole DIMMs and cannot shrink"
                .to_owned(),
        );
    }
    Some(MemoryRoom {
        plugged: memory.plugged(),
        maximum: memory.maximum,
        virtio_mem,
        for_devices,
        free_slots,
    })
}

/// Returns the obstacle to plugging memory devices, as `virtnode hotplug memory` reports it.
fn no_dimms(input: &RuleInput<'_>) -> Option<String> {
    let machine = input.machine.unwrap_or_default();
    let without = ["s390-ccw", "microvm", "isapc", "none"];
    if without.iter().any(|name| machine.starts_with(name)) {
        return Some(format!("machine type {machine} has no slots for DIMMs"));
    }
    let needs_acpi = input.is_x86() || input.arch == Some("aarch64");
    (needs_acpi && !input.domain.acpi).then(|| {
        "without ACPI no memory device can be plugged: add <acpi/> to <features>".to_owned()
    })
}
