//! What is true of the machine itself, beside libvirt. Read by [`crate::host`].

use std::collections::BTreeSet;
use std::fmt;

use serde::{Serialize, Serializer};

/// Plain facts of a machine. What could not be read is `None`, 0 or `false`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// The kernel's name of the architecture, as in `uname -m`: `x86_64`, `aarch64`, `ppc64le`.
    pub arch: String,
    /// The most vCPUs that KVM gives one domain; `None` without a usable /dev/kvm.
    pub kvm_max_vcpus: Option<u32>,
    /// Hyper-V enlightenments that KVM offers; `None` without a usable /dev/kvm and on other
    /// architectures than x86_64.
    pub kvm_hyperv: Option<KvmHyperv>,
    /// The IOMMU of the host.
    pub iommu: IommuKind,
    /// The number of IOMMU groups; 0 where none is active.
    pub iommu_groups: u32,
    /// Whether devices can be handed to guests by VFIO.
    pub vfio: bool,
    /// Whether there is iommufd.
    pub iommufd: bool,
    /// Whether guests can be hypervisors themselves.
    pub nested: bool,
    /// Whether real-time tasks may use all of a CPU's time (`kernel.sched_rt_runtime_us` is -1).
    pub realtime: bool,
}

/// The kind of the host's IOMMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IommuKind {
    /// Intel's.
    VtD,
    /// AMD's.
    AmdVi,
    /// Arm's.
    Smmu,
    /// There are IOMMU groups, of another kind: s390x, ppc64, virtio-iommu.
    Other,
    /// No IOMMU is active.
    #[default]
    None,
}

impl IommuKind {
    /// The kind as in the label `virtnode.io/iommu`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VtD => "vt-d",
            Self::AmdVi => "amd-vi",
            Self::Smmu => "smmu",
            Self::Other => "other",
            Self::None => "none",
        }
    }
}

impl fmt::Display for IommuKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for IommuKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Hyper-V enlightenments that KVM offers, under the names of KubeVirt's labels
/// `hyperv.node.kubevirt.io/<name>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KvmHyperv(BTreeSet<&'static str>);

impl KvmHyperv {
    /// Those with a capability of their own: name and number of the capability (`linux/kvm.h`).
    pub const EXTENSIONS: [(&'static str, u32); 7] = [
        ("base", 44),
        ("time", 96),
        ("vpindex", 149),
        ("tlbflush", 155),
        ("ipi", 161),
        ("synic", 123),
        ("synic2", 148),
    ];

    /// Those that show by a model-specific register: name and index of the register.
    pub const REGISTERS: [(&'static str, u32); 5] = [
        ("frequencies", 0x4000_0022),
        ("reset", 0x4000_0003),
        ("runtime", 0x4000_0010),
        ("synictimer", 0x4000_00B0),
        ("reenlightenment", 0x4000_0106),
    ];

    /// From the capabilities KVM said yes to and the registers it listed.
    ///
    /// Where KubeVirt knows both ways for one name (`vpindex`, `synic`, `synic2`) the capability
    /// decides there too (kvm-caps-info-plugin_amd64.go), so the registers are not asked here.
    pub fn derive(has_extension: impl Fn(u32) -> bool, registers: &[u32]) -> Self {
        let by_extension = Self::EXTENSIONS
            .iter()
            .filter(|(_, capability)| has_extension(*capability));
        let by_register = Self::REGISTERS
            .iter()
            .filter(|(_, index)| registers.contains(index));
        Self(
            by_extension
                .chain(by_register)
                .map(|(name, _)| *name)
                .collect(),
        )
    }

    /// The names, in order.
    pub fn iter(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.0.iter().copied()
    }

    /// Whether this one is offered.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enlightenments_come_from_capabilities_and_registers() {
        let hyperv = KvmHyperv::derive(|capability| capability == 44, &[0x4000_0010, 0x174]);
        assert_eq!(hyperv.iter().collect::<Vec<_>>(), ["base", "runtime"]);
        assert!(hyperv.contains("base") && !hyperv.contains("synic"));
    }

    #[test]
    fn a_capability_decides_where_kubevirt_knows_a_register_too() {
        let hyperv = KvmHyperv::derive(|_| false, &[0x4000_0002, 0x4000_0080]);
        assert_eq!(hyperv, KvmHyperv::default());
    }

    #[test]
    fn the_kind_of_iommu_is_the_labels_word() {
        assert_eq!(IommuKind::default().as_str(), "none");
        assert_eq!(
            serde_json::to_string(&IommuKind::AmdVi).unwrap(),
            "\"amd-vi\""
        );
    }
}
