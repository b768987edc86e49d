//! Facts about a node: libvirt's capability documents parsed into types, and the conclusions that
//! follow from them. Pure: a document arrives as bytes, whoever fetched it.
//!
//! * [`Capabilities`], [`DomainCapabilities`], [`CpuDefinition`]: one parser for each document;
//! * [`HostFacts`]: facts from the kernel, read by [`crate::host`];
//! * [`NodeFacts`]: all of these together, with the rules that combine them.
//!
//! A fact that is missing is unknown. It is never replaced by a guess.

mod cpu;
mod domain;
pub mod eim;
mod facts;
mod guest;
mod host;
mod node;
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
pub use version::Version;
