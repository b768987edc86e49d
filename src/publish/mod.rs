//! Where label sets go, and what else the cluster is told.

pub mod events;
pub mod file;
pub mod news;
pub mod node;
pub mod virtualization;
