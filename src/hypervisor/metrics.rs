//! Metrics of the calls to the hypervisor.

use std::time::Duration;

use prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGauge};

use super::CallError;
use crate::telemetry::MetricRegistry;

/// Calls about the node: values of the label `call`.
pub const CALLS: [&str; 9] = [
    "open",
    "versions",
    "capabilities",
    "domain-capabilities",
    "baseline-cpu",
    "compare-cpu",
    "native-arguments",
    "try-start",
    "running-domains",
];

/// Calls about domains: values of the label `call`.
const DOMAIN_CALLS: [&str; 10] = [
    "find-domain",
    "domain",
    "all-domain-stats",
    "domain-stats",
    "guest-vcpus",
    "acpi-answers",
    "set-guest-vcpus",
    "set-vcpus",
    "update-device",
    "attach-device",
];

/// Metrics of one hypervisor's connection and calls.
pub struct HypervisorMetrics {
    pub connected: IntGauge,
    /// Connections made after the first.
    pub reconnects: IntCounter,
    pub call_duration: HistogramVec,
    /// Calls that failed, except timeouts.
    pub call_failures: IntCounterVec,
    pub call_timeouts: IntCounterVec,
}

impl HypervisorMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let calls = [&CALLS[..], &DOMAIN_CALLS].concat();
        let reasons = CallError::CODES.into_iter();
        let reasons: Vec<&str> = reasons.filter(|reason| *reason != "timeout").collect();
        let metrics = Self {
            connected: registry.gauge(
                "virtnode_hypervisor_connected",
                "1 while there is a connection to the node's libvirt; absent if the node has none.",
            ),
            reconnects: registry.counter(
                "virtnode_hypervisor_reconnects_total",
                "Connections to libvirt made after the first.",
            ),
            call_duration: registry.histograms(
                "virtnode_hypervisor_call_duration_seconds",
                "Time until libvirt answered a call.",
                &[("call", &calls)],
            ),
            call_failures: registry.counters(
                "virtnode_hypervisor_call_failures_total",
                "Calls that libvirt answered with an error.",
                &[("call", &calls), ("reason", &reasons)],
            ),
            call_timeouts: registry.counters(
                "virtnode_hypervisor_call_timeouts_total",
                "Calls that libvirt did not answer before their deadline.",
                &[("call", &calls)],
            ),
        };
        for call in DOMAIN_CALLS {
            for reason in CallError::DOMAIN_CODES {
                metrics.call_failures.with_label_values(&[call, reason]);
            }
        }
        metrics
    }

    /// Records the result of a call and how long it took.
    pub fn call_ended<T>(&self, call: &'static str, took: Duration, result: &Result<T, CallError>) {
        if matches!(result, Err(CallError::Overdue { .. })) {
            self.call_timeouts.with_label_values(&[call]).inc();
            return;
        }
        self.call_duration
            .with_label_values(&[call])
            .observe(took.as_secs_f64());
        if let Err(error) = result {
            self.call_failures
                .with_label_values(&[call, error.code()])
                .inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_counts_as_timeout_only() {
        let metrics = HypervisorMetrics::register(&MetricRegistry::new());
        let took = Duration::from_secs(5);
        let late: Result<(), _> = Err(CallError::Overdue {
            call: "open".into(),
            after: took,
        });
        metrics.call_ended("open", took, &late);
        assert_eq!(metrics.call_timeouts.with_label_values(&["open"]).get(), 1);
        let durations = metrics.call_duration.with_label_values(&["open"]);
        assert_eq!(durations.get_sample_count(), 0);
    }
}
