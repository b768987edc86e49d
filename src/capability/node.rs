//! Facts about the host itself, independent of libvirt. [`crate::host`] reads them.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::units::words;

/// Facts that the kernel provides. An unreadable one is `None`, 0 or `false`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// Architecture in the kernel's spelling (`uname -m`): `x86_64`, `aarch64`, `ppc64le`.
    pub arch: String,
    /// KVM's maximum number of vCPUs per domain; `None` without a usable /dev/kvm.
    pub kvm_max_vcpus: Option<u32>,
    /// `None` without a usable /dev/kvm and on architectures other than x86_64.
    pub kvm_hyperv: Option<KvmHyperv>,
    pub iommu: IommuKind,
    pub iommu_groups: u32,
    /// True if VFIO can assign devices to guests.
    pub vfio: bool,
    pub iommufd: bool,
    /// True if a guest can run KVM itself.
    pub nested: bool,
    /// True if real-time tasks may use all of a CPU's time (`kernel.sched_rt_runtime_us` is -1).
    pub realtime: bool,
}

words! {
    /// The label `virtnode.io/iommu`.
    #[derive(Default)]
    pub enum IommuKind {
        /// Intel
        VtD = "vt-d",
        /// AMD
        AmdVi = "amd-vi",
        /// Arm
        Smmu = "smmu",
        /// IOMMU groups exist without one of the devices above: s390x, ppc64, virtio-iommu.
        Other = "other",
        #[default]
        None = "none",
    }
}

/// Hyper-V enlightenments that KVM supports, named as in KubeVirt's labels
/// `hyperv.node.kubevirt.io/<name>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct KvmHyperv(BTreeSet<&'static str>);

impl KvmHyperv {
    /// Enlightenments with a KVM capability: name and capability number (`linux/kvm.h`).
    pub const EXTENSIONS: [(&'static str, u32); 7] = [
        ("base", 44),
        ("time", 96),
        ("vpindex", 149),
        ("tlbflush", 155),
        ("ipi", 161),
        ("synic", 123),
        ("synic2", 148),
    ];

    /// Enlightenments detected by a model-specific register: name and register index.
    pub const REGISTERS: [(&'static str, u32); 5] = [
        ("frequencies", 0x4000_0022),
        ("reset", 0x4000_0003),
        ("runtime", 0x4000_0010),
        ("synictimer", 0x4000_00B0),
        ("reenlightenment", 0x4000_0106),
    ];

    /// Selects the enlightenments by KVM's capabilities and the registers that KVM lists.
    ///
    /// `vpindex`, `synic` and `synic2` have both. KubeVirt decides by the capability
    /// (kvm-caps-info-plugin_amd64.go), so their registers are not evaluated here.
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

    /// Returns the names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_and_registers_both_yield_enlightenments() {
        let hyperv = KvmHyperv::derive(|capability| capability == 44, &[0x4000_0010, 0x174]);
        assert_eq!(hyperv.iter().collect::<Vec<_>>(), ["base", "runtime"]);
    }

    #[test]
    fn register_of_enlightenment_with_capability_is_ignored() {
        let hyperv = KvmHyperv::derive(|_| false, &[0x4000_0002, 0x4000_0080]);
        assert_eq!(hyperv, KvmHyperv::default());
    }

    #[test]
    fn iommu_kind_serializes_as_label_value() {
        assert_eq!(IommuKind::default().as_str(), "none");
        assert_eq!(
            serde_json::to_string(&IommuKind::AmdVi).unwrap(),
            "\"amd-vi\""
        );
    }
}
