//! Hyper-V enlightenments.
//!
//! With KVM QEMU gives up over one that the kernel does not have (`kvm_hyperv_expand_features`,
//! QEMU target/i386/kvm/kvm.c). In software emulation libvirt 11.3 with QEMU 10.0 starts a domain
//! with any of them, of which its guest sees nothing (tests/it/foretold.rs).

use super::{RuleInput, named, unsupported};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity, Stage};

/// Every enlightenment that libvirt knows (`virDomainHyperv`, libvirt 12.0); what a newer one knows
/// besides is in its list.
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

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let wanted = || case.domain.special_enlightenments();
    let strange = wanted().find(|name| {
        let is_listed = case.node.enlightens(name) == Some(true);
        !is_listed && !KNOWN.contains(name)
    });
    if let Some(name) = strange {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Enlightenment,
                format!("libvirt knows no Hyper-V enlightenment of the name {name}"),
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
            .filter(|name| case.node.enlightens(name) == answer)
            .collect()
    };
    if case.is_tcg() {
        let ignored: Vec<&str> = wanted().collect();
        if !ignored.is_empty() {
            findings.push(RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::Enlightenment,
                format!(
                    "software emulation does nothing for Hyper-V enlightenments, and the guest \
                     does not see them: {}",
                    named(ignored)
                ),
            ));
        }
        return;
    }
    let (missing, open) = (with(Some(false)), with(None));
    if !missing.is_empty() {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::Enlightenment,
                format!(
                    "KVM here has no Hyper-V enlightenments that the domain asks for: {}",
                    named(missing)
                ),
            )
            .stage(Stage::Emulator)
            .remedy(
                "leave them out of <hyperv>, or choose a node that has them, with a newer kernel",
            ),
        );
    }
    if !open.is_empty() {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::Enlightenment,
                format!(
                    "whether KVM has these Hyper-V enlightenments is not known: {}",
                    named(open)
                ),
            )
            .stage(Stage::Emulator)
            .remedy(
                "give --domain-capabilities of the node, of libvirt 9.0 or later, which lists them",
            ),
        );
    }
}
