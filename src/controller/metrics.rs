//! Metrics of the DomainHotplug objects.

use prometheus::{IntCounterVec, IntGauge};

use crate::publish::metrics::API_FAILURES;
use crate::telemetry::MetricRegistry;

/// Calls to the API server about DomainHotplug objects: values of the label `call`. A watch
/// is no single call.
const OBJECT_CALLS: [&str; 5] = ["watch", "get", "status", "own", "delete"];

pub struct ObjectMetrics {
    pub(super) watched: IntGauge,
    pub(super) calls: IntCounterVec,
    failures: IntCounterVec,
}

impl ObjectMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        Self {
            watched: registry.gauge(
                "virtnode_hotplug_objects_watched",
                "1 while the DomainHotplug objects of this node are watched.",
            ),
            calls: registry.counters(
                "virtnode_hotplug_object_calls_total",
                "Calls to the API server that read a DomainHotplug object, write its status, set \
                 its owner or delete it.",
                &[("call", &OBJECT_CALLS[1..])],
            ),
            failures: registry.counters(
                "virtnode_hotplug_object_call_failures_total",
                "Calls about DomainHotplug objects that failed, and failures of their watch.",
                &[("call", &OBJECT_CALLS), ("reason", &API_FAILURES)],
            ),
        }
    }

    pub(super) fn failed(&self, call: &str, reason: &str) {
        self.failures.with_label_values(&[call, reason]).inc();
    }
}
