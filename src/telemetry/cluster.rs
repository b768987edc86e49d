//! What the cluster is told beside labels.

use prometheus::{IntCounter, IntCounterVec};

use super::metrics::Registrar;

/// Why an event was not written.
pub const EVENT_DROPS: [&str; 3] = ["queue-full", "api-unreachable", "rejected"];

/// Why a `NodeVirtualization` could not be written.
pub const VIRTUALIZATION_FAILURES: [&str; 7] = [
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-node-not-found",
    "api-not-found",
    "api-rejected",
    "api-conflict",
];

/// Counts of what the cluster is told beside labels.
pub struct ClusterMetrics {
    /// Events that were written, repeats of one included.
    pub events: IntCounter,
    /// Events that were lost, by reason.
    pub events_dropped: IntCounterVec,
    /// Attempts to bring the `NodeVirtualization` up to date.
    pub virtualization_attempts: IntCounter,
    /// Attempts that failed, by reason.
    pub virtualization_failures: IntCounterVec,
}

impl ClusterMetrics {
    pub(super) fn register(new: &Registrar<'_>) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            events: new.counter(
                "virtnode_events_total",
                "Kubernetes events written, repeats of one included.",
            )?,
            events_dropped: new.counters(
                "virtnode_events_dropped_total",
                "Kubernetes events lost, because too many came at once, the API server was away for too long, or did not take them.",
                &["reason"],
            )?,
            virtualization_attempts: new.counter(
                "virtnode_virtualization_sync_attempts_total",
                "Attempts to bring the NodeVirtualization up to date.",
            )?,
            virtualization_failures: new.counters(
                "virtnode_virtualization_sync_failures_total",
                "Attempts to bring the NodeVirtualization up to date that failed.",
                &["reason"],
            )?,
        };
        for reason in EVENT_DROPS {
            metrics.events_dropped.with_label_values(&[reason]);
        }
        for reason in VIRTUALIZATION_FAILURES {
            metrics.virtualization_failures.with_label_values(&[reason]);
        }
        Ok(metrics)
    }
}
