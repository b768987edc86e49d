//! Rules for the CPU features that a definition lists.

use std::collections::BTreeSet;

use super::cpu_words::missing_words;
use super::vcpus::effective_check;
use super::{RuleInput, cpu_match, named, unsupported};
use crate::capability::CpuModes;
use crate::compat::{RuleCode, RuleFinding, Stage};
use crate::domain::CpuCheck;

pub(super) fn stage_of(check: CpuCheck) -> Stage {
    match check {
        CpuCheck::Full => Stage::Emulator,
        _ => Stage::Start,
    }
}

pub(super) fn check_features(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_features_beyond(input, &BTreeSet::new(), findings);
}

/// Checks the listed features, except those that another finding already names.
pub(super) fn check_features_beyond(
    input: &RuleInput<'_>,
    already_named: &BTreeSet<&str>,
    findings: &mut Vec<RuleFinding>,
) {
    let cpu = &input.domain.cpu;
    let mut check = effective_check(input);
    // libvirt does not compare these two modes with the host.
    if check == CpuCheck::Partial
        && matches!(cpu.mode.as_deref(), Some("maximum" | "host-passthrough"))
    {
        check = CpuCheck::None;
    }
    let requested: BTreeSet<&str> = match check {
        CpuCheck::Full => cpu.required().chain(cpu.forced()).collect(),
        _ => cpu.required().collect(),
    };
    // libvirt compares with the host's CPU, not with what KVM gives to guests.
    let is_compared = check == CpuCheck::Partial
        && (input.node.cpu.as_ref()).is_some_and(|modes| cpu_match::applies(input, modes));
    let gives = |feature: &&str| {
        if is_compared {
            cpu_match::cpu_has(input, feature)
        } else {
            input.node.gives(feature)
        }
    };
    let missing: BTreeSet<&str> = requested
        .iter()
        .copied()
        .filter(|feature| gives(feature) == Some(false) && !already_named.contains(feature))
        .collect();
    if !missing.is_empty() {
        check_missing(check, &missing, findings);
    }
    if check == CpuCheck::None {
        return;
    }
    let forbidden: BTreeSet<&str> = match check {
        CpuCheck::Partial => input.forbidden_beyond_host_model().collect(),
        _ => BTreeSet::new(),
    };
    let unknown: Vec<&str> = requested
        .union(&forbidden)
        .copied()
        .filter(|feature| gives(feature).is_none())
        .collect();
    if !unknown.is_empty() {
        findings.push(
            RuleFinding::unknown(
                RuleCode::CpuFeature,
                format!(
                    "it is unknown if the hypervisor supports these CPU features for domains of \
                     type {}: {}",
                    or_any(input),
                    named(unknown)
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
            RuleFinding::blocking(
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
        let finding = RuleFinding::blocking(
            RuleCode::CpuFeature,
            format!("the hypervisor lacks CPU features that the domain requires: {list}"),
        )
        .remedy("leave them out or use policy='optional', or choose a node that has them");
        findings.push(missing_words(finding, check, missing));
        return;
    }
    findings.push(
        RuleFinding::warning(
            RuleCode::CpuFeature,
            format!(
                "the guest will lack CPU features that the domain requires, because no check is \
                 enabled: {list}"
            ),
        )
        .remedy(
            "write check='partial' to make libvirt reject the start, or choose a node that has \
             them",
        ),
    );
}

/// Reports feature names that libvirt may not know. libvirt has its own list of them, and its
/// documents contain only those that matter on this host. The names of a running domain are known.
fn check_names(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if input.domain.live || !input.is_x86() {
        return;
    }
    let (Some(given), Some(modes)) = (&input.node.cpu_features, &input.node.cpu) else {
        return;
    };
    // Only a document lists the features of the host model; an offer from labels has none.
    let host_model = modes.host_model.as_ref();
    if host_model.is_none_or(|host_model| host_model.features.is_empty()) {
        return;
    }
    let documented = features_in_documents(input);
    let names = input.domain.cpu.features.iter().map(|f| f.name.as_str());
    let undocumented: Vec<&str> = names
        .filter(|name| !documented.contains(name) && !given.contains(*name))
        .collect();
    let Some(first) = undocumented.first() else {
        return;
    };
    findings.push(
        RuleFinding::unknown(
            RuleCode::CpuFeature,
            format!(
                "libvirt may not know the CPU feature {}: none of its documents mentions it",
                named(undocumented.iter().copied())
            ),
        )
        .at_start(unsupported(format!("unknown CPU feature: {first}")))
        .remedy("check the spelling (libvirt's, such as sse4.2), or leave it out"),
    );
}

/// Checks forbidden features against those that the host model lists beyond its named model, which
/// libvirt does first, for every mode (`virCPUCheckForbiddenFeatures`, libvirt 9.0 to 11.3).
pub(super) fn check_forbidden_in_host_model(
    input: &RuleInput<'_>,
    modes: &CpuModes,
    findings: &mut Vec<RuleFinding>,
) {
    let check = effective_check(input);
    if check == CpuCheck::None {
        return;
    }
    let cpu = &input.domain.cpu;
    if let Some(name) = cpu.forbidden().find(|name| modes.adds_to_host_model(name)) {
        findings.push(
            RuleFinding::blocking(
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
    // A summary does not list the host model's features: any feature of the node may be one.
    let is_summary = modes.host_model.iter().all(|host| host.features.is_empty());
    let has = |name: &&str| input.node.gives(name) == Some(true);
    if let Some(name) = cpu.forbidden().find(has)
        && is_summary
        && check == CpuCheck::Full
    {
        findings.push(
            RuleFinding::unknown(
                RuleCode::CpuFeature,
                format!("the host model may have CPU feature {name}, which the domain forbids"),
            )
            .stage(Stage::Start),
        );
    }
}

/// Returns all feature names in libvirt's documents of this node.
fn features_in_documents<'i>(input: &'i RuleInput<'_>) -> BTreeSet<&'i str> {
    let modes = input.node.cpu.iter();
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

pub(super) fn check_policies(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    check_names(input, findings);
    let mut seen = BTreeSet::new();
    for feature in &input.domain.cpu.features {
        let name = &feature.name;
        let policy = feature.policy.as_deref().unwrap_or("require");
        if !matches!(
            policy,
            "force" | "require" | "optional" | "disable" | "forbid"
        ) {
            findings.push(
                RuleFinding::blocking(
                    RuleCode::CpuFeature,
                    format!("'{policy}' is not a valid policy for CPU feature {name}"),
                )
                .at_define(unsupported("Invalid CPU feature policy"))
                .remedy("use require, optional, disable, forbid or force"),
            );
        }
        if !seen.insert(name) {
            findings.push(
                RuleFinding::blocking(
                    RuleCode::CpuFeature,
                    format!("CPU feature {name} is listed more than once"),
                )
                .at_define(format!(
                    "XML error: CPU feature '{name}' specified more than once"
                ))
                .remedy("keep one of them"),
            );
        }
    }
}

pub(super) fn or_any<'i>(input: &'i RuleInput<'_>) -> &'i str {
    input.virt_type().unwrap_or("any")
}
