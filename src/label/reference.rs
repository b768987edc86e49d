//! Every key that can be written, as an operator looks it up: docs/labels.md is made of this, and a
//! test holds it against what is derived.

use super::{LabelKey, Schema};

/// One kind of label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelEntry {
    /// Which schema has it; never [`Schema::Both`].
    pub schema: Schema,
    /// Its key, in which `<…>` stands for a name of libvirt's.
    pub key: &'static str,
    /// What its value can be.
    pub value: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

impl LabelEntry {
    /// Whether a key is of this kind.
    pub fn describes(&self, key: &LabelKey) -> bool {
        let Some((prefix, name)) = self.key.split_once('/') else {
            return false;
        };
        (name.starts_with('<') || name == key.name())
            && match prefix.split_once("<architecture>") {
                None => prefix == key.prefix(),
                Some((before, after)) => key
                    .prefix()
                    .strip_prefix(before)
                    .and_then(|rest| rest.strip_suffix(after))
                    .is_some_and(|architecture| !architecture.is_empty()),
            }
    }
}

const fn native(key: &'static str, value: &'static str, meaning: &'static str) -> LabelEntry {
    LabelEntry {
        schema: Schema::Native,
        key,
        value,
        meaning,
    }
}

const fn kubevirt(key: &'static str, value: &'static str, meaning: &'static str) -> LabelEntry {
    LabelEntry {
        schema: Schema::Kubevirt,
        key,
        value,
        meaning,
    }
}

/// Every kind of label of both schemas.
pub const REFERENCE: &[LabelEntry] = &[
    native(
        "machine.virtnode.io/<machine type>",
        "a number, or `unknown`",
        "the most vCPUs that a domain of this machine type can really have here; `unknown` if libvirt does not say",
    ),
    native(
        "machine-alias.virtnode.io/<alias>",
        "a canonical name",
        "the machine type that the alias means on this node",
    ),
    native(
        "machine-deprecated.virtnode.io/<machine type>",
        "`true`",
        "QEMU will drop it",
    ),
    native(
        "machine.<architecture>.virtnode.io/<machine type>",
        "as above",
        "of a guest architecture that `labels.guestArchitectures` lists, with `-` for `_`",
    ),
    native(
        "machine-alias.<architecture>.virtnode.io/<alias>",
        "as above",
        "of such an architecture",
    ),
    native(
        "machine-deprecated.<architecture>.virtnode.io/<machine type>",
        "`true`",
        "of such an architecture",
    ),
    native(
        "cpu-model.virtnode.io/<model>",
        "`true`",
        "usable as it is with the best accelerator; without those of `labels.obsoleteCpuModels`",
    ),
    native(
        "cpu-feature.virtnode.io/<feature>",
        "`true`",
        "the hypervisor can give it to a guest",
    ),
    native(
        "hyperv.virtnode.io/<enlightenment>",
        "`true`",
        "the hypervisor can give it to a guest",
    ),
    native(
        "virtnode.io/accelerator",
        "`kvm`, `hvf`, `mshv` or `tcg`",
        "the best there is for guests of the host's architecture",
    ),
    native(
        "virtnode.io/max-vcpus",
        "a number",
        "the largest maximum over the machine types that are not deprecated",
    ),
    native(
        "virtnode.io/eim",
        "`auto`, `explicit` or `none`",
        "how a domain gets the extended interrupt mode that more than 255 vCPUs need on x86: by itself, by its XML, or not at all",
    ),
    native(
        "virtnode.io/host-model",
        "a CPU model",
        "what `host-model` means here",
    ),
    native("virtnode.io/cpu-vendor", "a vendor", "of that model"),
    native(
        "virtnode.io/tsc-frequency-hz",
        "a number",
        "the time stamp counter's",
    ),
    native(
        "virtnode.io/tsc-scaling",
        "`true` or `false`",
        "whether guests can have another",
    ),
    native(
        "virtnode.io/iommu",
        "`vt-d`, `amd-vi`, `smmu`, `other` or `none`",
        "the IOMMU that is switched on",
    ),
    native("virtnode.io/iommu-groups", "a number", "its groups"),
    native(
        "virtnode.io/vfio",
        "`true`",
        "devices can be given to guests by VFIO",
    ),
    native("virtnode.io/iommufd", "`true`", "and by iommufd"),
    native("virtnode.io/nested", "`true`", "guests can be hypervisors"),
    native("virtnode.io/libvirt-version", "a version", "libvirt's"),
    native("virtnode.io/qemu-version", "a version", "QEMU's"),
    native("virtnode.io/sev", "`true`", "AMD SEV guests can be started"),
    native("virtnode.io/sev-es", "`true`", "with encrypted state"),
    native("virtnode.io/sev-snp", "`true`", "with secure nested paging"),
    native(
        "virtnode.io/tdx",
        "`true`",
        "Intel TDX guests can be started",
    ),
    native("virtnode.io/sgx", "`true`", "guests can have SGX enclaves"),
    native(
        "virtnode.io/s390-pv",
        "`true`",
        "IBM Secure Execution guests can be started",
    ),
    kubevirt(
        "machine-type.node.kubevirt.io/<machine type or alias>",
        "`true`",
        "libvirt lists it for the host's architecture",
    ),
    kubevirt(
        "cpu-model.node.kubevirt.io/<model>",
        "`true`",
        "libvirt does not call it unusable; without the obsolete ones",
    ),
    kubevirt(
        "cpu-model-migration.node.kubevirt.io/<model>",
        "`true`",
        "libvirt knows it, usable or not; without the obsolete ones",
    ),
    kubevirt(
        "cpu-feature.node.kubevirt.io/<feature>",
        "`true`",
        "hypervisor-cpu-baseline requires it",
    ),
    kubevirt(
        "host-model-cpu.node.kubevirt.io/<model>",
        "`true`",
        "what `host-model` means here",
    ),
    kubevirt(
        "host-model-required-features.node.kubevirt.io/<feature>",
        "`true`",
        "`host-model` requires it",
    ),
    kubevirt(
        "cpu-vendor.node.kubevirt.io/<vendor>",
        "`true`",
        "of the host model",
    ),
    kubevirt(
        "hyperv.node.kubevirt.io/<enlightenment>",
        "`true`",
        "KVM offers it: only where /dev/kvm can be opened",
    ),
    kubevirt(
        "cpu-timer.node.kubevirt.io/tsc-frequency",
        "a number",
        "the time stamp counter's, in Hz",
    ),
    kubevirt(
        "cpu-timer.node.kubevirt.io/tsc-scalable",
        "`true` or `false`",
        "whether guests can have another",
    ),
    kubevirt(
        "node-labeller.kubevirt.io/obsolete-host-model",
        "`true`",
        "the host model is one of `labels.obsoleteCpuModels`",
    ),
    kubevirt(
        "kubevirt.io/realtime",
        "`true`",
        "real-time tasks may use a CPU for good",
    ),
    kubevirt("kubevirt.io/sev", "`true`", "AMD SEV guests can be started"),
    kubevirt("kubevirt.io/sev-es", "`true`", "with encrypted state"),
    kubevirt("kubevirt.io/sev-snp", "`true`", "with secure nested paging"),
    kubevirt(
        "kubevirt.io/tdx",
        "`true`",
        "Intel TDX guests can be started",
    ),
    kubevirt(
        "kubevirt.io/s390-pv",
        "`true`",
        "IBM Secure Execution guests can be started",
    ),
];
