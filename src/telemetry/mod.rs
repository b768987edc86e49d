//! Logs and metrics.

pub mod cluster;
pub mod hotplug;
mod inventory;
pub mod log;
pub mod metrics;

pub use inventory::{DomainFigures, Inventory, MemoryFigures, VcpuFigures, now};
pub use metrics::Metrics;
