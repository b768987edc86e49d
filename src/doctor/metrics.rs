//! Metrics of the doctor's findings.

use prometheus::IntGaugeVec;

use super::checks::{Check, Severity};
use crate::telemetry::MetricRegistry;

pub struct DoctorMetrics {
    pub findings: IntGaugeVec,
    /// All metrics of the daemon, which the doctor checks too.
    pub registry: MetricRegistry,
}

impl DoctorMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let findings = registry.gauges(
            "virtnode_doctor_findings",
            "Findings of virtnode doctor, by check and severity; all 0 for a check that cannot run.",
            &[
                ("check", &Check::ALL.map(Check::as_str)),
                ("severity", &Severity::ALL.map(Severity::as_str)),
            ],
        );
        Self {
            findings,
            registry: registry.clone(),
        }
    }
}
