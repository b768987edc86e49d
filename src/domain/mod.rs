//! Domains, as facts: from their live XML and their statistics. Pure.

pub mod device_xml;
mod devices;
mod facts;
#[cfg(test)]
mod facts_tests;
mod idset;
mod job;
mod memory;
mod needs;
mod reason;
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
pub use needs::Needs;
pub use reason::Reason;
pub use state::DomainState;
pub use stats::{BalloonStats, Stats, VcpuStats};
pub use text::{is_plain, plain};
pub use vcpus::{Vcpu, Vcpus};
