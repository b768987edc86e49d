//! The table of all label keys for operators. A test compares it with the derived labels and
//! generates docs/labels.md from it.

use virtnode::label::{LabelKey, Schema};

/// The description of one label key or of a family of keys.
pub(crate) struct LabelEntry {
    /// Never [`Schema::Both`].
    pub(crate) schema: Schema,
    /// `<…>` stands for a name from libvirt.
    pub(crate) key: &'static str,
    /// The possible values.
    pub(crate) value: &'static str,
    pub(crate) meaning: &'static str,
}

impl LabelEntry {
    /// True if this entry describes the key.
    pub(crate) fn describes(&self, key: &LabelKey) -> bool {
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

pub(crate) const REFERENCE: &[LabelEntry] = &[
    native(
        "machine.virtnode.io/<machine type>",
        "a number, or `unknown`",
        "maximum number of vCPUs of a domain with this machine type on this node; `unknown` if libvirt does not report it",
    ),
    native(
        "machine-alias.virtnode.io/<alias>",
        "a canonical name",
        "the machine type that the alias refers to on this node",
    ),
    native(
        "machine-deprecated.virtnode.io/<machine type>",
        "`true`",
        "QEMU plans to remove this machine type",
    ),
    native(
        "machine.<architecture>.virtnode.io/<machine type>",
        "as above",
        "the same for a guest architecture listed in `labels.guestArchitectures`, with `-` in place of `_`",
    ),
    native(
        "machine-alias.<architecture>.virtnode.io/<alias>",
        "as above",
        "the same for such an architecture",
    ),
    native(
        "machine-deprecated.<architecture>.virtnode.io/<machine type>",
        "`true`",
        "the same for such an architecture",
    ),
    native(
        "cpu-model.virtnode.io/<model>",
        "`true`",
        "the CPU supports all features of this model with the best accelerator; models in `labels.obsoleteCpuModels` are omitted",
    ),
    native(
        "cpu-feature.virtnode.io/<feature>",
        "`true`",
        "the hypervisor can provide this CPU feature to a guest",
    ),
    native(
        "hyperv.virtnode.io/<enlightenment>",
        "`true`",
        "the hypervisor can provide this Hyper-V enlightenment to a guest",
    ),
    native(
        "virtnode.io/accelerator",
        "`kvm`, `hvf`, `mshv` or `tcg`",
        "the best accelerator for guests of the host's architecture",
    ),
    native(
        "virtnode.io/max-vcpus",
        "a number",
        "highest maximum number of vCPUs of all machine types that are not deprecated",
    ),
    native(
        "virtnode.io/eim",
        "`auto`, `explicit` or `none`",
        "how a domain obtains extended interrupt mode, which more than 255 vCPUs require on x86: `auto` if libvirt adds it, `explicit` if the domain XML must request it, `none` if it is not available",
    ),
    native(
        "virtnode.io/host-model",
        "a CPU model",
        "the CPU model that `host-model` expands to on this node",
    ),
    native(
        "virtnode.io/cpu-vendor",
        "a vendor",
        "vendor of that CPU model",
    ),
    native(
        "virtnode.io/tsc-frequency-hz",
        "a number",
        "frequency of the time stamp counter",
    ),
    native(
        "virtnode.io/tsc-scaling",
        "`true` or `false`",
        "`true` if guests can have another time stamp counter frequency",
    ),
    native(
        "virtnode.io/iommu",
        "`vt-d`, `amd-vi`, `smmu`, `other` or `none`",
        "kind of the active IOMMU",
    ),
    native(
        "virtnode.io/iommu-groups",
        "a number",
        "number of IOMMU groups",
    ),
    native(
        "virtnode.io/vfio",
        "`true`",
        "VFIO can assign devices to guests",
    ),
    native(
        "virtnode.io/iommufd",
        "`true`",
        "iommufd is available for device assignment",
    ),
    native(
        "virtnode.io/nested",
        "`true`",
        "guests can run KVM themselves",
    ),
    native(
        "virtnode.io/libvirt-version",
        "a version",
        "version of libvirt",
    ),
    native("virtnode.io/qemu-version", "a version", "version of QEMU"),
    native("virtnode.io/sev", "`true`", "AMD SEV guests are supported"),
    native(
        "virtnode.io/sev-es",
        "`true`",
        "AMD SEV-ES guests (encrypted register state) are supported",
    ),
    native(
        "virtnode.io/sev-snp",
        "`true`",
        "AMD SEV-SNP guests (secure nested paging) are supported",
    ),
    native(
        "virtnode.io/tdx",
        "`true`",
        "Intel TDX guests are supported",
    ),
    native(
        "virtnode.io/sgx",
        "`true`",
        "Intel SGX enclaves in guests are supported",
    ),
    native(
        "virtnode.io/s390-pv",
        "`true`",
        "IBM Secure Execution guests are supported",
    ),
    kubevirt(
        "machine-type.node.kubevirt.io/<machine type or alias>",
        "`true`",
        "libvirt lists this machine type for the host's architecture",
    ),
    kubevirt(
        "cpu-model.node.kubevirt.io/<model>",
        "`true`",
        "libvirt does not report this model as unusable; obsolete models are omitted",
    ),
    kubevirt(
        "cpu-model-migration.node.kubevirt.io/<model>",
        "`true`",
        "libvirt lists this model, usable or not; obsolete models are omitted",
    ),
    kubevirt(
        "cpu-feature.node.kubevirt.io/<feature>",
        "`true`",
        "hypervisor-cpu-baseline requires this CPU feature",
    ),
    kubevirt(
        "host-model-cpu.node.kubevirt.io/<model>",
        "`true`",
        "the CPU model that `host-model` expands to on this node",
    ),
    kubevirt(
        "host-model-required-features.node.kubevirt.io/<feature>",
        "`true`",
        "`host-model` requires this CPU feature",
    ),
    kubevirt(
        "cpu-vendor.node.kubevirt.io/<vendor>",
        "`true`",
        "vendor of the `host-model` CPU",
    ),
    kubevirt(
        "hyperv.node.kubevirt.io/<enlightenment>",
        "`true`",
        "KVM supports this Hyper-V enlightenment; requires permission to open /dev/kvm",
    ),
    kubevirt(
        "cpu-timer.node.kubevirt.io/tsc-frequency",
        "a number",
        "frequency of the time stamp counter in Hz",
    ),
    kubevirt(
        "cpu-timer.node.kubevirt.io/tsc-scalable",
        "`true` or `false`",
        "`true` if guests can have another time stamp counter frequency",
    ),
    kubevirt(
        "node-labeller.kubevirt.io/obsolete-host-model",
        "`true`",
        "`labels.obsoleteCpuModels` lists the host model",
    ),
    kubevirt(
        "kubevirt.io/realtime",
        "`true`",
        "real-time tasks may use all of a CPU's time",
    ),
    kubevirt("kubevirt.io/sev", "`true`", "AMD SEV guests are supported"),
    kubevirt(
        "kubevirt.io/sev-es",
        "`true`",
        "AMD SEV-ES guests (encrypted register state) are supported",
    ),
    kubevirt(
        "kubevirt.io/sev-snp",
        "`true`",
        "AMD SEV-SNP guests (secure nested paging) are supported",
    ),
    kubevirt(
        "kubevirt.io/tdx",
        "`true`",
        "Intel TDX guests are supported",
    ),
    kubevirt(
        "kubevirt.io/s390-pv",
        "`true`",
        "IBM Secure Execution guests are supported",
    ),
];
