//! Domains: the reader of their XML, the views of it, states, jobs and statistics. Pure.

mod attached;
mod call_error;
mod cpu;
mod definition;
mod device_spec;
mod devices;
mod domain_ref;
mod facts;
#[cfg(test)]
mod facts_tests;
mod firmware;
mod idset;
mod job;
mod memory;
mod pause_reason;
mod placement;
mod requirements;
mod state;
mod stats;
mod text;
mod vcpus;

pub use attached::{AttachedDevice, AttachedKind};
pub use call_error::CallError;
pub use cpu::{CpuCheck, CpuRequirement, DomainCpu, PhysicalAddress, VcpuTopology};
pub use definition::{DomainDefinition, Gic, IoApicDriver};
pub use device_spec::{DeviceBackend, DeviceSpec};
pub use devices::{
    AgentChannel, AliasedDevice, Balloon, DeviceDefinitions, HostDevices, IommuDevice, IommuModel,
    PciControllers,
};
pub use domain_ref::{ConnectionId, DomainRef, is_uuid};
pub use facts::Domain;
pub use firmware::{Firmware, Loader};
pub use idset::IdSet;
pub use job::Job;
pub use memory::{GuestNumaCell, Memory, MemoryDefinition, MemoryDevice, MemoryModel};
pub use pause_reason::PauseReason;
pub use placement::{HostPlacement, MemoryBacking, parse_set};
pub use requirements::NodeRequirements;
pub use state::DomainState;
pub use stats::{BalloonStats, Stats, VcpuStats};
pub use text::{is_plain, plain};
pub use vcpus::{Vcpu, VcpuDefinition, Vcpus};
