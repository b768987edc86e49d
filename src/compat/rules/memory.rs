//! Rules for memory: its maximum, its devices, and the node's amount.

use super::{RuleInput, unsupported};
use crate::capability::Version;
use crate::compat::{RuleCode, RuleFinding, RuleSeverity};
use crate::domain::{Memory, MemoryDevice, MemoryModel};
use crate::units::Bytes;

/// First libvirt that adds the NUMA cell that pluggable memory requires (NEWS of 9.6.0).
pub(super) const FIRST_TO_ADD_CELL: Version = Version::new(9, 6, 0);
/// Maximum number of memory slots in QEMU (`ACPI_MAX_RAM_SLOTS`, include/hw/acpi/acpi.h).
const MAX_SLOTS: u32 = 256;
/// Minimum block size of virtio-mem: a transparent huge page on x86 (`virDomainMemoryDefValidate`).
const MIN_BLOCK: Bytes = Bytes::new(2 << 20);
/// The address space of 40 bits, QEMU's default for a guest.
const DEFAULT_ADDRESS_SPACE: Bytes = Bytes::new(1 << 40);
/// Address space for the PCI hole and for alignment, a safe estimate.
const RESERVED_ADDRESSES: Bytes = Bytes::new(64 << 30);

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(domain) = &input.domain.domain else {
        return;
    };
    let memory = &domain.memory;
    if memory.boot == Bytes::ZERO && memory.devices.is_empty() {
        findings.push(
            RuleFinding::blocking(RuleCode::Memory, "the domain has no memory")
                .at_define(
                    "XML error: Memory size must be specified via <memory> or in the <numa> \
                     configuration",
                )
                .remedy("write <memory unit='GiB'>1</memory> or more"),
        );
        return;
    }
    check_maximum(input, memory, findings);
    check_slots(input, memory, findings);
    for device in &memory.devices {
        check_device(memory, device, findings);
    }
    check_node(input, memory, findings);
}

/// Returns the domain's memory with all devices at their full size.
fn total(memory: &Memory) -> Bytes {
    memory
        .devices
        .iter()
        .fold(memory.boot, |sum, device| sum.saturating_add(device.size))
}

fn check_maximum(input: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    let total = total(memory);
    let Some(maximum) = memory.maximum else {
        if !memory.devices.is_empty() {
            findings.push(
                RuleFinding::blocking(
                    RuleCode::MemoryDevices,
                    "the domain has memory devices but no <maxMemory>",
                )
                .at_define(unsupported(
                    "cannot use/hotplug a memory device when domain 'maxMemory' is not defined",
                ))
                .remedy(format!(
                    "write <maxMemory slots='16' unit='KiB'>{}</maxMemory> or more",
                    total.get() / 1024
                )),
            );
        }
        return;
    };
    if maximum < total {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                format!(
                    "<maxMemory> is {maximum}, but the domain has {total} with all its devices"
                ),
            )
            .at_define(
                "XML error: maximum memory size must be equal or greater than the actual memory \
                 size",
            )
            .remedy(format!("raise <maxMemory> to {total} or more")),
        );
    }
    if memory.slots > 0 && maximum == memory.boot {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                format!("<maxMemory> has slots but equals the boot memory of {maximum}"),
            )
            .in_emulator(format!(
                "invalid value of maxmem: memory slots were specified but maximum memory size \
                 ({:#x}) is equal to the initial memory size",
                maximum.get()
            ))
            .remedy("raise <maxMemory>, or leave it out"),
        );
    }
    let needs_cell = input.is_x86() || matches!(input.arch, Some("aarch64"));
    if needs_cell && memory.cells.is_empty() {
        let words = "At least one numa node has to be configured when enabling memory hotplug";
        let finding = |severity| {
            RuleFinding::new(
                severity,
                RuleCode::MemoryDevices,
                format!(
                    "<maxMemory> requires a NUMA cell, which libvirt adds since {FIRST_TO_ADD_CELL}"
                ),
            )
            .at_define(unsupported(words))
            .remedy("add <numa> with one <cell> to <cpu>")
        };
        match input.libvirt_is(FIRST_TO_ADD_CELL) {
            Some(true) => {}
            Some(false) => findings.push(finding(RuleSeverity::Blocks)),
            None => findings.push(finding(RuleSeverity::Unknown)),
        }
    }
    let reach = DEFAULT_ADDRESS_SPACE.saturating_sub(RESERVED_ADDRESSES);
    if input.is_x86() && maximum > reach && maximum >= memory.boot {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Memory,
                format!(
                    "{maximum} may exceed the guest's address space: QEMU's default is 40 address \
                     bits"
                ),
            )
            .in_emulator("phys-bits too low (40)")
            .remedy("write <maxphysaddr mode='passthrough'/> into <cpu>, or use host-passthrough"),
        );
    }
}

fn check_slots(input: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    if memory.slots > MAX_SLOTS {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                format!(
                    "QEMU has at most {MAX_SLOTS} memory slots, but <maxMemory> requests {}",
                    memory.slots
                ),
            )
            .in_emulator(format!(
                "unsupported amount of memory slots: {}",
                memory.slots
            ))
            .remedy(format!("write slots='{MAX_SLOTS}' or fewer")),
        );
    }
    let slotted = memory
        .devices
        .iter()
        .filter(|device| takes_slot(device))
        .count();
    if memory.maximum.is_some() && slotted > usize::try_from(memory.slots).unwrap_or(usize::MAX) {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                format!(
                    "the domain has {slotted} DIMMs, but <maxMemory> has {} slots",
                    memory.slots
                ),
            )
            .at_define("internal error: failed to find an empty memory slot")
            .remedy(format!(
                "write slots='{slotted}' or more, or use virtio-mem, which needs no slot"
            )),
        );
    }
    let is_dimm = |device: &&MemoryDevice| device.model == MemoryModel::Dimm;
    if input.is_x86() && !input.domain.acpi && memory.devices.iter().any(|d| is_dimm(&d)) {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                "the guest detects DIMMs by ACPI, but the domain has no ACPI",
            )
            .in_emulator("memory hotplug is not enabled: missing acpi device or acpi disabled")
            .remedy("add <acpi/> to <features>"),
        );
    }
}

/// True for DIMMs and NVDIMMs.
pub(super) fn takes_slot(device: &MemoryDevice) -> bool {
    match &device.model {
        MemoryModel::Dimm => true,
        MemoryModel::Other(model) => model == "nvdimm",
        MemoryModel::VirtioMem => false,
    }
}

fn check_device(memory: &Memory, device: &MemoryDevice, findings: &mut Vec<RuleFinding>) {
    // Without any cell, libvirt adds number 0.
    let cells = memory.cells.len().max(1);
    if let Some(node) = device.node
        && usize::try_from(node).is_ok_and(|node| node >= cells)
        && memory.maximum.is_some()
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryDevices,
                format!("a memory device belongs to NUMA cell {node}, but the guest has {cells}"),
            )
            .at_start(format!(
                "can't add memory backend for guest node '{node}' as the guest has only '{cells}' \
                 NUMA nodes configured"
            ))
            .remedy(format!("write <node>{}</node>, or add the cell", cells - 1)),
        );
    }
    if device.model != MemoryModel::VirtioMem {
        return;
    }
    let size = device.size;
    let requested = device.requested.unwrap_or_default();
    let mut reject = |message: String, words: String, remedy: String| {
        findings.push(
            RuleFinding::blocking(RuleCode::MemoryDevices, message)
                .at_define(words)
                .remedy(remedy),
        );
    };
    if requested > size {
        reject(
            format!("a virtio-mem device has a size of {size}, but {requested} requested"),
            format!(
                "requested size must be smaller than or equal to @size ({}KiB)",
                size.get() / 1024
            ),
            format!("lower <requested>, or raise its <size> to {requested}"),
        );
    }
    let Some(block) = device.block else { return };
    if !block.get().is_power_of_two() {
        reject(
            format!("a virtio-mem block size must be a power of two, but this one is {block}"),
            "block size must be a power of two".to_owned(),
            format!("write <block unit='KiB'>{}</block>", MIN_BLOCK.get() / 1024),
        );
    } else if block < MIN_BLOCK {
        reject(
            format!("a virtio-mem block must be at least {MIN_BLOCK}, but this one is {block}"),
            format!(
                "block size too small, must be at least {}KiB",
                MIN_BLOCK.get() / 1024
            ),
            format!("write <block unit='KiB'>{}</block>", MIN_BLOCK.get() / 1024),
        );
    } else if !requested.is_multiple_of(block) {
        reject(
            format!("the requested {requested} is not a multiple of the block size {block}"),
            "requested size must be an integer multiple of block size".to_owned(),
            format!("request {}", requested.round_down(block)),
        );
    }
}

fn check_node(input: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    let Some(has) = input.node.memory else { return };
    let wants = memory.asked();
    if wants > has && !input.domain.backing.huge_pages {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Memory,
                format!(
                    "the domain needs {wants}, but the node has {has} in total: the domain starts \
                     only if the kernel overcommits memory (vm.overcommit_memory=1) or has swap"
                ),
            )
            .in_emulator("cannot set up guest memory 'pc.ram': Cannot allocate memory")
            .remedy(format!(
                "lower <memory> below {has}, or choose a larger node"
            )),
        );
    }
}
