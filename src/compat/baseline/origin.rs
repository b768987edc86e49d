//! The part of a node that decides if guests have a CPU feature. docs/cpu.md has the same table.

use serde::Serialize;

use crate::units::words;

words! {
    /// The part of a node from which a CPU feature comes.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum FeatureOrigin {
        /// The generation of the CPU. Nothing but another CPU adds it.
        Model = "model",
        /// The firmware's settings, and for virtualization the module parameter `nested` of KVM.
        Bios = "bios",
        /// Updates of the CPU's microcode, which mitigate flaws or remove faulty features.
        Microcode = "microcode",
        /// KVM and QEMU, which add it or keep it from guests.
        Hypervisor = "hypervisor",
    }
}

/// Features that the firmware can turn off; those that depend on nested virtualization also need KVM's
/// parameter.
const BIOS: [&str; 27] = [
    "avic",
    "decodeassists",
    "flushbyasid",
    "lbrv",
    "npt",
    "nrip-save",
    "pause-filter",
    "pfthreshold",
    "sgx",
    "sgx-aex-notify",
    "sgx-debug",
    "sgx-edeccssa",
    "sgx-exinfo",
    "sgx-kss",
    "sgx-mode64",
    "sgx-provisionkey",
    "sgx-tokenkey",
    "sgx1",
    "sgx2",
    "sgxlc",
    "svm",
    "svme-addr-chk",
    "tsc-scale",
    "v-vmsave-vmload",
    "vgif",
    "vmcb-clean",
    "vmx",
];

/// Features that microcode adds, or removes (hle, rtm).
const MICROCODE: [&str; 50] = [
    "amd-no-ssb",
    "amd-psfd",
    "amd-ssbd",
    "amd-stibp",
    "arch-capabilities",
    "auto-ibrs",
    "bhi-ctrl",
    "bhi-no",
    "core-capability",
    "ddpd-u",
    "fb-clear",
    "fbsdp-no",
    "flush-l1d",
    "gds-no",
    "hle",
    "ibpb",
    "ibpb-brtype",
    "ibrs",
    "ibrs-all",
    "intel-psfd",
    "ipred-ctrl",
    "its-no",
    "mcdt-no",
    "md-clear",
    "mds-no",
    "overclock-status",
    "pbrsb-no",
    "prefetchi",
    "psdp-no",
    "pschange-mc-no",
    "psfd",
    "rdctl-no",
    "rfds-clear",
    "rfds-no",
    "rrsba-ctrl",
    "rsba",
    "rtm",
    "sbdr-ssdp-no",
    "sbpb",
    "skip-l1dfl-vmentry",
    "spec-ctrl",
    "split-lock-detect",
    "srso-no",
    "srso-user-kernel-no",
    "ssbd",
    "stibp",
    "taa-no",
    "tsa-l1-no",
    "tsx-ctrl",
    "virt-ssbd",
];

/// Features that KVM or QEMU provide, emulate, or allow by their versions and settings.
const HYPERVISOR: [&str; 16] = [
    "arat",
    "arch-lbr",
    "cmp_legacy",
    "ht",
    "hypervisor",
    "invtsc",
    "monitor",
    "pdcm",
    "perfmon-v2",
    "pmu",
    "topoext",
    "tsc-deadline",
    "tsc_adjust",
    "umip",
    "vnmi",
    "x2apic",
];

impl FeatureOrigin {
    /// Returns the origin of a feature in libvirt's spelling: that of the CPU unless the feature is
    /// known to come from elsewhere.
    pub fn of(feature: &str) -> Self {
        let is_in = |list: &[&str]| list.contains(&feature);
        if is_in(&BIOS) || feature.starts_with("vmx-") {
            Self::Bios
        } else if is_in(&MICROCODE) {
            Self::Microcode
        } else if is_in(&HYPERVISOR) || feature.starts_with("kvm") {
            Self::Hypervisor
        } else {
            Self::Model
        }
    }

    /// Returns the words for people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Model => "CPU generation",
            Self::Bios => "BIOS",
            Self::Microcode => "microcode",
            Self::Hypervisor => "hypervisor",
        }
    }
}

/// A feature and its origin.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct OriginatedFeature {
    pub name: String,
    pub origin: FeatureOrigin,
}

impl OriginatedFeature {
    pub(super) fn new(name: &str) -> Self {
        Self {
            origin: FeatureOrigin::of(name),
            name: name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("avx512f", FeatureOrigin::Model)]
    #[case("svm", FeatureOrigin::Bios)]
    #[case("vmx-ept", FeatureOrigin::Bios)]
    #[case("md-clear", FeatureOrigin::Microcode)]
    #[case("rtm", FeatureOrigin::Microcode)]
    #[case("x2apic", FeatureOrigin::Hypervisor)]
    #[case("of-tomorrow", FeatureOrigin::Model)]
    fn feature_has_the_origin_of_the_table(#[case] name: &str, #[case] origin: FeatureOrigin) {
        assert_eq!(FeatureOrigin::of(name), origin);
    }
}
