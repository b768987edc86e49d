//! Domains, as facts: from their live XML and their statistics. Pure.

pub mod device_xml;
mod devices;
mod facts;
#[cfg(test)]
mod facts_tests;
mod idset;
mod job;
mod memory;
mod pause_reason;
mod requirements;
mod state;
mod stats;
mod text;
mod vcpus;

pub use devices::{AgentChannel, Balloon, Device};
pub use facts::{Cpu, Domain, Topology};
pub use idset::{IdSet, NotAnIdSet};
pub use job::Job;
pub(crate) use memory::scaled;
pub use memory::{Memory, MemoryDevice, MemoryModel, NumaCell};
pub use pause_reason::PauseReason;
pub use requirements::NodeRequirements;
pub use state::DomainState;
pub use stats::{BalloonStats, Stats, VcpuStats};
pub use text::{is_plain, plain};
pub use vcpus::{Vcpu, Vcpus};
