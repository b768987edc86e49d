//! Where label sets go, and what else the cluster is told.

pub mod events;
pub mod file;
pub mod node;
pub mod node_events;
pub mod virtualization;
