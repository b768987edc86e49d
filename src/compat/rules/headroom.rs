//! Computes what can be plugged into the domain while it runs.
//!
//! The preflight of hotplug decides ([`preflight`]), for a running domain and for a definition
//! alike: a definition is taken as a domain that runs unchanged. So `check` promises no more than
//! `virtnode hotplug` accepts, and gives its reasons.

use serde::Serialize;

use super::memory::{FIRST_TO_ADD_CELL, takes_slot};
use super::{RuleInput, vcpus};
use crate::compat::{Offer, Requirement};
use crate::domain::{AgentChannel, Domain, DomainState, GuestNumaCell, IdSet};
use crate::hotplug::{
    Agent, AnswerTimes, Host, HotplugRequest, Infeasible, Observation, Preflight, Rejection, Scope,
    attachable_memory, preflight,
};
use crate::units::{Bytes, Timestamp};

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
    /// The largest total that `virtnode hotplug memory` accepts.
    pub reachable: Bytes,
    /// The amount by which the virtio-mem devices can grow. Memory that the guest has not released
    /// yet is not part of it.
    pub virtio_mem: Bytes,
    /// The amount that new devices can add.
    pub for_devices: Bytes,
    /// DIMM slots without a DIMM.
    pub free_slots: u32,
}

/// Returns the room of a running domain, as it is observed.
pub fn headroom(
    domain: &Requirement,
    node: &Offer,
    seen: &Observation,
    host: &Host,
) -> Option<Headroom> {
    room(&RuleInput::new(domain, node), seen, host)
}

/// Returns the room of a definition.
pub(super) fn compute(input: &RuleInput<'_>) -> Option<Headroom> {
    let domain = input.domain.domain.as_ref()?;
    room(input, &as_if_running(input, domain), &Host::default())
}

/// Returns an observation of the domain as its definition starts it.
fn as_if_running(input: &RuleInput<'_>, domain: &Domain) -> Observation {
    let mut domain = Domain {
        state: DomainState::Running,
        arch: input.arch.map(str::to_owned),
        machine: input.machine.map(str::to_owned),
        ..domain.clone()
    };
    if domain.memory.maximum.is_some()
        && domain.memory.cells.is_empty()
        && input.libvirt_is(FIRST_TO_ADD_CELL) != Some(false)
    {
        domain.memory.cells.push(GuestNumaCell {
            id: 0,
            cpus: domain.vcpus.each.iter().map(|vcpu| vcpu.id).collect(),
            memory: domain.memory.boot,
        });
    }
    // libvirt names each device at the start.
    for (number, device) in domain.memory.devices.iter_mut().enumerate() {
        device.alias.get_or_insert(format!("memory{number}"));
    }
    Observation {
        at: Timestamp::from_millis(0),
        answered: AnswerTimes::default(),
        domain,
        reason: None,
        persistent: true,
        stats: None,
        agent: Agent::NotAsked,
        job: None,
        answers: None,
    }
}

fn room(input: &RuleInput<'_>, seen: &Observation, host: &Host) -> Option<Headroom> {
    let domain = &seen.domain;
    let mut hints = Vec::new();
    let vcpus = vcpu_room(input, seen, host, &mut hints)?;
    let ports = &input.domain.pci;
    let free_root_ports = Some(ports.free_root_ports())
        .filter(|_| !ports.root_ports.is_empty() && (input.is_q35() || input.is_virt()));
    let memory = memory_room(seen, host, free_root_ports != Some(0), &mut hints);
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

fn vcpu_room(
    input: &RuleInput<'_>,
    seen: &Observation,
    host: &Host,
    hints: &mut Vec<String>,
) -> Option<VcpuRoom> {
    let vcpus = &seen.domain.vcpus;
    let plugged = vcpus.plugged();
    let room = |pluggable| VcpuRoom {
        plugged,
        maximum: vcpus.maximum,
        pluggable,
    };
    let has_hotplug = matches!(
        input.arch?,
        "x86_64" | "i686" | "s390x" | "ppc64" | "ppc64le" | "loongarch64"
    );
    if plugged == vcpus.maximum {
        if has_hotplug {
            hints.push(all_plugged(plugged));
        }
        return Some(room(IdSet::default()));
    }
    if !has_hotplug {
        hints.push(format!(
            "machine type {} cannot plug vCPUs into a running domain: {} vCPUs beyond those at \
             start stay unused",
            input.machine.unwrap_or_default(),
            vcpus.maximum - plugged
        ));
        return Some(room(IdSet::default()));
    }
    let limit = match vcpus::has_x2apic(input) {
        Some(false) if input.is_x86() => vcpus::first_wide(input),
        _ => None,
    };
    let free: Vec<u32> = vcpus
        .each
        .iter()
        .filter(|vcpu| !vcpu.enabled && vcpu.hotpluggable)
        .map(|vcpu| vcpu.id)
        .filter(|id| limit.is_none_or(|limit| u64::from(*id) < limit))
        .collect();
    let wanted = plugged.saturating_add(u32::try_from(free.len()).unwrap_or(u32::MAX));
    let (reachable, obstacle) = most_vcpus(wanted, seen, host);
    if let Some(obstacle) = obstacle {
        add(hints, obstacle);
    }
    let more = usize::try_from(reachable.saturating_sub(plugged)).unwrap_or(usize::MAX);
    Some(room(free.into_iter().take(more).collect()))
}

fn all_plugged(plugged: u32) -> String {
    let all = match plugged {
        1 => "the only vCPU is".to_owned(),
        _ => format!("all {plugged} vCPUs are"),
    };
    format!(
        "{all} plugged at start: for room to grow, write <vcpu current='{plugged}'> with a larger \
         maximum"
    )
}

/// Returns the largest number of vCPUs up to `wanted` that the preflight accepts, and the obstacle
/// to more.
fn most_vcpus(wanted: u32, seen: &Observation, host: &Host) -> (u32, Option<String>) {
    let plugged = seen.domain.vcpus.plugged();
    let mut count = wanted;
    let mut obstacle = None;
    while count > plugged {
        let request = HotplugRequest::Vcpus {
            count,
            online: false,
        };
        let limit = match preflight(&request, Scope::Live, seen, host) {
            Preflight::Ready(_) => return (count, obstacle),
            other => other,
        };
        count = match &limit {
            Preflight::Rejected(Rejection::Infeasible(Infeasible::EmulatedVcpus {
                reachable,
                ..
            })) => *reachable,
            Preflight::Rejected(Rejection::Infeasible(Infeasible::VcpuGranularity {
                below,
                ..
            })) => *below,
            _ => plugged,
        };
        obstacle = words(limit);
    }
    (plugged, obstacle)
}

fn memory_room(
    seen: &Observation,
    host: &Host,
    has_port: bool,
    hints: &mut Vec<String>,
) -> MemoryRoom {
    let memory = &seen.domain.memory;
    let has_virtio_mem = memory.virtio_mem().next().is_some();
    let virtio_mem = memory.virtio_mem().fold(Bytes::ZERO, |sum, device| {
        let taken = device.asked().max(device.plugged());
        sum.saturating_add(device.size.saturating_sub(taken))
    });
    let taken = memory
        .devices
        .iter()
        .filter(|device| takes_slot(device))
        .count();
    let taken = u32::try_from(taken).unwrap_or(u32::MAX);
    let (mut for_devices, mut free_slots) =
        (memory.unused_maximum(), memory.slots.saturating_sub(taken));
    if for_devices > Bytes::ZERO
        && let Some(obstacle) = no_devices(&seen.domain)
    {
        add(hints, obstacle);
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
    let (reachable, obstacle) = most_memory(seen, host);
    if memory.maximum.is_none() {
        hints.push(
            "memory is fixed: for room to grow, write <maxMemory slots='16' \
             unit='GiB'>…</maxMemory> and a virtio-mem device"
                .to_owned(),
        );
    } else {
        if let Some(obstacle) = obstacle {
            add(hints, obstacle);
        }
        match attachable_memory(&seen.domain) {
            Some(size) if has_port && for_devices > Bytes::ZERO && virtio_mem == Bytes::ZERO => {
                hints.push(format!(
                    "{} virtio-mem device of up to {size} can be attached while the domain runs \
                 (virsh attach-device, see docs/hotplug.md){}",
                    if has_virtio_mem { "another" } else { "a" },
                    if has_virtio_mem {
                        ""
                    } else {
                        "; without one, memory grows by whole DIMMs and cannot shrink"
                    }
                ))
            }
            _ if !has_virtio_mem => hints.push(
                "there is no virtio-mem device: memory grows by whole DIMMs and cannot shrink"
                    .to_owned(),
            ),
            _ => {}
        }
    }
    MemoryRoom {
        plugged: memory.plugged(),
        maximum: memory.maximum,
        reachable,
        virtio_mem,
        for_devices,
        free_slots,
    }
}

/// Returns the largest total that the preflight accepts, and the obstacle to more.
fn most_memory(seen: &Observation, host: &Host) -> (Bytes, Option<String>) {
    let memory = &seen.domain.memory;
    let asked = memory.asked();
    let has_virtio_mem = memory.virtio_mem().next().is_some();
    let mut size = if has_virtio_mem {
        let sizes = memory
            .virtio_mem()
            .map(|device| device.size.saturating_sub(device.asked()));
        sizes.fold(asked, Bytes::saturating_add)
    } else {
        asked.saturating_add(memory.unused_maximum())
    };
    let mut obstacle = None;
    while size > asked {
        let request = HotplugRequest::Memory { size, force: false };
        let limit = match preflight(&request, Scope::Live, seen, host) {
            Preflight::Ready(_) => return (size, obstacle),
            other => other,
        };
        let less = match &limit {
            Preflight::Rejected(Rejection::Infeasible(limit)) => match limit {
                Infeasible::AboveMaximumMemory { reachable, .. } => *reachable,
                Infeasible::MemoryBlock { block, .. } => {
                    let more = size.saturating_sub(asked);
                    asked.saturating_add(more.round_down(*block))
                }
                Infeasible::NodeMemory { available, .. } => {
                    memory.plugged().saturating_add(*available)
                }
                _ => asked,
            },
            _ => asked,
        };
        // A size that lacks a part of a block is no obstacle to mention.
        if !matches!(
            limit,
            Preflight::Rejected(Rejection::Infeasible(Infeasible::MemoryBlock { .. }))
        ) {
            obstacle = words(limit);
        }
        size = if less < size { less } else { asked };
    }
    (asked, obstacle)
}

/// Returns the obstacle that a preflight names.
fn words(preflight: Preflight) -> Option<String> {
    match preflight {
        Preflight::Ready(_) => None,
        Preflight::Blocked(awaited) => Some(format!("wait for {awaited}")),
        Preflight::Unexplained(rejection) | Preflight::Rejected(rejection) => {
            Some(rejection.to_string())
        }
    }
}

/// Adds a hint once: vCPUs and memory can have the same obstacle.
fn add(hints: &mut Vec<String>, hint: String) {
    if !hints.contains(&hint) {
        hints.push(hint);
    }
}

/// Returns the obstacle to new memory devices of any model.
fn no_devices(domain: &Domain) -> Option<String> {
    let machine = domain.machine.as_deref().unwrap_or_default();
    let without = ["s390-ccw", "microvm", "isapc", "none"];
    if without.iter().any(|name| machine.starts_with(name)) {
        return Some(format!("machine type {machine} has no slots for DIMMs"));
    }
    let arch = domain.arch.as_deref().unwrap_or_default();
    let needs_acpi = matches!(arch, "x86_64" | "i686" | "aarch64");
    (needs_acpi && !domain.acpi).then(|| Infeasible::NoAcpi.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Returns a domain with 1 GiB of 8 GiB, and its observation as a running one.
    fn running(slots: u32, features: &str, devices: &str) -> (Requirement, Observation) {
        let xml = format!(
            "<domain type='kvm' id='1'><name>d</name>
             <maxMemory slots='{slots}' unit='GiB'>8</maxMemory><memory unit='GiB'>{}</memory>
             <vcpu current='2'>4</vcpu>
             <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
             <features>{features}</features>
             <cpu><numa><cell id='0' cpus='0-3' memory='1' unit='GiB'/></numa></cpu>
             <devices>{devices}</devices></domain>",
            1 + devices.matches("<size unit='GiB'>2</size>").count() * 2
        );
        let domain = Requirement::parse("d", xml.as_bytes()).unwrap();
        let offer = Offer::default();
        let input = RuleInput::new(&domain, &offer);
        let seen = as_if_running(&input, domain.domain.as_ref().unwrap());
        (domain, seen)
    }

    fn room_of((domain, seen): &(Requirement, Observation), host: Host) -> Headroom {
        headroom(domain, &Offer::default(), seen, &host).unwrap()
    }

    fn virtio_mem(requested: u64, current: u64) -> String {
        format!(
            "<memory model='virtio-mem'><target><size unit='GiB'>2</size><node>0</node>\
             <block unit='MiB'>2</block><requested unit='GiB'>{requested}</requested>\
             <current unit='GiB'>{current}</current></target><alias name='virtiomem0'/></memory>"
        )
    }

    const DIMM: &str = "<memory model='dimm'><target><size unit='GiB'>2</size><node>0</node>\
                        </target><alias name='dimm0'/></memory>";

    #[test]
    fn without_acpi_nothing_is_promised() {
        let room = room_of(&running(4, "", ""), Host::default());
        assert!(room.vcpus.pluggable.is_empty());
        let memory = &room.memory;
        assert_eq!((memory.for_devices, memory.free_slots), (Bytes::ZERO, 0));
        assert_eq!(memory.reachable, Bytes::new(GIB));
        let named = room.hints.iter().filter(|hint| hint.contains("<acpi/>"));
        assert_eq!(named.count(), 1, "{:?}", room.hints);
    }

    #[test]
    fn dimm_beside_virtio_mem_counts() {
        let devices = format!("{DIMM}{}", virtio_mem(2, 2));
        let room = room_of(&running(2, "<acpi/>", &devices), Host::default());
        let memory = &room.memory;
        assert_eq!(memory.plugged, Bytes::new(5 * GIB));
        assert_eq!(memory.virtio_mem, Bytes::ZERO);
        // Hotplug resizes the virtio-mem device; libvirt can attach another one.
        assert_eq!(memory.reachable, Bytes::new(5 * GIB));
        assert_eq!(memory.for_devices, Bytes::new(3 * GIB));
        assert_eq!(memory.free_slots, 1);
        let attach = "another virtio-mem device of up to 3GiB can be attached";
        assert!(room.hints[0].starts_with(attach), "{:?}", room.hints);
    }

    #[test]
    fn pending_shrink_is_no_additional_room() {
        let room = room_of(&running(0, "<acpi/>", &virtio_mem(0, 1)), Host::default());
        let memory = &room.memory;
        assert_eq!(memory.plugged, Bytes::new(2 * GIB));
        assert_eq!(memory.virtio_mem, Bytes::new(GIB));
        assert_eq!(memory.reachable, Bytes::new(3 * GIB));
        let pending = "the guest has not yet released 1GiB";
        assert!(room.hints[0].starts_with(pending), "{:?}", room.hints);
    }

    #[test]
    fn device_to_attach_is_named_before_another_start() {
        let room = room_of(&running(0, "<acpi/>", ""), Host::default());
        assert_eq!(room.memory.reachable, Bytes::new(GIB));
        let obstacle = &room.hints[0];
        let attach = obstacle
            .find("attach a virtio-mem device of up to 7GiB to a free PCI slot while it runs");
        assert!(attach.unwrap() < obstacle.find("start it again").unwrap());
    }

    #[test]
    fn memory_of_the_node_bounds_the_room() {
        let host = Host {
            available: Some(Bytes::new(2 * GIB + 1)),
            released_vcpus: 0,
        };
        let room = room_of(&running(4, "<acpi/>", ""), host);
        assert_eq!(room.memory.reachable, Bytes::new(3 * GIB));
        assert!(room.hints[0].contains("the node has"), "{:?}", room.hints);
    }

    #[test]
    fn emulator_without_kvm_bounds_the_room_by_its_released_vcpus() {
        let (mut domain, mut seen) = running(4, "<acpi/>", "");
        domain.virt_type = Some("qemu".to_owned());
        seen.domain.virt_type = "qemu".to_owned();
        let host = Host {
            available: None,
            released_vcpus: 1,
        };
        let room = room_of(&(domain, seen), host);
        assert_eq!(room.vcpus.pluggable.to_string(), "2");
        assert!(room.hints[0].contains("would crash"), "{:?}", room.hints);
    }

    #[test]
    fn paused_domain_has_no_room_until_it_is_resumed() {
        let (domain, mut seen) = running(4, "<acpi/>", "");
        seen.domain.state = DomainState::Paused;
        seen.reason = Some(crate::domain::PauseReason::User);
        let room = room_of(&(domain, seen), Host::default());
        assert!(room.vcpus.pluggable.is_empty());
        let resume = room.hints.iter().filter(|hint| hint.contains("resume"));
        assert_eq!(resume.count(), 1, "{:?}", room.hints);
    }
}
