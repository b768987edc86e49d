//! Metrics of the DomainHotplug objects.

use prometheus::{IntCounterVec, IntGauge};

use crate::telemetry::MetricRegistry;

/// Calls to the API server about DomainHotplug objects: values of the label `call`.
const OBJECT_CALLS: [&str; 4] = ["watch", "status", "own", "delete"];

const OBJECT_FAILURES: [&str; 7] = [
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-not-found",
    "api-node-not-found",
    "api-rejected",
    "api-conflict",
];

pub struct ObjectMetrics {
    pub(super) watched: IntGauge,
    pub(super) calls: IntCounterVec,
    failures: IntCounterVec,
}

impl ObjectMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let metrics = Self {
            watched: registry.gauge(
                "virtnode_hotplug_objects_watched",
                "1 while the DomainHotplug objects of this node are watched.",
            ),
            calls: registry.counters(
                "virtnode_hotplug_object_calls_total",
                "Calls to the API server that write the status of a DomainHotplug object, set its \
                 owner or delete it.",
                &["call"],
            ),
            failures: registry.counters(
                "virtnode_hotplug_object_call_failures_total",
                "Calls about DomainHotplug objects that failed, and failures of their watch.",
                &["call", "reason"],
            ),
        };
        for call in OBJECT_CALLS {
            if call != "watch" {
                metrics.calls.with_label_values(&[call]);
            }
            for reason in OBJECT_FAILURES {
                metrics.failures.with_label_values(&[call, reason]);
            }
        }
        metrics
    }

    pub(super) fn failed(&self, call: &str, reason: &str) {
        self.failures.with_label_values(&[call, reason]).inc();
    }
}
