//! What libvirt says of a node, as facts. Pure.

pub mod eim;
mod node;
mod version;

pub use eim::Eim;
pub use node::{HostFacts, IommuKind, KvmHyperv};
pub use version::{NotAVersion, Version};
