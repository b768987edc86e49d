//! Metrics of the readings of each source of facts.

use prometheus::{GaugeVec, IntCounterVec};

use crate::hypervisor::CallError;
use crate::label::FactSource;
use crate::telemetry::MetricRegistry;

pub struct ProbeMetrics {
    pub attempts: IntCounterVec,
    pub failures: IntCounterVec,
    pub last_success: GaugeVec,
}

impl ProbeMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let sources = FactSource::ALL.map(FactSource::as_str);
        // Of documents.
        let reasons = [&CallError::CODES[..], &["malformed", "unreadable"]].concat();
        Self {
            attempts: registry.counters(
                "virtnode_probe_attempts_total",
                "Readings of a source of facts.",
                &[("source", &sources)],
            ),
            failures: registry.counters(
                "virtnode_probe_failures_total",
                "Readings of a source of facts that failed.",
                &[("source", &sources), ("reason", &reasons)],
            ),
            last_success: registry.float_gauges(
                "virtnode_probe_last_success_timestamp_seconds",
                "When a source of facts was last read; 0 before the first time, absent while nothing runs \
                 that has these facts.",
                &[("source", &sources)],
            ),
        }
    }
}
