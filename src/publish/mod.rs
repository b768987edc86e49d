//! Where label sets go.

pub mod file;
