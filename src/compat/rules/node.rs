//! What a domain needs of the node beside CPU and memory: firmware, host devices, huge pages,
//! confidential guests.

use super::{RuleInput, named, unsupported};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity, Stage};

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_firmware(case, findings);
    check_launch_security(case, findings);
    check_backing(case, findings);
    check_host_devices(case, findings);
    if case.domain.raw_arguments {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::RawArguments,
                "the definition hands QEMU arguments of its own (qemu:commandline), of which \
                 nothing can be said",
            )
            .stage(Stage::Emulator),
        );
    }
}

fn check_firmware(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = case.domain.firmware.as_deref() else {
        return;
    };
    let Some(os) = &case.node.os else {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Firmware,
                format!("whether the node has {wanted} firmware is not known"),
            )
            .stage(Stage::Start)
            .remedy("give --domain-capabilities of the node"),
        );
        return;
    };
    if !os.offers("firmware", wanted) {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Firmware,
                format!("the node has no {wanted} firmware with a descriptor for libvirt"),
            )
            .at_define(format!(
                "operation failed: Unable to find '{wanted}' firmware that is compatible with the \
                 current configuration"
            ))
            .remedy("install it (package ovmf, or edk2-ovmf; qemu-efi-aarch64 on Arm)"),
        );
        return;
    }
    let loader = os.sections.get("loader");
    if case.domain.secure_boot && loader.is_some_and(|l| !l.offers("secure", "yes")) {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Firmware,
                "the node has no firmware for secure boot with this machine type",
            )
            .stage(Stage::Define)
            .remedy("install firmware with secure boot, or leave secure boot out; it needs q35"),
        );
    }
}

fn check_launch_security(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = case.domain.launch_security.as_deref() else {
        return;
    };
    match &case.node.launch_security {
        Some(types) if types.iter().any(|have| have == wanted) => {}
        Some(types) => {
            let has = match types.is_empty() {
                true => "none".to_owned(),
                false => named(types.iter().map(String::as_str)),
            };
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::LaunchSecurity,
                    format!("the node has no confidential guests of type {wanted}; it has {has}"),
                )
                .at_define(unsupported(format!(
                    "'{wanted}' launch security is not supported with this QEMU binary"
                )))
                .remedy(
                    "switch it on in the firmware and in KVM (kvm_amd sev=1 …), or choose a node \
                     that has it",
                ),
            );
        }
        None => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::LaunchSecurity,
                format!("whether the node has confidential guests of type {wanted} is not known"),
            )
            .stage(Stage::Define),
        ),
    }
}

fn check_backing(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let domain = case.domain;
    if let (Some(wanted), Some(has)) = (&domain.memory_source, &case.node.memory_sources)
        && !has.contains(wanted)
    {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::MemoryBacking,
                format!(
                    "memory cannot come from {wanted} here, only from {}",
                    named(has.iter().map(String::as_str))
                ),
            )
            .stage(Stage::Define)
            .remedy("use one of those as <source type=…>"),
        );
    }
    if !domain.huge_pages {
        return;
    }
    let Some(pages) = &case.node.pages else {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::MemoryBacking,
                "which huge pages the node has is not known",
            )
            .stage(Stage::Start)
            .remedy("give --capabilities of the node"),
        );
        return;
    };
    // The smallest are the ordinary pages.
    let huge = || pages.iter().skip(1);
    let wants = domain
        .domain
        .as_ref()
        .map(|domain| domain.memory.asked())
        .unwrap_or_default();
    let sizes: Vec<_> = match domain.huge_page_sizes.as_slice() {
        [] => huge().take(1).map(|(size, _)| *size).collect(),
        sizes => sizes.to_vec(),
    };
    for size in sizes {
        let count = huge()
            .find(|(have, _)| **have == size)
            .map(|(_, count)| *count);
        let needed = wants.get().div_ceil(size.get().max(1));
        let finding = |severity, message: String| {
            RuleFinding::new(severity, RuleCode::MemoryBacking, message).stage(Stage::Start)
        };
        match count {
            None => findings.push(
                finding(
                    RuleSeverity::Blocks,
                    format!("the host has no pages of {size}"),
                )
                .remedy(format!(
                    "use one of {}",
                    named(
                        huge()
                            .map(|(size, _)| size.to_string())
                            .collect::<Vec<_>>()
                            .iter()
                            .map(String::as_str)
                    )
                )),
            ),
            Some(count) if count < needed && domain.huge_page_sizes.len() < 2 => findings.push(
                finding(
                    RuleSeverity::Blocks,
                    format!(
                        "{wants} are {needed} pages of {size}, and the host has set aside {count}"
                    ),
                )
                .remedy(format!(
                    "set more aside: echo {needed} > /sys/kernel/mm/hugepages/hugepages-{}kB/\
                     nr_hugepages",
                    size.get() / 1024
                )),
            ),
            Some(_) => findings.push(finding(
                RuleSeverity::Note,
                format!(
                    "{wants} come from {needed} pages of {size}, which must be free at the start"
                ),
            )),
        }
    }
}

fn check_host_devices(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let devices = case.domain.host_devices;
    let count = devices.vfio();
    if count > 0 {
        match case.node.vfio {
            Some(true) => findings.push(RuleFinding::new(
                RuleSeverity::Note,
                RuleCode::HostDevice,
                format!(
                    "{count} devices are handed over by VFIO; whether those very devices are here \
                     and free is not looked at"
                ),
            )),
            Some(false) => findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::HostDevice,
                    format!(
                        "{count} devices are to be handed over by VFIO, and the host has no active \
                         IOMMU with VFIO"
                    ),
                )
                .at_start(unsupported("host doesn't support passthrough of host PCI devices"))
                .remedy(
                    "switch the IOMMU on in the firmware and on the kernel's command line \
                     (intel_iommu=on; AMD's is on by itself), and load vfio-pci",
                ),
            ),
            None => findings.push(
                RuleFinding::new(
                    RuleSeverity::Unknown,
                    RuleCode::HostDevice,
                    format!("{count} devices are to be handed over by VFIO; whether the host can is not known"),
                )
                .stage(Stage::Start),
            ),
        }
    }
    if devices.iommufd && case.node.iommufd == Some(false) {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::HostDevice,
                "a device is to be handed over by iommufd, which the host does not have",
            )
            .stage(Stage::Start)
            .remedy("load iommufd, or leave iommufd= out"),
        );
    }
    if devices.others > 0 {
        findings.push(RuleFinding::new(
            RuleSeverity::Note,
            RuleCode::HostDevice,
            format!(
                "{} USB, SCSI or other devices of the host are handed over; whether they are here \
                 is not looked at",
                devices.others
            ),
        ));
    }
}
