//! Every metric, in one registry of our own. A scrape reads memory only.
//!
//! Names and labels are design/operations.md's contract. Every combination that can happen is
//! there from the start with 0, so that a rate over it never misses its first increment.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use super::cluster::ClusterMetrics;
use super::hotplug::HotplugMetrics;
use super::inventory::{Inventory, InventoryCollector};
use crate::doctor::checks::{Check, Severity};
use crate::hypervisor::CallError;
use crate::label::{FAMILIES, FactSource, InvalidLabel, RetentionReason};

/// The names of the calls to libvirt about itself, as in the metrics' label `call`.
pub const CALLS: [&str; 8] = [
    "open",
    "versions",
    "capabilities",
    "domain-capabilities",
    "baseline-cpu",
    "compare-cpu",
    "native-arguments",
    "running-domains",
];

/// The names of the calls about domains.
pub const DOMAIN_CALLS: [&str; 13] = [
    "find-domain",
    "domain",
    "all-domain-stats",
    "domain-stats",
    "memory-stats",
    "guest-vcpus",
    "acpi-answers",
    "set-guest-vcpus",
    "agent-timeout",
    "set-vcpus",
    "update-device",
    "attach-device",
    "detach-device",
];

/// Why a source could not be read: the hypervisor's codes, and a document that is not readable.
fn probe_failure_reasons() -> impl Iterator<Item = &'static str> {
    CallError::CODES.into_iter().chain(["malformed"])
}

/// Why a label set could not be published.
pub const SYNC_FAILURES: [&str; 8] = [
    "file",
    "too-large",
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-node-not-found",
    "api-rejected",
    "api-conflict",
];

/// Every metric of the daemon.
pub struct Metrics {
    registry: Registry,
    /// 1 while there is a connection to libvirt.
    pub hypervisor_connected: IntGauge,
    /// Connections made after the first.
    pub hypervisor_reconnects: IntCounter,
    /// Time to libvirt's answer, by call.
    pub call_duration: HistogramVec,
    /// Calls that ended with an error other than a timeout, by call and reason.
    pub call_failures: IntCounterVec,
    /// Calls that were not answered within their deadline, by call.
    pub call_timeouts: IntCounterVec,
    /// Readings of a source.
    pub probe_attempts: IntCounterVec,
    /// Readings of a source that failed, by source and reason.
    pub probe_failures: IntCounterVec,
    /// When a source was last read.
    pub probe_last_success: GaugeVec,
    /// Attempts to bring the published labels up to date.
    pub sync_attempts: IntCounter,
    /// Attempts that failed, by reason.
    pub sync_failures: IntCounterVec,
    /// When the published labels were last known to be up to date.
    pub sync_last_success: Gauge,
    /// Labels in the set, by family.
    pub labels: IntGaugeVec,
    /// Labels left out because no label can be made of them, by reason.
    pub labels_rejected: IntGaugeVec,
    /// Labels kept though the last probe does not show them, by reason.
    pub labels_retained: IntGaugeVec,
    /// Published labels that were added, changed, removed or repaired.
    pub label_changes: IntCounterVec,
    /// Labels given up because another manager owns them with another value.
    pub label_conflicts: IntCounterVec,
    /// Machine types of the native architecture.
    pub machine_types: IntGauge,
    /// Machine types of the native architecture that are deprecated.
    pub machine_types_deprecated: IntGauge,
    /// The largest number of vCPUs a domain can have here; 0 while unknown.
    pub max_vcpus: IntGauge,
    /// What the last look over the host and its domains found, by check and severity.
    pub doctor_findings: IntGaugeVec,
    /// The running domains.
    pub inventory: Arc<Inventory>,
    /// Verified hotplug.
    pub hotplug: HotplugMetrics,
    /// What the cluster is told beside labels.
    pub cluster: ClusterMetrics,
}

impl Metrics {
    /// All metrics at their zero, in a registry of their own.
    ///
    /// # Panics
    /// Never with the names in this file: a test builds it.
    #[expect(
        clippy::expect_used,
        reason = "names are constants and a test builds them all"
    )]
    pub fn new() -> Self {
        Self::register(Registry::new()).expect("every metric's name is valid and unique")
    }

    fn register(registry: Registry) -> Result<Self, prometheus::Error> {
        let new = Registrar(&registry);
        let metrics = Self {
            hypervisor_connected: new.gauge(
                "virtnode_hypervisor_connected",
                "1 while there is a connection to libvirt.",
            )?,
            hypervisor_reconnects: new.counter(
                "virtnode_hypervisor_reconnects_total",
                "Connections to libvirt made after the first.",
            )?,
            call_duration: new.histograms(
                "virtnode_hypervisor_call_duration_seconds",
                "Time until libvirt answered a call.",
                &["call"],
            )?,
            call_failures: new.counters(
                "virtnode_hypervisor_call_failures_total",
                "Calls that libvirt answered with an error.",
                &["call", "reason"],
            )?,
            call_timeouts: new.counters(
                "virtnode_hypervisor_call_timeouts_total",
                "Calls that libvirt did not answer within their deadline.",
                &["call"],
            )?,
            probe_attempts: new.counters(
                "virtnode_probe_attempts_total",
                "Readings of a source of facts.",
                &["source"],
            )?,
            probe_failures: new.counters(
                "virtnode_probe_failures_total",
                "Readings of a source of facts that failed.",
                &["source", "reason"],
            )?,
            probe_last_success: new.float_gauges(
                "virtnode_probe_last_success_timestamp_seconds",
                "When a source of facts was last read; 0 before the first time.",
                &["source"],
            )?,
            sync_attempts: new.counter(
                "virtnode_label_sync_attempts_total",
                "Attempts to bring the published labels up to date.",
            )?,
            sync_failures: new.counters(
                "virtnode_label_sync_failures_total",
                "Attempts to bring the published labels up to date that failed.",
                &["reason"],
            )?,
            sync_last_success: new.float_gauge(
                "virtnode_label_sync_last_success_timestamp_seconds",
                "When the published labels were last known to be up to date; 0 before the first time.",
            )?,
            labels: new.gauges("virtnode_labels", "Labels in the set, by family.", &["family"])?,
            labels_rejected: new.gauges(
                "virtnode_labels_rejected",
                "Labels left out because the API server would not accept their name or value.",
                &["reason"],
            )?,
            labels_retained: new.gauges(
                "virtnode_labels_retained",
                "Labels kept though the last probe does not show them.",
                &["reason"],
            )?,
            label_changes: new.counters(
                "virtnode_label_changes_total",
                "Published labels that were added, changed, removed, or put back after someone else touched them.",
                &["action"],
            )?,
            label_conflicts: new.counters(
                "virtnode_label_conflicts_total",
                "Labels that another field manager owns with another value: given up, or taken over where the configuration says so.",
                &["action"],
            )?,
            machine_types: new
                .gauge("virtnode_machine_types", "Machine types of the native architecture.")?,
            machine_types_deprecated: new.gauge(
                "virtnode_machine_types_deprecated",
                "Machine types of the native architecture that are deprecated.",
            )?,
            max_vcpus: new.gauge(
                "virtnode_max_vcpus",
                "The largest number of vCPUs that a domain can have here; 0 while unknown.",
            )?,
            doctor_findings: new.gauges(
                "virtnode_doctor_findings",
                "What virtnode doctor finds, by check and severity; all 0 for what cannot be looked at.",
                &["check", "severity"],
            )?,
            inventory: new.inventory()?,
            hotplug: HotplugMetrics::register(&new)?,
            cluster: ClusterMetrics::register(&new)?,
            registry,
        };
        metrics.register_constants()?;
        metrics.start_at_zero();
        Ok(metrics)
    }

    fn register_constants(&self) -> Result<(), prometheus::Error> {
        let info = IntGauge::with_opts(
            Opts::new(
                "virtnode_build_info",
                "Always 1; the labels say what is running.",
            )
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label(
                "commit",
                option_env!("VIRTNODE_COMMIT").unwrap_or("unknown"),
            ),
        )?;
        info.set(1);
        self.registry.register(Box::new(info))?;
        self.registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))
    }

    fn start_at_zero(&self) {
        for call in CALLS.into_iter().chain(DOMAIN_CALLS) {
            self.call_duration.with_label_values(&[call]);
            self.call_timeouts.with_label_values(&[call]);
            for reason in CallError::CODES
                .into_iter()
                .filter(|code| *code != "timeout")
            {
                self.call_failures.with_label_values(&[call, reason]);
            }
        }
        for call in DOMAIN_CALLS {
            for reason in CallError::DOMAIN_CODES {
                self.call_failures.with_label_values(&[call, reason]);
            }
        }
        for source in FactSource::ALL.map(FactSource::as_str) {
            self.probe_attempts.with_label_values(&[source]);
            self.probe_last_success.with_label_values(&[source]);
            for reason in probe_failure_reasons() {
                self.probe_failures.with_label_values(&[source, reason]);
            }
        }
        for reason in SYNC_FAILURES {
            self.sync_failures.with_label_values(&[reason]);
        }
        for family in FAMILIES {
            self.labels.with_label_values(&[family]);
        }
        for reason in InvalidLabel::ALL {
            self.labels_rejected.with_label_values(&[reason.code()]);
        }
        for reason in RetentionReason::ALL {
            self.labels_retained.with_label_values(&[reason.code()]);
        }
        for action in ["added", "changed", "removed", "repaired"] {
            self.label_changes.with_label_values(&[action]);
        }
        for check in Check::ALL {
            for severity in Severity::ALL {
                self.doctor_findings
                    .with_label_values(&[check.name(), severity.name()]);
            }
        }
        for action in ["dropped", "forced"] {
            self.label_conflicts.with_label_values(&[action]);
        }
    }

    /// Writes down how a call to libvirt ended and how long it took.
    pub fn call_ended<T>(
        &self,
        call: &'static str,
        took: Duration,
        outcome: &Result<T, CallError>,
    ) {
        match outcome {
            Err(CallError::Overdue { .. }) => {
                self.call_timeouts.with_label_values(&[call]).inc();
            }
            Err(error) => {
                self.call_duration
                    .with_label_values(&[call])
                    .observe(took.as_secs_f64());
                self.call_failures
                    .with_label_values(&[call, error.code()])
                    .inc();
            }
            Ok(_) => self
                .call_duration
                .with_label_values(&[call])
                .observe(took.as_secs_f64()),
        }
    }

    /// The exposition in text format 0.0.4.
    ///
    /// # Errors
    /// Only if a collector hands out malformed families.
    pub fn encode(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds since 1970, as Prometheus counts time.
pub fn now_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Builds and registers in one step.
pub(super) struct Registrar<'r>(&'r Registry);

impl Registrar<'_> {
    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        collector: C,
    ) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.add(IntGauge::new(name, help)?)
    }

    pub(super) fn float_gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.add(Gauge::new(name, help)?)
    }

    fn inventory(&self) -> Result<Arc<Inventory>, prometheus::Error> {
        let inventory = Arc::new(Inventory::default());
        let collector = InventoryCollector::new(Arc::clone(&inventory))?;
        self.0.register(Box::new(collector))?;
        Ok(inventory)
    }

    pub(super) fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.add(IntCounter::new(name, help)?)
    }

    pub(super) fn gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntGaugeVec, prometheus::Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn float_gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<GaugeVec, prometheus::Error> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, prometheus::Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<HistogramVec, prometheus::Error> {
        // From a cached answer to a first probe of several emulators.
        let buckets = vec![0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0];
        self.add(HistogramVec::new(
            HistogramOpts::new(name, help).buckets(buckets),
            labels,
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_before_anything_happened() {
        let text = Metrics::new().encode().unwrap();
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

    #[test]
    fn a_timeout_is_no_failure_and_has_no_duration() {
        let metrics = Metrics::new();
        let took = Duration::from_secs(5);
        let late: Result<(), _> = Err(CallError::Overdue {
            call: "open".into(),
            after: took,
        });
        metrics.call_ended("open", took, &late);
        assert_eq!(metrics.call_timeouts.with_label_values(&["open"]).get(), 1);
        assert_eq!(
            metrics
                .call_duration
                .with_label_values(&["open"])
                .get_sample_count(),
            0
        );
    }
}
