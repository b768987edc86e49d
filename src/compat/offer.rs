//! What a node has for domains of one architecture and domain type.

mod labels;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub(crate) use self::labels::{ARCH_LABEL, family, go_arch};
use crate::capability::{
    CpuDefinition, CpuModes, Eim, HostFacts, NodeFacts, Pages, PolicyFeature, Section, VcpuMax,
    Version, is_x86,
};
use crate::units::{Bytes, KiB};

/// What a node has for domains of one architecture and domain type. Whatever is `None` is not
/// known; nothing is made up for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    /// The guest architecture that this is about.
    pub arch: Option<String>,
    /// The host's own architecture.
    pub native_arch: Option<String>,
    /// The domain type that this is about.
    pub virt_type: Option<String>,
    /// The domain types of the architecture, the best first; empty if there is no emulator for it.
    pub virt_types: Option<Vec<String>>,
    /// libvirt's version.
    pub libvirt_version: Option<Version>,
    /// The version of QEMU.
    pub qemu_version: Option<Version>,
    /// The emulator's path, for libvirt's messages.
    pub emulator: Option<String>,
    /// The machine types by canonical name.
    pub machines: Option<BTreeMap<String, OfferedMachine>>,
    /// What each alias means here.
    pub aliases: BTreeMap<String, String>,
    /// The most vCPUs that the accelerator has.
    pub accelerator_max: VcpuMax,
    /// How a domain gets extended interrupt mode.
    pub eim: Option<Eim>,
    /// The versions of Arm's interrupt controller that there are.
    pub gic_versions: Option<Vec<String>>,
    /// CPU modes, and models with their blockers.
    pub cpu: Option<CpuModes>,
    /// All CPU features that the hypervisor can give; see [`Offer::gives`].
    pub cpu_features: Option<BTreeSet<String>>,
    /// The Hyper-V enlightenments that the hypervisor can give; see [`Offer::enlightens`].
    pub enlightenments: Option<BTreeSet<String>>,
    /// Firmware and loader.
    pub os: Option<Section>,
    /// Where memory can come from: `memfd`, `file` …
    pub memory_sources: Option<Vec<String>>,
    /// The types of confidential guests.
    pub launch_security: Option<Vec<String>>,
    /// The memory of all NUMA cells.
    pub memory: Option<Bytes>,
    /// The pages of each size that are set aside, in all NUMA cells.
    pub pages: Option<BTreeMap<Bytes, u64>>,
    /// Whether PCI devices can be handed over by VFIO: there is VFIO and an active IOMMU.
    pub vfio: Option<bool>,
    /// Whether there is iommufd.
    pub iommufd: Option<bool>,
}

/// A machine type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OfferedMachine {
    /// The most vCPUs that the machine type itself allows.
    pub max_vcpus: VcpuMax,
    /// Whether the hypervisor is going to drop it.
    pub deprecated: bool,
}

impl Offer {
    /// What a node offers to domains of an architecture and a domain type; without them, of the
    /// node's own and the best.
    pub fn from_facts(facts: &NodeFacts, arch: Option<&str>, virt_type: Option<&str>) -> Self {
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
            offer.take_guests(facts, arch);
            offer.take_documents(facts, arch);
            if is_x86(arch) {
                offer.eim = facts.eim();
            }
            offer.accelerator_max = match virt_type {
                Some("kvm") => facts.accelerator_limit(arch, &facts.machines(arch)),
                _ => VcpuMax::Unknown,
            };
        }
        offer.take_host(facts);
        offer
    }

    /// Whether the hypervisor can give a CPU feature; `None` if what is known does not tell.
    ///
    /// Without the whole list the documents know some: what the host model has beside its model
    /// is there, and what keeps some named model from running is not.
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

    /// Whether the hypervisor can give a Hyper-V enlightenment; `None` if what is known does not
    /// tell.
    ///
    /// libvirt's own list has all there are, and always the spin locks, which are no more than a
    /// value. A list without them is KVM's, for a libvirt that has none (before 9.0); what is not
    /// in that may be there all the same.
    pub fn enlightens(&self, name: &str) -> Option<bool> {
        let all = self.enlightenments.as_ref()?;
        match all.contains(name) {
            false if !all.contains("spinlocks") => None,
            known => Some(known),
        }
    }

    /// The CPU features of a `<cpu>` that hypervisor-cpu-baseline printed for this very
    /// architecture and domain type.
    pub fn take_features(&mut self, baseline: &CpuDefinition) {
        let is_given = |feature: &&PolicyFeature| {
            matches!(feature.policy.as_deref(), None | Some("require" | "force"))
        };
        let given = baseline.features.iter().filter(is_given);
        self.cpu_features = Some(given.map(|feature| feature.name.clone()).collect());
    }

    /// The canonical name of a machine type, or of an alias of one here.
    pub fn canonical<'n>(&'n self, machine: &'n str) -> &'n str {
        self.aliases.get(machine).map_or(machine, String::as_str)
    }

    /// The aliases of a canonical name.
    pub fn aliases_of<'o>(&'o self, canonical: &'o str) -> impl Iterator<Item = &'o str> {
        self.aliases
            .iter()
            .filter(move |(_, name)| *name == canonical)
            .map(|(alias, _)| alias.as_str())
    }

    fn take_guests(&mut self, facts: &NodeFacts, arch: &str) {
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

    /// What the documents for this architecture and domain type say.
    fn take_documents(&mut self, facts: &NodeFacts, arch: &str) {
        let fits = |have: &Option<String>, wanted: Option<&str>| {
            have.is_none() || wanted.is_none() || have.as_deref() == wanted
        };
        let documents = || {
            facts.domain_capabilities.iter().filter(|document| {
                fits(&document.arch, Some(arch))
                    && fits(&document.virt_type, self.virt_type.as_deref())
            })
        };
        let machines: Vec<_> = documents()
            .filter_map(|document| {
                // kvm's number is cut by KVM, which is told apart.
                let max = match document.virt_type.as_deref() {
                    Some("kvm") => VcpuMax::Unknown,
                    _ => document.max_vcpus,
                };
                Some((document.machine.clone()?, max))
            })
            .collect();
        let Some(document) = documents().next() else {
            return;
        };
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
            .map(|section| match section.is_supported() {
                true => listed(section, "sectype"),
                false => Vec::new(),
            });
        self.gic_versions =
            document
                .features
                .get("gic")
                .map(|section| match section.is_supported() {
                    true => listed(section, "version"),
                    false => Vec::new(),
                });
        // The baseline is the native one of the best domain type. Without it the features of the
        // host model are no whole list: they stand beside those of its named model.
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
        // Without <capabilities> these are all that is known, which is no list to be missing from.
        if let Some(offered) = &mut self.machines {
            for (name, max) in machines {
                let machine = offered.entry(name).or_default();
                machine.max_vcpus = machine.max_vcpus.min(max);
            }
        }
    }

    fn take_host(&mut self, facts: &NodeFacts) {
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
        self.vfio = facts.host.as_ref().map(|host| host.vfio && has_iommu(host));
        self.iommufd = facts.host.as_ref().map(|host| host.iommufd);
    }
}

/// No list is empty of which something is known.
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
