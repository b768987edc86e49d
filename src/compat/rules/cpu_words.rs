//! Messages and remedies about CPU models and features.

use std::collections::BTreeSet;

use super::{RuleInput, named};
use crate::capability::{CpuModel, Usable};
use crate::compat::RuleFinding;
use crate::domain::CpuCheck;

/// Adds libvirt's message about missing features. libvirt may list more: those that its own
/// definition of the model has and QEMU's lacks.
pub(super) fn missing_words(
    finding: RuleFinding,
    check: CpuCheck,
    missing: &BTreeSet<&str>,
) -> RuleFinding {
    let list = |separator: &str| {
        if missing.is_empty() {
            "…".to_owned()
        } else {
            missing.iter().copied().collect::<Vec<_>>().join(separator)
        }
    };
    match check {
        CpuCheck::Full => finding.in_emulator(format!(
            "operation failed: guest CPU doesn't match specification: missing features: {}",
            list(",")
        )),
        _ => finding.at_start(format!(
            "the CPU is incompatible with host CPU: Host CPU does not provide required features: \
             {}",
            list(", ")
        )),
    }
}

pub(super) fn model_remedy(input: &RuleInput<'_>, model: &CpuModel) -> String {
    let usable: Vec<&str> = input
        .node
        .cpu
        .iter()
        .flat_map(|modes| &modes.models)
        .filter(|other| other.usable == Some(Usable::Yes) && !other.deprecated)
        .filter(|other| other.vendor == model.vendor && other.canonical.is_some())
        .map(|other| other.name.as_str())
        .collect();
    match (&model.vendor, usable.is_empty()) {
        (Some(vendor), false) => format!(
            "use host-model, choose a node that has them, or take a model of {vendor} that is \
             usable here: {}",
            named(usable)
        ),
        _ => "use host-model, or choose a node that has them".to_owned(),
    }
}
