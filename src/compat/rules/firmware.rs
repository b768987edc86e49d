//! Rules for ACPI, UEFI and the firmware image.

use super::{RuleInput, unsupported};
use crate::compat::offer::family_of;
use crate::compat::{RuleCode, RuleFinding, Stage};

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_acpi(input, findings);
    match input.domain.firmware.automatic.as_deref() {
        Some(kind) => check_automatic(input, kind, findings),
        None => check_loader(input, findings),
    }
}

/// Checks ACPI and UEFI, which depend on each other (`qemuValidateDomainDef`, libvirt 11.3).
fn check_acpi(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let is_uefi = input.domain.firmware.is_uefi();
    let acpi = input.domain.acpi;
    let finding = |message: &str, words: String, remedy: &str| {
        RuleFinding::blocking(RuleCode::Firmware, message)
            .at_define(unsupported(words))
            .remedy(remedy)
    };
    if input.is_x86() && is_uefi && !acpi {
        findings.push(finding(
            "UEFI requires ACPI on x86, but the domain has no ACPI",
            "UEFI requires ACPI on this architecture".to_owned(),
            "add <acpi/> to <features>",
        ));
    }
    if input.arch == Some("aarch64") && acpi && !is_uefi {
        findings.push(finding(
            "ACPI requires UEFI on aarch64, but the domain has no UEFI",
            "ACPI requires UEFI on this architecture".to_owned(),
            "write <os firmware='efi'>, or remove <acpi/> from <features>",
        ));
    }
    if acpi && matches!(input.arch, Some("s390x" | "ppc64" | "ppc64le")) {
        let machine = input.machine.unwrap_or("of this architecture");
        findings.push(finding(
            &format!("machine type {machine} has no ACPI"),
            format!("machine type '{machine}' does not support ACPI"),
            "remove <acpi/> from <features>",
        ));
    }
}

/// Returns the finding for a definition that no firmware descriptor of the node matches
/// (`qemuFirmwareFillDomain`).
fn no_match(kind: &str, message: String) -> RuleFinding {
    RuleFinding::blocking(RuleCode::Firmware, message).at_define(format!(
        "operation failed: Unable to find '{kind}' firmware that is compatible with the current \
         configuration"
    ))
}

fn check_automatic(input: &RuleInput<'_>, kind: &str, findings: &mut Vec<RuleFinding>) {
    let firmware = &input.domain.firmware;
    let Some(os) = &input.node.os else {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Firmware,
                format!("it is unknown if the node has {kind} firmware"),
            )
            .stage(Stage::Start)
            .remedy("give --domain-capabilities of the node"),
        );
        return;
    };
    if !is_described(input) {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Firmware,
                format!(
                    "it is unknown if the node has {kind} firmware for machine type {}: the given \
                     domain capabilities describe {}",
                    input.machine.unwrap_or("of the domain"),
                    input.node.described_machine.as_deref().unwrap_or("another")
                ),
            )
            .stage(Stage::Start)
            .remedy("give --domain-capabilities for that machine type"),
        );
    } else if !os.offers("firmware", kind) {
        findings.push(
            no_match(
                kind,
                format!(
                    "the node has no {kind} firmware for this machine type with a descriptor that \
                     libvirt reads"
                ),
            )
            .remedy("install it (package ovmf, or edk2-ovmf; qemu-efi-aarch64 on Arm)"),
        );
        return;
    }
    let loader = firmware.loader.as_ref();
    let images = os.sections.get("loader").map(|loader| &loader.values);
    if let Some(path) = loader.and_then(|loader| loader.path.as_deref())
        && let Some(images) = images
        && !images.iter().any(|image| image == path)
    {
        findings.push(
            no_match(
                kind,
                format!("no firmware descriptor of the node names the loader {path}"),
            )
            .remedy("leave the path out of <loader>: libvirt chooses an image of the node"),
        );
        return;
    }
    check_secure(input, kind, findings);
}

/// True if the domain capabilities describe the domain's machine type or one of its family, which
/// have the same firmware.
fn is_described(input: &RuleInput<'_>) -> bool {
    match (input.machine, input.node.described_machine.as_deref()) {
        (Some(wanted), Some(have)) => family_of(wanted) == family_of(have),
        _ => true,
    }
}

fn check_secure(input: &RuleInput<'_>, kind: &str, findings: &mut Vec<RuleFinding>) {
    let firmware = &input.domain.firmware;
    let wants_keys = firmware.wants("enrolled-keys");
    if !firmware.is_secure() && !wants_keys {
        return;
    }
    let os = input.node.os.as_ref();
    let lists = |section: &str, name: &str, value: &str| {
        let section = os?.sections.get(section)?;
        section.enums.get(name)?;
        Some(section.offers(name, value))
    };
    let message = if input.is_x86() && !input.is_q35() {
        "secure boot requires machine type q35"
    } else if input.is_x86() && input.domain.smm == Some(false) {
        "secure boot requires system management mode, which the domain turns off"
    } else if lists("loader", "secure", "yes") == Some(false)
        || lists("firmwareFeatures", "secureBoot", "yes") == Some(false)
    {
        "the node has no firmware with secure boot for this machine type"
    } else if wants_keys && lists("firmwareFeatures", "enrolledKeys", "yes") == Some(false) {
        "the node has no firmware with enrolled keys for this machine type"
    } else {
        return;
    };
    let remedy = if input.is_x86() && !input.is_q35() {
        "use machine type q35, or leave secure boot out"
    } else if input.is_x86() && input.domain.smm == Some(false) {
        "remove <smm state='off'/> from <features>, or leave secure boot out"
    } else {
        "install firmware with secure boot (package ovmf has it), or leave secure boot out"
    };
    findings.push(no_match(kind, message.to_owned()).remedy(remedy));
}

/// Checks a loader that the definition chooses itself.
fn check_loader(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(loader) = &input.domain.firmware.loader else {
        return;
    };
    if loader.secure != Some(true) {
        return;
    }
    let finding = |message: &str, words: &str, remedy: &str| {
        RuleFinding::blocking(RuleCode::Firmware, message)
            .at_define(unsupported(words))
            .remedy(remedy)
    };
    if !input.is_q35() {
        findings.push(finding(
            "secure boot requires machine type q35",
            "Secure boot is supported with q35 machine types only",
            "use machine type q35, or leave secure='yes' out",
        ));
    } else if input.arch != Some("x86_64") {
        findings.push(finding(
            "secure boot requires architecture x86_64",
            "Secure boot is supported for x86_64 architecture only",
            "leave secure='yes' out",
        ));
    } else if input.domain.smm != Some(true) {
        // libvirt turns it on for an image that a descriptor of the node names.
        let images = input
            .node
            .os
            .as_ref()
            .and_then(|os| os.sections.get("loader"));
        let is_named = images.map(|images| {
            let mut images = images.values.iter();
            images.any(|image| Some(image) == loader.path.as_ref())
        });
        match is_named {
            Some(true) => {}
            Some(false) => findings.push(finding(
                "secure boot requires system management mode",
                "Secure boot requires SMM feature enabled",
                "add <smm state='on'/> to <features>",
            )),
            None => findings.push(
                RuleFinding::unknown(
                    RuleCode::Firmware,
                    "secure boot requires system management mode, which libvirt turns on only for \
                     firmware with a descriptor",
                )
                .at_define(unsupported("Secure boot requires SMM feature enabled"))
                .remedy("add <smm state='on'/> to <features>"),
            ),
        }
    }
}
