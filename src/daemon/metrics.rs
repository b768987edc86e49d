//! All metrics of a daemon: each component's own, in one registry.

use std::sync::Arc;

use crate::controller::ObjectMetrics;
use crate::doctor::DoctorMetrics;
use crate::executor::HotplugMetrics;
use crate::external::ExternalMetrics;
use crate::hypervisor::HypervisorMetrics;
use crate::labeller::LabellerMetrics;
use crate::launchers::LauncherMetrics;
use crate::monitor::Inventory;
use crate::probe::ProbeMetrics;
use crate::publish::metrics::{EventMetrics, SyncMetrics, VirtualizationMetrics};
use crate::telemetry::MetricRegistry;

pub struct Metrics {
    pub registry: MetricRegistry,
    pub hypervisor: Arc<HypervisorMetrics>,
    pub labeller: Arc<LabellerMetrics>,
    pub sync: Arc<SyncMetrics>,
    pub virtualization: Arc<VirtualizationMetrics>,
    pub events: Arc<EventMetrics>,
    pub hotplug: Arc<HotplugMetrics>,
    pub objects: Arc<ObjectMetrics>,
    pub inventory: Arc<Inventory>,
    pub doctor: Arc<DoctorMetrics>,
    pub launchers: Arc<LauncherMetrics>,
    pub external: Arc<ExternalMetrics>,
}

impl Metrics {
    /// Registers the metrics of every component, so that a daemon without a cluster has the same
    /// series as one in a cluster.
    pub fn new() -> Self {
        let registry = MetricRegistry::new();
        let probe = Arc::new(ProbeMetrics::register(&registry));
        let sync = Arc::new(SyncMetrics::register(&registry));
        Self {
            hypervisor: Arc::new(HypervisorMetrics::register(&registry)),
            labeller: Arc::new(LabellerMetrics::register(
                &registry,
                probe,
                Arc::clone(&sync),
            )),
            sync,
            virtualization: Arc::new(VirtualizationMetrics::register(&registry)),
            events: Arc::new(EventMetrics::register(&registry)),
            hotplug: Arc::new(HotplugMetrics::register(&registry)),
            objects: Arc::new(ObjectMetrics::register(&registry)),
            inventory: Inventory::register(&registry),
            doctor: Arc::new(DoctorMetrics::register(&registry)),
            launchers: Arc::new(LauncherMetrics::register(&registry)),
            external: Arc::new(ExternalMetrics::register(&registry)),
            registry,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_registry_serves_every_series_at_zero() {
        let text = Metrics::new().registry.encode().unwrap();
        for line in [
            "virtnode_hypervisor_connected 0",
            "virtnode_probe_failures_total{reason=\"malformed\",source=\"capabilities\"} 0",
            "virtnode_labels_retained{reason=\"domain-uses-it\"} 0",
            "virtnode_label_sync_failures_total{reason=\"api-forbidden\"} 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
        assert!(text.contains("virtnode_build_info{"));
        assert!(text.contains("process_resident_memory_bytes"));
    }
}
