//! What could be plugged into the domain while it runs.

use serde::Serialize;

use super::memory::takes_slot;
use super::{RuleInput, vcpus};
use crate::domain::{AgentChannel, IdSet};
use crate::units::Bytes;

/// What could be plugged into a running domain; all of it is fixed when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Headroom {
    /// vCPUs.
    pub vcpus: VcpuRoom,
    /// Memory.
    pub memory: MemoryRoom,
    /// PCIe root ports that nothing sits on: one for each device. `None` for a definition that
    /// leaves its controllers to libvirt, and for machines without them.
    pub free_root_ports: Option<usize>,
    /// The way to the guest agent, which proves what the guest took.
    pub agent: AgentChannel,
    /// What stands in the way, and what to do.
    pub hints: Vec<String>,
}

/// Room for vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuRoom {
    /// Plugged, or to start with.
    pub plugged: u32,
    /// The most there can be.
    pub maximum: u32,
    /// Those that can be plugged, by number.
    pub pluggable: IdSet,
}

/// Room for memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryRoom {
    /// What it has, or starts with.
    pub plugged: Bytes,
    /// `<maxMemory>`.
    pub maximum: Option<Bytes>,
    /// By how much its virtio-mem devices can grow.
    pub virtio_mem: Bytes,
    /// How much room there is for more devices.
    pub for_devices: Bytes,
    /// Slots that no DIMM sits in.
    pub free_slots: u32,
}

pub(super) fn of(case: &RuleInput<'_>) -> Option<Headroom> {
    let domain = case.domain.domain.as_ref()?;
    let mut hints = Vec::new();
    let vcpus = vcpu_room(case, &mut hints)?;
    let memory = memory_room(case, &mut hints)?;
    let ports = &case.domain.pci;
    let free_root_ports = match case.is_q35() || case.is_virt() {
        true if !ports.root_ports.is_empty() => Some(ports.free_root_ports()),
        _ => None,
    };
    if free_root_ports == Some(0) {
        hints.push(
            "no PCIe root port is free for another device: add <controller type='pci' \
             model='pcie-root-port'/>, one for each"
                .to_owned(),
        );
    }
    if domain.agent == AgentChannel::Absent {
        hints.push(
            "without a channel for the guest agent (org.qemu.guest_agent.0) less can be proven \
             of what the guest takes"
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

fn vcpu_room(case: &RuleInput<'_>, hints: &mut Vec<String>) -> Option<VcpuRoom> {
    let vcpus = &case.domain.domain.as_ref()?.vcpus;
    let plugged = vcpus.plugged();
    let mut pluggable: IdSet = vcpus
        .each
        .iter()
        .filter(|vcpu| !vcpu.enabled && vcpu.hotpluggable)
        .map(|vcpu| vcpu.id)
        .collect();
    let name = case.machine.unwrap_or_default();
    let plugs = match case.arch {
        Some("x86_64" | "i686") => !matches!(name, "microvm" | "isapc"),
        Some("s390x" | "ppc64" | "ppc64le" | "loongarch64") => true,
        Some(_) => false,
        None => return None,
    };
    if !plugs && plugged < vcpus.maximum {
        hints.push(format!(
            "machine type {name} cannot plug vCPUs into a running domain: the {} beyond those it \
             starts with are out of reach",
            vcpus.maximum - plugged
        ));
        pluggable = IdSet::default();
    }
    if case.is_x86() && plugs && !case.domain.acpi && !pluggable.is_empty() {
        hints.push(
            "without ACPI the guest does not learn of new vCPUs: add <acpi/> to <features>"
                .to_owned(),
        );
        pluggable = IdSet::default();
    }
    if case.is_x86()
        && vcpus::has_x2apic(case) == Some(false)
        && let Some(first) = vcpus::first_wide(case)
    {
        pluggable = pluggable
            .iter()
            .filter(|id| u64::from(*id) < first)
            .collect();
    }
    if plugs && plugged == vcpus.maximum {
        let all = match plugged {
            1 => "its only vCPU is".to_owned(),
            _ => format!("all {plugged} vCPUs are"),
        };
        hints.push(format!(
            "{all} there from the start: for room to grow write \
             <vcpu current='{plugged}'> with a larger maximum"
        ));
    }
    Some(VcpuRoom {
        plugged,
        maximum: vcpus.maximum,
        pluggable,
    })
}

fn memory_room(case: &RuleInput<'_>, hints: &mut Vec<String>) -> Option<MemoryRoom> {
    let memory = &case.domain.domain.as_ref()?.memory;
    let virtio_mem = memory.virtio_mem().fold(Bytes::ZERO, |sum, device| {
        sum.saturating_add(device.size.saturating_sub(device.asked()))
    });
    let used = memory
        .devices
        .iter()
        .fold(memory.boot, |sum, device| sum.saturating_add(device.size));
    let for_devices = memory.maximum.unwrap_or_default().saturating_sub(used);
    let taken = memory
        .devices
        .iter()
        .filter(|device| takes_slot(device))
        .count();
    let taken = u32::try_from(taken).unwrap_or(u32::MAX);
    let free_slots = memory.slots.saturating_sub(taken);
    if memory.maximum.is_none() {
        hints.push(
            "memory is fixed: for room to grow write <maxMemory slots='16' unit='GiB'>…</maxMemory> \
             and a virtio-mem device"
                .to_owned(),
        );
    } else if memory.virtio_mem().next().is_none() {
        hints.push(
            "there is no virtio-mem device: memory grows by whole DIMMs and does not shrink again"
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
