//! The log and the registry of metrics. Components define their metrics themselves.

pub mod log;
mod registry;

pub use registry::{MetricRegistry, now_seconds};
