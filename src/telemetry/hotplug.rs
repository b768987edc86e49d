//! The metrics of verified hotplug and its journal.

use std::time::Duration;

use prometheus::{Gauge, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec};

use super::metrics::Registrar;
use crate::hotplug::{Extent, Moment, Verdict};
use crate::operations::Phase;

/// What can be plugged, as in the label `resource`.
pub const RESOURCES: [&str; 2] = ["vcpus", "memory"];

/// What is done to it, as in the label `action`: more, less, as much as before, and not known
/// since the domain could not be looked at.
pub const ACTIONS: [&str; 4] = ["plug", "unplug", "keep", "unknown"];

/// The parts of an operation's time: until the hypervisor had done its part, and from then until
/// the verdict.
pub const PHASES: [&str; 2] = ["execute", "verify"];

/// The word of an extent's resource.
pub fn resource(extent: Extent) -> &'static str {
    match extent {
        Extent::Vcpus { .. } => "vcpus",
        Extent::Memory { .. } => "memory",
    }
}

/// What is done by going from what there was to what is asked for.
pub fn action(before: Option<Extent>, requested: Extent) -> &'static str {
    let order = match (before, requested) {
        (Some(Extent::Vcpus { vcpus: had, .. }), Extent::Vcpus { vcpus: asked, .. }) => {
            asked.cmp(&had)
        }
        (Some(Extent::Memory { memory: had, .. }), Extent::Memory { memory: asked, .. }) => {
            asked.cmp(&had)
        }
        _ => return "unknown",
    };
    match order {
        std::cmp::Ordering::Greater => "plug",
        std::cmp::Ordering::Less => "unplug",
        std::cmp::Ordering::Equal => "keep",
    }
}

/// The metrics of verified hotplug.
pub struct HotplugMetrics {
    requests: IntCounterVec,
    results: IntCounterVec,
    duration: HistogramVec,
    in_progress: IntGauge,
    oldest: Gauge,
    journal: IntGaugeVec,
}

impl HotplugMetrics {
    pub(super) fn register(new: &Registrar<'_>) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            requests: new.counters(
                "virtnode_hotplug_requests_total",
                "Operations that were asked for, counted as soon as it is known what they do.",
                &["resource", "action"],
            )?,
            results: new.counters(
                "virtnode_hotplug_results_total",
                "Operations that ended, by verdict. A verdict that changes later is counted once, \
                 as it was first.",
                &["resource", "action", "verdict"],
            )?,
            duration: new.histograms(
                "virtnode_hotplug_duration_seconds",
                "Time until the hypervisor had done its part (execute), and from then until the \
                 verdict (verify).",
                &["resource", "action", "phase"],
            )?,
            in_progress: new.gauge(
                "virtnode_hotplug_in_progress",
                "Operations without a verdict, those that wait for another included.",
            )?,
            oldest: new.float_gauge(
                "virtnode_hotplug_oldest_in_progress_timestamp_seconds",
                "When the oldest operation without a verdict was asked for; 0 if there is none.",
            )?,
            journal: new.gauges(
                "virtnode_journal_records",
                "Records in the journal, by how far the operation is.",
                &["state"],
            )?,
        };
        for resource in RESOURCES {
            for action in ACTIONS {
                metrics.requests.with_label_values(&[resource, action]);
                for verdict in Verdict::ALL.map(Verdict::as_str) {
                    metrics
                        .results
                        .with_label_values(&[resource, action, verdict]);
                }
                for phase in PHASES {
                    metrics
                        .duration
                        .with_label_values(&[resource, action, phase]);
                }
            }
        }
        for state in STATES.map(|(_, word)| word) {
            metrics.journal.with_label_values(&[state]);
        }
        Ok(metrics)
    }

    /// An operation is asked for. `before` is what the domain has, if it could be looked at.
    pub fn asked(&self, before: Option<Extent>, requested: Extent) {
        self.requests
            .with_label_values(&[resource(requested), action(before, requested)])
            .inc();
    }

    /// An operation has its first verdict.
    pub fn ended(&self, before: Option<Extent>, requested: Extent, verdict: Verdict) {
        let labels = [
            resource(requested),
            action(before, requested),
            verdict.as_str(),
        ];
        self.results.with_label_values(&labels).inc();
    }

    /// How long an operation took until the hypervisor had done its part, and from then on.
    pub fn took(
        &self,
        before: Option<Extent>,
        requested: Extent,
        execute: Duration,
        verify: Duration,
    ) {
        for (phase, took) in PHASES.into_iter().zip([execute, verify]) {
            let labels = [resource(requested), action(before, requested), phase];
            self.duration
                .with_label_values(&labels)
                .observe(took.as_secs_f64());
        }
    }

    /// What the journal holds: for each record how far it is and when it was asked for.
    pub fn journal_holds(&self, records: impl IntoIterator<Item = (Phase, Moment)>) {
        let mut counts = STATES.map(|_| 0);
        let mut oldest: Option<Moment> = None;
        for (phase, asked) in records {
            for (count, (state, _)) in counts.iter_mut().zip(STATES) {
                *count += i64::from(state == phase);
            }
            if phase != Phase::Finished {
                oldest = Some(oldest.map_or(asked, |oldest| oldest.min(asked)));
            }
        }
        for (count, (_, word)) in counts.into_iter().zip(STATES) {
            self.journal.with_label_values(&[word]).set(count);
        }
        let [queued, running, _] = counts;
        self.in_progress.set(queued + running);
        self.oldest.set(oldest.map_or(0.0, seconds));
    }
}

/// The phases with their words in the metrics.
const STATES: [(Phase, &str); 3] = [
    (Phase::Queued, "queued"),
    (Phase::Running, "running"),
    (Phase::Finished, "finished"),
];

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds since 1970 are exact in a float"
)]
fn seconds(moment: Moment) -> f64 {
    moment.as_millis() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;
    use crate::units::Bytes;

    fn vcpus(vcpus: u32) -> Extent {
        Extent::Vcpus {
            vcpus,
            online: None,
        }
    }

    #[test]
    fn every_series_is_there_from_the_start() {
        let text = Metrics::new().encode().unwrap();
        for line in [
            "virtnode_hotplug_requests_total{action=\"plug\",resource=\"vcpus\"} 0",
            "virtnode_hotplug_results_total{action=\"unplug\",resource=\"memory\",verdict=\"GuestRefused\"} 0",
            "virtnode_hotplug_duration_seconds_count{action=\"plug\",phase=\"verify\",resource=\"memory\"} 0",
            "virtnode_hotplug_in_progress 0",
            "virtnode_hotplug_oldest_in_progress_timestamp_seconds 0",
            "virtnode_journal_records{state=\"running\"} 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn what_is_done_follows_from_what_there_was() {
        assert_eq!(action(Some(vcpus(1)), vcpus(3)), "plug");
        assert_eq!(action(Some(vcpus(3)), vcpus(1)), "unplug");
        assert_eq!(action(Some(vcpus(3)), vcpus(3)), "keep");
        assert_eq!(action(None, vcpus(3)), "unknown");
        let memory = Extent::Memory {
            memory: Bytes::new(1 << 30),
            guest_total: None,
        };
        assert_eq!(action(Some(vcpus(3)), memory), "unknown");
        assert_eq!(resource(memory), "memory");
    }

    #[test]
    fn the_oldest_is_that_which_is_not_finished() {
        let metrics = Metrics::new();
        let at = Moment::from_millis;
        metrics.hotplug.journal_holds([
            (Phase::Finished, at(1000)),
            (Phase::Running, at(2500)),
            (Phase::Queued, at(3000)),
        ]);
        let text = metrics.encode().unwrap();
        assert!(text.contains("virtnode_hotplug_in_progress 2\n"));
        assert!(
            text.contains("virtnode_hotplug_oldest_in_progress_timestamp_seconds 2.5\n"),
            "{text}"
        );
        assert!(text.contains("virtnode_journal_records{state=\"finished\"} 1\n"));
        metrics.hotplug.journal_holds([]);
        assert!(metrics.encode().unwrap().contains("in_progress 0\n"));
    }
}
