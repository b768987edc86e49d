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
        let metrics = Self {
            attempts: registry.counters(
                "virtnode_probe_attempts_total",
                "Readings of a source of facts.",
                &["source"],
            ),
            failures: registry.counters(
                "virtnode_probe_failures_total",
                "Readings of a source of facts that failed.",
                &["source", "reason"],
            ),
            last_success: registry.float_gauges(
                "virtnode_probe_last_success_timestamp_seconds",
                "When a source of facts was last read; 0 before the first time.",
                &["source"],
            ),
        };
        for source in FactSource::ALL.map(FactSource::as_str) {
            metrics.attempts.with_label_values(&[source]);
            metrics.last_success.with_label_values(&[source]);
            // A document can also be unreadable.
            for reason in CallError::CODES.into_iter().chain(["malformed"]) {
                metrics.failures.with_label_values(&[source, reason]);
            }
        }
        metrics
    }
}
