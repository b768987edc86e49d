//! Rules for confidential guests, memory sources and host devices.

use super::{RuleInput, named, unsupported};
use crate::compat::{RuleCode, RuleFinding, Stage};

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
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
    let (Some(wanted), Some(has)) = (&input.domain.backing.source, &input.node.memory_sources)
    else {
        return;
    };
    if has.contains(wanted) {
        return;
    }
    let finding = RuleFinding::blocking(
        RuleCode::MemoryBacking,
        format!(
            "the node does not support memory from {wanted}, only from {}",
            named(has.iter().map(String::as_str))
        ),
    );
    let finding = match wanted.as_str() {
        "memfd" | "file" | "anonymous" => finding.stage(Stage::Define),
        _ => finding.at_define(unsupported(format!(
            "unknown memoryBacking/source/type '{wanted}'"
        ))),
    };
    findings.push(finding.remedy("use one of these as <source type=…>"));
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
            // libvirt looks for mediated devices only when it starts the domain.
            Some(false) if devices.pci == 0 => findings.push(
                RuleFinding::blocking(
                    RuleCode::HostDevice,
                    format!("{count} mediated devices use VFIO, which the host lacks"),
                )
                .stage(Stage::Launch)
                .remedy("load vfio-mdev and create the device, or choose a node that has it"),
            ),
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
