//! Conversion of facts into the status of a `NodeVirtualization`. Pure.

use std::collections::BTreeMap;

use crate::capability::{CanonicalMachine, CpuModel, HostFacts, NodeFacts, Usable, VcpuMax};
use crate::cluster::objects::node_virtualization::{
    CpuModelStatus, CpuStatus, GuestStatus, IommuStatus, LabelHolder, MachineStatus,
    NodeVirtualizationStatus, TscStatus, VersionsStatus,
};
use crate::label::{RetainedLabel, RetentionReason};
use crate::probe::DomainUsage;

/// Maximum number of listed domains, to bound the object's size.
const HOLDERS_MAX: usize = 32;
/// Maximum characters of a domain's name, which its owner chooses.
const NAME_MAX: usize = 100;

/// Returns the status without conditions and times. Machine types are listed for the host's
/// architecture and for `architectures`.
pub(super) fn describe(facts: &NodeFacts, architectures: &[String]) -> NodeVirtualizationStatus {
    let arch = facts.native_arch();
    let host = facts.host.as_ref();
    let capabilities = facts.capabilities.as_ref();
    let text = |version: Option<crate::capability::Version>| version.map(|v| v.to_string());
    let guests = guests(facts, architectures);
    let largest = capabilities.and(arch).map(|arch| {
        let machines = facts.machines(arch);
        CanonicalMachine::largest_max(&facts.canonical_machines(arch, &machines))
    });
    NodeVirtualizationStatus {
        architecture: arch.map(str::to_owned),
        accelerator: facts.accelerator().map(|found| found.as_str().to_owned()),
        max_vcpus: largest.and_then(VcpuMax::number),
        kvm_max_vcpus: facts.kvm_max_vcpus,
        eim: facts.eim().map(|eim| eim.as_str().to_owned()),
        versions: VersionsStatus {
            virtnode: Some(env!("CARGO_PKG_VERSION").to_owned()),
            libvirt: text(facts.libvirt_version),
            qemu: text(facts.qemu_version()),
        },
        iommu: host.map(iommu),
        nested: host.map(|host| host.nested),
        tsc: capabilities
            .and_then(|capabilities| capabilities.host.cpu.as_ref()?.tsc)
            .map(|tsc| TscStatus {
                frequency_hz: tsc.frequency_hz,
                scaling: tsc.scaling,
            }),
        security: owned(&facts.security()),
        cpu: cpu(facts),
        guests,
        ..NodeVirtualizationStatus::default()
    }
}

/// Returns the running domains that depend on retained labels, or may depend on them since they
/// cannot be read, sorted by name.
pub(super) fn label_holders(
    retained: &[RetainedLabel],
    domains: &[DomainUsage],
) -> Vec<LabelHolder> {
    let kept = || {
        retained
            .iter()
            .filter(|label| label.reason != RetentionReason::AwaitingSecondProbe)
    };
    let holder = |domain: &DomainUsage| {
        let labels = kept().filter(|label| domain.in_use.may_include(&label.key));
        LabelHolder {
            domain: domain.id.display_name().chars().take(NAME_MAX).collect(),
            uuid: domain.id.uuid.clone(),
            labels: labels.map(|label| label.key.to_string()).collect(),
        }
    };
    let mut holders: Vec<LabelHolder> = domains
        .iter()
        .map(holder)
        .filter(|holder| !holder.labels.is_empty())
        .collect();
    holders.sort_by(|a, b| (&a.domain, &a.uuid).cmp(&(&b.domain, &b.uuid)));
    holders.truncate(HOLDERS_MAX);
    holders
}

fn iommu(host: &HostFacts) -> IommuStatus {
    IommuStatus {
        kind: host.iommu.as_str().to_owned(),
        groups: host.iommu_groups,
        vfio: host.vfio,
        iommufd: host.iommufd,
    }
}

fn cpu(facts: &NodeFacts) -> CpuStatus {
    let Some(document) = facts.primary_document() else {
        return CpuStatus::default();
    };
    let host_model = document.cpu.host_model.as_ref();
    let host_model = host_model.filter(|host_model| host_model.supported);
    let models = models(&document.cpu.models);
    let usable = models.iter().filter(|model| model.usable == "yes").count();
    CpuStatus {
        vendor: host_model.and_then(|model| model.vendor.clone()),
        host_model: host_model.and_then(|model| model.model.clone()),
        usable_models: u32::try_from(usable).ok(),
        models,
        features: owned(&facts.cpu_features()),
        hyperv: owned(&facts.enlightenments()),
    }
}

fn models(models: &[CpuModel]) -> Vec<CpuModelStatus> {
    let by_name: BTreeMap<&str, &CpuModel> = models.iter().map(|m| (m.name.as_str(), m)).collect();
    let describe = |model: &CpuModel| {
        let canonical = model
            .canonical
            .as_deref()
            .and_then(|name| by_name.get(name));
        // libvirt lists the same blockers for an alias and its model.
        let is_repetition = canonical.is_some_and(|it| it.blockers == model.blockers);
        CpuModelStatus {
            name: model.name.clone(),
            usable: model.usable.unwrap_or(Usable::Unknown).to_string(),
            alias_of: model.canonical.clone(),
            deprecated: model.deprecated,
            blockers: if is_repetition {
                Vec::new()
            } else {
                model.blockers.clone()
            },
        }
    };
    models.iter().map(describe).collect()
}

/// Returns the guest architectures, the host's own first, then by name.
fn guests(facts: &NodeFacts, architectures: &[String]) -> Vec<GuestStatus> {
    let native = facts.native_arch();
    let listed = facts.capabilities.iter().flat_map(|c| &c.guests);
    let mut archs: Vec<&str> = listed.map(|guest| guest.arch.as_str()).collect();
    archs.sort_unstable_by_key(|arch| (Some(*arch) != native, *arch));
    archs.dedup();
    let with_machines =
        |arch: &str| Some(arch) == native || architectures.iter().any(|it| it == arch);
    archs
        .into_iter()
        .map(|arch| guest(facts, arch, with_machines(arch)))
        .collect()
}

fn guest(facts: &NodeFacts, arch: &str, with_machines: bool) -> GuestStatus {
    let best = facts.best_domain_type(arch);
    let listed = facts.capabilities.iter().flat_map(|c| &c.guests);
    let offered = listed
        .filter(|guest| guest.arch == arch)
        .flat_map(|guest| &guest.domains);
    let mut domain_types: Vec<&str> = offered.map(|domain| domain.virt_type.as_str()).collect();
    domain_types.sort_unstable_by_key(|virt_type| (Some(*virt_type) != best, *virt_type));
    domain_types.dedup();
    let machines = facts.machines(arch);
    let canonical = facts.canonical_machines(arch, &machines);
    let machine = |it: &CanonicalMachine<'_>| {
        let same = || machines.iter().filter(|m| m.canonical_name() == it.name);
        let by_qemu = same()
            .map(|m| m.max_vcpus)
            .fold(VcpuMax::Unknown, VcpuMax::min);
        let max_vcpus = it.effective_max.number();
        MachineStatus {
            name: it.name.to_owned(),
            max_vcpus,
            qemu_max_vcpus: by_qemu.number().filter(|max| Some(*max) != max_vcpus),
            aliases: same()
                .filter(|m| m.canonical.is_some())
                .map(|m| m.name.clone())
                .collect(),
            deprecated: it.deprecated,
        }
    };
    GuestStatus {
        architecture: arch.to_owned(),
        domain_types: owned(&domain_types),
        machines: if with_machines {
            canonical.iter().map(machine).collect()
        } else {
            Vec::new()
        },
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
