//! Metrics of publishing: labels, the NodeVirtualization and events.

use prometheus::{Gauge, IntCounter, IntCounterVec};

use crate::telemetry::MetricRegistry;

/// Reasons for which labels were not published.
pub const SYNC_FAILURES: [&str; 9] = [
    "another-daemon",
    "file",
    "too-large",
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-node-not-found",
    "api-rejected",
    "api-conflict",
];

const EVENT_DROPS: [&str; 3] = ["queue-full", "api-unreachable", "rejected"];

/// Reasons for which a call about an object failed.
pub const API_FAILURES: [&str; 7] = [
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-node-not-found",
    "api-not-found",
    "api-rejected",
    "api-conflict",
];

/// Reasons for which a NodeVirtualization was not published.
const VIRTUALIZATION_FAILURES: [&str; 8] = [
    "another-daemon",
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-node-not-found",
    "api-not-found",
    "api-rejected",
    "api-conflict",
];

/// Metrics of publishing labels, to a file or on the Node.
pub struct SyncMetrics {
    pub attempts: IntCounter,
    pub failures: IntCounterVec,
    pub last_success: Gauge,
    pub changes: IntCounterVec,
    pub conflicts: IntCounterVec,
    pub watch_failures: IntCounterVec,
}

impl SyncMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        Self {
            attempts: registry.counter(
                "virtnode_label_sync_attempts_total",
                "Attempts to bring the published labels up to date.",
            ),
            failures: registry.counters(
                "virtnode_label_sync_failures_total",
                "Attempts to bring the published labels up to date that failed.",
                &[("reason", &SYNC_FAILURES)],
            ),
            last_success: registry.float_gauge(
                "virtnode_label_sync_last_success_timestamp_seconds",
                "When the published labels were last known to be up to date; 0 before the first \
                 time.",
            ),
            changes: registry.counters(
                "virtnode_label_changes_total",
                "Published labels that were added, changed, removed, or restored after another \
                 client changed them.",
                &[("action", &["added", "changed", "removed", "repaired"])],
            ),
            conflicts: registry.counters(
                "virtnode_label_conflicts_total",
                "Labels that another field manager owns with a different value: dropped, or taken \
                 over if the configuration says so.",
                &[("action", &["dropped", "forced"])],
            ),
            watch_failures: registry.counters(
                "virtnode_node_watch_failures_total",
                "Failures of the watch of the Node. A watch that ends within a second is one.",
                &[("reason", &SYNC_FAILURES[2..])],
            ),
        }
    }
}

/// Metrics of publishing the NodeVirtualization.
pub struct VirtualizationMetrics {
    pub attempts: IntCounter,
    pub failures: IntCounterVec,
}

impl VirtualizationMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        Self {
            attempts: registry.counter(
                "virtnode_virtualization_sync_attempts_total",
                "Attempts to bring the NodeVirtualization up to date.",
            ),
            failures: registry.counters(
                "virtnode_virtualization_sync_failures_total",
                "Attempts to bring the NodeVirtualization up to date that failed.",
                &[("reason", &VIRTUALIZATION_FAILURES)],
            ),
        }
    }
}

/// Metrics of Kubernetes events.
pub struct EventMetrics {
    pub written: IntCounter,
    pub dropped: IntCounterVec,
}

impl EventMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        Self {
            written: registry.counter(
                "virtnode_events_total",
                "Kubernetes events written, including repeats of one event.",
            ),
            dropped: registry.counters(
                "virtnode_events_dropped_total",
                "Kubernetes events dropped because the queue was full, the API server was \
                 unreachable for too long, or it rejected them.",
                &[("reason", &EVENT_DROPS)],
            ),
        }
    }
}
