//! Where the labels go.

pub mod node;
