//! libvirt's comparison of an x86 CPU with the host before a start: `check='partial'`.
//!
//! libvirt compares the CPU with the *host's* CPU, including features that KVM does not give to
//! guests; QEMU then drops those. Measured with libvirt 11.3 on a host whose KVM lacks features of
//! the CPU:
//!
//! ```text
//! model                       usable, no features     otherwise
//! EPYC, Nehalem …             not compared            libvirt's model, host's CPU, vendor
//! EPYC-v1, Nehalem-v1 …       not compared            QEMU's blockers, features of KVM
//! ```
//!
//! Before 10.2 usable models were compared too, and before 10.9 every model in the first way.

use std::collections::BTreeSet;

use super::cpu_words::{missing_words, model_remedy};
use super::vcpus::effective_check;
use super::{RuleInput, named};
use crate::capability::{CpuModel, CpuModes, Usable, Version};
use crate::compat::{RuleCode, RuleFinding, Stage};
use crate::domain::CpuCheck;

/// First libvirt that does not compare a usable model ("qemu: Avoid unnecessary CPU compatibility
/// checks", NEWS of 10.2.0).
const FIRST_TO_TRUST_USABLE: Version = Version::new(10, 2, 0);
/// First libvirt that compares versioned models by QEMU's blockers (`virCPUCompareUnusable`).
const FIRST_TO_USE_BLOCKERS: Version = Version::new(10, 9, 0);

/// Models without a version that libvirt compares like versioned ones: its CPU map has no
/// `<check partial='compat'/>` for them.
const COMPARED_BY_BLOCKERS: [&str; 2] = ["Denverton", "KnightsMill"];
/// Features of libvirt's models that QEMU turns off for guests of KVM (`kvm_default_props`, QEMU
/// target/i386/kvm/kvm-cpu.c), so they are no blockers. Prefixes of model names.
const WITH_SVM: [&str; 9] = [
    "Dhyana",
    "EPYC",
    "Opteron_G2",
    "Opteron_G3",
    "Opteron_G4",
    "Opteron_G5",
    "phenom",
    "qemu64",
    "cpu64-rhel6",
];
const WITH_MONITOR: [&str; 4] = ["core2duo", "coreduo", "n270", "phenom"];

/// The way in which libvirt compares a model with the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    None,
    /// libvirt's own definition of the model, with the host's CPU.
    OwnModel,
    /// QEMU's blockers and the features of KVM.
    Blockers,
}

/// Returns the way in which libvirt compares the model of a domain with `check='partial'`.
pub(super) fn comparison(input: &RuleInput<'_>, model: &CpuModel) -> Comparison {
    let mut features = input.domain.cpu.features.iter();
    let has_features = features.any(|f| f.policy.as_deref() != Some("disable"));
    if model.usable == Some(Usable::Yes)
        && !has_features
        && input.libvirt_is(FIRST_TO_TRUST_USABLE) != Some(false)
    {
        return Comparison::None;
    }
    let is_versioned = is_versioned(&model.name) || COMPARED_BY_BLOCKERS.contains(&&*model.name);
    if is_versioned && input.libvirt_is(FIRST_TO_USE_BLOCKERS) != Some(false) {
        Comparison::Blockers
    } else {
        Comparison::OwnModel
    }
}

fn is_versioned(name: &str) -> bool {
    let version = name.rsplit_once("-v").map(|(_, version)| version);
    version.is_some_and(|version| {
        !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Returns the features of libvirt's model that are never blockers.
fn beyond_blockers(name: &str) -> impl Iterator<Item = &'static str> {
    let named = move |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let svm = named(&WITH_SVM).then_some("svm");
    let monitor = named(&WITH_MONITOR).then_some("monitor");
    svm.into_iter().chain(monitor)
}

/// True if this comparison can be computed: documents describe the host's CPU and what KVM gives.
pub(super) fn applies(input: &RuleInput<'_>, modes: &CpuModes) -> bool {
    // A summary, from labels or an object, does not list the features of the host model.
    let is_document = modes
        .host_model
        .iter()
        .any(|host| !host.features.is_empty());
    input.is_x86()
        && !input.is_tcg()
        && is_document
        && effective_check(input) == CpuCheck::Partial
        && input.arch == input.node.native_arch.as_deref()
}

/// True if the host's CPU has a feature, whether or not KVM gives it to guests; `None` if that is
/// unknown.
pub(super) fn cpu_has(input: &RuleInput<'_>, feature: &str) -> Option<bool> {
    if input.node.gives(feature) == Some(true) {
        return Some(true);
    }
    let cpu = input.node.host_cpu.as_ref()?;
    let modes = input.node.cpu.as_ref()?;
    // The document lists only what the model lacks. The model has what blocks it, and what the host
    // model of the same name disables.
    let is_model = |name: &str| {
        name == cpu.model
            || modes.models.iter().any(|model| {
                let canonical = model.canonical.as_deref();
                (model.name == name && canonical == Some(&*cpu.model))
                    || (model.name == cpu.model && canonical == Some(name))
            })
    };
    let mut blockers = modes
        .models
        .iter()
        .filter(|model| is_model(&model.name))
        .flat_map(|model| &model.blockers);
    let mut disabled = modes
        .host_model
        .iter()
        .filter(|host| host.model.as_deref().is_some_and(is_model))
        .flat_map(|host| &host.features)
        .filter(|f| matches!(f.policy.as_deref(), Some("disable" | "forbid")));
    Some(
        cpu.features.contains(feature)
            || blockers.any(|name| name == feature)
            || disabled.any(|disabled| disabled.name == feature)
            || beyond_blockers(&cpu.model).any(|name| name == feature),
    )
}

/// Checks model, vendor and features as libvirt does.
pub(super) fn check(
    input: &RuleInput<'_>,
    modes: &CpuModes,
    model: &CpuModel,
    findings: &mut Vec<RuleFinding>,
) {
    match comparison(input, model) {
        Comparison::None => {}
        Comparison::Blockers => check_blockers(input, model, findings),
        Comparison::OwnModel => check_own_model(input, modes, model, findings),
    }
}

fn check_blockers(input: &RuleInput<'_>, model: &CpuModel, findings: &mut Vec<RuleFinding>) {
    if model.usable != Some(Usable::Yes) && model.blockers.is_empty() {
        findings.push(unknown_model(model));
        return;
    }
    let cpu = &input.domain.cpu;
    // Neither policy='optional' nor 'force' makes libvirt tolerate a blocker.
    let is_disabled = |name: &&str| {
        let mut features = cpu.features.iter().rev();
        let last = features.find(|feature| feature.name == *name);
        last.is_some_and(|feature| feature.policy.as_deref() == Some("disable"))
    };
    let blockers = model.blockers.iter().map(String::as_str);
    let mut missing: BTreeSet<&str> = blockers.filter(|name| !is_disabled(name)).collect();
    let lacks = |name: &&str| input.node.gives(name) == Some(false);
    missing.extend(cpu.required().filter(lacks));
    let forbidden = input
        .forbidden_beyond_host_model()
        .filter(|name| input.node.gives(name) == Some(true));
    let forbidden: BTreeSet<&str> = forbidden.collect();
    report(input, model, &missing, &forbidden, findings);
    let unknown = cpu.required().chain(input.forbidden_beyond_host_model());
    let unknown = unknown
        .filter(|name| input.node.gives(name).is_none())
        .collect();
    report_unknown(unknown, findings);
}

fn check_own_model(
    input: &RuleInput<'_>,
    modes: &CpuModes,
    model: &CpuModel,
    findings: &mut Vec<RuleFinding>,
) {
    let cpu = &input.domain.cpu;
    findings.extend(other_vendor(input, modes));
    if cpu.matching.as_deref() == Some("strict") {
        findings.push(
            RuleFinding::blocking(
                RuleCode::CpuModel,
                format!(
                    "match='strict' requires that the host has no feature beyond those of CPU \
                     model {}, which every newer CPU has",
                    model.name
                ),
            )
            .at_start(
                "the CPU is incompatible with host CPU: Host CPU does not strictly match guest CPU",
            )
            .remedy("write match='exact'"),
        );
    }
    if model.usable != Some(Usable::Yes) && model.blockers.is_empty() {
        findings.push(unknown_model(model));
        return;
    }
    let is_tolerated = |name: &&str| {
        let mut features = cpu.features.iter().rev();
        let last = features.find(|feature| feature.name == *name);
        let policy = last.and_then(|feature| feature.policy.as_deref());
        matches!(policy, Some("disable" | "optional" | "force"))
    };
    let blockers = model.blockers.iter().map(String::as_str);
    let mut of_model: Vec<&str> = blockers.collect();
    for name in beyond_blockers(&model.name) {
        of_model.push(name);
    }
    let wanted: BTreeSet<&str> = of_model
        .into_iter()
        .filter(|name| !is_tolerated(name))
        .chain(cpu.required())
        .collect();
    let (missing, rest): (BTreeSet<&str>, BTreeSet<&str>) = wanted
        .into_iter()
        .partition(|name| cpu_has(input, name) == Some(false));
    let forbidden = input
        .forbidden_beyond_host_model()
        .filter(|name| cpu_has(input, name) == Some(true));
    let forbidden: BTreeSet<&str> = forbidden.collect();
    report(input, model, &missing, &forbidden, findings);
    let unknown = rest
        .iter()
        .copied()
        .chain(input.forbidden_beyond_host_model());
    report_unknown(
        unknown
            .filter(|name| cpu_has(input, name).is_none())
            .collect(),
        findings,
    );
    let dropped: Vec<&str> = rest
        .into_iter()
        .filter(|name| cpu_has(input, name) == Some(true) && input.node.gives(name) == Some(false))
        .collect();
    if missing.is_empty() && !dropped.is_empty() {
        findings.push(
            RuleFinding::warning(
                RuleCode::CpuModel,
                format!(
                    "the host's CPU has them, but KVM here gives guests no {}: libvirt starts the \
                     domain, and QEMU drops them",
                    named(dropped)
                ),
            )
            .remedy("use host-model for all that KVM gives, or choose a node that gives them"),
        );
    }
}

/// Returns the finding for a domain that requires another vendor than the host's, if libvirt
/// compares the two.
pub(super) fn other_vendor(input: &RuleInput<'_>, modes: &CpuModes) -> Option<RuleFinding> {
    let host = modes.host_model.as_ref()?.vendor.as_deref()?;
    let wanted = input.domain.cpu.vendor.as_deref()?;
    (wanted != host).then(|| {
        RuleFinding::blocking(
            RuleCode::CpuVendor,
            format!(
                "the domain requires a CPU of vendor {wanted}, but the host's vendor is {host}"
            ),
        )
        .at_start(format!(
            "the CPU is incompatible with host CPU: host CPU vendor does not match required CPU \
             vendor {wanted}"
        ))
        .remedy("leave <vendor> out, or choose a node of that vendor")
    })
}

fn unknown_model(model: &CpuModel) -> RuleFinding {
    RuleFinding::unknown(
        RuleCode::CpuModel,
        format!(
            "CPU model {} is not usable as it is, and libvirt does not report which of its features \
             are missing",
            model.name
        ),
    )
    .stage(Stage::Start)
}

fn report(
    input: &RuleInput<'_>,
    model: &CpuModel,
    missing: &BTreeSet<&str>,
    forbidden: &BTreeSet<&str>,
    findings: &mut Vec<RuleFinding>,
) {
    if !missing.is_empty() {
        let of_model = |name: &&str| {
            let mut beyond = beyond_blockers(&model.name);
            model.blockers.iter().any(|have| have == name) || beyond.any(|have| have == *name)
        };
        let list = named(missing.iter().copied());
        let finding = if missing.iter().any(of_model) {
            RuleFinding::blocking(
                RuleCode::CpuModel,
                format!(
                    "CPU model {} is not usable here: missing are {list}",
                    model.name
                ),
            )
        } else {
            RuleFinding::blocking(
                RuleCode::CpuFeature,
                format!("the hypervisor lacks CPU features that the domain requires: {list}"),
            )
        }
        .remedy(model_remedy(input, model));
        findings.push(missing_words(finding, CpuCheck::Partial, missing));
    }
    if !forbidden.is_empty() {
        findings.push(
            RuleFinding::blocking(
                RuleCode::CpuFeature,
                format!(
                    "the host has CPU features that the domain forbids: {}",
                    named(forbidden.iter().copied())
                ),
            )
            .at_start(format!(
                "the CPU is incompatible with host CPU: Host CPU provides forbidden features: {}",
                forbidden.iter().copied().collect::<Vec<_>>().join(", ")
            ))
            .remedy(
                "use policy='disable' to hide them from the guest, or choose a node without them",
            ),
        );
    }
}

fn report_unknown(unknown: BTreeSet<&str>, findings: &mut Vec<RuleFinding>) {
    if unknown.is_empty() {
        return;
    }
    findings.push(
        RuleFinding::unknown(
            RuleCode::CpuFeature,
            format!(
                "it is unknown if the host's CPU has the features {}",
                named(unknown)
            ),
        )
        .stage(Stage::Start)
        .remedy(
            "give --capabilities and --domain-capabilities, and --supported-features with the \
             output of `virsh hypervisor-cpu-baseline --features`",
        ),
    );
}
