//! Rules for Hyper-V enlightenments.
//!
//! With KVM, QEMU exits if the kernel lacks one (`kvm_hyperv_expand_features`, QEMU
//! target/i386/kvm/kvm.c). With software emulation, libvirt 11.3 with QEMU 10.0 starts a domain
//! with any of them, but its guest sees none (tests/it/foretold.rs).

use super::{RuleInput, named, unsupported};
use crate::compat::{RuleCode, RuleFinding, Stage};

/// All enlightenments of libvirt 12.0 (`virDomainHyperv`). A newer libvirt lists its additions in
/// the domain capabilities.
const KNOWN: [&str; 17] = [
    "avic",
    "emsr_bitmap",
    "evmcs",
    "frequencies",
    "ipi",
    "reenlightenment",
    "relaxed",
    "reset",
    "runtime",
    "spinlocks",
    "stimer",
    "synic",
    "tlbflush",
    "vapic",
    "vendor_id",
    "vpindex",
    "xmm_input",
];

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let wanted = || input.domain.special_enlightenments();
    let unlisted = wanted().find(|name| {
        let is_listed = input.node.enlightens(name) == Some(true);
        !is_listed && !KNOWN.contains(name)
    });
    if let Some(name) = unlisted {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Enlightenment,
                format!("libvirt has no Hyper-V enlightenment named {name}"),
            )
            .at_define(unsupported(format!(
                "unsupported HyperV Enlightenment feature: {name}"
            )))
            .remedy("check the spelling, or leave it out of <hyperv>"),
        );
        return;
    }
    let with = |answer: Option<bool>| -> Vec<&str> {
        wanted()
            .filter(|name| input.node.enlightens(name) == answer)
            .collect()
    };
    if input.is_tcg() {
        let ignored: Vec<&str> = wanted().collect();
        if !ignored.is_empty() {
            findings.push(RuleFinding::warning(
                RuleCode::Enlightenment,
                format!(
                    "software emulation ignores Hyper-V enlightenments, so the guest does not see \
                     {}",
                    named(ignored)
                ),
            ));
        }
        return;
    }
    // Labels and objects are compared by name only, as the scheduler does.
    if input.node.devices.is_some() {
        if input.node.enlightens("relaxed") == Some(false) {
            check_without_hyperv(input, findings);
            return;
        }
        check_dependencies(input, findings);
    }
    let (missing, unknown) = (with(Some(false)), with(None));
    if !missing.is_empty() {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Enlightenment,
                format!(
                    "KVM on this node lacks Hyper-V enlightenments that the domain enables: {}",
                    named(missing)
                ),
            )
            .stage(Stage::Emulator)
            .remedy(
                "leave them out of <hyperv>, or choose a node with a newer kernel that has them",
            ),
        );
    }
    if !unknown.is_empty() {
        findings.push(
            RuleFinding::unknown(
                RuleCode::Enlightenment,
                format!(
                    "it is unknown if KVM on this node has the Hyper-V enlightenments {}",
                    named(unknown)
                ),
            )
            .stage(Stage::Emulator)
            .remedy(
                "give --domain-capabilities of the node; libvirt 9.0 and later list them there",
            ),
        );
    }
}

/// Checks a KVM without Hyper-V support (`CONFIG_KVM_HYPERV`), for which libvirt lists only the two
/// values that QEMU keeps itself. Measured with QEMU 10.0: it ignores most enlightenments, and exits
/// when it sets a register of the others.
fn check_without_hyperv(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let mut ignored = Vec::new();
    for name in &input.domain.enlightenments {
        let words = match name.as_str() {
            "vpindex" => "kernel doesn't allow setting HyperV VP_INDEX",
            "synic" | "reenlightenment" | "vapic" => "error: failed to set MSR 0x400000",
            "spinlocks" | "vendor_id" => continue,
            name => {
                ignored.push(name);
                continue;
            }
        };
        findings.push(
            RuleFinding::blocking(
                RuleCode::Enlightenment,
                format!(
                    "KVM on this node has no Hyper-V enlightenments, and QEMU exits without {name}"
                ),
            )
            .in_emulator(words)
            .remedy(format!(
                "leave {name} out of <hyperv>, or choose a node whose kernel has CONFIG_KVM_HYPERV"
            )),
        );
    }
    if !ignored.is_empty() {
        findings.push(RuleFinding::warning(
            RuleCode::Enlightenment,
            format!(
                "KVM on this node has no Hyper-V enlightenments, so the guest does not see {}",
                named(ignored)
            ),
        ));
    }
}

/// Enlightenments that require another one, with QEMU's descriptions (`kvm_hyperv_properties`, QEMU
/// 10.0 target/i386/kvm/kvm.c). `time` is the timer `hypervclock`.
const DEPENDENCIES: [(&str, &str, &str, &str); 6] = [
    (
        "synic",
        "vpindex",
        "synthetic interrupt controller (hv-synic)",
        "VP_INDEX MSR (hv-vpindex)",
    ),
    (
        "stimer",
        "synic",
        "synthetic timers (hv-stimer)",
        "synthetic interrupt controller (hv-synic)",
    ),
    (
        "stimer",
        "time",
        "synthetic timers (hv-stimer)",
        "clocksources (hv-time)",
    ),
    (
        "tlbflush",
        "vpindex",
        "paravirtualized TLB flush (hv-tlbflush)",
        "VP_INDEX MSR (hv-vpindex)",
    ),
    (
        "ipi",
        "vpindex",
        "paravirtualized IPI (hv-ipi)",
        "VP_INDEX MSR (hv-vpindex)",
    ),
    (
        "evmcs",
        "vapic",
        "enlightened VMCS (hv-evmcs)",
        "virtual APIC (hv-vapic)",
    ),
];

/// Checks that each enlightenment has those that it requires; QEMU exits otherwise.
fn check_dependencies(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let enables = |name: &str| match name {
        "time" => input.domain.hyperv_clock,
        name => input.domain.enlightenments.iter().any(|have| have == name),
    };
    for (name, required, described, requirement) in DEPENDENCIES {
        if !enables(name) || enables(required) {
            continue;
        }
        let remedy = match required {
            "time" => "add <timer name='hypervclock' present='yes'/> to <clock>".to_owned(),
            _ => format!("add <{required} state='on'/> to <hyperv>"),
        };
        let required = match required {
            "time" => "the timer hypervclock",
            name => name,
        };
        findings.push(
            RuleFinding::blocking(
                RuleCode::Enlightenment,
                format!("Hyper-V enlightenment {name} requires {required}"),
            )
            .in_emulator(format!(
                "Hyper-V {described} requires Hyper-V {requirement}"
            ))
            .remedy(remedy),
        );
    }
}
