//! The virtual IOMMU: extended interrupt mode, interrupt remapping and the split I/O APIC, as the
//! definition gives them and as libvirt completes them by itself.

use super::machine::{WITHOUT_PCI, knows_pci};
use super::{MOST_WITHOUT_EIM, RuleInput, unsupported};
use crate::capability::{Eim, Version};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity};
use crate::domain::{IoApicDriver, IommuDevice, IommuModel};

/// libvirt completes an `<iommu model='intel'>` that is given, and the I/O APIC, wherever it is
/// needed ("qemu: Enable I/O APIC even more frequently" and the change before it, NEWS of 11.0.0;
/// parts of it are in 10.10.0).
const COMPLETES: Version = Version::new(11, 0, 0);
const COMPLETES_PARTLY: Version = Version::new(10, 10, 0);
/// `<iommu model='amd'>` is known (NEWS of 11.5.0).
const KNOWS_AMD: Version = Version::new(11, 5, 0);
/// AMD's IOMMU may carry more than 255 vCPUs, and libvirt turns xtsup on (NEWS of 12.2.0).
const AMD_CARRIES: Version = Version::new(12, 2, 0);
/// More than 255 vCPUs without extended interrupt mode: up to 12.1 libvirt refuses them whatever the
/// model of the IOMMU (NEWS of 12.2.0), 12.8 takes them if there is an `<iommu>`, and QEMU starts
/// (measured). In between it is open.
const TAKES_ALL: Version = Version::new(12, 8, 0);
const LAST_TO_REFUSE: Version = Version::new(12, 1, 99);
/// The last QEMU of which it is known that a domain with amd-iommu cannot be migrated
/// (`vmstate_amdvi_sysbus`, QEMU hw/i386/amd_iommu.c).
const AMD_STAYS: Version = Version::new(10, 0, 99);

const NEEDS_EIM: &str =
    "more than 255 vCPUs require extended interrupt mode enabled on the iommu device";
const NEEDS_SPLIT: &str =
    "IOMMU interrupt remapping requires split I/O APIC (ioapic driver='qemu')";
const EIM_NEEDS_REMAPPING: &str = "IOMMU eim requires interrupt remapping to be enabled";
const WHOLE: &str = "<iommu model='intel'><driver intremap='on' eim='on'/></iommu> in <devices> and \
                     <ioapic driver='qemu'/> in <features>";

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let domain = case.domain;
    if let Some(iommu) = &domain.iommu {
        check_model(case, iommu, findings);
        if iommu.model == IommuModel::Virtio {
            check_virtio(case, findings);
        }
        check_migration(case, iommu, findings);
    }
    if case.is_x86() {
        match &domain.iommu {
            None if case.needs_eim() && case.is_q35() => check_automatic(case, findings),
            Some(iommu) if iommu.model == IommuModel::Intel => {
                check_intel(case, iommu, findings);
            }
            Some(iommu) if case.needs_eim() && case.is_q35() => {
                check_other(case, iommu, findings);
            }
            _ => {}
        }
        if case.needs_eim() && domain.host_devices.vfio() > 0 {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Warning,
                    RuleCode::Iommu,
                    format!(
                        "more than {MOST_WITHOUT_EIM} vCPUs bring a virtual IOMMU, and with one \
                         the domain's memory is locked once for each of its {} VFIO devices",
                        domain.host_devices.vfio()
                    ),
                )
                .remedy(
                    "raise the locked memory limit (<memtune><hard_limit>) accordingly, or lower \
                     <vcpu> to 255",
                ),
            );
        }
    }
}

fn blocks(code: RuleCode, message: String) -> RuleFinding {
    RuleFinding::new(RuleSeverity::Blocks, code, message)
}

fn check_model(case: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let model = iommu.model.as_str();
    let known = match &iommu.model {
        IommuModel::Intel | IommuModel::Virtio | IommuModel::Smmuv3 => Some(true),
        IommuModel::Amd => case.libvirt_is(KNOWS_AMD),
        IommuModel::Other(_) => Some(false),
    };
    match known {
        Some(true) => {}
        Some(false) => {
            let message = match iommu.model {
                IommuModel::Amd => format!(
                    "this libvirt does not know <iommu model='amd'>, which came with {KNOWS_AMD}"
                ),
                _ => format!("libvirt knows no <iommu model='{model}'>"),
            };
            findings.push(
                blocks(RuleCode::Iommu, message)
                    .at_define(format!(
                        "XML error: Invalid value for attribute 'model' in element 'iommu': \
                         '{model}'."
                    ))
                    .remedy("use model='intel': QEMU emulates it on every host, also on AMD's"),
            );
            return;
        }
        None => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Iommu,
                format!(
                    "<iommu model='amd'> needs libvirt {KNOWS_AMD}, and its version is not known"
                ),
            )
            .remedy("give --libvirt-version"),
        ),
    }
    let fits = match iommu.model {
        IommuModel::Intel | IommuModel::Amd => case.is_q35(),
        IommuModel::Virtio => case.is_q35() || case.is_virt(),
        IommuModel::Smmuv3 => case.is_virt(),
        IommuModel::Other(_) => true,
    };
    if !fits {
        let machines = match iommu.model {
            IommuModel::Virtio => "Q35 and ARM Virt machines",
            IommuModel::Smmuv3 => "ARM Virt machines",
            _ => "Q35 machines",
        };
        findings.push(
            blocks(
                RuleCode::Iommu,
                format!(
                    "an IOMMU of model {model} needs {machines}, and the domain is of machine \
                     type {}",
                    case.machine.unwrap_or("that is not known")
                ),
            )
            .at_define(match case.machine {
                // AMD's is also a PCI device, for which libvirt looks for a place first.
                Some(name)
                    if iommu.model == IommuModel::Amd
                        && WITHOUT_PCI.contains(&name)
                        && knows_pci(case) == Some(true) =>
                {
                    "XML error: No PCI buses available".to_owned()
                }
                _ => unsupported(format!(
                    "IOMMU device: '{model}' is only supported with {machines}"
                )),
            })
            .remedy(match case.is_x86() {
                true => "use machine type q35, or leave <iommu> out",
                false => "leave <iommu> out, or use one that the machine type has",
            }),
        );
    }
}

/// The paravirtual IOMMU is a PCI device that ACPI tables describe.
fn check_virtio(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if case.is_x86() && case.machine.is_some_and(|name| WITHOUT_PCI.contains(&name)) {
        findings.push(
            blocks(
                RuleCode::Iommu,
                "an IOMMU of model virtio is a PCI device, and the machine type has no PCI"
                    .to_owned(),
            )
            .at_define("XML error: No PCI buses available")
            .remedy("use machine type q35, or leave <iommu> out"),
        );
    }
    if !case.domain.acpi {
        findings.push(
            blocks(
                RuleCode::Iommu,
                "an IOMMU of model virtio reaches its guest through ACPI, and the domain has none"
                    .to_owned(),
            )
            .at_define(unsupported("IOMMU device: 'virtio' requires ACPI"))
            .remedy("add <acpi/> to <features>"),
        );
    }
}

fn check_migration(case: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let stays = case.node.qemu_version.is_some_and(|qemu| qemu <= AMD_STAYS);
    if iommu.model == IommuModel::Amd && stays {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::Migratable,
                "a domain with an IOMMU of model amd cannot be migrated with this QEMU",
            )
            .remedy("use model='intel', which runs on AMD's hosts as well"),
        );
    }
}

/// More than 255 vCPUs, and nothing given: libvirt adds what is needed, or not.
fn check_automatic(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &case.domain.vcpus;
    let why = format!(
        "{} vCPUs are more than {MOST_WITHOUT_EIM} and need a virtual IOMMU with extended \
         interrupt mode{}",
        vcpus.maximum,
        case.maximum_counts()
    );
    match case.node.eim {
        Some(Eim::Auto) if case.domain.io_apic == Some(IoApicDriver::Kvm) => {
            findings.push(not_split(
                "libvirt adds the IOMMU by itself, and its interrupt remapping needs",
            ));
        }
        Some(Eim::Auto) => findings.push(RuleFinding::new(
            RuleSeverity::Note,
            RuleCode::Eim,
            format!("{why}; libvirt adds it here by itself"),
        )),
        Some(Eim::Explicit) => findings.push(
            blocks(
                RuleCode::Eim,
                format!("{why}; this libvirt does not add it by itself (10.10.0 and later do)"),
            )
            .at_define(unsupported(NEEDS_EIM))
            .remedy(format!("write {WHOLE}; or lower <vcpu> to 255")),
        ),
        Some(Eim::None) => findings.push(
            blocks(
                RuleCode::Eim,
                format!("{why}, and this node cannot give that"),
            )
            .at_define(unsupported(NEEDS_EIM))
            .remedy("lower <vcpu> to 255, or update libvirt and QEMU"),
        ),
        None => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Eim,
                format!("{why}; whether libvirt adds it here is not known"),
            )
            .remedy(format!("give --libvirt-version or --eim, or write {WHOLE}")),
        ),
    }
}

/// An Intel IOMMU in the definition, with what libvirt completes of it.
fn check_intel(case: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let needed = case.needs_eim() && case.is_q35();
    let completes = case.libvirt_is(COMPLETES);
    let partly = completes == Some(false) && case.libvirt_is(COMPLETES_PARTLY) == Some(true);
    let unknown = |what: &str| {
        let version = match case.node.libvirt_version {
            Some(version) => format!("libvirt {version} may or may not do"),
            None => {
                "it depends on libvirt's version, which is not known, whether it does".to_owned()
            }
        };
        RuleFinding::new(
            RuleSeverity::Unknown,
            RuleCode::Eim,
            format!("{what} is left for libvirt to turn on: {version}"),
        )
        .remedy(format!("write {WHOLE}"))
    };
    let completed = |given: Option<bool>, wanted: bool| match (given, completes) {
        (Some(given), _) => Some(given),
        (None, _) if !wanted => Some(false),
        (None, Some(true)) => Some(true),
        (None, Some(false)) if !partly => Some(false),
        (None, _) => None,
    };
    let eim = completed(iommu.eim, needed);
    // Extended interrupt mode that is needed brings remapping with it.
    let intremap = completed(iommu.intremap, needed && eim != Some(false));
    if iommu.eim == Some(true) && case.node.eim == Some(Eim::None) {
        findings.push(
            blocks(
                RuleCode::Eim,
                "this QEMU has no extended interrupt mode".to_owned(),
            )
            .at_define(unsupported(
                "iommu: eim is not supported with this QEMU binary",
            ))
            .remedy("leave eim= out and lower <vcpu> to 255, or update QEMU"),
        );
    }
    if needed {
        match eim {
            Some(true) => {}
            Some(false) => findings.push(without_eim(
                case,
                &format!(
                    "extended interrupt mode on the IOMMU, which is off{}",
                    case.maximum_counts()
                ),
                format!("write {WHOLE}; or lower <vcpu> to 255"),
            )),
            None => findings.push(unknown("extended interrupt mode")),
        }
    }
    match (eim, intremap) {
        (Some(true), Some(false)) => findings.push(
            blocks(
                RuleCode::InterruptRemapping,
                "the IOMMU has extended interrupt mode on and interrupt remapping off, which it \
                 needs"
                    .to_owned(),
            )
            .at_define(unsupported(EIM_NEEDS_REMAPPING))
            .remedy(format!("write {WHOLE}")),
        ),
        (Some(true), None) => findings.push(unknown("interrupt remapping")),
        _ => {}
    }
    if intremap == Some(true) {
        match (case.domain.io_apic, completes) {
            (Some(IoApicDriver::Qemu), _) | (None, Some(true)) => {}
            (None, Some(false)) if partly => findings.push(unknown("the split I/O APIC")),
            (None, None) => findings.push(unknown("the split I/O APIC")),
            (Some(IoApicDriver::Kvm) | None, _) => {
                findings.push(not_split("the IOMMU's interrupt remapping needs"));
            }
        }
    }
}

fn not_split(why: &str) -> RuleFinding {
    blocks(
        RuleCode::InterruptRemapping,
        format!("{why} a split I/O APIC, and the domain's is KVM's"),
    )
    .at_define(unsupported(NEEDS_SPLIT))
    .remedy("write <ioapic driver='qemu'/> in <features>")
}

/// More than 255 vCPUs and an IOMMU that lacks what they need.
fn without_eim(case: &RuleInput<'_>, lacks: &str, remedy: String) -> RuleFinding {
    let message = format!(
        "{} vCPUs are more than {MOST_WITHOUT_EIM} and need {lacks}",
        case.domain.vcpus.maximum
    );
    let finding = match case.node.libvirt_version {
        Some(version) if version >= TAKES_ALL => RuleFinding::new(
            RuleSeverity::Warning,
            RuleCode::Eim,
            format!(
                "{message}; this libvirt starts the domain all the same, and its guest may not \
                 use them all"
            ),
        ),
        Some(version) if version > LAST_TO_REFUSE => {
            RuleFinding::new(RuleSeverity::Unknown, RuleCode::Eim, message)
                .at_define(unsupported(NEEDS_EIM))
        }
        _ => blocks(RuleCode::Eim, message).at_define(unsupported(NEEDS_EIM)),
    };
    finding.remedy(remedy)
}

/// More than 255 vCPUs with an IOMMU of another model.
fn check_other(case: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let model = iommu.model.as_str();
    let carries = match iommu.model {
        IommuModel::Amd => case.libvirt_is(AMD_CARRIES),
        _ => Some(false),
    };
    let remedy = format!("write {WHOLE} instead; or lower <vcpu> to 255");
    match carries {
        Some(true) if iommu.xtsup == Some(false) => findings.push(
            blocks(
                RuleCode::Eim,
                format!(
                    "{} vCPUs are more than {MOST_WITHOUT_EIM} and need xtsup on AMD's IOMMU, \
                     which is off",
                    case.domain.vcpus.maximum
                ),
            )
            .in_emulator("AMD IOMMU with x2APIC configuration requires xtsup=on")
            .remedy("write xtsup='on' at its <driver>, or leave it out: libvirt turns it on"),
        ),
        Some(true) => {}
        Some(false) => findings.push(without_eim(
            case,
            &format!(
                "extended interrupt mode, which an IOMMU of model {model} does not have with this \
                 libvirt"
            ),
            remedy,
        )),
        None => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Eim,
                format!(
                    "more than {MOST_WITHOUT_EIM} vCPUs with an IOMMU of model amd need libvirt \
                     {AMD_CARRIES}, and its version is not known"
                ),
            )
            .remedy(remedy),
        ),
    }
}
