//! Rules for the node's firmware, confidential guests, huge pages and host devices.

use super::{RuleInput, named, unsupported};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity, Stage};

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_firmware(input, findings);
    check_launch_security(input, findings);
    check_backing(input, findings);
    check_host_devices(input, findings);
    if input.domain.raw_arguments {
        findings.push(
            RuleFinding::unknown(
                RuleCode::RawArguments,
                "the definition passes arguments directly to QEMU (qemu:commandline), whose effect \
                 is unknown",
            )
            .stage(Stage::Emulator),
        );
    }
}

fn check_firmware(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = input.domain.firmware.as_deref() else {
        return;
    };
    let Some(os) = &input.node.os else {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Firmware,
                format!("it is unknown if the node has {wanted} firmware"),
            )
            .stage(Stage::Start)
            .remedy("give --domain-capabilities of the node"),
        );
        return;
    };
    if !os.offers("firmware", wanted) {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Firmware,
                format!("the node has no {wanted} firmware with a descriptor that libvirt reads"),
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
    if input.domain.secure_boot && loader.is_some_and(|l| !l.offers("secure", "yes")) {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Firmware,
                "the node has no firmware for secure boot with this machine type",
            )
            .stage(Stage::Define)
            .remedy("install firmware with secure boot, or leave secure boot out; it needs q35"),
        );
    }
}

fn check_launch_security(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = input.domain.launch_security.as_deref() else {
        return;
    };
    match &input.node.launch_security {
        Some(types) if types.iter().any(|have| have == wanted) => {}
        Some(types) => {
            let has = if types.is_empty() {
                "none".to_owned()
            } else {
                named(types.iter().map(String::as_str))
            };
            findings.push(
                RuleFinding::blocking(
                    RuleCode::LaunchSecurity,
                    format!(
                        "the node does not support confidential guests of type {wanted}; it \
                         supports {has}"
                    ),
                )
                .at_define(unsupported(format!(
                    "'{wanted}' launch security is not supported with this QEMU binary"
                )))
                .remedy(
                    "enable it in the firmware and in KVM (kvm_amd sev=1 …), or choose a node that \
                     has it",
                ),
            );
        }
        None => findings.push(
            RuleFinding::unknown(
                RuleCode::LaunchSecurity,
                format!("it is unknown if the node supports confidential guests of type {wanted}"),
            )
            .stage(Stage::Define),
        ),
    }
}

fn check_backing(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let domain = input.domain;
    if let (Some(wanted), Some(has)) = (&domain.memory_source, &input.node.memory_sources)
        && !has.contains(wanted)
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::MemoryBacking,
                format!(
                    "the node does not support memory from {wanted}, only from {}",
                    named(has.iter().map(String::as_str))
                ),
            )
            .stage(Stage::Define)
            .remedy("use one of these as <source type=…>"),
        );
    }
    if !domain.huge_pages {
        return;
    }
    let Some(pages) = &input.node.pages else {
        findings.push(
            RuleFinding::unknown(RuleCode::MemoryBacking, "the node's huge pages are unknown")
                .stage(Stage::Start)
                .remedy("give --capabilities of the node"),
        );
        return;
    };
    // The smallest size is that of ordinary pages.
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
                        "{wants} need {needed} pages of {size}, but the host has reserved {count}"
                    ),
                )
                .remedy(format!(
                    "reserve more: echo {needed} > \
                     /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                    size.get() / 1024
                )),
            ),
            Some(_) => findings.push(finding(
                RuleSeverity::Note,
                format!("{wants} use {needed} pages of {size}, which must be free at the start"),
            )),
        }
    }
}

fn check_host_devices(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let devices = input.domain.host_devices;
    let count = devices.vfio();
    if count > 0 {
        match input.node.vfio {
            Some(true) => findings.push(RuleFinding::note(
                RuleCode::HostDevice,
                format!(
                    "{count} devices are passed through by VFIO; their presence and availability \
                     is not checked"
                ),
            )),
            Some(false) => findings.push(
                RuleFinding::blocking(
                    RuleCode::HostDevice,
                    format!(
                        "{count} devices are passed through by VFIO, but the host has no active \
                         IOMMU with VFIO"
                    ),
                )
                .at_start(unsupported(
                    "host doesn't support passthrough of host PCI devices",
                ))
                .remedy(
                    "enable the IOMMU in the firmware and on the kernel's command line \
                     (intel_iommu=on; AMD's needs none), and load vfio-pci",
                ),
            ),
            None => findings.push(
                RuleFinding::unknown(
                    RuleCode::HostDevice,
                    format!(
                        "{count} devices are passed through by VFIO; it is unknown if the host \
                         supports that"
                    ),
                )
                .stage(Stage::Start),
            ),
        }
    }
    if devices.iommufd && input.node.iommufd == Some(false) {
        findings.push(
            RuleFinding::blocking(
                RuleCode::HostDevice,
                "a device is passed through by iommufd, which the host lacks",
            )
            .stage(Stage::Start)
            .remedy("load iommufd, or leave iommufd= out"),
        );
    }
    if devices.others > 0 {
        findings.push(RuleFinding::note(
            RuleCode::HostDevice,
            format!(
                "{} USB, SCSI or other host devices are passed through; their presence is not \
                 checked",
                devices.others
            ),
        ));
    }
}
