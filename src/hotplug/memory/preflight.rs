//! Limits on the amount of memory, and the calls.

use super::MemoryResource;
use crate::domain::{Domain, Memory, MemoryDevice, MemoryModel};
use crate::hotplug::{Action, Host, Infeasible, Observation, Plan, Scope};
use crate::units::{Bytes, KiB};

/// Plans the calls for the requested total.
///
/// # Errors
/// The first limit that rules the request out.
pub(super) fn preflight(
    MemoryResource { size, force }: MemoryResource,
    seen: &Observation,
    host: &Host,
    scope: Scope,
) -> Result<Plan, Infeasible> {
    let memory = &seen.domain.memory;
    if size < memory.boot || size == Bytes::ZERO {
        return Err(Infeasible::BelowBootMemory {
            asked: size,
            boot: memory.boot,
        });
    }
    if size == memory.asked() {
        return Ok(unchanged(memory, scope));
    }
    if memory.maximum.is_none() {
        return Err(Infeasible::NoMaxMemory {
            has: memory.asked(),
        });
    }
    let actions = match memory.virtio_mem().next() {
        Some(_) => resize(size, &seen.domain)?,
        None => vec![attach(size, &seen.domain)?],
    };
    check_node(size, memory, host)?;
    if !force {
        check_use(size, seen)?;
    }
    Ok(Plan { actions }.in_scope(scope))
}

/// Plans nothing for a domain that has what is requested, or the calls that change its definition
/// alone. A DIMM cannot be attached a second time, so only virtio-mem devices follow.
fn unchanged(memory: &Memory, scope: Scope) -> Plan {
    if !scope.persists() {
        return Plan::default();
    }
    let resize = |device: &MemoryDevice| {
        Some(Action::ResizeVirtioMem {
            alias: device.alias.clone()?,
            requested: KiB::try_from(device.asked()).ok()?,
            persist: true,
        })
    };
    Plan {
        actions: memory.virtio_mem().filter_map(resize).collect(),
    }
}

/// Rejects a shrink that leaves the guest less than it uses, by its latest report. Without a report
/// that is current nothing is known.
///
/// # Errors
/// The figures, with the least that the guest can be left with.
pub(super) fn check_use(size: Bytes, seen: &Observation) -> Result<(), Infeasible> {
    let memory = &seen.domain.memory;
    let Some(report) = seen.memory_report().filter(|report| report.is_current) else {
        return Ok(());
    };
    let Some(used) = report.used() else {
        return Ok(());
    };
    let taken = memory.plugged().saturating_sub(size);
    let left = report.total.saturating_sub(taken);
    if taken == Bytes::ZERO || left >= used {
        return Ok(());
    }
    let block = memory.virtio_mem().map(block).max().unwrap_or_default();
    let least = size.saturating_add(used.saturating_sub(left));
    Err(Infeasible::BelowUse {
        asked: size,
        left,
        used,
        total: report.total,
        age: report.age.as_secs(),
        least: least.round_up(block).unwrap_or(least).min(memory.plugged()),
    })
}

fn check_node(size: Bytes, memory: &Memory, host: &Host) -> Result<(), Infeasible> {
    let more = size.saturating_sub(memory.plugged());
    match host.available {
        // Huge pages are reserved and not part of the available memory.
        Some(available) if more > available && !memory.huge_pages => {
            Err(Infeasible::NodeMemory { more, available })
        }
        _ => Ok(()),
    }
}

/// Spreads the difference over the virtio-mem devices: grows from the first, shrinks from the last.
fn resize(size: Bytes, domain: &Domain) -> Result<Vec<Action>, Infeasible> {
    let memory = &domain.memory;
    let fixed = memory
        .dimms()
        .fold(memory.boot, |sum, dimm| sum.saturating_add(dimm.size));
    if size < fixed {
        return Err(Infeasible::CannotShrink {
            asked: size,
            least: fixed,
        });
    }
    let reachable = memory
        .virtio_mem()
        .fold(fixed, |sum, device| sum.saturating_add(device.size));
    if size > reachable {
        return Err(Infeasible::AboveMaximumMemory {
            asked: size,
            reachable,
            remedy: beyond_virtio_mem(size.saturating_sub(reachable), domain),
        });
    }
    let has = memory.asked();
    let grow = size > has;
    let devices: Vec<&MemoryDevice> = if grow {
        memory.virtio_mem().collect()
    } else {
        memory.virtio_mem().rev().collect()
    };
    let mut rest = size.abs_diff(has);
    let mut actions = Vec::new();
    for device in devices {
        let (Some(alias), requested) = (&device.alias, device.asked()) else {
            continue;
        };
        let room = if grow {
            device.size.saturating_sub(requested)
        } else {
            requested
        };
        let share = rest.min(room).round_down(block(device));
        let target = if grow {
            requested.saturating_add(share)
        } else {
            requested.saturating_sub(share)
        };
        let Ok(target) = KiB::try_from(target) else {
            continue;
        };
        if share > Bytes::ZERO {
            rest = rest.saturating_sub(share);
            actions.push(Action::ResizeVirtioMem {
                alias: alias.clone(),
                requested: target,
                persist: false,
            });
        }
    }
    if rest > Bytes::ZERO {
        let block = memory.virtio_mem().map(block).min().unwrap_or_default();
        let (below, above) = if grow {
            (
                size.saturating_sub(rest),
                size.saturating_sub(rest).saturating_add(block),
            )
        } else {
            (
                size.saturating_add(rest).saturating_sub(block),
                size.saturating_add(rest),
            )
        };
        return Err(not_in_blocks(
            size,
            block,
            below.max(fixed),
            above.min(reachable),
        ));
    }
    Ok(actions)
}

/// Returns the maximum size of a virtio-mem device that can be attached while the domain runs
/// (tried with libvirt 11.3 on q35). It needs no DIMM slot, but room below `<maxMemory>`, a NUMA
/// cell and a PCI slot. Linux on x86 uses it in blocks of 128 MiB.
pub fn attachable_memory(domain: &Domain) -> Option<Bytes> {
    let machine = domain.machine.as_deref().unwrap_or_default();
    let has_pci = ["pc", "q35", "virt"]
        .iter()
        .any(|name| machine.starts_with(name));
    let has_model = matches!(domain.arch.as_deref(), Some("x86_64" | "aarch64"));
    let size = domain
        .memory
        .unused_maximum()
        .round_down(Bytes::new(128 << 20));
    let has_cell = !domain.memory.cells.is_empty();
    (has_pci && has_model && has_cell && size > Bytes::ZERO).then_some(size)
}

/// Returns the remedy for a request beyond the virtio-mem devices.
fn beyond_virtio_mem(missing: Bytes, domain: &Domain) -> String {
    let raise =
        "raise the <size> of its virtio-mem device, and <maxMemory> with it, and start it again";
    match attachable_memory(domain) {
        Some(size) if size >= missing => format!(
            "attach another virtio-mem device of up to {size} to a free PCI slot while it runs (virsh \
             attach-device, see docs/hotplug.md), or {raise}"
        ),
        _ => raise.to_owned(),
    }
}

/// Returns the remedy for a domain without a free DIMM slot.
fn without_slot(domain: &Domain) -> String {
    match attachable_memory(domain) {
        Some(size) => format!(
            "attach a virtio-mem device of up to {size} to a free PCI slot while it runs (virsh \
             attach-device, see docs/hotplug.md), or give <maxMemory> more slots and start it again"
        ),
        None => {
            "give <maxMemory> more slots, or the domain a virtio-mem device, and start it again"
                .to_owned()
        }
    }
}

/// libvirt always reports the block; 2 MiB is the minimum (`virDomainMemoryDefValidate`).
fn block(device: &MemoryDevice) -> Bytes {
    let least = Bytes::new(2 << 20);
    device
        .block
        .filter(|block| *block > Bytes::ZERO)
        .unwrap_or(least)
}

fn not_in_blocks(asked: Bytes, block: Bytes, below: Bytes, above: Bytes) -> Infeasible {
    let near = if below == above {
        below.to_string()
    } else {
        format!("{below} or {above}")
    };
    Infeasible::MemoryBlock { asked, block, near }
}

/// Plans one more DIMM.
fn attach(size: Bytes, domain: &Domain) -> Result<Action, Infeasible> {
    let memory = &domain.memory;
    let has = memory.asked();
    if size < has {
        return Err(Infeasible::CannotShrink {
            asked: size,
            least: has,
        });
    }
    check_machine(domain)?;
    let more = size.saturating_sub(has);
    let free = memory.unused_maximum();
    if more > free {
        return Err(Infeasible::AboveMaximumMemory {
            asked: size,
            reachable: has.saturating_add(free),
            remedy: "raise <maxMemory> in its definition and start it again".to_owned(),
        });
    }
    let is_slotted = |device: &&MemoryDevice| match &device.model {
        MemoryModel::Dimm => true,
        MemoryModel::Other(model) => model == "nvdimm",
        MemoryModel::VirtioMem => false,
    };
    let taken = memory.devices.iter().filter(is_slotted).count();
    if taken >= usize::try_from(memory.slots).unwrap_or(usize::MAX) {
        return Err(Infeasible::NoSlot {
            slots: memory.slots,
            remedy: without_slot(domain),
        });
    }
    let arch = domain.arch.as_deref().unwrap_or_default();
    let unit = dimm_unit(arch);
    let in_unit = |bytes: Bytes| {
        KiB::try_from(bytes)
            .ok()
            .filter(|_| bytes.is_multiple_of(unit))
    };
    let Some(dimm) = in_unit(more) else {
        let below = has.saturating_add(more.round_down(unit));
        let above = below.saturating_add(unit);
        return Err(not_in_blocks(size, unit, below, above));
    };
    let node = memory.cells.iter().map(|cell| cell.id).min();
    if node.is_none() && matches!(arch, "x86_64" | "i686" | "aarch64") {
        return Err(Infeasible::NoNumaCell);
    }
    Ok(Action::AttachDimm {
        alias: free_alias(domain),
        size: dimm,
        node,
        persist: false,
    })
}

/// Returns the unit of a DIMM's size. QEMU rejects other sizes ("backend memory size must be
/// multiple of 0x200000", QEMU 10.0), or libvirt rounds them up to more than was requested
/// (`qemuDomainGetMemoryModuleSizeAlignment`, libvirt 11.3).
///
/// The guest may need a larger unit: Linux on x86 takes only multiples of 128 MiB or more. A DIMM
/// that the guest drops never becomes `Verified`, and the diagnosis explains it.
fn dimm_unit(arch: &str) -> Bytes {
    Bytes::new(match arch {
        "ppc64" | "ppc64le" => 256 << 20,
        "x86_64" | "i686" | "aarch64" => 2 << 20,
        _ => 1 << 20,
    })
}

fn check_machine(domain: &Domain) -> Result<(), Infeasible> {
    let machine = domain.machine.as_deref().unwrap_or_default();
    let without = ["s390-ccw", "microvm", "isapc", "none"];
    if without.iter().any(|name| machine.starts_with(name)) {
        return Err(Infeasible::NoDimms {
            machine: machine.to_owned(),
        });
    }
    let arch = domain.arch.as_deref().unwrap_or_default();
    if domain.acpi || !matches!(arch, "x86_64" | "i686" | "aarch64") {
        Ok(())
    } else {
        Err(Infeasible::NoAcpi)
    }
}

/// Returns an unused alias. libvirt accepts aliases from users if they start with `ua-`, and keeps
/// them.
fn free_alias(domain: &Domain) -> String {
    let names: std::collections::BTreeSet<&str> = domain
        .memory
        .devices
        .iter()
        .filter_map(|device| device.alias.as_deref())
        .chain(domain.devices.iter().map(|device| device.alias.as_str()))
        .collect();
    (0..=names.len())
        .map(|number| format!("ua-virtnode-dimm{number}"))
        .find(|alias| !names.contains(alias.as_str()))
        .unwrap_or_default()
}
