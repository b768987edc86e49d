//! What a node's labels say that it has.

use std::collections::BTreeMap;

use super::{Offer, OfferedMachine, listed_or_unknown};
use crate::capability::{
    Accelerator, CpuModel, CpuModes, Eim, HostModel, PlainMode, Usable, VcpuMax, Version, is_q35,
};
use crate::compat::{NodeLabels, Requirement};
use crate::label::prefix::{
    CPU_FEATURE, CPU_MODEL, HYPERV, MACHINE, MACHINE_ALIAS, MACHINE_DEPRECATED, NODE,
};

/// The label in which the kubelet says the architecture, in Go's spelling.
pub(crate) const ARCH_LABEL: &str = "kubernetes.io/arch";

/// What Go calls an architecture of libvirt's.
pub(crate) fn go_arch(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "i686" => "386",
        "aarch64" => "arm64",
        "armv7l" | "armv6l" => "arm",
        "loongarch64" => "loong64",
        other => other,
    }
}

/// What libvirt calls it.
fn libvirt_arch(arch: &str) -> &str {
    match arch {
        "amd64" => "x86_64",
        "386" => "i686",
        "arm64" => "aarch64",
        "arm" => "armv7l",
        "loong64" => "loongarch64",
        other => other,
    }
}

/// The highest maximum without extended interrupt mode that libvirt adds by itself; where a label
/// says so, the machine type may have more for a domain that brings it.
const WITHOUT_EIM: u32 = 255;
/// The first libvirt with the CPU mode `maximum` (NEWS of 7.1.0).
const KNOWS_MAXIMUM: Version = Version::new(7, 1, 0);
/// The first maximum that a version 2 GIC cannot have.
const NEEDS_GIC_V3: u32 = 9;

impl Offer {
    /// What a node's labels in our own schema say that it has for this domain: they speak of
    /// guests of the host's own architecture and of the best domain type.
    ///
    /// A machine type's maximum is the effective one, in which the limits of KVM, of APIC IDs and
    /// of the interrupt controller are counted already.
    pub fn from_labels(labels: &NodeLabels, domain: &Requirement) -> Self {
        let of = |name: &str| labels.get(&format!("{NODE}/{name}")).map(String::as_str);
        let told = labels
            .get(ARCH_LABEL)
            .map(|arch| libvirt_arch(arch).to_owned());
        let arch = domain.arch.clone().or(told);
        let eim = of("eim").and_then(|word| word.parse().ok());
        let versions = ["libvirt-version", "qemu-version"].map(|name| of(name)?.parse().ok());
        let mut offer = Self {
            native_arch: arch.clone(),
            arch,
            virt_type: domain.virt_type.clone(),
            virt_types: of("accelerator").map(|word| vec![domain_type(word).to_owned()]),
            libvirt_version: versions[0],
            qemu_version: versions[1],
            accelerator_max: VcpuMax::Unlimited,
            eim,
            iommufd: of("iommu-groups").map(|_| of("iommufd").is_some()),
            vfio: of("iommu-groups")
                .map(|groups| of("vfio").is_some() && groups.parse::<u32>().unwrap_or(0) > 0),
            launch_security: of("accelerator").map(|_| confidential(labels)),
            ..Self::default()
        };
        offer.take_machine_labels(labels, domain);
        offer.take_cpu_labels(labels, domain);
        offer
    }

    fn take_machine_labels(&mut self, labels: &NodeLabels, domain: &Requirement) {
        for (alias, canonical) in family(labels, MACHINE_ALIAS) {
            self.aliases.insert(alias.to_owned(), canonical.to_owned());
        }
        let mut machines = BTreeMap::new();
        for (name, value) in family(labels, MACHINE) {
            let max_vcpus = match value.parse().map(VcpuMax::from_number) {
                // Cut only for want of what the domain may bring itself.
                Ok(VcpuMax::AtMost(WITHOUT_EIM))
                    if domain.vcpus.maximum > u64::from(WITHOUT_EIM)
                        && is_q35(name)
                        && self.eim != Some(Eim::Auto) =>
                {
                    VcpuMax::Unknown
                }
                Ok(max) => max,
                Err(_) => VcpuMax::Unknown,
            };
            let deprecated = labels.contains_key(&format!("{MACHINE_DEPRECATED}/{name}"));
            let machine = OfferedMachine {
                max_vcpus,
                deprecated,
            };
            machines.insert(name.to_owned(), machine);
        }
        let machine = domain.machine_on(self.arch.as_deref());
        let max = machine.and_then(|name| machines.get(self.canonical(name)));
        // Where only version 2 is to be had, that is counted in the maximum.
        let has_v3 = max.and_then(|machine| machine.max_vcpus.number()) >= Some(NEEDS_GIC_V3);
        self.gic_versions = has_v3.then(|| vec!["2".to_owned(), "3".to_owned()]);
        self.machines = Some(machines).filter(|machines| !machines.is_empty());
    }

    fn take_cpu_labels(&mut self, labels: &NodeLabels, domain: &Requirement) {
        let of = |name: &str| labels.get(&format!("{NODE}/{name}")).cloned();
        if !labels.contains_key(&format!("{NODE}/accelerator")) {
            return;
        }
        let mut models: Vec<CpuModel> = family(labels, CPU_MODEL)
            .map(|(name, _)| CpuModel {
                name: name.to_owned(),
                usable: Some(Usable::Yes),
                ..CpuModel::default()
            })
            .collect();
        if let Some(name) = &domain.cpu.model
            && models.iter().all(|model| model.name != *name)
        {
            models.push(CpuModel {
                name: name.clone(),
                // NodeLabels do not name what keeps it from being usable, which the domain may do
                // without.
                usable: Some(match domain.cpu.tolerates_missing_features() {
                    true => Usable::Unknown,
                    false => Usable::No,
                }),
                ..CpuModel::default()
            });
        }
        let accelerated = of("accelerator").as_deref() != Some(Accelerator::Tcg.as_str());
        self.cpu = Some(CpuModes::of_summary(
            of("host-model"),
            of("cpu-vendor"),
            models,
            accelerated,
            self.libvirt_version,
        ));
        let names = |prefix| listed_or_unknown(family(labels, prefix).map(|(name, _)| name));
        self.cpu_features = names(CPU_FEATURE);
        self.enlightenments = names(HYPERV);
    }
}

impl CpuModes {
    /// The CPU modes of a node of which only a summary is told.
    pub(crate) fn of_summary(
        host_model: Option<String>,
        vendor: Option<String>,
        models: Vec<CpuModel>,
        accelerated: bool,
        libvirt: Option<Version>,
    ) -> Self {
        let plain = |supported| PlainMode {
            supported,
            migratable: true,
        };
        Self {
            host_passthrough: Some(plain(accelerated)),
            maximum: Some(plain(libvirt.is_none_or(|have| have >= KNOWS_MAXIMUM))),
            host_model: Some(HostModel {
                supported: host_model.is_some(),
                model: host_model,
                vendor,
                ..HostModel::default()
            }),
            custom: Some(true),
            models,
        }
    }
}

/// The labels under a prefix: names and values.
pub(crate) fn family<'l>(
    labels: &'l NodeLabels,
    prefix: &'l str,
) -> impl Iterator<Item = (&'l str, &'l str)> {
    let first = format!("{prefix}/");
    labels.range(first..).map_while(move |(key, value)| {
        let name = key.strip_prefix(prefix)?.strip_prefix('/')?;
        Some((name, value.as_str()))
    })
}

/// The domain type behind an accelerator's word.
fn domain_type(accelerator: &str) -> &str {
    match accelerator {
        "tcg" => "qemu",
        "mshv" => "hyperv",
        other => other,
    }
}

fn confidential(labels: &NodeLabels) -> Vec<String> {
    let there = |kind: &&str| labels.contains_key(&format!("{NODE}/{kind}"));
    let kinds = ["sev", "sev-snp", "tdx", "s390-pv"].into_iter();
    kinds.filter(there).map(str::to_owned).collect()
}
