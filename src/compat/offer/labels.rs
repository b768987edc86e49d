//! Builds an [`Offer`] from a node's labels.

use std::collections::BTreeMap;

use super::{Offer, OfferedMachine, OfferedTsc, listed_or_unknown};
use crate::capability::{
    Accelerator, CpuModel, CpuModes, Eim, HostModel, PlainMode, TscCounter, Usable, VcpuMax,
    Version, is_q35,
};
use crate::compat::Requirement;
use crate::label::prefix::{
    CPU_FEATURE, CPU_MODEL, HYPERV, MACHINE, MACHINE_ALIAS, MACHINE_DEPRECATED, NODE,
};

/// A node's labels.
pub type NodeLabels = BTreeMap<String, String>;

/// The kubelet's label with the architecture by Go's name.
pub(crate) const ARCH_LABEL: &str = "kubernetes.io/arch";

/// Returns Go's name of libvirt's architecture.
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

/// Returns libvirt's name of Go's architecture.
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

/// A label's maximum if libvirt does not add extended interrupt mode. A domain that configures it
/// may have more.
const MAX_WITHOUT_EIM: u32 = 255;
/// First libvirt with the CPU mode `maximum` (NEWS of 7.1.0).
const FIRST_WITH_MAXIMUM: Version = Version::new(7, 1, 0);
/// Lowest maximum of vCPUs that requires a version 3 GIC.
const MIN_VCPUS_OF_GIC_V3: u32 = 9;

impl Offer {
    /// Returns the offer of virtnode's own labels. They describe guests of the host's architecture
    /// and best domain type.
    ///
    /// The label's maximum of a machine type already includes the limits of KVM, of APIC IDs and of
    /// the interrupt controller.
    pub fn from_labels(labels: &NodeLabels, domain: &Requirement) -> Self {
        let of = |name: &str| labels.get(&format!("{NODE}/{name}")).map(String::as_str);
        let host = labels
            .get(ARCH_LABEL)
            .map(|arch| libvirt_arch(arch).to_owned());
        let arch = domain.arch.clone().or(host);
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
            tsc: match of("tsc-frequency-hz").and_then(|hz| hz.parse().ok()) {
                Some(frequency_hz) => OfferedTsc::Measured(TscCounter {
                    frequency_hz,
                    // libvirt accepts any frequency unless it knows that scaling is impossible.
                    scaling: Some(of("tsc-scaling") != Some("false")),
                }),
                None => OfferedTsc::Unmeasured,
            },
            ..Self::default()
        };
        offer.read_machines(labels, domain);
        offer.read_cpu(labels, domain);
        offer
    }

    fn read_machines(&mut self, labels: &NodeLabels, domain: &Requirement) {
        for (alias, canonical) in family(labels, MACHINE_ALIAS) {
            self.aliases.insert(alias.to_owned(), canonical.to_owned());
        }
        let mut machines = BTreeMap::new();
        for (name, value) in family(labels, MACHINE) {
            let max_vcpus = match value.parse().map(VcpuMax::from_number) {
                // The limit applies only if the domain does not configure extended interrupt mode.
                Ok(VcpuMax::AtMost(MAX_WITHOUT_EIM))
                    if domain.vcpus.maximum > u64::from(MAX_WITHOUT_EIM)
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
        // The maximum includes the limit of a version 2 controller.
        let has_v3 =
            max.and_then(|machine| machine.max_vcpus.number()) >= Some(MIN_VCPUS_OF_GIC_V3);
        self.gic_versions = has_v3.then(|| vec!["2".to_owned(), "3".to_owned()]);
        self.machines = Some(machines).filter(|machines| !machines.is_empty());
    }

    fn read_cpu(&mut self, labels: &NodeLabels, domain: &Requirement) {
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
                // Labels do not list the missing features, which the domain may tolerate.
                usable: Some(if domain.cpu.tolerates_missing_features() {
                    Usable::Unknown
                } else {
                    Usable::No
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
    /// Returns the CPU modes of a node from a summary, without features and blockers.
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
            maximum: Some(plain(libvirt.is_none_or(|have| have >= FIRST_WITH_MAXIMUM))),
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

/// Returns names and values of the labels under a prefix.
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

/// Returns the domain type of an accelerator's label value.
fn domain_type(accelerator: &str) -> &str {
    match accelerator {
        "tcg" => "qemu",
        "mshv" => "hyperv",
        other => other,
    }
}

fn confidential(labels: &NodeLabels) -> Vec<String> {
    let has = |kind: &&str| labels.contains_key(&format!("{NODE}/{kind}"));
    let kinds = ["sev", "sev-snp", "tdx", "s390-pv"].into_iter();
    kinds.filter(has).map(str::to_owned).collect()
}
