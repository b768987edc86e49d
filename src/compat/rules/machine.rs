//! Type of guest, architecture, accelerator and machine type.

use super::{RuleInput, named, unsupported};
use crate::capability::Version;
use crate::compat::{OfferedMachine, RuleCode, RuleFinding, RuleSeverity, Stage};

/// The machine types of x86 without PCI.
pub(super) const WITHOUT_PCI: [&str; 2] = ["isapc", "microvm"];
/// What libvirt says when it finds no place for them.
const NO_PCI: &str = "XML error: No PCI buses available";

/// libvirt knows which machine types of x86 have PCI, and adds no device that needs it to the others.
/// Measured: 11.3 does not, 12.8 does; its new words were seen with 11.9. In between it is open.
const KNOWS_PCI: Version = Version::new(11, 9, 0);
const LAST_WITHOUT: Version = Version::new(11, 3, 99);

/// Whether this libvirt knows it; without a version it is taken for an older one.
pub(super) fn knows_pci(case: &RuleInput<'_>) -> Option<bool> {
    match case.node.libvirt_version {
        Some(version) if version >= KNOWS_PCI => Some(true),
        Some(version) if version > LAST_WITHOUT => None,
        _ => Some(false),
    }
}

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_os_type(case, findings);
    check_accelerator(case, findings);
    check_machine(case, findings);
}

fn check_os_type(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let finding =
        |message: String| RuleFinding::new(RuleSeverity::Blocks, RuleCode::DomainType, message);
    if case.domain.virt_type.is_none() {
        let finding = finding("the definition does not say its domain type".to_owned())
            .at_define("internal error: missing domain type attribute")
            .remedy("write <domain type='kvm'>, or type='qemu' for software emulation");
        findings.push(finding);
    }
    match case.domain.os_type.as_deref() {
        Some("hvm") => {}
        None => findings.push(
            finding("the definition does not say what type of guest it is".to_owned())
                .at_define("XML error: an os <type> must be specified")
                .remedy("write <os><type machine='q35'>hvm</type></os>"),
        ),
        Some(other) if case.virt_type().is_some_and(is_qemus) => findings.push(
            finding(format!(
                "QEMU runs guests of type hvm, and this one is of type {other}"
            ))
            .at_define(unsupported(format!(
                "Emulator '{}' does not support os type '{other}'",
                case.emulator()
            )))
            .remedy("write <os><type machine='q35'>hvm</type></os>"),
        ),
        Some(_) => {}
    }
}

fn is_qemus(virt_type: &str) -> bool {
    matches!(virt_type, "kvm" | "qemu" | "hvf")
}

fn check_accelerator(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(arch) = case.arch else {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Architecture,
                "neither the domain nor the node says which architecture it has",
            )
            .remedy("name it in <type arch='x86_64'> or with --arch, or give --capabilities of the node"),
        );
        return;
    };
    let Some(types) = &case.node.virt_types else {
        if case.node.virt_type.as_deref() != case.domain.virt_type.as_deref()
            || case.node.machines.is_none()
        {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Unknown,
                    RuleCode::Machine,
                    "the node's accelerators and machine types are not known",
                )
                .remedy("give --capabilities what `virsh capabilities` prints on the node"),
            );
        }
        return;
    };
    if types.is_empty() {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
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
    let Some(wanted) = case.domain.virt_type.as_deref() else {
        return;
    };
    if types.iter().any(|have| have == wanted) {
        return;
    }
    let remedy = match wanted {
        "kvm" => {
            "load kvm_amd or kvm_intel and see that libvirt's user may open /dev/kvm \
             (`virtnode doctor` says what is wrong), or write <domain type='qemu'> for slow \
             software emulation"
        }
        _ => "write one of those as <domain type=…>, or choose a node that has it",
    };
    findings.push(
        RuleFinding::new(
            RuleSeverity::Blocks,
            RuleCode::DomainType,
            format!(
                "domain type {wanted} is not to be had here for {arch}, only {}",
                named(types.iter().map(String::as_str))
            ),
        )
        .at_define(unsupported(format!(
            "Emulator '{}' does not support virt type '{wanted}'",
            case.emulator()
        )))
        .remedy(remedy),
    );
}

fn check_machine(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(canonical) = case.machine else {
        return;
    };
    match &case.node.machines {
        Some(machines) if !machines.is_empty() => match machines.get(canonical) {
            Some(machine) => check_known(case, canonical, *machine, findings),
            None => {
                findings.push(not_listed(case, canonical));
                return;
            }
        },
        // No emulator, or nothing is known of the node: said already.
        _ if case.node.virt_types.as_ref().is_none_or(Vec::is_empty) => {}
        _ => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Machine,
                format!("whether the node has machine type {canonical} is not known"),
            )
            .remedy("give --capabilities what `virsh capabilities` prints on the node"),
        ),
    }
    let knows_pci = knows_pci(case);
    if wants_pci(case) && WITHOUT_PCI.contains(&canonical) && knows_pci != Some(true) {
        let (severity, adds) = match knows_pci {
            Some(_) => (RuleSeverity::Blocks, "libvirt adds"),
            None => (RuleSeverity::Unknown, "libvirt may add"),
        };
        findings.push(
            RuleFinding::new(
                severity,
                RuleCode::Machine,
                format!(
                    "machine type {canonical} has no PCI, and {adds} a USB controller and a \
                     balloon, which need it"
                ),
            )
            .at_define(NO_PCI)
            .remedy(
                "decline both: <controller type='usb' model='none'/> and \
                 <memballoon model='none'/>; or use q35",
            ),
        );
    }
}

/// Whether libvirt adds devices by itself that want PCI; without it there is no place for them.
fn wants_pci(case: &RuleInput<'_>) -> bool {
    case.is_x86() && case.domain.pci.suppressed_defaults < 2
}

fn not_listed(case: &RuleInput<'_>, canonical: &str) -> RuleFinding {
    // Of a name that it does not know libvirt thinks that there is PCI.
    let is_strange = case.is_x86() && !canonical.starts_with("pc") && !case.is_q35();
    let words = match knows_pci(case) {
        Some(true) if is_strange => Some(format!(
            "Machine type '{canonical}' supports PCI but no PCI controller added"
        )),
        None if is_strange => None,
        _ if is_strange && wants_pci(case) => Some(NO_PCI.to_owned()),
        _ => Some(unsupported(format!(
            "Emulator '{}' does not support machine type '{canonical}'",
            case.emulator()
        ))),
    };
    let finding = RuleFinding::new(
        RuleSeverity::Blocks,
        RuleCode::Machine,
        format!("machine type {canonical} is not known here"),
    );
    let finding = match words {
        Some(words) => finding.at_define(words),
        None => finding.stage(Stage::Define),
    };
    finding.remedy(instead(case, canonical))
}

fn check_known(
    case: &RuleInput<'_>,
    canonical: &str,
    machine: OfferedMachine,
    findings: &mut Vec<RuleFinding>,
) {
    if machine.deprecated {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::MachineDeprecated,
                format!(
                    "machine type {canonical} is deprecated: a newer QEMU will not have it, and \
                     the domain cannot go there"
                ),
            )
            .remedy(instead(case, canonical)),
        );
    }
    let message = match case.domain.machine.as_deref() {
        Some(alias) if alias != canonical => format!(
            "{alias} means {canonical} here, and may mean another machine type on another node"
        ),
        None => format!("the definition names no machine type: libvirt takes {canonical} here"),
        Some(_) => return,
    };
    findings.push(RuleFinding::new(
        RuleSeverity::Note,
        RuleCode::MachineAlias,
        message,
    ));
}

/// The machine type of the same family that new guests get.
fn instead(case: &RuleInput<'_>, canonical: &str) -> String {
    let family = match canonical {
        name if name.starts_with("pc-q35") || name == "q35" => "q35",
        name if name.starts_with("pc-i440fx") || name == "pc" => "pc",
        name if name.starts_with("virt") => "virt",
        name if name.starts_with("pseries") => "pseries",
        name if name.starts_with("s390-ccw-virtio") => "s390-ccw-virtio",
        _ if case.is_x86() => "q35",
        _ => "virt",
    };
    match case.node.aliases.get(family) {
        Some(name) => format!("use {family}, which is {name} here, or choose a node that has it"),
        None => {
            "use one that `virtnode capabilities` lists, or choose a node that has it".to_owned()
        }
    }
}
