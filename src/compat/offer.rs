//! [`Offer`]: the properties of a node for domains of one architecture and domain type.

mod labels;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub use self::labels::NodeLabels;
pub(crate) use self::labels::{ARCH_LABEL, family, go_arch};
use crate::capability::{
    CpuDefinition, CpuModes, DomainCapabilities, Eim, HostFacts, NodeFacts, Pages, PolicyFeature,
    Section, TscCounter, VcpuMax, Version, is_q35, is_x86,
};
use crate::compat::Requirement;
use crate::domain::IdSet;
use crate::units::{Bytes, KiB};

/// The properties of a node for domains of one architecture and domain type. `None` means unknown,
/// never absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    /// The guest architecture.
    pub arch: Option<String>,
    /// The host's architecture.
    pub native_arch: Option<String>,
    pub virt_type: Option<String>,
    /// The domain types of the architecture, the best first; empty without an emulator for it.
    pub virt_types: Option<Vec<String>>,
    pub libvirt_version: Option<Version>,
    pub qemu_version: Option<Version>,
    /// The emulator's path, for libvirt's messages.
    pub emulator: Option<String>,
    /// Machine types by canonical name.
    pub machines: Option<BTreeMap<String, OfferedMachine>>,
    /// Canonical names by alias.
    pub aliases: BTreeMap<String, String>,
    /// The accelerator's maximum number of vCPUs.
    pub accelerator_max: VcpuMax,
    /// A number of vCPUs that the accelerator supports, if the maximum is unknown.
    pub accelerator_supports: Option<u32>,
    /// The machine type that the domain capabilities describe.
    pub described_machine: Option<String>,
    /// The abilities of devices in the domain capabilities, by element.
    pub devices: Option<BTreeMap<String, Section>>,
    /// True if the PS/2 controller can be configured.
    pub ps2: Option<bool>,
    /// The host's CPU, with the features that the hypervisor does not give to guests.
    pub host_cpu: Option<OfferedHostCpu>,
    /// The numbers of the host's CPUs.
    pub host_cpus: Option<IdSet>,
    /// The numbers of the host's NUMA nodes.
    pub host_nodes: Option<IdSet>,
    /// Maximum number of physical address bits of a guest.
    pub physical_address_bits: Option<u32>,
    /// The host's time stamp counter.
    pub tsc: OfferedTsc,
    /// The way in which a domain gets extended interrupt mode.
    pub eim: Option<Eim>,
    /// The available versions of Arm's interrupt controller.
    pub gic_versions: Option<Vec<String>>,
    /// CPU modes, and models with their blockers.
    pub cpu: Option<CpuModes>,
    /// The complete list of CPU features of the hypervisor; see [`Offer::gives`].
    pub cpu_features: Option<BTreeSet<String>>,
    /// The Hyper-V enlightenments of the hypervisor; see [`Offer::enlightens`].
    pub enlightenments: Option<BTreeSet<String>>,
    /// Firmware and loader.
    pub os: Option<Section>,
    /// The supported sources of memory: `memfd`, `file` …
    pub memory_sources: Option<Vec<String>>,
    /// The supported types of confidential guests.
    pub launch_security: Option<Vec<String>>,
    /// The memory of all NUMA cells.
    pub memory: Option<Bytes>,
    /// The reserved pages of each size, in all NUMA cells.
    pub pages: Option<BTreeMap<Bytes, u64>>,
    /// True if PCI devices can be passed through: the host has VFIO and an active IOMMU.
    pub vfio: Option<bool>,
    pub iommufd: Option<bool>,
}

/// The host's CPU in `<capabilities>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OfferedHostCpu {
    /// The named model that libvirt found closest.
    pub model: String,
    /// The features that the model lacks.
    pub features: BTreeSet<String>,
}

/// The host's time stamp counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum OfferedTsc {
    #[default]
    Unknown,
    /// libvirt did not measure it, and then accepts every frequency.
    Unmeasured,
    Measured(TscCounter),
}

/// A machine type of an [`Offer`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OfferedMachine {
    /// The machine type's own maximum, without the accelerator's.
    pub max_vcpus: VcpuMax,
    pub deprecated: bool,
}

impl Offer {
    /// Returns what a node offers to a domain. Of several documents, the one of the domain's machine
    /// type counts.
    pub fn for_domain(facts: &NodeFacts, domain: &Requirement) -> Self {
        let arch = domain.arch.as_deref().or_else(|| facts.native_arch());
        let machine = domain.machine_on(arch);
        Self::new(facts, arch, domain.virt_type.as_deref(), machine)
    }

    /// Returns the offer of a node, by default for its own architecture and best domain type, for
    /// its usual machine type.
    pub fn from_facts(facts: &NodeFacts, arch: Option<&str>, virt_type: Option<&str>) -> Self {
        Self::new(facts, arch, virt_type, None)
    }

    fn new(
        facts: &NodeFacts,
        arch: Option<&str>,
        virt_type: Option<&str>,
        machine: Option<&str>,
    ) -> Self {
        let arch = arch.or_else(|| facts.native_arch());
        let virt_type = virt_type.or_else(|| arch.and_then(|arch| facts.best_domain_type(arch)));
        let mut offer = Self {
            arch: arch.map(str::to_owned),
            native_arch: facts.native_arch().map(str::to_owned),
            virt_type: virt_type.map(str::to_owned),
            libvirt_version: facts.libvirt_version,
            qemu_version: facts.qemu_version(),
            ..Self::default()
        };
        if let Some(arch) = arch {
            offer.read_guests(facts, arch);
            offer.read_documents(facts, arch, machine);
            if is_x86(arch) {
                offer.eim = facts.eim();
            }
            offer.accelerator_max = match virt_type {
                Some("kvm") => facts.accelerator_limit(arch, &facts.machines(arch)),
                _ => VcpuMax::Unknown,
            };
        }
        offer.read_host(facts);
        if offer.arch.is_some() && offer.arch == offer.native_arch {
            offer.read_host_cpu(facts);
        }
        offer
    }

    /// True if the domain capabilities describe the domain's machine type.
    pub fn describes(&self, domain: &Requirement) -> bool {
        let wanted = domain.machine_on(self.arch.as_deref());
        let wanted = wanted.map(|machine| self.canonical(machine));
        wanted.is_none() || wanted == self.described_machine.as_deref()
    }

    /// True if the hypervisor supports a CPU feature; `None` if that is unknown.
    ///
    /// Without a complete list, the documents still imply some features: one that the host model
    /// adds is supported, and one that blocks a named model is not.
    pub fn gives(&self, feature: &str) -> Option<bool> {
        if let Some(all) = &self.cpu_features {
            return Some(all.contains(feature));
        }
        let modes = self.cpu.as_ref()?;
        let in_host_model = modes
            .host_model
            .iter()
            .flat_map(|host_model| &host_model.features)
            .find(|have| have.name == feature);
        match in_host_model.map(|have| have.policy.as_deref()) {
            Some(None | Some("require" | "force")) => return Some(true),
            Some(Some("disable" | "forbid")) => return Some(false),
            _ => {}
        }
        let blocks = |name: &String| name == feature;
        let mut models = modes.models.iter();
        models
            .any(|model| model.blockers.iter().any(blocks))
            .then_some(false)
    }

    /// True if the hypervisor supports a Hyper-V enlightenment; `None` if that is unknown.
    ///
    /// libvirt's list is complete and always contains spinlocks, which are only a value. A list
    /// without them comes from KVM, for a libvirt before 9.0, and is not complete.
    pub fn enlightens(&self, name: &str) -> Option<bool> {
        let all = self.enlightenments.as_ref()?;
        let is_complete = all.contains("spinlocks");
        Some(all.contains(name)).filter(|is_listed| *is_listed || is_complete)
    }

    /// Sets the CPU features from the output of hypervisor-cpu-baseline for this architecture and
    /// domain type.
    pub fn set_features(&mut self, baseline: &CpuDefinition) {
        let is_given = |feature: &&PolicyFeature| {
            matches!(feature.policy.as_deref(), None | Some("require" | "force"))
        };
        let given = baseline.features.iter().filter(is_given);
        self.cpu_features = Some(given.map(|feature| feature.name.clone()).collect());
    }

    /// Returns the canonical name of a machine type or alias.
    pub fn canonical<'n>(&'n self, machine: &'n str) -> &'n str {
        self.aliases.get(machine).map_or(machine, String::as_str)
    }

    fn read_guests(&mut self, facts: &NodeFacts, arch: &str) {
        let Some(capabilities) = &facts.capabilities else {
            return;
        };
        let guests = || capabilities.guests.iter().filter(|g| g.arch == arch);
        let mut types: Vec<String> = Vec::new();
        for domain in guests().flat_map(|guest| &guest.domains) {
            if !types.contains(&domain.virt_type) {
                types.push(domain.virt_type.clone());
            }
        }
        self.virt_types = Some(types);
        self.emulator = guests().find_map(|guest| guest.emulator.clone());
        let mut machines: BTreeMap<String, OfferedMachine> = BTreeMap::new();
        for machine in facts.machines(arch) {
            let offered = machines
                .entry(machine.canonical_name().to_owned())
                .or_default();
            offered.max_vcpus = offered.max_vcpus.min(machine.max_vcpus);
            offered.deprecated |= machine.deprecated;
            if let Some(canonical) = machine.canonical {
                self.aliases.insert(machine.name, canonical);
            }
        }
        self.machines = Some(machines);
    }

    /// Reads the domain capabilities of this architecture and domain type.
    fn read_documents(&mut self, facts: &NodeFacts, arch: &str, machine: Option<&str>) {
        let matches = |have: &Option<String>, wanted: Option<&str>| {
            have.is_none() || wanted.is_none() || have.as_deref() == wanted
        };
        let documents = || {
            facts.domain_capabilities.iter().filter(|document| {
                matches(&document.arch, Some(arch))
                    && matches(&document.virt_type, self.virt_type.as_deref())
            })
        };
        let machines: Vec<_> = documents()
            .filter_map(|document| {
                // For kvm the number includes KVM's limit, which `accelerator_max` holds.
                let max = match document.virt_type.as_deref() {
                    Some("kvm") => VcpuMax::Unknown,
                    _ => document.max_vcpus,
                };
                Some((document.machine.clone()?, max))
            })
            .collect();
        let wanted = machine.map(|machine| self.canonical(machine).to_owned());
        let first =
            documents().min_by(|a, b| rank(a, wanted.as_deref()).cmp(&rank(b, wanted.as_deref())));
        let Some(document) = first else {
            return;
        };
        if document.virt_type.as_deref() == Some("kvm") {
            // A document's number is the lower of KVM's and the machine type's.
            let numbers = documents().filter_map(|document| document.max_vcpus.number());
            self.accelerator_supports = numbers.max();
        }
        self.described_machine = document.machine.clone();
        self.devices = Some(document.devices.clone()).filter(|devices| !devices.is_empty());
        self.ps2 = document.features.get("ps2").and_then(|ps2| ps2.supported);
        let emulator = document.emulator.clone();
        self.cpu = Some(document.cpu.clone());
        self.os = document.os.supported.map(|_| document.os.clone());
        self.memory_sources = document
            .memory_backing
            .supported
            .map(|_| listed(&document.memory_backing, "sourceType"));
        self.launch_security = document
            .features
            .get("launchSecurity")
            .map(|section| listed_if_supported(section, "sectype"))
            .or_else(|| launch_security_before_10_5(document));
        self.gic_versions = document
            .features
            .get("gic")
            .map(|section| listed_if_supported(section, "version"));
        // The baseline is that of the native architecture and best domain type. The features of the
        // host model alone are not complete: they only extend those of its named model.
        let best = facts.best_domain_type(arch) == self.virt_type.as_deref();
        if best && facts.native_arch() == Some(arch) && facts.baseline_cpu.is_some() {
            let features = facts.cpu_features().into_iter();
            self.cpu_features = Some(features.map(str::to_owned).collect());
        }
        self.enlightenments = match &document.hyperv {
            Some(hyperv) => Some(hyperv.enlightenments.iter().cloned().collect()),
            None if best => listed_or_unknown(facts.enlightenments()),
            None => None,
        };
        self.emulator = self.emulator.take().or(emulator);
        // Without <capabilities> the list is incomplete, so it stays unknown.
        if let Some(offered) = &mut self.machines {
            for (name, max) in machines {
                let machine = offered.entry(name).or_default();
                machine.max_vcpus = machine.max_vcpus.min(max);
            }
        }
    }

    fn read_host(&mut self, facts: &NodeFacts) {
        let cells = facts.capabilities.as_ref().map(|c| c.host.cells.as_slice());
        if let Some(cells) = cells.filter(|cells| !cells.is_empty()) {
            let kib = cells.iter().filter_map(|cell| cell.memory_kib).sum();
            self.memory = KiB::new(kib).map(Bytes::from);
            let mut pages: BTreeMap<Bytes, u64> = BTreeMap::new();
            for Pages { size_kib, count } in cells.iter().flat_map(|cell| &cell.pages) {
                if let Some(size) = KiB::new(*size_kib).map(Bytes::from) {
                    let sum = pages.entry(size).or_default();
                    *sum = sum.saturating_add(*count);
                }
            }
            self.pages = Some(pages).filter(|pages| !pages.is_empty());
        }
        if let Some(cells) = cells.filter(|cells| !cells.is_empty()) {
            self.host_nodes = Some(cells.iter().map(|cell| cell.id).collect());
            let cpus: IdSet = cells.iter().flat_map(|cell| &cell.cpus).copied().collect();
            self.host_cpus = Some(cpus).filter(|cpus| !cpus.is_empty());
        }
        // libvirt looks for IOMMU groups and for VFIO; a document shows only the former.
        let documented = facts.capabilities.as_ref().and_then(|c| c.host.iommu);
        self.vfio = match &facts.host {
            Some(host) => Some(host.vfio && has_iommu(host)),
            None => documented,
        };
        self.iommufd = facts.host.as_ref().map(|host| host.iommufd);
    }

    fn read_host_cpu(&mut self, facts: &NodeFacts) {
        let capabilities = facts.capabilities.as_ref();
        let cpu = capabilities.and_then(|capabilities| capabilities.host.cpu.as_ref());
        self.tsc = match cpu.map(|cpu| cpu.tsc) {
            None => OfferedTsc::Unknown,
            Some(None) => OfferedTsc::Unmeasured,
            Some(Some(tsc)) => OfferedTsc::Measured(tsc),
        };
        let host_model = self
            .cpu
            .as_ref()
            .and_then(|modes| modes.host_model.as_ref());
        self.physical_address_bits = cpu
            .and_then(|cpu| cpu.physical_address_bits)
            .or_else(|| host_model.and_then(|host_model| host_model.physical_address_limit));
        self.host_cpu = cpu.and_then(|cpu| {
            Some(OfferedHostCpu {
                model: cpu.model.clone()?,
                features: cpu.features.iter().cloned().collect(),
            })
        });
    }
}

/// Orders documents by their suitability for a machine type, the best first: its own, one of the same
/// family, the machine type that new guests use, then by name.
fn rank<'d>(document: &'d DomainCapabilities, wanted: Option<&str>) -> (bool, bool, bool, &'d str) {
    let have = document.machine.as_deref().unwrap_or_default();
    let is_other_family = wanted.is_some_and(|wanted| family_of(wanted) != family_of(have));
    (
        wanted.is_some_and(|wanted| wanted != have),
        is_other_family,
        !is_q35(have),
        have,
    )
}

/// Returns the name of a machine type without its version: `pc-q35` for `pc-q35-10.0`.
pub(crate) fn family_of(machine: &str) -> &str {
    match machine {
        "q35" => "pc-q35",
        "pc" => "pc-i440fx",
        _ => {
            let version = machine.rfind('-').filter(|at| {
                let rest = machine.get(at + 1..).unwrap_or_default();
                rest.bytes().any(|byte| byte.is_ascii_digit()) && !matches!(rest, "q35" | "i440fx")
            });
            let family = version.and_then(|at| machine.get(..at));
            // RHEL and Ubuntu put their own name before the version.
            family.unwrap_or(machine)
        }
    }
}

/// Returns the types of confidential guests in a document of libvirt before 10.5, which has an
/// element for each type that it knows.
fn launch_security_before_10_5(document: &DomainCapabilities) -> Option<Vec<String>> {
    let kinds = [
        ("sev", document.sev.is_some()),
        ("s390-pv", document.has_feature("s390-pv")),
    ];
    let supported = kinds.into_iter().filter(|(_, supported)| *supported);
    let listed: Vec<String> = supported.map(|(kind, _)| kind.to_owned()).collect();
    (!document.features.is_empty()).then_some(listed)
}

/// Returns `None` for an empty list: it means unknown, not none.
pub(crate) fn listed_or_unknown<'n>(
    names: impl IntoIterator<Item = &'n str>,
) -> Option<BTreeSet<String>> {
    let names: BTreeSet<String> = names.into_iter().map(str::to_owned).collect();
    Some(names).filter(|names| !names.is_empty())
}

fn has_iommu(host: &HostFacts) -> bool {
    host.iommu_groups > 0
}

fn listed(section: &Section, name: &str) -> Vec<String> {
    section.enums.get(name).cloned().unwrap_or_default()
}

fn listed_if_supported(section: &Section, name: &str) -> Vec<String> {
    if section.is_supported() {
        listed(section, name)
    } else {
        Vec::new()
    }
}
