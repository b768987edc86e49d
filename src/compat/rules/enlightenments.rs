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
