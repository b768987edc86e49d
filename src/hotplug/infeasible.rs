//! Limits that are known before anything is changed. Every text has the limit and the remedy.

use thiserror::Error;

use crate::units::Bytes;

/// Why a request cannot be done, whatever the guest is like.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Infeasible {
    /// Zero vCPUs.
    #[error("a domain has at least 1 vCPU: ask for 1 or more, or shut the domain down")]
    NoVcpus,
    /// More than the domain was started with room for.
    #[error(
        "{asked} vCPUs are more than the domain's maximum of {maximum}: the maximum is fixed while \
         it runs; raise <vcpu> in its definition and start it again"
    )]
    AboveMaximumVcpus {
        /// What was asked for.
        asked: u32,
        /// The most there can be.
        maximum: u32,
    },
    /// Only whole cores can be plugged.
    #[error(
        "{asked} vCPUs are not a multiple of {granularity}, the threads of a core, which this \
         machine type plugs together: ask for {below} or {above}"
    )]
    VcpuGranularity {
        /// What was asked for.
        asked: u32,
        /// What it must be a multiple of.
        granularity: u32,
        /// The next smaller number that can be had.
        below: u32,
        /// The next larger one.
        above: u32,
    },
    /// The machine type plugs no vCPUs.
    #[error(
        "machine type {machine} cannot plug vCPUs into a running domain: start the domain with \
         as many as it needs{instead}"
    )]
    MachineWithoutVcpuHotplug {
        /// The machine type.
        machine: String,
        /// Which machine type of the architecture can, if there is one.
        instead: &'static str,
    },
    /// The machine type lets no vCPU go.
    #[error(
        "machine type {machine} cannot unplug vCPUs from a running domain: take them offline in \
         the guest, or start the domain again with fewer"
    )]
    MachineWithoutVcpuUnplug {
        /// The machine type.
        machine: String,
    },
    /// The vCPUs that the domain was started with stay.
    #[error(
        "{asked} vCPUs are fewer than the {fixed} that the domain was started with and that are \
         not hotpluggable: start it with fewer, or with hotpluggable='yes' in <vcpus>"
    )]
    FixedVcpus {
        /// What was asked for.
        asked: u32,
        /// Those that cannot be unplugged.
        fixed: u32,
    },
    /// vCPUs that are not plugged cannot be.
    #[error(
        "{asked} vCPUs cannot be reached: {plugged} are plugged and only {free} of the others are \
         hotpluggable; set hotpluggable='yes' in <vcpus> and start the domain again"
    )]
    TooFewHotpluggableVcpus {
        /// What was asked for.
        asked: u32,
        /// Those that are plugged.
        plugged: u32,
        /// Those that can be.
        free: u32,
    },
    /// The guest would never be told.
    #[error(
        "the domain has no ACPI, by which its guest would learn of it: add <acpi/> to <features> \
         and start it again"
    )]
    NoAcpi,
    /// No memory at all, or less than the domain booted with.
    #[error(
        "{asked} are less than the {boot} that the domain booted with, which cannot be unplugged: \
         start it with less, or set a balloon target"
    )]
    BelowBootMemory {
        /// What was asked for.
        asked: Bytes,
        /// What it booted with.
        boot: Bytes,
    },
    /// The domain has no room for memory devices.
    #[error(
        "the domain has no <maxMemory>, so its memory is fixed at {has}: add <maxMemory> (with \
         slots for DIMMs) and a virtio-mem device to its definition and start it again"
    )]
    NoMaxMemory {
        /// What it has.
        has: Bytes,
    },
    /// More than the domain was started with room for.
    #[error(
        "{asked} are more than the domain can reach, which is {reachable}: {remedy}, and start it \
         again"
    )]
    AboveMaximumMemory {
        /// What was asked for.
        asked: Bytes,
        /// The most that can be had.
        reachable: Bytes,
        /// What to do.
        remedy: &'static str,
    },
    /// Not a whole number of blocks.
    #[error(
        "{asked} cannot be met exactly: memory is plugged in blocks of {block} here; ask for {near}"
    )]
    MemoryBlock {
        /// What was asked for.
        asked: Bytes,
        /// The block.
        block: Bytes,
        /// The sizes next to it that can be had.
        near: String,
    },
    /// All slots are taken.
    #[error(
        "all {slots} memory slots are taken: give <maxMemory> more slots, or the domain a \
         virtio-mem device, and start it again"
    )]
    NoSlot {
        /// How many there are.
        slots: u32,
    },
    /// A DIMM belongs to a NUMA cell, and there is none.
    #[error(
        "the domain has no NUMA cell, to which a DIMM must belong on this architecture: add <numa> \
         with one <cell> to <cpu> and start it again"
    )]
    NoNumaCell,
    /// The architecture has no DIMMs.
    #[error(
        "machine type {machine} has no DIMMs, and the domain has no virtio-mem device: add one to \
         its definition and start it again"
    )]
    NoDimms {
        /// The machine type.
        machine: String,
    },
    /// DIMMs are only added.
    #[error(
        "{asked} are less than the {least} that cannot be given back: only virtio-mem devices \
         shrink, and DIMMs stay; detach a DIMM by its alias, or give the domain a virtio-mem \
         device"
    )]
    CannotShrink {
        /// What was asked for.
        asked: Bytes,
        /// What the domain booted with, and its DIMMs.
        least: Bytes,
    },
    /// The node does not have as much.
    #[error(
        "{more} more are asked for, and the node has {available} available: free memory on the \
         node, or move the domain to one that has it"
    )]
    NodeMemory {
        /// By how much the domain is to grow.
        more: Bytes,
        /// What the node can give.
        available: Bytes,
    },
}

impl Infeasible {
    /// The bounded word for this limit.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoVcpus => "no-vcpus",
            Self::AboveMaximumVcpus { .. } => "above-maximum-vcpus",
            Self::VcpuGranularity { .. } => "vcpu-granularity",
            Self::MachineWithoutVcpuHotplug { .. } => "machine-without-vcpu-hotplug",
            Self::MachineWithoutVcpuUnplug { .. } => "machine-without-vcpu-unplug",
            Self::FixedVcpus { .. } => "fixed-vcpus",
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
            Self::NodeMemory { .. } => "node-memory",
        }
    }
}
