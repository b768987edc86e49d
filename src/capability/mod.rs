//! What libvirt says of a node, as facts. Pure.

mod version;

pub use version::{NotAVersion, Version};
