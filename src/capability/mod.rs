//! What libvirt says of a node, as facts. Pure.

mod cpu;
mod domain;
mod guest;
mod host;
mod vcpus;
mod version;

pub use cpu::{CpuDefinition, CpuModel, CpuModes, HostModel, PlainMode, PolicyFeature, Usable};
pub use domain::{DomainCapabilities, Hyperv, Section, Sev, Sgx};
pub use guest::{Guest, GuestDomain, Machine};
pub use host::{Capabilities, Host, HostCpu, Migration, NumaCell, Pages, Topology, TscCounter};
pub use vcpus::{UNLIMITED, VcpuMax};
pub use version::{NotAVersion, Version};
