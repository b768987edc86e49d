//! Rules for guest type, architecture, accelerator and machine type.

use super::{RuleInput, named, unsupported};
use crate::capability::{Version, is_x86};
use crate::compat::{OfferedMachine, RuleCode, RuleFinding, RuleSeverity, Stage};

/// x86 machine types without PCI.
pub(super) const WITHOUT_PCI: [&str; 2] = [ISAPC, "microvm"];
/// The machine type with an ISA bus alone.
const ISAPC: &str = "isapc";
/// libvirt's message when it finds no address for a PCI device.
const NO_PCI: &str = "XML error: No PCI buses available";

/// First libvirt known to distinguish x86 machine types without PCI, to which it adds no PCI
/// device. Measured: 11.3 does not, 12.8 does; its new message was seen with 11.9. The versions
/// between them are unknown.
const FIRST_TO_DISTINGUISH: Version = Version::new(11, 9, 0);
const LAST_NOT_TO_DISTINGUISH: Version = Version::new(11, 3, 99);

/// True if this libvirt distinguishes machine types without PCI. An unknown version counts as an
/// older one; `None` means a version between the measured ones.
pub(super) fn distinguishes_pci(input: &RuleInput<'_>) -> Option<bool> {
    match input.node.libvirt_version {
        Some(version) if version >= FIRST_TO_DISTINGUISH => Some(true),
        Some(version) if version > LAST_NOT_TO_DISTINGUISH => None,
        _ => Some(false),
    }
}

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_os_type(input, findings);
    check_accelerator(input, findings);
    check_machine(input, findings);
}

fn check_os_type(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let finding = |message: String| RuleFinding::blocking(RuleCode::DomainType, message);
    if input.domain.virt_type.is_none() {
        let finding = finding("the definition has no domain type".to_owned())
            .at_define("internal error: missing domain type attribute")
            .remedy("write <domain type='kvm'>, or type='qemu' for software emulation");
        findings.push(finding);
    }
    match input.domain.os_type.as_deref() {
        Some("hvm") => {}
        None => findings.push(
            finding("the definition has no guest type".to_owned())
                .at_define("XML error: an os <type> must be specified")
                .remedy("write <os><type machine='q35'>hvm</type></os>"),
        ),
        Some(other) if input.virt_type().is_some_and(is_qemu_type) => findings.push(
            finding(format!(
                "QEMU runs guests of type hvm, but this one is of type {other}"
            ))
            .at_define(unsupported(format!(
                "Emulator '{}' does not support os type '{other}'",
                input.emulator()
            )))
            .remedy("write <os><type machine='q35'>hvm</type></os>"),
        ),
        Some(_) => {}
    }
}

fn is_qemu_type(virt_type: &str) -> bool {
    matches!(virt_type, "kvm" | "qemu" | "hvf")
}

fn check_accelerator(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(arch) = input.arch else {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Architecture,
                "the architecture is unknown: neither the domain nor the node reports one",
            )
            .remedy(
                "name it in <type arch='x86_64'> or with --arch, or give --capabilities of the \
                 node",
            ),
        );
        return;
    };
    let Some(types) = &input.node.virt_types else {
        if input.node.virt_type.as_deref() != input.domain.virt_type.as_deref()
            || input.node.machines.is_none()
        {
            findings.push(
                RuleFinding::unknown(
                    RuleCode::Machine,
                    "the node's accelerators and machine types are unknown",
                )
                .remedy("give --capabilities what `virsh capabilities` prints on the node"),
            );
        }
        return;
    };
    if types.is_empty() {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Architecture,
                format!("the node has no emulator for {arch}"),
            )
            .at_define(unsupported(format!("No emulator found for arch '{arch}'")))
            .remedy(format!(
                "install the emulator (qemu-system-{arch}), or choose a node that has it"
            )),
        );
        return;
    }
    let Some(wanted) = input.domain.virt_type.as_deref() else {
        return;
    };
    if types.iter().any(|have| have == wanted) {
        return;
    }
    let native = input.node.native_arch.as_deref();
    let remedy = match wanted {
        "kvm"
            if native.is_some_and(|native| native != arch && !(is_x86(native) && is_x86(arch))) =>
        {
            "choose a node of that architecture, or write <domain type='qemu'> for slow software \
             emulation"
        }
        "kvm" if native.is_some_and(|native| !is_x86(native)) => {
            "see that libvirt's user may open /dev/kvm (`virtnode doctor` finds the cause), or write \
             <domain type='qemu'> for slow software emulation"
        }
        "kvm" => {
            "load kvm_amd or kvm_intel and see that libvirt's user may open /dev/kvm (`virtnode \
             doctor` finds the cause), or write <domain type='qemu'> for slow software emulation"
        }
        _ => "write one of these as <domain type=…>, or choose another node",
    };
    findings.push(
        RuleFinding::blocking(
            RuleCode::DomainType,
            format!(
                "domain type {wanted} is not available here for {arch}, only {}",
                named(types.iter().map(String::as_str))
            ),
        )
        .at_define(unsupported(format!(
            "Emulator '{}' does not support virt type '{wanted}'",
            input.emulator()
        )))
        .remedy(remedy),
    );
}

fn check_machine(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(canonical) = input.machine else {
        return;
    };
    match &input.node.machines {
        Some(machines) if !machines.is_empty() => match machines.get(canonical) {
            Some(machine) => check_known(input, canonical, *machine, findings),
            None => {
                findings.push(not_listed(input, canonical));
                return;
            }
        },
        // `check_accelerator` has already reported a missing or unknown emulator.
        _ if input.node.virt_types.as_ref().is_none_or(Vec::is_empty) => {}
        _ => findings.push(
            RuleFinding::unknown(
                RuleCode::Machine,
                format!("it is unknown if the node has machine type {canonical}"),
            )
            .remedy("give --capabilities what `virsh capabilities` prints on the node"),
        ),
    }
    let distinguishes_pci = distinguishes_pci(input);
    if adds_pci_devices(input, canonical)
        && WITHOUT_PCI.contains(&canonical)
        && distinguishes_pci != Some(true)
    {
        let (severity, adds) = match distinguishes_pci {
            Some(_) => (RuleSeverity::Blocks, "libvirt adds"),
            None => (RuleSeverity::Unknown, "libvirt may add"),
        };
        findings.push(
            RuleFinding::new(
                severity,
                RuleCode::Machine,
                format!(
                    "machine type {canonical} has no PCI, but {adds} devices that require PCI, such \
                     as a balloon"
                ),
            )
            .at_define(NO_PCI)
            .remedy(
                "suppress them with <memballoon model='none'/> and <controller type='usb' \
                 model='none'/>, or use q35",
            ),
        );
    }
}

/// True if libvirt adds default devices that require PCI: a balloon, and a USB controller except to
/// isapc (`qemuDomainDefAddDefaultDevices`).
fn adds_pci_devices(input: &RuleInput<'_>, canonical: &str) -> bool {
    let pci = &input.domain.pci;
    let adds_usb = !pci.no_usb && canonical != ISAPC;
    input.is_x86() && (adds_usb || !pci.no_balloon)
}

fn not_listed(input: &RuleInput<'_>, canonical: &str) -> RuleFinding {
    // libvirt assumes that an unknown machine type has PCI.
    let is_unknown = input.is_x86() && !has_known_prefix(canonical);
    let words = match distinguishes_pci(input) {
        Some(true) if is_unknown => Some(format!(
            "Machine type '{canonical}' supports PCI but no PCI controller added"
        )),
        None if is_unknown => None,
        _ if is_unknown && adds_pci_devices(input, canonical) => Some(NO_PCI.to_owned()),
        _ => Some(unsupported(format!(
            "Emulator '{}' does not support machine type '{canonical}'",
            input.emulator()
        ))),
    };
    let finding = RuleFinding::blocking(
        RuleCode::Machine,
        format!("machine type {canonical} is not available here"),
    );
    let finding = match words {
        Some(words) => finding.at_define(words),
        None => finding.stage(Stage::Define),
    };
    finding.remedy(remedy_for(input, canonical))
}

/// True if libvirt adds PCI buses to an x86 machine type by its name, also if the emulator does not
/// have it (qemuDomainMachineIsQ35, qemuDomainMachineIsI440FX). `pc-q35` is not such a name.
fn has_known_prefix(canonical: &str) -> bool {
    const PREFIXES: [&str; 5] = ["pc-q35-", "pc-i440fx-", "pc-0.", "pc-1.", "rhel"];
    matches!(canonical, "pc" | "q35") || PREFIXES.iter().any(|p| canonical.starts_with(p))
}

fn check_known(
    input: &RuleInput<'_>,
    canonical: &str,
    machine: OfferedMachine,
    findings: &mut Vec<RuleFinding>,
) {
    if machine.deprecated {
        findings.push(
            RuleFinding::warning(
                RuleCode::MachineDeprecated,
                format!(
                    "machine type {canonical} is deprecated: a newer QEMU will remove it, and the \
                     domain cannot be migrated there"
                ),
            )
            .remedy(remedy_for(input, canonical)),
        );
    }
    let message = match input.domain.machine.as_deref() {
        Some(alias) if alias != canonical => format!(
            "{alias} means {canonical} here, but may mean another machine type on another node"
        ),
        None => format!("the definition has no machine type: libvirt chooses {canonical} here"),
        Some(_) => return,
    };
    findings.push(RuleFinding::note(RuleCode::MachineAlias, message));
}

/// Returns the remedy: the machine type of the same family that new guests get.
fn remedy_for(input: &RuleInput<'_>, canonical: &str) -> String {
    let family = match canonical {
        name if name.starts_with("pc-q35") || name == "q35" => "q35",
        name if name.starts_with("pc-i440fx") || name == "pc" => "pc",
        name if name.starts_with("virt") => "virt",
        name if name.starts_with("pseries") => "pseries",
        name if name.starts_with("s390-ccw-virtio") => "s390-ccw-virtio",
        _ if input.is_x86() => "q35",
        _ => "virt",
    };
    match input.node.aliases.get(family) {
        Some(name) => format!("use {family}, which is {name} here, or choose a node that has it"),
        None => "use a machine type that `virtnode capabilities` lists, or choose a node that has \
                 this one"
            .to_owned(),
    }
}
