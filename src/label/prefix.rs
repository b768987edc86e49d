//! The prefixes of our own keys, for whoever writes or reads them.

/// What is said of the node as a whole.
pub const NODE: &str = "virtnode.io";
/// Machine types of the host's own architecture.
pub const MACHINE: &str = "machine.virtnode.io";
/// What an alias of a machine type means there.
pub const MACHINE_ALIAS: &str = "machine-alias.virtnode.io";
/// Machine types that are going to be dropped.
pub const MACHINE_DEPRECATED: &str = "machine-deprecated.virtnode.io";
/// Named CPU models.
pub const CPU_MODEL: &str = "cpu-model.virtnode.io";
/// CPU features.
pub const CPU_FEATURE: &str = "cpu-feature.virtnode.io";
/// Hyper-V enlightenments.
pub const HYPERV: &str = "hyperv.virtnode.io";
