//! Prefixes of the native schema's keys.

pub const NODE: &str = "virtnode.io";
/// Machine types of the host's architecture.
pub const MACHINE: &str = "machine.virtnode.io";
pub const MACHINE_ALIAS: &str = "machine-alias.virtnode.io";
pub const MACHINE_DEPRECATED: &str = "machine-deprecated.virtnode.io";
pub const CPU_MODEL: &str = "cpu-model.virtnode.io";
pub const CPU_FEATURE: &str = "cpu-feature.virtnode.io";
pub const HYPERV: &str = "hyperv.virtnode.io";
