//! [`NodeFacts`] and the rules that combine documents: native architecture, accelerator, primary
//! document, effective vCPU limits, CPU features.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Capabilities, CpuDefinition, DomainCapabilities, Eim, GuestCapabilities, HostFacts,
    MachineType, VcpuMax, Version,
};
use crate::units::words;

/// Maximum number of vCPUs on x86 without extended interrupt mode: APIC IDs have 8 bits
/// (`QEMU_MAX_VCPUS_WITHOUT_EIM`, libvirt src/qemu/qemu_validate.h).
const MAX_WITHOUT_EIM: VcpuMax = VcpuMax::AtMost(255);

/// Maximum number of vCPUs with a version 2 GIC: its number of CPU interfaces (QEMU hw/arm/virt.c).
const MAX_WITH_GIC_V2: VcpuMax = VcpuMax::AtMost(8);

/// Everything known about a node. A missing fact is unknown.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeFacts {
    pub libvirt_version: Option<Version>,
    /// QEMU's version with libvirt's QEMU driver; see [`NodeFacts::qemu_version`].
    pub hypervisor_version: Option<Version>,
    pub capabilities: Option<Capabilities>,
    /// One document per query.
    pub domain_capabilities: Vec<DomainCapabilities>,
    /// The domain type of the host's architecture, if the source of the documents chose it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_type: Option<String>,
    /// The `<cpu>` from hypervisor-cpu-baseline: every feature that the hypervisor supports.
    pub baseline_cpu: Option<CpuDefinition>,
    /// Result of the dry run; [`NodeFacts::eim`] falls back to the versions.
    pub eim: Option<Eim>,
    /// `KVM_CAP_MAX_VCPUS`
    pub kvm_max_vcpus: Option<u32>,
    pub host: Option<HostFacts>,
}

words! {
    /// QEMU accelerators, best first: the label `virtnode.io/accelerator`.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum Accelerator {
        Kvm = "kvm",
        /// Hypervisor.framework of macOS
        Hvf = "hvf",
        /// Microsoft's hypervisor with Linux as its root partition
        Mshv = "mshv",
        /// No accelerator: QEMU translates every instruction.
        Tcg = "tcg",
    }
}

impl Accelerator {
    /// Returns the accelerator of a libvirt domain type; `None` for a type of another driver.
    pub fn of_domain_type(virt_type: &str) -> Option<Self> {
        match virt_type {
            "kvm" => Some(Self::Kvm),
            "hvf" => Some(Self::Hvf),
            // libvirt's domain type for Microsoft's hypervisor is `hyperv`.
            "mshv" | "hyperv" => Some(Self::Mshv),
            "qemu" => Some(Self::Tcg),
            _ => None,
        }
    }
}

/// A machine type with a canonical name, and its limit on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanonicalMachine<'f> {
    pub name: &'f str,
    /// Maximum number of vCPUs of a domain on this node: the lowest of all limits.
    pub effective_max: VcpuMax,
    pub deprecated: bool,
}

impl CanonicalMachine<'_> {
    /// Returns the largest maximum of the machine types that are not deprecated.
    pub fn largest_max(machines: &[CanonicalMachine<'_>]) -> VcpuMax {
        machines
            .iter()
            .filter(|machine| !machine.deprecated)
            .map(|machine| machine.effective_max)
            .max_by_key(|max| max.number())
            .unwrap_or_default()
    }
}

impl NodeFacts {
    /// Returns the host's architecture in libvirt's spelling.
    ///
    /// The first of these that is known: the host's `<cpu>`, the kernel's architecture, the widest
    /// accelerated guest architecture, the only guest architecture.
    pub fn native_arch(&self) -> Option<&str> {
        let capabilities = self.capabilities.as_ref();
        let decoded = capabilities.and_then(|c| c.host.cpu.as_ref()?.arch.as_deref());
        let kernel = self
            .host
            .as_ref()
            .map(|host| host.arch.as_str())
            .filter(|arch| !arch.is_empty());
        let guests = || {
            capabilities
                .map(|c| c.guests.as_slice())
                .unwrap_or_default()
        };
        let accelerated = || {
            guests()
                .iter()
                .filter(|guest| guest.domains.iter().any(|d| is_accelerated(&d.virt_type)))
                .max_by_key(|guest| guest.word_size)
                .map(|guest| guest.arch.as_str())
                .or_else(|| {
                    let domain = |d: &&DomainCapabilities| {
                        d.virt_type.as_deref().is_some_and(is_accelerated)
                    };
                    self.domain_capabilities
                        .iter()
                        .find(domain)?
                        .arch
                        .as_deref()
                })
        };
        let only = || {
            let documents = self
                .domain_capabilities
                .iter()
                .filter_map(|d| d.arch.as_deref());
            let mut archs = guests().iter().map(|g| g.arch.as_str()).chain(documents);
            let first = archs.next()?;
            archs.all(|arch| arch == first).then_some(first)
        };
        decoded
            .or(kernel)
            .or_else(accelerated)
            .or_else(only)
            .filter(|arch| !arch.is_empty())
    }

    /// Returns the domain type that the source chose, else the best one for an architecture, in the
    /// order of [`Accelerator`]; types of other drivers come last.
    pub fn best_domain_type(&self, arch: &str) -> Option<&str> {
        if let Some(chosen) = &self.domain_type
            && self.native_arch() == Some(arch)
        {
            return Some(chosen);
        }
        let guests = self.capabilities.iter().flat_map(|c| &c.guests);
        let offered = guests
            .filter(|guest| guest.arch == arch)
            .flat_map(|guest| &guest.domains)
            .map(|domain| domain.virt_type.as_str());
        let rank = |virt_type: &&str| {
            let accelerator = Accelerator::of_domain_type(virt_type);
            (accelerator.is_none(), accelerator)
        };
        let documented = self
            .domain_capabilities
            .iter()
            .filter(|d| d.arch.as_deref().is_none_or(|have| have == arch))
            .filter_map(|d| d.virt_type.as_deref());
        offered
            .min_by_key(rank)
            .or_else(|| documented.min_by_key(rank))
    }

    /// Returns the accelerator of native guests; `None` if unknown or if the driver is not QEMU's.
    pub fn accelerator(&self) -> Option<Accelerator> {
        Accelerator::of_domain_type(self.best_domain_type(self.native_arch()?)?)
    }

    /// Returns QEMU's version; `None` if the driver is not QEMU's.
    pub fn qemu_version(&self) -> Option<Version> {
        let best = self
            .native_arch()
            .and_then(|arch| self.best_domain_type(arch));
        let other = best.is_some_and(|best| Accelerator::of_domain_type(best).is_none());
        self.hypervisor_version.filter(|_| !other)
    }

    /// Returns the documents for an architecture and its best domain type. The others describe
    /// domains that nobody would run on this node.
    pub fn documents<'f>(&'f self, arch: &'f str) -> impl Iterator<Item = &'f DomainCapabilities> {
        let best = self.best_domain_type(arch);
        self.domain_capabilities.iter().filter(move |d| {
            d.arch.as_deref().is_none_or(|have| have == arch)
                && (d.virt_type.is_none() || d.virt_type.as_deref() == best)
        })
    }

    /// Returns the document that represents the node: for the native architecture, the best domain
    /// type and, if there are several, the machine type that new guests use.
    pub fn primary_document(&self) -> Option<&DomainCapabilities> {
        let arch = self.native_arch()?;
        let usual = |d: &&DomainCapabilities| d.machine.as_deref().is_some_and(is_usual_machine);
        self.documents(arch)
            .find(usual)
            .or_else(|| self.documents(arch).next())
    }

    /// Returns the machine types and aliases of an architecture, without duplicates. Those of guests
    /// that are not fully virtualized (`xen`, `xenpvh`) are none that a definition can name.
    pub fn machines(&self, arch: &str) -> Vec<MachineType> {
        let best = self.best_domain_type(arch);
        let mut machines: BTreeMap<&str, MachineType> = BTreeMap::new();
        let guests = self.capabilities.iter().flat_map(|c| &c.guests);
        let is_virtual = |guest: &&GuestCapabilities| guest.os_type == "hvm" && guest.arch == arch;
        for guest in guests.filter(is_virtual) {
            let own = guest
                .domains
                .iter()
                .find(|domain| Some(domain.virt_type.as_str()) == best)
                .map(|domain| &domain.machines)
                .filter(|machines| !machines.is_empty());
            for machine in own.unwrap_or(&guest.machines) {
                machines
                    .entry(&machine.name)
                    .and_modify(|have| {
                        have.max_vcpus = have.max_vcpus.min(machine.max_vcpus);
                        have.deprecated |= machine.deprecated;
                    })
                    .or_insert_with(|| machine.clone());
            }
        }
        machines.into_values().collect()
    }

    /// Returns the machine type that new guests of the native architecture usually have, as an alias
    /// if it has one.
    pub fn usual_machine(&self) -> Option<MachineType> {
        let arch = self.native_arch()?;
        let usual: &[&str] = match arch {
            arch if is_x86(arch) => &["q35", "pc"],
            "s390x" => &["s390-ccw-virtio"],
            "ppc64" | "ppc64le" => &["pseries"],
            _ => &["virt"],
        };
        let machines = self.machines(arch);
        let mut found = usual
            .iter()
            .filter_map(|name| machines.iter().find(|m| m.name == **name));
        found.next().cloned()
    }

    /// Returns the machine types of an architecture, sorted by canonical name, with their effective
    /// limits. Includes a machine type that only a domain capabilities document mentions.
    pub fn canonical_machines<'m>(
        &'m self,
        arch: &'m str,
        machines: &'m [MachineType],
    ) -> Vec<CanonicalMachine<'m>> {
        let mut canonical: BTreeMap<&str, (VcpuMax, bool)> = BTreeMap::new();
        for machine in machines {
            let (max, deprecated) = canonical.entry(machine.canonical_name()).or_default();
            *max = max.min(machine.max_vcpus);
            *deprecated |= machine.deprecated;
        }
        for document in self.documents(arch) {
            // The document's maximum already accounts for KVM's limit.
            let machine = document.machine.as_deref();
            // Machine types of Xen's paravirtualized guests.
            let machine = machine.filter(|name| !matches!(*name, "xenpv" | "xenpvh"));
            if let Some(name) = machine {
                let (max, _) = canonical.entry(name).or_default();
                *max = max.min(document.max_vcpus);
            }
        }
        let limit = self.accelerator_limit(arch, machines);
        let gic = self.interrupt_controller_limit(arch);
        canonical
            .into_iter()
            .map(|(name, (max, deprecated))| {
                let effective_max = match max {
                    VcpuMax::Unknown => VcpuMax::Unknown,
                    max if is_x86(arch) => max.min(limit).min(self.apic_limit(name)),
                    max if is_virt(name) => max.min(limit).min(gic),
                    max => max.min(limit),
                };
                // No domain can have an unlimited number: the true maximum is unknown.
                let effective_max = match effective_max {
                    VcpuMax::Unlimited => VcpuMax::Unknown,
                    max => max,
                };
                CanonicalMachine {
                    name,
                    effective_max,
                    deprecated,
                }
            })
            .collect()
    }

    /// Returns KVM's maximum number of vCPUs: from KVM itself, and from a document whose maximum is
    /// below that of its machine type, because libvirt writes the lower of the two
    /// (`virQEMUCapsFillDomainCaps`).
    pub(crate) fn accelerator_limit(&self, arch: &str, machines: &[MachineType]) -> VcpuMax {
        if self.best_domain_type(arch) != Some("kvm") {
            return VcpuMax::Unknown;
        }
        let shown = self
            .documents(arch)
            .filter(|document| {
                let name = document.machine.as_deref();
                let machine = machines.iter().find(|m| Some(m.canonical_name()) == name);
                let own = machine.map_or(VcpuMax::Unknown, |machine| machine.max_vcpus);
                document.max_vcpus.number() < own.number()
            })
            .map(|document| document.max_vcpus)
            .fold(VcpuMax::Unknown, VcpuMax::min);
        self.kvm_max_vcpus
            .map_or(VcpuMax::Unknown, VcpuMax::from_number)
            .min(shown)
    }

    /// Returns 255, except for a q35 machine to which libvirt adds EIM.
    fn apic_limit(&self, machine: &str) -> VcpuMax {
        match self.eim() {
            Some(Eim::Auto) if is_q35(machine) => VcpuMax::Unlimited,
            _ => MAX_WITHOUT_EIM,
        }
    }

    /// Returns 8 if version 2 is the only supported GIC.
    fn interrupt_controller_limit(&self, arch: &str) -> VcpuMax {
        let only_v2 = self.documents(arch).any(|document| {
            document.features.get("gic").is_some_and(|gic| {
                gic.is_supported() && gic.offers("version", "2") && !gic.offers("version", "3")
            })
        });
        if only_v2 {
            MAX_WITH_GIC_V2
        } else {
            VcpuMax::Unlimited
        }
    }

    /// Returns how a domain obtains EIM: by the dry run, else by the versions. `None` if unknown, on
    /// architectures other than x86, and with drivers other than QEMU's.
    pub fn eim(&self) -> Option<Eim> {
        let arch = self.native_arch();
        if arch.is_some_and(|arch| !is_x86(arch)) {
            return None;
        }
        self.eim.or_else(|| {
            arch.and(self.accelerator()).and_then(|_| {
                Some(Eim::from_versions(
                    self.libvirt_version?,
                    self.hypervisor_version,
                ))
            })
        })
    }

    /// Returns the names of the CPU features that the hypervisor provides, sorted: from
    /// hypervisor-cpu-baseline if present, else those that the host model requires.
    ///
    /// A feature without a policy counts as provided (s390x omits it); one with `disable`, `forbid`
    /// or `optional` does not.
    pub fn cpu_features(&self) -> Vec<&str> {
        let features = match &self.baseline_cpu {
            Some(cpu) => cpu.features.as_slice(),
            None => self
                .primary_document()
                .and_then(|document| document.cpu.host_model.as_ref())
                .filter(|host_model| host_model.supported)
                .map(|host_model| host_model.features.as_slice())
                .unwrap_or_default(),
        };
        let mut names: Vec<&str> = features
            .iter()
            .filter(|f| matches!(f.policy.as_deref(), None | Some("require" | "force")))
            .map(|feature| feature.name.as_str())
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Returns the supported kinds of confidential guests and enclaves: `sev`, `sev-es`, `sev-snp`,
    /// `tdx`, `sgx`, `s390-pv`. `launchSecurity` (libvirt 10.5) lists types without an element of
    /// their own, such as SEV-SNP.
    pub fn security(&self) -> Vec<&'static str> {
        let Some(document) = self.primary_document() else {
            return Vec::new();
        };
        let es_guests = document.sev.as_ref().and_then(|sev| sev.max_es_guests);
        let offered = |name| document.has_feature(name) || document.launches(name);
        let kinds = [
            ("sev", document.sev.is_some()),
            ("sev-es", es_guests.is_some_and(|guests| guests > 0)),
            ("sev-snp", document.launches("sev-snp")),
            ("tdx", offered("tdx")),
            ("sgx", document.sgx.is_some()),
            ("s390-pv", offered("s390-pv")),
        ];
        let supported = kinds.into_iter().filter(|(_, supported)| *supported);
        supported.map(|(kind, _)| kind).collect()
    }

    /// Returns the names of the Hyper-V enlightenments: libvirt's list, or before libvirt 9.0, which
    /// has none, KVM's list in libvirt's spelling.
    pub fn enlightenments(&self) -> Vec<&str> {
        let document = self.primary_document();
        if let Some(hyperv) = document.and_then(|document| document.hyperv.as_ref()) {
            return hyperv.enlightenments.iter().map(String::as_str).collect();
        }
        let by_kvm = self.accelerator() == Some(Accelerator::Kvm) && document.is_some();
        let offered = self.host.as_ref().and_then(|host| host.kvm_hyperv.as_ref());
        offered
            .filter(|_| by_kvm)
            .into_iter()
            .flat_map(|kvm| kvm.iter())
            .filter_map(|name| match name {
                "synictimer" => Some("stimer"),
                // libvirt does not have them, or has them as parts of others.
                "base" | "time" | "synic2" => None,
                name => Some(name),
            })
            .collect()
    }
}

/// True if APIC IDs limit the number of vCPUs.
pub fn is_x86(arch: &str) -> bool {
    matches!(arch, "x86_64" | "i686")
}

/// True for a machine type of the q35 family, from QEMU or a distribution
/// (`qemuDomainMachineIsQ35`, libvirt src/qemu/qemu_domain.c).
pub fn is_q35(machine: &str) -> bool {
    machine == "q35" || machine.starts_with("pc-q35-")
}

/// True for a machine type of Arm's `virt` family.
fn is_virt(machine: &str) -> bool {
    machine == "virt" || machine.starts_with("virt-")
}

fn is_accelerated(virt_type: &str) -> bool {
    Accelerator::of_domain_type(virt_type)
        .is_some_and(|accelerator| accelerator != Accelerator::Tcg)
}

/// True for a machine type that tools usually give to new guests.
fn is_usual_machine(machine: &str) -> bool {
    is_q35(machine)
        || is_virt(machine)
        || machine.starts_with("s390-ccw-virtio")
        || machine.starts_with("pseries")
}
