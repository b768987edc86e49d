//! Where label sets go.

pub mod file;
pub mod node;
