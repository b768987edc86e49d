//! Classification of keys: the metrics' family, the fact sources, and ownership by this program.

use super::LabelKey;
use crate::units::words;

words! {
    /// A source of facts, as metrics and logs name it. Each can fail independently of the others.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum FactSource {
        /// Versions of libvirt and QEMU
        Versions = "versions",
        Capabilities = "capabilities",
        DomainCapabilities = "domain-capabilities",
        /// hypervisor-cpu-baseline
        CpuBaseline = "cpu-baseline",
        /// Running domains
        Domains = "domains",
        /// sysfs, /dev and /proc of the host
        Host = "host",
    }
}

/// Prefixes of the keys that KubeVirt's node-labeller writes (node_labeller.go:52). The admission
/// policy of the KubeVirt overlay lists them too.
pub const KUBEVIRT_PREFIXES: [&str; 9] = [
    "cpu-feature.node.kubevirt.io",
    "cpu-model.node.kubevirt.io",
    "cpu-model-migration.node.kubevirt.io",
    "cpu-timer.node.kubevirt.io",
    "cpu-vendor.node.kubevirt.io",
    "host-model-cpu.node.kubevirt.io",
    "host-model-required-features.node.kubevirt.io",
    "hyperv.node.kubevirt.io",
    "machine-type.node.kubevirt.io",
];

/// Other keys that KubeVirt's node-labeller writes. This program does not write any others under
/// these prefixes, such as `kubevirt.io/schedulable`.
pub const KUBEVIRT_KEYS: [&str; 7] = [
    "kubevirt.io/realtime",
    "kubevirt.io/sev",
    "kubevirt.io/sev-es",
    "kubevirt.io/sev-snp",
    "kubevirt.io/s390-pv",
    "kubevirt.io/tdx",
    "node-labeller.kubevirt.io/obsolete-host-model",
];

/// True if this program writes the key, in either schema.
pub fn is_ours(key: &LabelKey) -> bool {
    let prefix = key.prefix();
    prefix == "virtnode.io"
        || prefix.ends_with(".virtnode.io")
        || KUBEVIRT_PREFIXES.contains(&prefix)
        || KUBEVIRT_KEYS.contains(&key.as_str())
}

/// Values of the metrics' label `family`.
pub const FAMILIES: [&str; 10] = [
    "machine",
    "machine-alias",
    "machine-deprecated",
    "cpu-model",
    "cpu-feature",
    "hyperv",
    "cpu",
    "iommu",
    "security",
    "node",
];

/// Returns the family of a key of either schema.
pub fn family(key: &LabelKey) -> &'static str {
    let prefix = key.prefix();
    let first = prefix.split('.').next().unwrap_or_default();
    match (first, key.name()) {
        ("machine" | "machine-type", _) => "machine",
        ("machine-alias", _) => "machine-alias",
        ("machine-deprecated", _) => "machine-deprecated",
        ("cpu-model" | "cpu-model-migration", _) => "cpu-model",
        ("cpu-feature" | "host-model-required-features", _) => "cpu-feature",
        ("hyperv", _) => "hyperv",
        ("cpu-timer" | "cpu-vendor" | "host-model-cpu" | "node-labeller", _) => "cpu",
        (_, "host-model" | "cpu-vendor" | "tsc-frequency-hz" | "tsc-scaling") => "cpu",
        (_, "iommu" | "iommu-groups" | "vfio" | "iommufd") => "iommu",
        (_, "sev" | "sev-es" | "sev-snp" | "tdx" | "sgx" | "s390-pv") => "security",
        _ => "node",
    }
}

/// Returns the sources that the value of a key depends on. If one of them fails, the published value
/// is more accurate than the derived one: without the domain capabilities, for example, a machine
/// type's maximum would rise to QEMU's, which KVM may not support.
pub fn sources(key: &LabelKey) -> &'static [FactSource] {
    use FactSource::{Capabilities, CpuBaseline, DomainCapabilities, Host, Versions};
    match (family(key), key.name()) {
        ("machine", _) | (_, "max-vcpus" | "eim") => {
            &[Versions, Capabilities, DomainCapabilities, Host]
        }
        ("machine-alias" | "machine-deprecated", _) => &[Capabilities],
        ("cpu-model" | "security", _) => &[Capabilities, DomainCapabilities],
        ("cpu-feature", _) => &[Capabilities, DomainCapabilities, CpuBaseline],
        ("hyperv", _) => &[Capabilities, DomainCapabilities, Host],
        ("iommu", _) | (_, "nested" | "realtime") => &[Host],
        (_, "libvirt-version" | "qemu-version") => &[Versions],
        (_, "tsc-frequency-hz" | "tsc-scaling" | "tsc-frequency" | "tsc-scalable") => {
            &[Capabilities]
        }
        (_, "accelerator") => &[Capabilities],
        _ => &[Capabilities, DomainCapabilities],
    }
}

/// True if the label consists of this source's answer, so that without an answer its absence proves
/// nothing.
pub(super) fn consists_of(key: &LabelKey, source: FactSource) -> bool {
    source == FactSource::Versions
        && matches!(key.name(), "eim" | "libvirt-version" | "qemu-version")
        && key.prefix() == "virtnode.io"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_both_schemas_have_a_family() {
        for (key, expected) in [
            ("machine.virtnode.io/pc-q35-10.0", "machine"),
            ("machine.aarch64.virtnode.io/virt-10.0", "machine"),
            ("machine-type.node.kubevirt.io/q35", "machine"),
            ("cpu-model-migration.node.kubevirt.io/EPYC", "cpu-model"),
            (
                "host-model-required-features.node.kubevirt.io/x2apic",
                "cpu-feature",
            ),
            ("virtnode.io/host-model", "cpu"),
            ("virtnode.io/iommu", "iommu"),
            ("kubevirt.io/sev-es", "security"),
            ("virtnode.io/max-vcpus", "node"),
        ] {
            let key: LabelKey = key.parse().unwrap();
            assert_eq!(family(&key), expected, "{key}");
            assert!(FAMILIES.contains(&family(&key)));
            assert!(is_ours(&key));
        }
    }

    #[test]
    fn keys_of_other_components_are_not_ours() {
        for key in [
            "kubevirt.io/schedulable",
            "node-labeller.kubevirt.io/skip-node",
            "notvirtnode.io/eim",
            "node.kubevirt.io/x",
            "scheduling.node.kubevirt.io/tsc-frequency-1",
        ] {
            assert!(!is_ours(&key.parse().unwrap()), "{key}");
        }
    }
}
