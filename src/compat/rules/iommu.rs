//! Rules for the virtual IOMMU: extended interrupt mode, interrupt remapping and the split I/O
//! APIC, as the definition sets them and as libvirt completes them.

use super::machine::{WITHOUT_PCI, distinguishes_pci};
use super::{MAX_VCPUS_WITHOUT_EIM, RuleInput, unsupported};
use crate::capability::{Eim, Version};
use crate::compat::{RuleCode, RuleFinding};
use crate::domain::{IoApicDriver, IommuDevice, IommuModel};

/// First libvirt that completes a given `<iommu model='intel'>`, and the I/O APIC, wherever it is
/// needed ("qemu: Enable I/O APIC even more frequently" and the change before it, NEWS of 11.0.0;
/// parts of it are in 10.10.0).
const FIRST_TO_COMPLETE: Version = Version::new(11, 0, 0);
const FIRST_TO_COMPLETE_PARTLY: Version = Version::new(10, 10, 0);
/// First libvirt with `<iommu model='amd'>` (NEWS of 11.5.0).
const FIRST_WITH_AMD: Version = Version::new(11, 5, 0);
/// First libvirt that accepts more than 255 vCPUs with AMD's IOMMU, and turns xtsup on (NEWS of
/// 12.2.0).
const FIRST_WITH_AMD_EIM: Version = Version::new(12, 2, 0);
/// More than 255 vCPUs without extended interrupt mode: libvirt up to 12.1 rejects them with every
/// IOMMU model (NEWS of 12.2.0); 12.8 accepts them with any `<iommu>`, and QEMU starts (measured).
/// The versions between them are unknown.
const FIRST_TO_ACCEPT: Version = Version::new(12, 8, 0);
const LAST_TO_REJECT: Version = Version::new(12, 1, 99);
/// Last QEMU known to block the migration of a domain with amd-iommu (`vmstate_amdvi_sysbus`, QEMU
/// hw/i386/amd_iommu.c).
const LAST_WITHOUT_AMD_MIGRATION: Version = Version::new(10, 0, 99);

const NEEDS_EIM: &str =
    "more than 255 vCPUs require extended interrupt mode enabled on the iommu device";
const NEEDS_SPLIT: &str =
    "IOMMU interrupt remapping requires split I/O APIC (ioapic driver='qemu')";
const EIM_NEEDS_REMAPPING: &str = "IOMMU eim requires interrupt remapping to be enabled";
const FULL_EIM_XML: &str = "<iommu model='intel'><driver intremap='on' eim='on'/></iommu> in \
                            <devices> and <ioapic driver='qemu'/> in <features>";

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let domain = input.domain;
    if let Some(iommu) = &domain.iommu {
        check_model(input, iommu, findings);
        if iommu.model == IommuModel::Virtio {
            check_virtio(input, findings);
        }
        check_migration(input, iommu, findings);
    }
    if input.is_x86() {
        match &domain.iommu {
            None if input.needs_eim() && input.is_q35() => check_automatic(input, findings),
            Some(iommu) if iommu.model == IommuModel::Intel => {
                check_intel(input, iommu, findings);
            }
            Some(iommu) if input.needs_eim() && input.is_q35() => {
                check_other(input, iommu, findings);
            }
            _ => {}
        }
        if input.needs_eim() && domain.host_devices.vfio() > 0 {
            findings.push(
                RuleFinding::warning(
                    RuleCode::Iommu,
                    format!(
                        "more than {MAX_VCPUS_WITHOUT_EIM} vCPUs require a virtual IOMMU, with \
                         which each of the {} VFIO devices locks the domain's memory again",
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

fn check_model(input: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let model = iommu.model.as_str();
    let known = match &iommu.model {
        IommuModel::Intel | IommuModel::Virtio | IommuModel::Smmuv3 => Some(true),
        IommuModel::Amd => input.libvirt_is(FIRST_WITH_AMD),
        IommuModel::Other(_) => Some(false),
    };
    match known {
        Some(true) => {}
        Some(false) => {
            let message = match iommu.model {
                IommuModel::Amd => {
                    format!("this libvirt lacks <iommu model='amd'>, which {FIRST_WITH_AMD} added")
                }
                _ => format!("libvirt has no <iommu model='{model}'>"),
            };
            findings.push(
                RuleFinding::blocking(RuleCode::Iommu, message)
                    .at_define(format!(
                        "XML error: Invalid value for attribute 'model' in element 'iommu': \
                         '{model}'."
                    ))
                    .remedy(
                        "use model='intel', which QEMU emulates on every host, including \
                             AMD's",
                    ),
            );
            return;
        }
        None => findings.push(
            RuleFinding::unknown(
                RuleCode::Iommu,
                format!(
                    "<iommu model='amd'> requires libvirt {FIRST_WITH_AMD}, and its version is \
                     unknown"
                ),
            )
            .remedy("give --libvirt-version"),
        ),
    }
    let is_supported = match iommu.model {
        IommuModel::Intel | IommuModel::Amd => input.is_q35(),
        IommuModel::Virtio => input.is_q35() || input.is_virt(),
        IommuModel::Smmuv3 => input.is_virt(),
        IommuModel::Other(_) => true,
    };
    if !is_supported {
        let machines = match iommu.model {
            IommuModel::Virtio => "Q35 and ARM Virt machines",
            IommuModel::Smmuv3 => "ARM Virt machines",
            _ => "Q35 machines",
        };
        findings.push(
            RuleFinding::blocking(
                RuleCode::Iommu,
                format!(
                    "an IOMMU of model {model} requires {machines}, but the domain's machine type \
                     is {}",
                    input.machine.unwrap_or("unknown")
                ),
            )
            .at_define(match input.machine {
                // AMD's is also a PCI device; libvirt first assigns a PCI address.
                Some(name)
                    if iommu.model == IommuModel::Amd
                        && WITHOUT_PCI.contains(&name)
                        && distinguishes_pci(input) == Some(true) =>
                {
                    "XML error: No PCI buses available".to_owned()
                }
                _ => unsupported(format!(
                    "IOMMU device: '{model}' is only supported with {machines}"
                )),
            })
            .remedy(if input.is_x86() {
                "use machine type q35, or leave <iommu> out"
            } else {
                "leave <iommu> out, or use a model that the machine type supports"
            }),
        );
    }
}

/// Checks the paravirtual IOMMU, a PCI device that ACPI tables describe.
fn check_virtio(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if input.is_x86()
        && input
            .machine
            .is_some_and(|name| WITHOUT_PCI.contains(&name))
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Iommu,
                "an IOMMU of model virtio is a PCI device, but the machine type has no PCI",
            )
            .at_define("XML error: No PCI buses available")
            .remedy("use machine type q35, or leave <iommu> out"),
        );
    }
    if !input.domain.acpi {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Iommu,
                "the guest detects an IOMMU of model virtio by ACPI, but the domain has no ACPI",
            )
            .at_define(unsupported("IOMMU device: 'virtio' requires ACPI"))
            .remedy("add <acpi/> to <features>"),
        );
    }
}

fn check_migration(input: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let cannot_migrate = input
        .node
        .qemu_version
        .is_some_and(|qemu| qemu <= LAST_WITHOUT_AMD_MIGRATION);
    if iommu.model == IommuModel::Amd && cannot_migrate {
        findings.push(
            RuleFinding::warning(
                RuleCode::Migratable,
                "this QEMU cannot migrate a domain with an IOMMU of model amd",
            )
            .remedy("use model='intel', which also works on AMD hosts"),
        );
    }
}

/// Checks more than 255 vCPUs without an `<iommu>`: newer libvirts add one.
fn check_automatic(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let vcpus = &input.domain.vcpus;
    let why = format!(
        "{} vCPUs exceed {MAX_VCPUS_WITHOUT_EIM} and require a virtual IOMMU with extended \
         interrupt mode{}",
        vcpus.maximum,
        input.maximum_counts()
    );
    match input.node.eim {
        Some(Eim::Auto) if input.domain.io_apic == Some(IoApicDriver::Kvm) => {
            findings.push(not_split(
                "libvirt adds the IOMMU, whose interrupt remapping requires",
            ));
        }
        Some(Eim::Auto) => findings.push(RuleFinding::note(
            RuleCode::Eim,
            format!("{why}; libvirt adds it here"),
        )),
        Some(Eim::Explicit) => findings.push(
            RuleFinding::blocking(
                RuleCode::Eim,
                format!("{why}; this libvirt does not add it (10.10.0 and later do)"),
            )
            .at_define(unsupported(NEEDS_EIM))
            .remedy(format!("write {FULL_EIM_XML}; or lower <vcpu> to 255")),
        ),
        Some(Eim::None) => findings.push(
            RuleFinding::blocking(
                RuleCode::Eim,
                format!("{why}, which this node does not support"),
            )
            .at_define(unsupported(NEEDS_EIM))
            .remedy("lower <vcpu> to 255, or update libvirt and QEMU"),
        ),
        None => findings.push(
            RuleFinding::unknown(
                RuleCode::Eim,
                format!("{why}; it is unknown if libvirt adds it here"),
            )
            .remedy(format!(
                "give --libvirt-version or --eim, or write {FULL_EIM_XML}"
            )),
        ),
    }
}

/// Checks an Intel IOMMU of the definition, with the attributes that libvirt completes.
fn check_intel(input: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let needed = input.needs_eim() && input.is_q35();
    let completes = input.libvirt_is(FIRST_TO_COMPLETE);
    let partly =
        completes == Some(false) && input.libvirt_is(FIRST_TO_COMPLETE_PARTLY) == Some(true);
    let unknown = |what: &str| {
        let version = match input.node.libvirt_version {
            Some(version) => format!("it is unknown if libvirt {version} does"),
            None => "some versions do, and this libvirt's version is unknown".to_owned(),
        };
        RuleFinding::unknown(
            RuleCode::Eim,
            format!("the definition leaves it to libvirt to turn on {what}: {version}"),
        )
        .remedy(format!("write {FULL_EIM_XML}"))
    };
    let completed = |given: Option<bool>, wanted: bool| match (given, completes) {
        (Some(given), _) => Some(given),
        (None, _) if !wanted => Some(false),
        (None, Some(true)) => Some(true),
        (None, Some(false)) if !partly => Some(false),
        (None, _) => None,
    };
    let eim = completed(iommu.eim, needed);
    // Required extended interrupt mode implies remapping.
    let intremap = completed(iommu.intremap, needed && eim != Some(false));
    if iommu.eim == Some(true) && input.node.eim == Some(Eim::None) {
        findings.push(
            RuleFinding::blocking(RuleCode::Eim, "this QEMU has no extended interrupt mode")
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
                input,
                &format!(
                    "extended interrupt mode, which is off on the IOMMU{}",
                    input.maximum_counts()
                ),
                format!("write {FULL_EIM_XML}; or lower <vcpu> to 255"),
            )),
            None => findings.push(unknown("extended interrupt mode")),
        }
    }
    match (eim, intremap) {
        (Some(true), Some(false)) => findings.push(
            RuleFinding::blocking(
                RuleCode::InterruptRemapping,
                "the IOMMU's extended interrupt mode requires interrupt remapping, which is off",
            )
            .at_define(unsupported(EIM_NEEDS_REMAPPING))
            .remedy(format!("write {FULL_EIM_XML}")),
        ),
        (Some(true), None) => findings.push(unknown("interrupt remapping")),
        _ => {}
    }
    if intremap == Some(true) {
        match (input.domain.io_apic, completes) {
            (Some(IoApicDriver::Qemu), _) | (None, Some(true)) => {}
            (None, Some(false)) if partly => findings.push(unknown("the split I/O APIC")),
            (None, None) => findings.push(unknown("the split I/O APIC")),
            (Some(IoApicDriver::Kvm) | None, _) => {
                findings.push(not_split("the IOMMU's interrupt remapping requires"));
            }
        }
    }
}

fn not_split(why: &str) -> RuleFinding {
    RuleFinding::blocking(
        RuleCode::InterruptRemapping,
        format!("{why} a split I/O APIC, but KVM emulates the domain's"),
    )
    .at_define(unsupported(NEEDS_SPLIT))
    .remedy("write <ioapic driver='qemu'/> in <features>")
}

/// Returns the finding for more than 255 vCPUs with an IOMMU that lacks extended interrupt mode.
fn without_eim(input: &RuleInput<'_>, missing: &str, remedy: String) -> RuleFinding {
    let message = format!(
        "{} vCPUs exceed {MAX_VCPUS_WITHOUT_EIM} and require {missing}",
        input.domain.vcpus.maximum
    );
    let finding = match input.node.libvirt_version {
        Some(version) if version >= FIRST_TO_ACCEPT => RuleFinding::warning(
            RuleCode::Eim,
            format!(
                "{message}; this libvirt starts the domain nevertheless, but its guest may be \
                 unable to use all of them"
            ),
        ),
        Some(version) if version > LAST_TO_REJECT => {
            RuleFinding::unknown(RuleCode::Eim, message).at_define(unsupported(NEEDS_EIM))
        }
        _ => RuleFinding::blocking(RuleCode::Eim, message).at_define(unsupported(NEEDS_EIM)),
    };
    finding.remedy(remedy)
}

/// Checks more than 255 vCPUs with an IOMMU of another model than Intel's.
fn check_other(input: &RuleInput<'_>, iommu: &IommuDevice, findings: &mut Vec<RuleFinding>) {
    let model = iommu.model.as_str();
    let is_enough = match iommu.model {
        IommuModel::Amd => input.libvirt_is(FIRST_WITH_AMD_EIM),
        _ => Some(false),
    };
    let remedy = format!("write {FULL_EIM_XML} instead; or lower <vcpu> to 255");
    match is_enough {
        Some(true) if iommu.xtsup == Some(false) => findings.push(
            RuleFinding::blocking(
                RuleCode::Eim,
                format!(
                    "{} vCPUs exceed {MAX_VCPUS_WITHOUT_EIM} and require xtsup on AMD's IOMMU, \
                     which is off",
                    input.domain.vcpus.maximum
                ),
            )
            .in_emulator("AMD IOMMU with x2APIC configuration requires xtsup=on")
            .remedy("write xtsup='on' into its <driver>, or leave it out: libvirt turns it on"),
        ),
        Some(true) => {}
        Some(false) => findings.push(without_eim(
            input,
            &format!(
                "extended interrupt mode, which an IOMMU of model {model} lacks with this libvirt"
            ),
            remedy,
        )),
        None => findings.push(
            RuleFinding::unknown(
                RuleCode::Eim,
                format!(
                    "more than {MAX_VCPUS_WITHOUT_EIM} vCPUs with an IOMMU of model amd require \
                     libvirt {FIRST_WITH_AMD_EIM}, and its version is unknown"
                ),
            )
            .remedy(remedy),
        ),
    }
}
