//! Memory: room for devices, the devices themselves, and whether the node has as much.

use super::{RuleInput, unsupported};
use crate::capability::Version;
use crate::compat::{RuleCode, RuleFinding, RuleSeverity};
use crate::domain::{Memory, MemoryDevice, MemoryModel};
use crate::units::Bytes;

/// Since then libvirt adds a NUMA cell by itself where memory is to be plugged (NEWS of 9.6.0).
const ADDS_A_CELL: Version = Version::new(9, 6, 0);
/// The most slots that QEMU has (`ACPI_MAX_RAM_SLOTS`, include/hw/acpi/acpi.h).
const MOST_SLOTS: u32 = 256;
/// The least block of virtio-mem: a transparent huge page on x86 (`virDomainMemoryDefValidate`).
const LEAST_BLOCK: Bytes = Bytes::new(2 << 20);
/// What 40 address bits reach, which is what QEMU gives a guest where nothing else is said.
const FORTY_BITS: Bytes = Bytes::new(1 << 40);
/// What is taken of them by the hole for PCI and by alignment, on the safe side.
const BESIDE_MEMORY: Bytes = Bytes::new(64 << 30);

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(domain) = &case.domain.domain else {
        return;
    };
    let memory = &domain.memory;
    if memory.boot == Bytes::ZERO && memory.devices.is_empty() {
        findings.push(
            blocks(RuleCode::Memory, "the domain has no memory".to_owned())
                .at_define(
                    "XML error: Memory size must be specified via <memory> or in the <numa> \
                     configuration",
                )
                .remedy("write <memory unit='GiB'>1</memory> or more"),
        );
        return;
    }
    check_maximum(case, memory, findings);
    check_slots(case, memory, findings);
    for device in &memory.devices {
        check_device(memory, device, findings);
    }
    check_node(case, memory, findings);
}

fn blocks(code: RuleCode, message: String) -> RuleFinding {
    RuleFinding::new(RuleSeverity::Blocks, code, message)
}

/// What the domain has with all its devices at their full size.
fn total(memory: &Memory) -> Bytes {
    memory
        .devices
        .iter()
        .fold(memory.boot, |sum, device| sum.saturating_add(device.size))
}

fn check_maximum(case: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    let total = total(memory);
    let Some(maximum) = memory.maximum else {
        if !memory.devices.is_empty() {
            findings.push(
                blocks(
                    RuleCode::MemoryDevices,
                    "the domain has memory devices and no <maxMemory> to hold them".to_owned(),
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
            blocks(
                RuleCode::MemoryDevices,
                format!(
                    "<maxMemory> is {maximum}, and the domain has {total} with all its devices"
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
            blocks(
                RuleCode::MemoryDevices,
                format!("<maxMemory> has slots and is no larger than what the domain boots with, {maximum}"),
            )
            .in_emulator(format!(
                "invalid value of maxmem: memory slots were specified but maximum memory size \
                 ({:#x}) is equal to the initial memory size",
                maximum.get()
            ))
            .remedy("raise <maxMemory>, or leave it out"),
        );
    }
    let needs_cell = case.is_x86() || matches!(case.arch, Some("aarch64"));
    if needs_cell && memory.cells.is_empty() {
        let words = "At least one numa node has to be configured when enabling memory hotplug";
        let finding = |severity| {
            RuleFinding::new(
                severity,
                RuleCode::MemoryDevices,
                format!("<maxMemory> needs a NUMA cell, which libvirt adds by itself since {ADDS_A_CELL}"),
            )
            .at_define(unsupported(words))
            .remedy("add <numa> with one <cell> to <cpu>")
        };
        match case.libvirt_is(ADDS_A_CELL) {
            Some(true) => {}
            Some(false) => findings.push(finding(RuleSeverity::Blocks)),
            None => findings.push(finding(RuleSeverity::Unknown)),
        }
    }
    let reach = FORTY_BITS.saturating_sub(BESIDE_MEMORY);
    if case.is_x86() && maximum > reach && maximum >= memory.boot {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Memory,
                format!(
                    "{maximum} may be more than the guest's CPU can address: QEMU gives it 40 \
                     address bits if nothing else is said"
                ),
            )
            .in_emulator("phys-bits too low (40)")
            .remedy("write <maxphysaddr mode='passthrough'/> into <cpu>, or use host-passthrough"),
        );
    }
}

fn check_slots(case: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    if memory.slots > MOST_SLOTS {
        findings.push(
            blocks(
                RuleCode::MemoryDevices,
                format!(
                    "QEMU has {MOST_SLOTS} memory slots at most, and <maxMemory> asks for {}",
                    memory.slots
                ),
            )
            .in_emulator(format!(
                "unsupported amount of memory slots: {}",
                memory.slots
            ))
            .remedy(format!("write slots='{MOST_SLOTS}' or fewer")),
        );
    }
    let slotted = memory
        .devices
        .iter()
        .filter(|device| takes_slot(device))
        .count();
    if memory.maximum.is_some() && slotted > usize::try_from(memory.slots).unwrap_or(usize::MAX) {
        findings.push(
            blocks(
                RuleCode::MemoryDevices,
                format!(
                    "the domain has {slotted} DIMMs, and <maxMemory> has {} slots",
                    memory.slots
                ),
            )
            .at_define("internal error: failed to find an empty memory slot")
            .remedy(format!(
                "write slots='{slotted}' or more, or use virtio-mem, which takes none"
            )),
        );
    }
    let is_dimm = |device: &&MemoryDevice| device.model == MemoryModel::Dimm;
    if case.is_x86() && !case.domain.acpi && memory.devices.iter().any(|d| is_dimm(&d)) {
        findings.push(
            blocks(
                RuleCode::MemoryDevices,
                "a DIMM reaches its guest through ACPI, and the domain has none".to_owned(),
            )
            .in_emulator("memory hotplug is not enabled: missing acpi device or acpi disabled")
            .remedy("add <acpi/> to <features>"),
        );
    }
}

/// DIMMs of both kinds sit in slots.
pub(super) fn takes_slot(device: &MemoryDevice) -> bool {
    match &device.model {
        MemoryModel::Dimm => true,
        MemoryModel::Other(model) => model == "nvdimm",
        MemoryModel::VirtioMem => false,
    }
}

fn check_device(memory: &Memory, device: &MemoryDevice, findings: &mut Vec<RuleFinding>) {
    // Without any cell libvirt adds number 0.
    let cells = memory.cells.len().max(1);
    if let Some(node) = device.node
        && usize::try_from(node).is_ok_and(|node| node >= cells)
        && memory.maximum.is_some()
    {
        findings.push(
            blocks(
                RuleCode::MemoryDevices,
                format!("a memory device belongs to NUMA cell {node}, and the guest has {cells}"),
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
    let mut refuse = |message: String, words: String, remedy: String| {
        findings.push(
            blocks(RuleCode::MemoryDevices, message)
                .at_define(words)
                .remedy(remedy),
        );
    };
    if requested > size {
        refuse(
            format!("a virtio-mem device of {size} is asked for {requested}"),
            format!(
                "requested size must be smaller than or equal to @size ({}KiB)",
                size.get() / 1024
            ),
            format!("lower <requested>, or raise its <size> to {requested}"),
        );
    }
    let Some(block) = device.block else { return };
    if !block.get().is_power_of_two() {
        refuse(
            format!("virtio-mem goes in blocks of a power of two, and this one is {block}"),
            "block size must be a power of two".to_owned(),
            format!(
                "write <block unit='KiB'>{}</block>",
                LEAST_BLOCK.get() / 1024
            ),
        );
    } else if block < LEAST_BLOCK {
        refuse(
            format!("a block of virtio-mem is {LEAST_BLOCK} at least, and this one is {block}"),
            format!(
                "block size too small, must be at least {}KiB",
                LEAST_BLOCK.get() / 1024
            ),
            format!(
                "write <block unit='KiB'>{}</block>",
                LEAST_BLOCK.get() / 1024
            ),
        );
    } else if !requested.is_multiple_of(block) {
        refuse(
            format!("{requested} are no whole number of blocks of {block}"),
            "requested size must be an integer multiple of block size".to_owned(),
            format!("ask for {}", requested.round_down(block)),
        );
    }
}

fn check_node(case: &RuleInput<'_>, memory: &Memory, findings: &mut Vec<RuleFinding>) {
    let Some(has) = case.node.memory else { return };
    let wants = memory.asked();
    if wants > has && !case.domain.huge_pages {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Memory,
                format!(
                    "the domain boots with {wants}, and the node has {has} in all: it starts only \
                     where the kernel overcommits memory (vm.overcommit_memory=1) or has swap"
                ),
            )
            .in_emulator("cannot set up guest memory 'pc.ram': Cannot allocate memory")
            .remedy(format!(
                "lower <memory> below {has}, or choose a larger node"
            )),
        );
    }
}
