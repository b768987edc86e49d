//! Metrics of the derived labels.

use std::sync::Arc;

use prometheus::{IntGauge, IntGaugeVec};

use crate::label::{FAMILIES, InvalidLabel, RetentionReason};
use crate::probe::ProbeMetrics;
use crate::publish::metrics::SyncMetrics;
use crate::telemetry::MetricRegistry;

/// Metrics of the labeller, and those of the components that it drives.
pub struct LabellerMetrics {
    pub probe: Arc<ProbeMetrics>,
    pub sync: Arc<SyncMetrics>,
    pub labels: IntGaugeVec,
    pub rejected: IntGaugeVec,
    pub retained: IntGaugeVec,
    pub unreadable: IntGauge,
    pub machine_types: IntGauge,
    pub machine_types_deprecated: IntGauge,
    pub max_vcpus: IntGauge,
}

impl LabellerMetrics {
    pub fn register(
        registry: &MetricRegistry,
        probe: Arc<ProbeMetrics>,
        sync: Arc<SyncMetrics>,
    ) -> Self {
        Self {
            probe,
            sync,
            labels: registry.gauges(
                "virtnode_labels",
                "Labels in the set, by family.",
                &[("family", &FAMILIES)],
            ),
            rejected: registry.gauges(
                "virtnode_labels_rejected",
                "Labels left out because the API server would reject their name or value.",
                &[("reason", &InvalidLabel::ALL.map(InvalidLabel::code))],
            ),
            retained: registry.gauges(
                "virtnode_labels_retained",
                "Labels kept although the last probe does not show them.",
                &[("reason", &RetentionReason::ALL.map(RetentionReason::as_str))],
            ),
            unreadable: registry.gauge(
                "virtnode_domains_unreadable",
                "Running domains whose definition cannot be read, so that their use is unknown.",
            ),
            machine_types: registry.gauge(
                "virtnode_machine_types",
                "Machine types of the native architecture.",
            ),
            machine_types_deprecated: registry.gauge(
                "virtnode_machine_types_deprecated",
                "Machine types of the native architecture that are deprecated.",
            ),
            max_vcpus: registry.gauge(
                "virtnode_max_vcpus",
                "Maximum number of vCPUs of a domain on this node; 0 while unknown.",
            ),
        }
    }
}
