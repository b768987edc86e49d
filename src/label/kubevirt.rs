//! The KubeVirt schema: the keys that KubeVirt's node-labeller writes
//! (pkg/virt-handler/node-labeller, v1.9) and its controllers select on, so that the node-labeller
//! can be disabled.
//!
//! Omitted on purpose: keys with an empty name; machine types of other architectures, which
//! KubeVirt mixes with the host's; and `kubevirt.io/vm-arch-…`, whose feature gate is off by default.

use super::{Derivation, Policy};
use crate::capability::{CpuModel, DomainCapabilities, NodeFacts, PolicyFeature, Usable};

/// CPU models that KubeVirt does not publish by default (`DefaultObsoleteCPUModels`,
/// node-labeller/util/util.go), each also with the suffix `-v1`.
pub const DEFAULT_OBSOLETE_CPU_MODELS: [&str; 17] = [
    "486",
    "pentium",
    "pentium2",
    "pentium3",
    "pentiumpro",
    "coreduo",
    "n270",
    "core2duo",
    "Conroe",
    "athlon",
    "phenom",
    "qemu64",
    "qemu32",
    "kvm64",
    "kvm32",
    "Opteron_G1",
    "Opteron_G2",
];

pub(super) fn derive(facts: &NodeFacts, policy: &Policy, labels: &mut Derivation) {
    let Some(arch) = facts.native_arch() else {
        return;
    };
    let machines = facts.machines(arch);
    labels.add_all(
        "machine-type.node.kubevirt.io",
        machines.iter().map(|m| m.name.as_str()),
    );
    let document = facts.primary_document();
    if let Some(document) = document {
        derive_security(document, labels);
    }
    // KubeVirt labels CPUs of these two architectures only (arch_labeller.go).
    if matches!(arch, "x86_64" | "s390x") {
        derive_features(facts, arch, labels);
        if let Some(document) = document {
            derive_models(document, policy, labels);
            derive_host_model(document, arch, policy, labels);
        }
    }
    derive_timer(facts, labels);
    if let Some(host) = &facts.host {
        labels.add_if(host.realtime, "kubevirt.io", "realtime");
        if arch == "x86_64" {
            let offered = host.kvm_hyperv.iter().flat_map(|kvm| kvm.iter());
            labels.add_all("hyperv.node.kubevirt.io", offered);
        }
    }
}

fn derive_features(facts: &NodeFacts, arch: &str, labels: &mut Derivation) {
    let policy_holds = |feature: &&PolicyFeature| match feature.policy.as_deref() {
        Some("require") => true,
        Some("") | None => arch == "s390x",
        Some(_) => false,
    };
    let features = facts
        .baseline_cpu
        .iter()
        .flat_map(|cpu| &cpu.features)
        .filter(policy_holds);
    labels.add_all(
        "cpu-feature.node.kubevirt.io",
        features.map(|feature| feature.name.as_str()),
    );
}

fn derive_models(document: &DomainCapabilities, policy: &Policy, labels: &mut Derivation) {
    let offered = |model: &&CpuModel| !is_obsolete(&model.name, policy);
    let known = || {
        document
            .cpu
            .models
            .iter()
            .filter(|m| m.usable.is_some())
            .filter(offered)
    };
    // KubeVirt treats `unknown` as usable.
    let usable = known().filter(|model| model.usable != Some(Usable::No));
    labels.add_all(
        "cpu-model.node.kubevirt.io",
        usable.map(|model| model.name.as_str()),
    );
    labels.add_all(
        "cpu-model-migration.node.kubevirt.io",
        known().map(|model| model.name.as_str()),
    );
}

fn derive_host_model(
    document: &DomainCapabilities,
    arch: &str,
    policy: &Policy,
    labels: &mut Derivation,
) {
    let Some(host_model) = &document.cpu.host_model else {
        return;
    };
    let default_vendor = (arch == "s390x").then_some("IBM");
    if let Some(vendor) = host_model.vendor.as_deref().or(default_vendor) {
        labels.add("cpu-vendor.node.kubevirt.io", vendor, "true");
    }
    if let Some(model) = &host_model.model {
        labels.add("host-model-cpu.node.kubevirt.io", model, "true");
        // KubeVirt evaluates only a configured list here, not the default (node_labeller.go:278).
        let obsolete = policy
            .obsolete_cpu_models
            .as_ref()
            .is_some_and(|m| m.contains(model));
        labels.add_if(obsolete, "node-labeller.kubevirt.io", "obsolete-host-model");
    }
    let required = host_model
        .features
        .iter()
        .filter(|f| f.policy.as_deref() == Some("require"));
    labels.add_all(
        "host-model-required-features.node.kubevirt.io",
        required.map(|feature| feature.name.as_str()),
    );
}

fn derive_security(document: &DomainCapabilities, labels: &mut Derivation) {
    let es_guests = document.sev.as_ref().and_then(|sev| sev.max_es_guests);
    let es = es_guests.is_some_and(|guests| guests > 0);
    labels.add_if(document.sev.is_some(), "kubevirt.io", "sev");
    labels.add_if(es, "kubevirt.io", "sev-es");
    labels.add_if(es && document.launches("sev-snp"), "kubevirt.io", "sev-snp");
    labels.add_if(document.has_feature("s390-pv"), "kubevirt.io", "s390-pv");
    labels.add_if(document.has_feature("tdx"), "kubevirt.io", "tdx");
}

fn derive_timer(facts: &NodeFacts, labels: &mut Derivation) {
    let capabilities = facts.capabilities.as_ref();
    let tsc = capabilities.and_then(|capabilities| capabilities.host.cpu.as_ref()?.tsc);
    let prefix = "cpu-timer.node.kubevirt.io";
    let scalable = tsc.map(|tsc| tsc.scaling == Some(true));
    labels.add_some(prefix, "tsc-frequency", tsc.map(|tsc| tsc.frequency_hz));
    labels.add_some(prefix, "tsc-scalable", scalable);
}

fn is_obsolete(model: &str, policy: &Policy) -> bool {
    match &policy.obsolete_cpu_models {
        Some(models) => models.contains(model),
        None => {
            let base = model.strip_suffix("-v1").unwrap_or(model);
            DEFAULT_OBSOLETE_CPU_MODELS.contains(&base)
        }
    }
}
