//! CPU features that a definition names.

use std::collections::BTreeSet;

use super::cpu::or_any;
use super::vcpus::effective_check;
use super::{RuleInput, named, unsupported};
use crate::capability::CpuModes;
use crate::compat::{RuleCode, RuleFinding, RuleSeverity, Stage};
use crate::domain::CpuCheck;

pub(super) fn stage_of(check: CpuCheck) -> Stage {
    match check {
        CpuCheck::Full => Stage::Emulator,
        _ => Stage::Start,
    }
}

/// What libvirt says of missing features. It may name more: those that its own definition of a
/// model has and QEMU's has not.
pub(super) fn missing_words(
    finding: RuleFinding,
    check: CpuCheck,
    missing: &BTreeSet<&str>,
) -> RuleFinding {
    let list = |separator: &str| match missing.is_empty() {
        true => "…".to_owned(),
        false => missing.iter().copied().collect::<Vec<_>>().join(separator),
    };
    match check {
        CpuCheck::Full => finding.in_emulator(format!(
            "operation failed: guest CPU doesn't match specification: missing features: {}",
            list(",")
        )),
        _ => finding.at_start(format!(
            "the CPU is incompatible with host CPU: Host CPU does not provide required features: {}",
            list(", ")
        )),
    }
}

pub(super) fn check_features(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_features_beyond(case, &BTreeSet::new(), findings);
}

/// The features that the definition asks for by name, but for those that were named already.
pub(super) fn check_features_beyond(
    case: &RuleInput<'_>,
    named_already: &BTreeSet<&str>,
    findings: &mut Vec<RuleFinding>,
) {
    let cpu = &case.domain.cpu;
    let mut check = effective_check(case);
    // Held against the host only in these two modes.
    if check == CpuCheck::Partial
        && matches!(cpu.mode.as_deref(), Some("maximum" | "host-passthrough"))
    {
        check = CpuCheck::None;
    }
    let asked: BTreeSet<&str> = match check {
        CpuCheck::Full => cpu.required().chain(cpu.forced()).collect(),
        _ => cpu.required().collect(),
    };
    let gives = |feature: &&str| case.node.gives(feature);
    let missing: BTreeSet<&str> = asked
        .iter()
        .copied()
        .filter(|feature| gives(feature) == Some(false) && !named_already.contains(feature))
        .collect();
    if !missing.is_empty() {
        check_missing(check, &missing, findings);
    }
    if check == CpuCheck::None {
        return;
    }
    let forbidden: BTreeSet<&str> = match check {
        CpuCheck::Partial => cpu.forbidden().collect(),
        _ => BTreeSet::new(),
    };
    let open: Vec<&str> = asked
        .union(&forbidden)
        .copied()
        .filter(|feature| gives(feature).is_none())
        .collect();
    if !open.is_empty() {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::CpuFeature,
                format!(
                    "whether the hypervisor can give domains of type {} these CPU features is not \
                     known: {}",
                    or_any(case),
                    named(open)
                ),
            )
            .stage(stage_of(check))
            .remedy(
                "give --supported-features what `virsh hypervisor-cpu-baseline --features` prints \
                 for the node's best domain type",
            ),
        );
    }
    let provided: Vec<&str> = forbidden
        .into_iter()
        .filter(|feature| gives(feature) == Some(true))
        .collect();
    if !provided.is_empty() {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::CpuFeature,
                format!(
                    "the host has CPU features that the domain forbids: {}",
                    named(provided.iter().copied())
                ),
            )
            .at_start(format!(
                "the CPU is incompatible with host CPU: Host CPU provides forbidden features: {}",
                provided.join(", ")
            ))
            .remedy(
                "use policy='disable' to hide them from the guest, or choose a node without them",
            ),
        );
    }
}

fn check_missing(check: CpuCheck, missing: &BTreeSet<&str>, findings: &mut Vec<RuleFinding>) {
    let list = named(missing.iter().copied());
    if check != CpuCheck::None {
        let finding = RuleFinding::new(
            RuleSeverity::Blocks,
            RuleCode::CpuFeature,
            format!("the hypervisor cannot give CPU features that the domain requires: {list}"),
        )
        .remedy("leave them out or use policy='optional', or choose a node that has them");
        findings.push(missing_words(finding, check, missing));
        return;
    }
    findings.push(
        RuleFinding::new(
            RuleSeverity::Warning,
            RuleCode::CpuFeature,
            format!(
                "the guest will lack CPU features that the domain requires, and nothing checks \
                 it: {list}"
            ),
        )
        .remedy("write check='partial' to have libvirt refuse it, or choose a node that has them"),
    );
}

/// Names that may be libvirt's or not: it knows them by a list of its own, and its documents have
/// only those that matter for this host. A running domain's are known.
fn check_names(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if case.domain.live || !case.is_x86() {
        return;
    }
    let (Some(given), Some(modes)) = (&case.node.cpu_features, &case.node.cpu) else {
        return;
    };
    // NodeLabels and the like are no documents: those have the host model's features.
    let host_model = modes.host_model.as_ref();
    if host_model.is_none_or(|host_model| host_model.features.is_empty()) {
        return;
    }
    let heard_of = features_in_documents(case);
    let names = case.domain.cpu.features.iter().map(|f| f.name.as_str());
    let strange: Vec<&str> = names
        .filter(|name| !heard_of.contains(name) && !given.contains(*name))
        .collect();
    let Some(first) = strange.first() else { return };
    findings.push(
        RuleFinding::new(
            RuleSeverity::Unknown,
            RuleCode::CpuFeature,
            format!(
                "libvirt may not know a CPU feature of the name {}: none of its documents has it",
                named(strange.iter().copied())
            ),
        )
        .at_start(unsupported(format!("unknown CPU feature: {first}")))
        .remedy("check the spelling (libvirt's, such as sse4.2), or leave it out"),
    );
}

/// What libvirt writes into the host model stays there (`x86UpdateHostModel`), whatever `check`
/// says.
pub(super) fn check_forbidden_in_host_model(
    case: &RuleInput<'_>,
    modes: &CpuModes,
    findings: &mut Vec<RuleFinding>,
) {
    let host = modes.host_model.iter().flat_map(|host| &host.features);
    let has: BTreeSet<&str> = host
        .filter(|f| matches!(f.policy.as_deref(), None | Some("require" | "force")))
        .map(|feature| feature.name.as_str())
        .collect();
    // Of a node of which only a summary is told, what it can give may be in its host model.
    let is_summary = modes.host_model.iter().all(|host| host.features.is_empty());
    let mut forbidden = case.domain.cpu.forbidden();
    if is_summary && effective_check(case) != CpuCheck::Partial {
        if let Some(name) = forbidden.find(|name| case.node.gives(name) == Some(true)) {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Unknown,
                    RuleCode::CpuFeature,
                    format!("the host model may have CPU feature {name}, which the domain forbids"),
                )
                .stage(Stage::Start),
            );
        }
        return;
    }
    if let Some(name) = forbidden.find(|name| has.contains(name)) {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::CpuFeature,
                format!("the host model has CPU feature {name}, which the domain forbids"),
            )
            .at_start(format!(
                "the CPU is incompatible with host CPU: Host CPU provides forbidden feature \
                 '{name}'"
            ))
            .remedy("use policy='disable' to hide it from the guest"),
        );
    }
}

/// Every name of a feature that libvirt's documents have here.
fn features_in_documents<'c>(case: &'c RuleInput<'_>) -> BTreeSet<&'c str> {
    let modes = case.node.cpu.iter();
    let blockers = modes
        .clone()
        .flat_map(|m| &m.models)
        .flat_map(|m| &m.blockers);
    let host = modes
        .filter_map(|m| m.host_model.as_ref())
        .flat_map(|h| &h.features);
    blockers
        .map(String::as_str)
        .chain(host.map(|feature| feature.name.as_str()))
        .collect()
}

pub(super) fn check_policies(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_names(case, findings);
    let mut seen = BTreeSet::new();
    for feature in &case.domain.cpu.features {
        let name = &feature.name;
        let policy = feature.policy.as_deref().unwrap_or("require");
        if !matches!(
            policy,
            "force" | "require" | "optional" | "disable" | "forbid"
        ) {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::CpuFeature,
                    format!("libvirt knows no policy '{policy}' for CPU feature {name}"),
                )
                .at_define(unsupported("Invalid CPU feature policy"))
                .remedy("use require, optional, disable, forbid or force"),
            );
        }
        if !seen.insert(name) {
            findings.push(
                RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::CpuFeature,
                    format!("CPU feature {name} is named more than once"),
                )
                .at_define(format!(
                    "XML error: CPU feature '{name}' specified more than once"
                ))
                .remedy("keep one of them"),
            );
        }
    }
}
