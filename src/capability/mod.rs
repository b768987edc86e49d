//! What libvirt and the host say of a node, as facts. Pure.

mod cpu;
mod domain;
pub mod eim;
mod facts;
mod guest;
mod host;
mod node;
mod read;
mod vcpus;
mod version;

pub use cpu::{CpuDefinition, CpuModel, CpuModes, HostModel, PlainMode, PolicyFeature, Usable};
pub use domain::{DomainCapabilities, Hyperv, Section, Sev, Sgx};
pub use eim::Eim;
pub use facts::{Accelerator, CanonicalMachine, NodeFacts, is_q35, is_x86};
pub use guest::{GuestCapabilities, GuestDomain, MachineType};
pub use host::{
    Capabilities, CpuTopology, EmulatorOwner, HostCapabilities, HostCpu, Migration, NumaCell,
    Pages, TscCounter,
};
pub use node::{HostFacts, IommuKind, KvmHyperv};
pub use vcpus::{UNLIMITED, VcpuMax};
pub use version::{NotAVersion, Version};
