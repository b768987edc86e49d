//! Metrics of the launchers.

use prometheus::{Gauge, IntCounterVec, IntGauge, IntGaugeVec};

use super::table::{LauncherState, OpenFailure};
use crate::telemetry::MetricRegistry;

/// State of a launcher whose domain's name belongs to a newer launcher.
pub(super) const CONFLICT: &str = "conflict";
/// State of a launcher beyond the maximum number.
pub(super) const SURPLUS: &str = "surplus";

/// Results of attempts to open a connection: values of the label `result`.
pub(super) const OPENED: &str = "opened";

/// Metrics of the launchers.
pub struct LauncherMetrics {
    pub(super) launchers: IntGaugeVec,
    pub(super) opens: IntCounterVec,
    pub(super) scanned: Gauge,
    pub(super) ignored_domains: IntGauge,
}

impl LauncherMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let states = LauncherState::ALL.map(LauncherState::as_str);
        let states = [&states[..], &[CONFLICT, SURPLUS]].concat();
        let results = OpenFailure::ALL.map(OpenFailure::as_str);
        let results = [&[OPENED], &results[..]].concat();
        Self {
            launchers: registry.gauges(
                "virtnode_launchers",
                "KubeVirt launcher pods with a libvirt, by the state of the connection.",
                &[("state", &states)],
            ),
            opens: registry.counters(
                "virtnode_launcher_opens_total",
                "Attempts to connect to the libvirt of a launcher, by result.",
                &[("result", &results)],
            ),
            scanned: registry.float_gauge(
                "virtnode_launcher_scan_last_success_timestamp_seconds",
                "Time of the last scan for launchers that succeeded; 0 if there was none.",
            ),
            ignored_domains: registry.gauge(
                "virtnode_launcher_domains_ignored",
                "Domains that are ignored, because their launcher has more than 4.",
            ),
        }
    }
}
