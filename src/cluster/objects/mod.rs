//! The custom resources (group `virtnode.io`, version `v1alpha1`) as types. Their CRDs are made
//! from these, and the descriptions there are the ones here.

pub mod condition;
pub mod node_virtualization;

pub use condition::Condition;
pub use node_virtualization::{NodeVirtualization, NodeVirtualizationStatus};
