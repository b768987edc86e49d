//! Limits that are known before anything is changed. Every text names the limit and the remedy.

use thiserror::Error;

use crate::domain::IdSet;
use crate::units::Bytes;

/// A limit that rules a request out, whatever the guest does.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Infeasible {
    /// A rule for launchers' domains.
    #[error("{reason}; {remedy}")]
    Launcher { reason: String, remedy: String },
    #[error(
        "the domain is transient: it has no definition that could be changed; ask without --persistent (persistent: true), \
         or define it first (virsh define)"
    )]
    NoDefinition,
    #[error("a domain has at least 1 vCPU: ask for 1 or more, or shut the domain down")]
    NoVcpus,
    #[error(
        "{asked} vCPUs are more than the domain's maximum of {maximum}: the maximum is fixed while \
         it runs; raise <vcpu> in its definition and start it again"
    )]
    AboveMaximumVcpus { asked: u32, maximum: u32 },
    #[error(
        "{asked} vCPUs are not a multiple of {granularity}, the threads of a core, which this \
         machine type plugs together: ask for {below} or {above}"
    )]
    VcpuGranularity {
        asked: u32,
        granularity: u32,
        /// The nearest possible number below.
        below: u32,
        /// The nearest possible number above.
        above: u32,
    },
    #[error(
        "machine type {machine} cannot plug vCPUs into a running domain: start the domain with \
         as many as it needs{instead}"
    )]
    MachineWithoutVcpuHotplug {
        machine: String,
        /// The machine type of this architecture that can, if there is one.
        instead: &'static str,
    },
    #[error(
        "machine type {machine} cannot unplug vCPUs from a running domain: take them offline in \
         the guest, or start the domain again with fewer"
    )]
    MachineWithoutVcpuUnplug { machine: String },
    #[error(
        "{asked} vCPUs are fewer than the {} that the domain was started with and that are not \
         hotpluggable ({}): {remedy}", .fixed.len(), .fixed.named("vCPU")
    )]
    FixedVcpus {
        asked: u32,
        /// vCPUs that cannot be unplugged.
        fixed: IdSet,
        remedy: String,
    },
    /// QEMU would abort.
    #[error(
        "{asked} vCPUs would crash the domain: without KVM, QEMU starts at most {maximum} vCPUs in its \
         life, the maximum, and {released} of them were unplugged since it started; ask for \
         {reachable} or fewer, or shut the domain down and start it again"
    )]
    EmulatedVcpus {
        asked: u32,
        maximum: u32,
        /// vCPUs that left since the emulator started.
        released: u32,
        /// The largest number that is possible.
        reachable: u32,
    },
    #[error(
        "{asked} vCPUs cannot be reached: {plugged} are plugged and only {free} of the others are \
         hotpluggable; set hotpluggable='yes' in <vcpus> and start the domain again"
    )]
    TooFewHotpluggableVcpus {
        asked: u32,
        plugged: u32,
        /// Unplugged vCPUs that are hotpluggable.
        free: u32,
    },
    /// The guest would never be notified.
    #[error(
        "the domain has no ACPI, which notifies the guest: add <acpi/> to <features> \
         and start it again"
    )]
    NoAcpi,
    /// No memory at all, or less than at boot.
    #[error(
        "{asked} are less than the {boot} that the domain booted with, which cannot be unplugged: \
         start it with less, or set a balloon target"
    )]
    BelowBootMemory { asked: Bytes, boot: Bytes },
    /// The domain has no room for memory devices.
    #[error(
        "the domain has no <maxMemory>, so its memory is fixed at {has}: add <maxMemory> (with \
         slots for DIMMs) and a virtio-mem device to its definition and start it again"
    )]
    NoMaxMemory { has: Bytes },
    #[error("{asked} are more than the domain can reach, which is {reachable}: {remedy}")]
    AboveMaximumMemory {
        asked: Bytes,
        reachable: Bytes,
        remedy: String,
    },
    #[error(
        "{asked} cannot be met exactly: memory is plugged in blocks of {block} here; ask for {near}"
    )]
    MemoryBlock {
        asked: Bytes,
        block: Bytes,
        /// The nearest possible sizes.
        near: String,
    },
    #[error("all {slots} memory slots are taken: {remedy}")]
    NoSlot { slots: u32, remedy: String },
    /// A DIMM must belong to a NUMA cell.
    #[error(
        "the domain has no NUMA cell, to which a DIMM must belong on this architecture: add <numa> \
         with one <cell> to <cpu> and start it again"
    )]
    NoNumaCell,
    #[error(
        "machine type {machine} has no DIMMs, and the domain has no virtio-mem device: add one to \
         its definition and start it again"
    )]
    NoDimms { machine: String },
    #[error(
        "{asked} are less than the {least} that cannot be returned: only virtio-mem devices \
         shrink, and DIMMs stay; detach a DIMM by its alias, or give the domain a virtio-mem \
         device"
    )]
    CannotShrink {
        asked: Bytes,
        /// Boot memory and DIMMs.
        least: Bytes,
    },
    #[error(
        "with {asked} the guest would have {left} of its total left, and it uses {used} of {total} \
         (reported {age} s before): free memory in the guest, or ask for {least} or more; --force \
         (force: true) takes it away all the same, and the guest may kill programs or crash"
    )]
    BelowUse {
        asked: Bytes,
        /// The guest's total afterwards.
        left: Bytes,
        used: Bytes,
        total: Bytes,
        /// The age of the figures in seconds.
        age: u64,
        least: Bytes,
    },
    #[error(
        "{more} more are asked for, and the node has {available} available: free memory on the \
         node, or move the domain to one that has it"
    )]
    NodeMemory {
        /// The requested growth.
        more: Bytes,
        available: Bytes,
    },
}

impl Infeasible {
    /// Returns the fixed word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Launcher { .. } => "launcher",
            Self::NoDefinition => "no-definition",
            Self::NoVcpus => "no-vcpus",
            Self::AboveMaximumVcpus { .. } => "above-maximum-vcpus",
            Self::VcpuGranularity { .. } => "vcpu-granularity",
            Self::MachineWithoutVcpuHotplug { .. } => "machine-without-vcpu-hotplug",
            Self::MachineWithoutVcpuUnplug { .. } => "machine-without-vcpu-unplug",
            Self::FixedVcpus { .. } => "fixed-vcpus",
            Self::EmulatedVcpus { .. } => "emulated-vcpus",
            Self::TooFewHotpluggableVcpus { .. } => "too-few-hotpluggable-vcpus",
            Self::NoAcpi => "no-acpi",
            Self::BelowBootMemory { .. } => "below-boot-memory",
            Self::NoMaxMemory { .. } => "no-max-memory",
            Self::AboveMaximumMemory { .. } => "above-maximum-memory",
            Self::MemoryBlock { .. } => "memory-block",
            Self::NoSlot { .. } => "no-slot",
            Self::NoNumaCell => "no-numa-cell",
            Self::NoDimms { .. } => "no-dimms",
            Self::CannotShrink { .. } => "cannot-shrink",
            Self::BelowUse { .. } => "below-use",
            Self::NodeMemory { .. } => "node-memory",
        }
    }
}
