//! The native schema, described in docs/labels.md.

use super::prefix::{CPU_FEATURE, CPU_MODEL, HYPERV, NODE};
use super::{Derivation, Policy};
use crate::capability::{
    CanonicalMachine, DomainCapabilities, IommuKind, NodeFacts, Usable, VcpuMax,
};

pub(super) fn derive(facts: &NodeFacts, policy: &Policy, labels: &mut Derivation) {
    if let Some(arch) = facts.native_arch() {
        let largest = derive_machines(facts, arch, "", labels);
        labels.add_some(NODE, "max-vcpus", largest.number());
        for foreign in policy
            .guest_architectures
            .iter()
            .filter(|other| *other != arch)
        {
            // A prefix is a DNS name, which cannot contain '_': x86_64 becomes x86-64.
            let infix = format!(".{}", foreign.replace('_', "-"));
            derive_machines(facts, foreign, &infix, labels);
        }
    }
    labels.add_some(NODE, "accelerator", facts.accelerator());
    if let Some(document) = facts.primary_document() {
        derive_cpu(document, policy, labels);
    }
    for kind in facts.security() {
        labels.add(NODE, kind, "true");
    }
    labels.add_all(CPU_FEATURE, facts.cpu_features());
    labels.add_all(HYPERV, facts.enlightenments());
    labels.add_some(NODE, "eim", facts.eim());
    labels.add_some(NODE, "libvirt-version", facts.libvirt_version);
    labels.add_some(NODE, "qemu-version", facts.qemu_version());
    derive_host(facts, labels);
}

/// Adds the machine types of an architecture under `machine<infix>.virtnode.io`. Returns the largest
/// maximum of those that are not deprecated.
fn derive_machines(facts: &NodeFacts, arch: &str, infix: &str, labels: &mut Derivation) -> VcpuMax {
    let [machine_key, alias_key, deprecated_key] =
        ["machine", "machine-alias", "machine-deprecated"]
            .map(|family| format!("{family}{infix}.virtnode.io"));
    let machines = facts.machines(arch);
    for alias in machines
        .iter()
        .filter(|machine| machine.canonical.is_some())
    {
        labels.add(&alias_key, &alias.name, alias.canonical_name());
    }
    let canonical = facts.canonical_machines(arch, &machines);
    for machine in &canonical {
        labels.add(
            &machine_key,
            machine.name,
            &machine.effective_max.to_string(),
        );
        labels.add_if(machine.deprecated, &deprecated_key, machine.name);
    }
    CanonicalMachine::largest_max(&canonical)
}

fn derive_cpu(document: &DomainCapabilities, policy: &Policy, labels: &mut Derivation) {
    let obsolete = |name: &str| {
        policy
            .obsolete_cpu_models
            .as_ref()
            .is_some_and(|models| models.contains(name))
    };
    let usable = document
        .cpu
        .models
        .iter()
        .filter(|model| model.usable == Some(Usable::Yes));
    labels.add_all(
        CPU_MODEL,
        usable
            .map(|model| model.name.as_str())
            .filter(|name| !obsolete(name)),
    );
    let host_model = document.cpu.host_model.as_ref();
    let host_model = host_model.filter(|host_model| host_model.supported);
    labels.add_some(
        NODE,
        "host-model",
        host_model.and_then(|h| h.model.as_ref()),
    );
    labels.add_some(
        NODE,
        "cpu-vendor",
        host_model.and_then(|h| h.vendor.as_ref()),
    );
}

/// Adds labels about the time stamp counter, the IOMMU and nesting. Without facts of the host, only
/// libvirt's document is available.
fn derive_host(facts: &NodeFacts, labels: &mut Derivation) {
    let host = facts
        .capabilities
        .as_ref()
        .map(|capabilities| &capabilities.host);
    let tsc = host.and_then(|host| host.cpu.as_ref()?.tsc);
    labels.add_some(NODE, "tsc-frequency-hz", tsc.map(|tsc| tsc.frequency_hz));
    labels.add_some(NODE, "tsc-scaling", tsc.and_then(|tsc| tsc.scaling));
    match &facts.host {
        Some(host) => {
            labels.add(NODE, "iommu", host.iommu.as_str());
            labels.add(NODE, "iommu-groups", &host.iommu_groups.to_string());
            labels.add_if(host.vfio, NODE, "vfio");
            labels.add_if(host.iommufd, NODE, "iommufd");
            labels.add_if(host.nested, NODE, "nested");
        }
        // libvirt's "yes" does not name the kind, but "no" is unambiguous.
        None if host.is_some_and(|host| host.iommu == Some(false)) => {
            labels.add(NODE, "iommu", IommuKind::None.as_str());
        }
        None => {}
    }
}
