//! CPU mode, model and features.

use std::collections::BTreeSet;

use super::vcpus::effective_check;
use super::{Case, named, unsupported};
use crate::capability::{CpuModel, CpuModes, Usable};
use crate::compat::{Check, Code, Finding, Severity, Stage};

pub(super) fn check(case: &Case<'_>, findings: &mut Vec<Finding>) {
    let cpu = &case.domain.cpu;
    check_policies(case, findings);
    let mode = match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (None | Some("custom"), None) => {
            if !cpu.features.is_empty() {
                findings.push(
                    Finding::new(
                        Severity::Blocks,
                        Code::CpuFeature,
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
            Finding::new(
                Severity::Unknown,
                Code::CpuMode,
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
            Finding::new(
                Severity::Blocks,
                Code::CpuMode,
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
fn check_full(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if effective_check(case) != Check::Full || case.domain.live {
        return;
    }
    findings.push(
        Finding::new(
            Severity::Unknown,
            Code::CpuModel,
            "check='full' holds the CPU that QEMU makes against libvirt's own list, feature by \
             feature; what QEMU adds to it shows only when the domain starts",
        )
        .in_emulator("operation failed: guest CPU doesn't match specification: ")
        .remedy("write check='partial', or start it once so and take <cpu> from its live XML"),
    );
}

fn or_any<'c>(case: &'c Case<'_>) -> &'c str {
    case.virt_type().unwrap_or("any")
}

fn check_mode(case: &Case<'_>, mode: &str, supported: bool, findings: &mut Vec<Finding>) {
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
        Finding::new(
            Severity::Blocks,
            Code::CpuMode,
            format!("CPU mode {mode} is not to be had for {arch} domains of type {} here", or_any(case)),
        )
        .at_start(unsupported(format!(
            "CPU mode '{mode}' for {arch} {} domain on {native} host is not supported by hypervisor",
            or_any(case)
        )))
        .remedy(remedy),
    );
}

fn check_migratable(case: &Case<'_>, mode: &str, can: bool, findings: &mut Vec<Finding>) {
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
        Finding::new(Severity::Note, Code::Migratable, message)
            .remedy("use host-model or a named model for a domain that is to move"),
    );
}

fn check_custom(case: &Case<'_>, modes: &CpuModes, findings: &mut Vec<Finding>) {
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
            Finding::new(
                Severity::Warning,
                Code::CpuModel,
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
fn unlisted(case: &Case<'_>, modes: &CpuModes, name: &str) -> Finding {
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
        true => Severity::Blocks,
        false => Severity::Unknown,
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
    let finding = Finding::new(severity, Code::CpuModel, message).remedy(remedy);
    match case.is_x86() {
        true => finding.at_start(format!("internal error: Unknown CPU model {name}")),
        false => finding.stage(Stage::Start),
    }
}

fn check_vendor(case: &Case<'_>, modes: &CpuModes, findings: &mut Vec<Finding>) {
    // Software emulation has any vendor.
    let host = modes
        .host_model
        .as_ref()
        .and_then(|mode| mode.vendor.as_deref());
    let (Some(wanted), Some(host)) = (case.domain.cpu.vendor.as_deref(), host) else {
        return;
    };
    if case.is_tcg() || wanted == host || effective_check(case) == Check::None {
        return;
    }
    findings.push(
        Finding::new(
            Severity::Blocks,
            Code::CpuVendor,
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
    case: &Case<'_>,
    model: &'m CpuModel,
    findings: &mut Vec<Finding>,
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
        (_, Check::None | Check::Full) if cpu.matching.as_deref() == Some("minimum") => {}
        (Some(Usable::No), Check::None) => findings.push(
            Finding::new(
                Severity::Warning,
                Code::CpuModel,
                format!(
                    "CPU model {name} is not whole here: QEMU leaves out what it does not have; {}",
                    list()
                ),
            )
            .remedy("write check='partial' to have libvirt refuse it, or use host-model"),
        ),
        // The live XML is what QEMU really made, and libvirt holds the next one against it only
        // when it is made: without what the domain does without there is nothing to miss.
        (Some(Usable::No), Check::Full)
            if case.domain.live && lacking.is_empty() && !model.blockers.is_empty() => {}
        (Some(Usable::No), _) if lacking.is_empty() && !model.blockers.is_empty() => findings.push(
            Finding::new(
                Severity::Unknown,
                Code::CpuModel,
                format!(
                    "CPU model {name} is not usable as it is; all features that keep it from that \
                     are disabled, and whether that is enough for libvirt it does not say"
                ),
            )
            .stage(stage_of(check)),
        ),
        (Some(Usable::No), check) => {
            let finding = Finding::new(
                Severity::Blocks,
                Code::CpuModel,
                format!("CPU model {name} is not usable here: {}", list()),
            )
            .remedy(model_remedy(case, model));
            findings.push(missing_words(finding, check, &lacking));
        }
        (Some(Usable::Unknown) | None, Check::None) => {}
        (Some(Usable::Unknown) | None, check) => findings.push(
            Finding::new(
                Severity::Unknown,
                Code::CpuModel,
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

fn model_remedy(case: &Case<'_>, model: &CpuModel) -> String {
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

fn stage_of(check: Check) -> Stage {
    match check {
        Check::Full => Stage::Emulator,
        _ => Stage::Start,
    }
}

/// What libvirt says of missing features. It may name more: those that its own definition of a
/// model has and QEMU's has not.
fn missing_words(finding: Finding, check: Check, missing: &BTreeSet<&str>) -> Finding {
    let list = |separator: &str| match missing.is_empty() {
        true => "…".to_owned(),
        false => missing.iter().copied().collect::<Vec<_>>().join(separator),
    };
    match check {
        Check::Full => finding.in_emulator(format!(
            "operation failed: guest CPU doesn't match specification: missing features: {}",
            list(",")
        )),
        _ => finding.at_start(format!(
            "the CPU is incompatible with host CPU: Host CPU does not provide required features: {}",
            list(", ")
        )),
    }
}

fn check_features(case: &Case<'_>, findings: &mut Vec<Finding>) {
    check_features_beyond(case, &BTreeSet::new(), findings);
}

/// The features that the definition asks for by name, but for those that were named already.
fn check_features_beyond(
    case: &Case<'_>,
    named_already: &BTreeSet<&str>,
    findings: &mut Vec<Finding>,
) {
    let cpu = &case.domain.cpu;
    let mut check = effective_check(case);
    // Held against the host only in these two modes.
    if check == Check::Partial
        && matches!(cpu.mode.as_deref(), Some("maximum" | "host-passthrough"))
    {
        check = Check::None;
    }
    let asked: BTreeSet<&str> = match check {
        Check::Full => cpu.required().chain(cpu.forced()).collect(),
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
    if check == Check::None {
        return;
    }
    let forbidden: BTreeSet<&str> = match check {
        Check::Partial => cpu.forbidden().collect(),
        _ => BTreeSet::new(),
    };
    let open: Vec<&str> = asked
        .union(&forbidden)
        .copied()
        .filter(|feature| gives(feature).is_none())
        .collect();
    if !open.is_empty() {
        findings.push(
            Finding::new(
                Severity::Unknown,
                Code::CpuFeature,
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
            Finding::new(
                Severity::Blocks,
                Code::CpuFeature,
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

fn check_missing(check: Check, missing: &BTreeSet<&str>, findings: &mut Vec<Finding>) {
    let list = named(missing.iter().copied());
    if check != Check::None {
        let finding = Finding::new(
            Severity::Blocks,
            Code::CpuFeature,
            format!("the hypervisor cannot give CPU features that the domain requires: {list}"),
        )
        .remedy("leave them out or use policy='optional', or choose a node that has them");
        findings.push(missing_words(finding, check, missing));
        return;
    }
    findings.push(
        Finding::new(
            Severity::Warning,
            Code::CpuFeature,
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
fn check_names(case: &Case<'_>, findings: &mut Vec<Finding>) {
    if case.domain.live || !case.is_x86() {
        return;
    }
    let (Some(given), Some(modes)) = (&case.node.cpu_features, &case.node.cpu) else {
        return;
    };
    // Labels and the like are no documents: those have the host model's features.
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
        Finding::new(
            Severity::Unknown,
            Code::CpuFeature,
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
fn check_forbidden_in_host_model(case: &Case<'_>, modes: &CpuModes, findings: &mut Vec<Finding>) {
    let host = modes.host_model.iter().flat_map(|host| &host.features);
    let has: BTreeSet<&str> = host
        .filter(|f| matches!(f.policy.as_deref(), None | Some("require" | "force")))
        .map(|feature| feature.name.as_str())
        .collect();
    // Of a node of which only a summary is told, what it can give may be in its host model.
    let is_summary = modes.host_model.iter().all(|host| host.features.is_empty());
    let mut forbidden = case.domain.cpu.forbidden();
    if is_summary && effective_check(case) != Check::Partial {
        if let Some(name) = forbidden.find(|name| case.node.gives(name) == Some(true)) {
            findings.push(
                Finding::new(
                    Severity::Unknown,
                    Code::CpuFeature,
                    format!("the host model may have CPU feature {name}, which the domain forbids"),
                )
                .stage(Stage::Start),
            );
        }
        return;
    }
    if let Some(name) = forbidden.find(|name| has.contains(name)) {
        findings.push(
            Finding::new(
                Severity::Blocks,
                Code::CpuFeature,
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
fn features_in_documents<'c>(case: &'c Case<'_>) -> BTreeSet<&'c str> {
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

fn check_policies(case: &Case<'_>, findings: &mut Vec<Finding>) {
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
                Finding::new(
                    Severity::Blocks,
                    Code::CpuFeature,
                    format!("libvirt knows no policy '{policy}' for CPU feature {name}"),
                )
                .at_define(unsupported("Invalid CPU feature policy"))
                .remedy("use require, optional, disable, forbid or force"),
            );
        }
        if !seen.insert(name) {
            findings.push(
                Finding::new(
                    Severity::Blocks,
                    Code::CpuFeature,
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
