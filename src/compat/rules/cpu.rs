//! Rules for the CPU mode and model.

use std::collections::BTreeSet;

use super::cpu_match::{self, Comparison};
use super::cpu_words::{missing_words, model_remedy};
use super::features::{
    check_features, check_features_beyond, check_forbidden_in_host_model, check_policies, or_any,
    stage_of,
};
use super::vcpus::effective_check;
use super::{RuleInput, named, unsupported};
use crate::capability::{CpuModel, CpuModes, Usable};
use crate::compat::{RuleCode, RuleFinding, Stage};
use crate::domain::CpuCheck;

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let cpu = &input.domain.cpu;
    check_policies(input, findings);
    check_physical_address(input, findings);
    let mode = match (cpu.mode.as_deref(), cpu.model.as_deref()) {
        (None | Some("custom"), None) => {
            if !cpu.features.is_empty() {
                findings.push(
                    RuleFinding::blocking(
                        RuleCode::CpuFeature,
                        "<cpu> lists features but no model to add them to",
                    )
                    .at_define("XML error: Non-empty feature list specified without CPU model")
                    .remedy("name a <model>, or use <cpu mode='host-model'>"),
                );
            }
            return; // the emulator's default
        }
        (mode, _) => mode.unwrap_or("custom"),
    };
    let Some(modes) = &input.node.cpu else {
        findings.push(
            RuleFinding::unknown(
                RuleCode::CpuMode,
                format!(
                    "the CPUs that the node offers to domains of type {} are unknown",
                    or_any(input)
                ),
            )
            .remedy(format!(
                "give --domain-capabilities what `virsh domcapabilities --virttype {}` prints on \
                 the node",
                or_any(input)
            )),
        );
        return;
    };
    check_full(input, findings);
    check_forbidden_in_host_model(input, modes, findings);
    match mode {
        "custom" => check_custom(input, modes, findings),
        "host-model" => {
            let supported = modes.host_model.as_ref().is_some_and(|mode| mode.supported);
            check_mode(input, mode, supported, findings);
            if supported {
                check_features(input, findings);
            }
        }
        "host-passthrough" | "maximum" => {
            let plain = match mode {
                "maximum" => modes.maximum,
                _ => modes.host_passthrough,
            };
            check_mode(
                input,
                mode,
                plain.is_some_and(|mode| mode.supported),
                findings,
            );
            if let Some(plain) = plain.filter(|plain| plain.supported) {
                check_migratable(input, mode, plain.migratable, findings);
                check_features(input, findings);
            }
        }
        other => findings.push(
            RuleFinding::blocking(
                RuleCode::CpuMode,
                format!("'{other}' is not a valid CPU mode"),
            )
            .at_define(unsupported(format!("Invalid mode attribute '{other}'")))
            .remedy("use host-model, host-passthrough, maximum, or custom with a <model>"),
        ),
    }
}

/// Reports that `check='full'` cannot be predicted for a new domain. QEMU adds features of its own,
/// such as `hypervisor`, or `ht` for several threads or cores, and libvirt compares the result with
/// the definition. The definition of a running domain lists them all.
fn check_full(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if effective_check(input) != CpuCheck::Full || input.domain.live {
        return;
    }
    findings.push(
        RuleFinding::unknown(
            RuleCode::CpuModel,
            "check='full' compares the CPU that QEMU creates with libvirt's definition of the \
             model; the features that QEMU adds are visible only after a start",
        )
        .in_emulator("operation failed: guest CPU doesn't match specification: ")
        .remedy(
            "write check='partial', or start the domain once that way and copy <cpu> from its live \
             XML",
        ),
    );
}

/// Checks the width of physical addresses, for every domain type
/// (`qemuValidateDomainDefCpu`, libvirt 11.3).
fn check_physical_address(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let Some(wanted) = &input.domain.cpu.physical_address else {
        return;
    };
    let finding = |message: String, words: &str, remedy: String| {
        RuleFinding::blocking(RuleCode::PhysicalAddress, message)
            .at_define(unsupported(words))
            .remedy(remedy)
    };
    let is_passthrough = wanted.mode.as_deref() == Some("passthrough");
    if is_passthrough && wanted.bits.is_some() {
        findings.push(finding(
            "maxphysaddr with mode='passthrough' has no number of bits".to_owned(),
            "CPU maximum physical address bits number specification cannot be used with \
             mode='passthrough'",
            "leave bits= out, or write mode='emulate'".to_owned(),
        ));
    }
    if !is_passthrough && wanted.limit.is_some() {
        findings.push(finding(
            "maxphysaddr has a limit only with mode='passthrough'".to_owned(),
            "attribute 'limit' is only supported for maxphysaddr mode 'passthrough'",
            "leave limit= out".to_owned(),
        ));
    }
    if let (Some(bits), Some(limit)) = (wanted.bits, input.node.physical_address_bits)
        && !is_passthrough
        && bits > limit
    {
        findings.push(finding(
            format!("the domain requires {bits} physical address bits, but the host has {limit}"),
            "The number of virtual CPU address bits cannot exceed the number supported by the host \
             CPU",
            format!("write bits='{limit}' or fewer"),
        ));
    }
}

fn check_mode(input: &RuleInput<'_>, mode: &str, supported: bool, findings: &mut Vec<RuleFinding>) {
    if supported {
        return;
    }
    let arch = input.arch.unwrap_or("this");
    let native = input.node.native_arch.as_deref().unwrap_or(arch);
    let remedy = match mode {
        "host-passthrough" if input.is_tcg() => {
            "use <cpu mode='maximum'/>, all that software emulation has, or <domain type='kvm'> \
             where there is KVM"
        }
        "custom" => {
            "no named model is available here: leave <cpu> out, or use a mode without a model"
        }
        _ => "name a <model> that `virtnode capabilities` lists as usable",
    };
    findings.push(
        RuleFinding::blocking(
            RuleCode::CpuMode,
            format!(
                "CPU mode {mode} is not available for {arch} domains of type {} here",
                or_any(input)
            ),
        )
        .at_start(unsupported(format!(
            "CPU mode '{mode}' for {arch} {} domain on {native} host is not supported by \
             hypervisor",
            or_any(input)
        )))
        .remedy(remedy),
    );
}

fn check_migratable(input: &RuleInput<'_>, mode: &str, can: bool, findings: &mut Vec<RuleFinding>) {
    let message = match (mode, input.domain.cpu.migratable) {
        (_, Some(false)) => {
            format!("CPU mode {mode} with migratable='off': the domain cannot be migrated")
        }
        ("host-passthrough", _) if !can => {
            "a domain with CPU mode host-passthrough cannot be migrated from this node".to_owned()
        }
        ("host-passthrough", _) => {
            "a domain with CPU mode host-passthrough can be migrated only to a host with the same \
             CPU, microcode and kernel"
                .to_owned()
        }
        _ => return,
    };
    findings.push(
        RuleFinding::note(RuleCode::Migratable, message)
            .remedy("use host-model or a named model for a domain to be migrated"),
    );
}

fn check_custom(input: &RuleInput<'_>, modes: &CpuModes, findings: &mut Vec<RuleFinding>) {
    let cpu = &input.domain.cpu;
    let Some(name) = cpu.model.as_deref() else {
        return;
    };
    if modes.custom == Some(false) {
        check_mode(input, "custom", false, findings);
        return;
    }
    let Some(model) = modes.models.iter().find(|model| model.name == name) else {
        findings.push(unlisted(input, modes, name));
        return;
    };
    if model.deprecated {
        findings.push(
            RuleFinding::warning(
                RuleCode::CpuModel,
                format!("CPU model {name} is deprecated: a newer QEMU will remove it"),
            )
            .remedy("use a newer model of the same vendor, or host-model"),
        );
    }
    if cpu_match::applies(input, modes) {
        cpu_match::check(input, modes, model, findings);
        return;
    }
    check_vendor(input, modes, model, findings);
    let missing = check_model(input, model, findings);
    check_features_beyond(input, &missing, findings);
}

/// Returns the finding for a model that libvirt does not list for this emulator.
fn unlisted(input: &RuleInput<'_>, modes: &CpuModes, name: &str) -> RuleFinding {
    let usable = modes
        .models
        .iter()
        .filter(|model| model.usable == Some(Usable::Yes) && !model.deprecated)
        .map(|model| model.name.as_str());
    let remedy = format!(
        "use host-model, or a model that is usable here: {}",
        named(usable)
    );
    let forbids = input.domain.cpu.fallback.as_deref() == Some("forbid");

    let finding = if forbids {
        RuleFinding::blocking(
            RuleCode::CpuModel,
            format!("the hypervisor lacks CPU model {name}, and fallback='forbid' allows no other"),
        )
    } else {
        RuleFinding::unknown(
            RuleCode::CpuModel,
            format!(
                "the hypervisor lacks CPU model {name}: libvirt substitutes a similar model if it \
                 knows {name} itself, and otherwise rejects it"
            ),
        )
    }
    .remedy(remedy);
    if input.is_x86() {
        finding.at_start(format!("internal error: Unknown CPU model {name}"))
    } else {
        finding.stage(Stage::Start)
    }
}

/// Checks the vendor where libvirt compares the model with the host. Software emulation has the
/// host's vendor too.
fn check_vendor(
    input: &RuleInput<'_>,
    modes: &CpuModes,
    model: &CpuModel,
    findings: &mut Vec<RuleFinding>,
) {
    let is_document = modes
        .host_model
        .iter()
        .any(|host| !host.features.is_empty());
    let is_compared = match effective_check(input) {
        CpuCheck::None => false,
        // The scheduler knows a vendor's label, but not the version of libvirt.
        _ if !is_document => !input.is_tcg(),
        CpuCheck::Partial => cpu_match::comparison(input, model) == Comparison::OwnModel,
        CpuCheck::Full => false,
    };
    if is_compared {
        findings.extend(cpu_match::other_vendor(input, modes));
    }
}

/// Checks the model and returns its features that the node lacks.
fn check_model<'m>(
    input: &RuleInput<'_>,
    model: &'m CpuModel,
    findings: &mut Vec<RuleFinding>,
) -> BTreeSet<&'m str> {
    let cpu = &input.domain.cpu;
    let name = &model.name;
    let check = effective_check(input);
    let is_optional = |feature: &str| {
        let last = cpu.features.iter().rev().find(|f| f.name == feature);
        matches!(
            last.and_then(|f| f.policy.as_deref()),
            Some("disable" | "forbid" | "optional" | "force")
        )
    };
    let missing: BTreeSet<&str> = model
        .blockers
        .iter()
        .map(String::as_str)
        .filter(|feature| !is_optional(feature))
        .collect();
    let list = || {
        if missing.is_empty() {
            "libvirt does not report which of its features are missing".to_owned()
        } else {
            format!("missing are {}", named(missing.iter().copied()))
        }
    };
    match (model.usable, check) {
        (Some(Usable::Yes), _) => {}
        // libvirt takes the host model, regardless of what the named one lacks.
        (_, CpuCheck::None | CpuCheck::Full) if cpu.matching.as_deref() == Some("minimum") => {}
        (Some(Usable::No), CpuCheck::None) => findings.push(
            RuleFinding::warning(
                RuleCode::CpuModel,
                format!(
                    "CPU model {name} is incomplete here: QEMU drops the features that it lacks; \
                     {}",
                    list()
                ),
            )
            .remedy("write check='partial' to make libvirt reject the start, or use host-model"),
        ),
        // The live XML describes the CPU that QEMU created. If it disables every missing feature,
        // another start yields the same CPU.
        (Some(Usable::No), CpuCheck::Full)
            if input.domain.live && missing.is_empty() && !model.blockers.is_empty() => {}
        (Some(Usable::No), _) if missing.is_empty() && !model.blockers.is_empty() => findings.push(
            RuleFinding::unknown(
                RuleCode::CpuModel,
                format!(
                    "CPU model {name} is not usable as it is; the domain disables all missing \
                     features, but libvirt does not report if that suffices"
                ),
            )
            .stage(stage_of(check)),
        ),
        (Some(Usable::No), check) => {
            let finding = RuleFinding::blocking(
                RuleCode::CpuModel,
                format!("CPU model {name} is not usable here: {}", list()),
            )
            .remedy(model_remedy(input, model));
            findings.push(missing_words(finding, check, &missing));
        }
        (Some(Usable::Unknown) | None, CpuCheck::None) => {}
        (Some(Usable::Unknown) | None, check) => findings.push(
            RuleFinding::unknown(
                RuleCode::CpuModel,
                format!("libvirt does not report if CPU model {name} is usable here"),
            )
            .stage(stage_of(check)),
        ),
    }
    match model.usable {
        Some(Usable::Yes) => BTreeSet::new(),
        _ => missing,
    }
}
