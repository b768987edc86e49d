//! CPU mode and model.

use std::collections::BTreeSet;

use super::features::{
    check_features, check_features_beyond, check_forbidden_in_host_model, check_policies,
    missing_words, stage_of,
};
use super::vcpus::effective_check;
use super::{RuleInput, named, unsupported};
use crate::capability::{CpuModel, CpuModes, Usable};
use crate::compat::{RuleCode, RuleFinding, RuleSeverity, Stage};
use crate::domain::CpuCheck;

pub(super) fn check(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let cpu = &case.domain.cpu;
    check_policies(case, findings);
    let mode = match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (None | Some("custom"), None) => {
            if !cpu.features.is_empty() {
                findings.push(
                    RuleFinding::new(
                        RuleSeverity::Blocks,
                        RuleCode::CpuFeature,
                        "<cpu> asks for features and names no model to add them to",
                    )
                    .at_define("XML error: Non-empty feature list specified without CPU model")
                    .remedy("name a <model>, or use <cpu mode='host-model'>"),
                );
            }
            return; // the emulator's default
        }
        (mode, _) => mode.unwrap_or("custom"),
    };
    let Some(modes) = &case.node.cpu else {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::CpuMode,
                format!(
                    "which CPUs the node has for domains of type {} is not known",
                    or_any(case)
                ),
            )
            .remedy(format!(
                "give --domain-capabilities what `virsh domcapabilities --virttype {}` prints on \
                 the node",
                or_any(case)
            )),
        );
        return;
    };
    check_full(case, findings);
    match mode {
        "custom" => check_custom(case, modes, findings),
        "host-model" => {
            let there = modes.host_model.as_ref().is_some_and(|mode| mode.supported);
            check_mode(case, mode, there, findings);
            if there {
                check_forbidden_in_host_model(case, modes, findings);
                check_features(case, findings);
            }
        }
        "host-passthrough" | "maximum" => {
            let plain = match mode {
                "maximum" => modes.maximum,
                _ => modes.host_passthrough,
            };
            check_mode(
                case,
                mode,
                plain.is_some_and(|mode| mode.supported),
                findings,
            );
            if let Some(plain) = plain.filter(|plain| plain.supported) {
                check_migratable(case, mode, plain.migratable, findings);
                check_features(case, findings);
            }
        }
        other => findings.push(
            RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::CpuMode,
                format!("libvirt knows no CPU mode '{other}'"),
            )
            .at_define(unsupported(format!("Invalid mode attribute '{other}'")))
            .remedy("use host-model, host-passthrough, maximum, or custom with a <model>"),
        ),
    }
}

/// `check='full'`: a new domain's CPU seldom is what libvirt's own list says, feature by feature.
/// What QEMU adds by itself shows only when it starts: `hypervisor`, or `ht` for several threads or
/// cores. A running domain's definition has all of it written down.
fn check_full(case: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if effective_check(case) != CpuCheck::Full || case.domain.live {
        return;
    }
    findings.push(
        RuleFinding::new(
            RuleSeverity::Unknown,
            RuleCode::CpuModel,
            "check='full' holds the CPU that QEMU makes against libvirt's own list, feature by \
             feature; what QEMU adds to it shows only when the domain starts",
        )
        .in_emulator("operation failed: guest CPU doesn't match specification: ")
        .remedy("write check='partial', or start it once so and take <cpu> from its live XML"),
    );
}

pub(super) fn or_any<'c>(case: &'c RuleInput<'_>) -> &'c str {
    case.virt_type().unwrap_or("any")
}

fn check_mode(case: &RuleInput<'_>, mode: &str, supported: bool, findings: &mut Vec<RuleFinding>) {
    if supported {
        return;
    }
    let arch = case.arch.unwrap_or("this");
    let native = case.node.native_arch.as_deref().unwrap_or(arch);
    let remedy = match mode {
        "host-passthrough" if case.is_tcg() => {
            "use <cpu mode='maximum'/>, the most that software emulation has, or <domain \
             type='kvm'> where there is KVM"
        }
        "custom" => {
            "no named model is to be had here: leave <cpu> out, or use a mode without a model"
        }
        _ => "name a <model> that `virtnode capabilities` lists as usable",
    };
    findings.push(
        RuleFinding::new(
            RuleSeverity::Blocks,
            RuleCode::CpuMode,
            format!("CPU mode {mode} is not to be had for {arch} domains of type {} here", or_any(case)),
        )
        .at_start(unsupported(format!(
            "CPU mode '{mode}' for {arch} {} domain on {native} host is not supported by hypervisor",
            or_any(case)
        )))
        .remedy(remedy),
    );
}

fn check_migratable(case: &RuleInput<'_>, mode: &str, can: bool, findings: &mut Vec<RuleFinding>) {
    let message = match (mode, case.domain.cpu.migratable) {
        (_, Some(false)) => format!("CPU mode {mode} with migratable='off': the domain stays here"),
        ("host-passthrough", _) if !can => {
            "CPU mode host-passthrough cannot be migrated from here".to_owned()
        }
        ("host-passthrough", _) => {
            "CPU mode host-passthrough: the domain can be migrated only to a host with the same \
             CPU, microcode and kernel"
                .to_owned()
        }
        _ => return,
    };
    findings.push(
        RuleFinding::new(RuleSeverity::Note, RuleCode::Migratable, message)
            .remedy("use host-model or a named model for a domain that is to move"),
    );
}

fn check_custom(case: &RuleInput<'_>, modes: &CpuModes, findings: &mut Vec<RuleFinding>) {
    let cpu = &case.domain.cpu;
    let Some(name) = cpu.model.as_deref() else {
        return;
    };
    if modes.custom == Some(false) {
        check_mode(case, "custom", false, findings);
        return;
    }
    let Some(model) = modes.models.iter().find(|model| model.name == name) else {
        findings.push(unlisted(case, modes, name));
        return;
    };
    if model.deprecated {
        findings.push(
            RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::CpuModel,
                format!("CPU model {name} is deprecated: a newer QEMU will not have it"),
            )
            .remedy("use a newer model of the same vendor, or host-model"),
        );
    }
    check_vendor(case, modes, findings);
    let lacking = check_model(case, model, findings);
    check_features_beyond(case, &lacking, findings);
}

/// A model that libvirt does not list for this emulator.
fn unlisted(case: &RuleInput<'_>, modes: &CpuModes, name: &str) -> RuleFinding {
    let usable = modes
        .models
        .iter()
        .filter(|model| model.usable == Some(Usable::Yes) && !model.deprecated)
        .map(|model| model.name.as_str());
    let remedy = format!(
        "use host-model, or one that is usable here: {}",
        named(usable)
    );
    let forbids = case.domain.cpu.fallback.as_deref() == Some("forbid");
    let severity = match forbids {
        true => RuleSeverity::Blocks,
        false => RuleSeverity::Unknown,
    };
    let message = match forbids {
        true => {
            format!("the hypervisor has no CPU model {name}, and fallback='forbid' allows no other")
        }
        false => format!(
            "the hypervisor has no CPU model {name}: libvirt takes the closest other one if it \
             knows that model itself, and refuses it otherwise"
        ),
    };
    let finding = RuleFinding::new(severity, RuleCode::CpuModel, message).remedy(remedy);
    match case.is_x86() {
        true => finding.at_start(format!("internal error: Unknown CPU model {name}")),
        false => finding.stage(Stage::Start),
    }
}

fn check_vendor(case: &RuleInput<'_>, modes: &CpuModes, findings: &mut Vec<RuleFinding>) {
    // Software emulation has any vendor.
    let host = modes
        .host_model
        .as_ref()
        .and_then(|mode| mode.vendor.as_deref());
    let (Some(wanted), Some(host)) = (case.domain.cpu.vendor.as_deref(), host) else {
        return;
    };
    if case.is_tcg() || wanted == host || effective_check(case) == CpuCheck::None {
        return;
    }
    findings.push(
        RuleFinding::new(
            RuleSeverity::Blocks,
            RuleCode::CpuVendor,
            format!("the domain wants a CPU of {wanted}, and this host's is of {host}"),
        )
        .at_start(format!(
            "the CPU is incompatible with host CPU: host CPU vendor does not match required CPU \
             vendor {wanted}"
        ))
        .remedy("leave <vendor> out, or choose a node of that vendor"),
    );
}

/// Says whether the model runs here, and which of its features are missing.
fn check_model<'m>(
    case: &RuleInput<'_>,
    model: &'m CpuModel,
    findings: &mut Vec<RuleFinding>,
) -> BTreeSet<&'m str> {
    let cpu = &case.domain.cpu;
    let name = &model.name;
    let check = effective_check(case);
    let given_up = |feature: &str| {
        let last = cpu.features.iter().rev().find(|f| f.name == feature);
        matches!(
            last.and_then(|f| f.policy.as_deref()),
            Some("disable" | "forbid" | "optional" | "force")
        )
    };
    let lacking: BTreeSet<&str> = model
        .blockers
        .iter()
        .map(String::as_str)
        .filter(|feature| !given_up(feature))
        .collect();
    let list = || match lacking.is_empty() {
        true => "libvirt does not say which of its features are missing".to_owned(),
        false => format!("missing are {}", named(lacking.iter().copied())),
    };
    match (model.usable, check) {
        (Some(Usable::Yes), _) => {}
        // The host model is taken, whatever the named one lacks.
        (_, CpuCheck::None | CpuCheck::Full) if cpu.matching.as_deref() == Some("minimum") => {}
        (Some(Usable::No), CpuCheck::None) => findings.push(
            RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::CpuModel,
                format!(
                    "CPU model {name} is not whole here: QEMU leaves out what it does not have; {}",
                    list()
                ),
            )
            .remedy("write check='partial' to have libvirt refuse it, or use host-model"),
        ),
        // The live XML is what QEMU really made, and libvirt holds the next one against it only
        // when it is made: without what the domain does without there is nothing to miss.
        (Some(Usable::No), CpuCheck::Full)
            if case.domain.live && lacking.is_empty() && !model.blockers.is_empty() => {}
        (Some(Usable::No), _) if lacking.is_empty() && !model.blockers.is_empty() => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::CpuModel,
                format!(
                    "CPU model {name} is not usable as it is; all features that keep it from that \
                     are disabled, and whether that is enough for libvirt it does not say"
                ),
            )
            .stage(stage_of(check)),
        ),
        (Some(Usable::No), check) => {
            let finding = RuleFinding::new(
                RuleSeverity::Blocks,
                RuleCode::CpuModel,
                format!("CPU model {name} is not usable here: {}", list()),
            )
            .remedy(model_remedy(case, model));
            findings.push(missing_words(finding, check, &lacking));
        }
        (Some(Usable::Unknown) | None, CpuCheck::None) => {}
        (Some(Usable::Unknown) | None, check) => findings.push(
            RuleFinding::new(
                RuleSeverity::Unknown,
                RuleCode::CpuModel,
                format!("libvirt does not say whether CPU model {name} is usable here"),
            )
            .stage(stage_of(check)),
        ),
    }
    match model.usable {
        Some(Usable::Yes) => BTreeSet::new(),
        _ => lacking,
    }
}

fn model_remedy(case: &RuleInput<'_>, model: &CpuModel) -> String {
    let usable: Vec<&str> = case
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
