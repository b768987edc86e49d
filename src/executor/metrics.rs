//! Metrics of operations and of the journal.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use prometheus::{Gauge, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::hotplug::{Amount, Evidence, ResourceKind, Source, Verdict};
use crate::operation::{OperationId, Record, State};
use crate::telemetry::MetricRegistry;
use crate::units::Timestamp;

/// Values of the label `action`. The action is unknown if the domain was never observed.
const ACTIONS: [&str; 4] = ["plug", "unplug", "keep", "unknown"];

/// Phases of an operation: until the hypervisor has done its part, and from then to the verdict.
const PHASES: [&str; 2] = ["execute", "verify"];

fn action(before: Option<Amount>, requested: Amount) -> &'static str {
    match before.and_then(|before| requested.compare(before)) {
        None => "unknown",
        Some(Ordering::Greater) => "plug",
        Some(Ordering::Less) => "unplug",
        Some(Ordering::Equal) => "keep",
    }
}

pub struct HotplugMetrics {
    requests: IntCounterVec,
    results: IntCounterVec,
    duration: HistogramVec,
    in_progress: IntGauge,
    oldest: Gauge,
    deadline: Gauge,
    journal: IntGaugeVec,
    journal_failures: IntCounter,
    open: Mutex<HashMap<OperationId, Open>>,
}

/// An operation without a verdict.
struct Open {
    asked: Timestamp,
    deadline: Timestamp,
    /// Counted as a request, which is possible once the domain was observed.
    counted: bool,
}

impl HotplugMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let resources = ("resource", &ResourceKind::ALL.map(ResourceKind::as_str)[..]);
        let actions = ("action", &ACTIONS[..]);
        let verdicts = Verdict::ALL.map(Verdict::as_str);
        Self {
            requests: registry.counters(
                "virtnode_hotplug_requests_total",
                "Operations submitted, counted once their action is known.",
                &[resources, actions],
            ),
            results: registry.counters(
                "virtnode_hotplug_results_total",
                "Operations that ended, by their first verdict: a correction is not counted.",
                &[resources, actions, ("verdict", &verdicts)],
            ),
            duration: registry.histograms(
                "virtnode_hotplug_duration_seconds",
                "Time until the hypervisor has done its part (execute), and from then until the \
                 verdict (verify).",
                &[resources, actions, ("phase", &PHASES)],
            ),
            in_progress: registry.gauge(
                "virtnode_hotplug_in_progress",
                "Operations without a verdict, including those that wait for another operation.",
            ),
            oldest: registry.float_gauge(
                "virtnode_hotplug_oldest_in_progress_timestamp_seconds",
                "When the oldest operation without a verdict was submitted; 0 if there is none.",
            ),
            deadline: registry.float_gauge(
                "virtnode_hotplug_earliest_deadline_timestamp_seconds",
                "The earliest deadline of the operations without a verdict; 0 if there is none.",
            ),
            journal: registry.gauges(
                "virtnode_journal_records",
                "Records in the journal, by state of the operation.",
                &[("state", &STATES.map(State::as_str))],
            ),
            journal_failures: registry.counter(
                "virtnode_journal_write_failures_total",
                "Failed writes to the journal.",
            ),
            open: Mutex::default(),
        }
    }

    /// Counts a change of an operation.
    pub fn changed(&self, record: &Record) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        match record.state {
            State::Done => {
                let counted = open.remove(&record.id).is_some_and(|open| open.counted);
                if record.corrected.is_none() {
                    if !counted {
                        self.count_request(record);
                    }
                    self.count_result(record);
                }
            }
            State::Queued | State::Running => {
                let counted = open.get(&record.id).is_some_and(|open| open.counted);
                if !counted && record.before.is_some() {
                    self.count_request(record);
                }
                let now = Open {
                    asked: record.created,
                    deadline: record.deadline,
                    counted: counted || record.before.is_some(),
                };
                open.insert(record.id.clone(), now);
            }
        }
        let oldest = open.values().map(|open| open.asked).min();
        self.in_progress
            .set(i64::try_from(open.len()).unwrap_or(i64::MAX));
        self.oldest.set(oldest.map_or(0.0, seconds));
        let deadline = open.values().map(|open| open.deadline).min();
        self.deadline.set(deadline.map_or(0.0, seconds));
    }

    fn count_request(&self, record: &Record) {
        let action = action(record.before, record.requested);
        self.requests
            .with_label_values(&[record.requested.kind().as_str(), action])
            .inc();
    }

    fn count_result(&self, record: &Record) {
        let resource = record.requested.kind().as_str();
        let action = action(record.before, record.requested);
        if let Some(verdict) = record.verdict {
            self.results
                .with_label_values(&[resource, action, verdict.as_str()])
                .inc();
        }
        let call = |evidence: &&Evidence| evidence.source == Source::HypervisorCall;
        let called = record.evidence.iter().rfind(call);
        if let (Some(called), Some(finished)) = (called, record.finished) {
            let started = record.started.unwrap_or(record.created);
            let spans = [called.time.since(started), finished.since(called.time)];
            for (phase, span) in PHASES.into_iter().zip(spans) {
                self.duration
                    .with_label_values(&[resource, action, phase])
                    .observe(span.as_secs_f64());
            }
        }
    }

    pub fn journal_failed(&self) {
        self.journal_failures.inc();
    }

    /// Sets the number of journal records by state.
    pub fn set_journal(&self, states: impl IntoIterator<Item = State>) {
        let mut counts = STATES.map(|_| 0);
        for state in states {
            for (count, each) in counts.iter_mut().zip(STATES) {
                *count += i64::from(each == state);
            }
        }
        for (count, state) in counts.into_iter().zip(STATES) {
            self.journal.with_label_values(&[state.as_str()]).set(count);
        }
    }
}

const STATES: [State; 3] = [State::Queued, State::Running, State::Done];

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds since 1970 are exact in a float"
)]
fn seconds(timestamp: Timestamp) -> f64 {
    timestamp.as_millis() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hotplug::{HotplugRequest, Require};
    use crate::operation::{AskedBy, Order};
    use crate::units::Bytes;

    fn vcpus(vcpus: u32) -> Amount {
        Amount::Vcpus {
            vcpus,
            online: None,
        }
    }

    #[test]
    fn every_series_starts_at_zero() {
        let registry = MetricRegistry::new();
        HotplugMetrics::register(&registry);
        let text = registry.encode().unwrap();
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
    fn action_is_derived_from_the_amount_before() {
        assert_eq!(action(Some(vcpus(1)), vcpus(3)), "plug");
        assert_eq!(action(Some(vcpus(3)), vcpus(1)), "unplug");
        assert_eq!(action(Some(vcpus(3)), vcpus(3)), "keep");
        assert_eq!(action(None, vcpus(3)), "unknown");
        let memory = Amount::Memory {
            memory: Bytes::new(1 << 30),
            guest_total: None,
        };
        assert_eq!(action(Some(vcpus(3)), memory), "unknown");
        assert_eq!(memory.kind().as_str(), "memory");
    }

    fn record(millis: u64) -> Record {
        let order = Order {
            domain: "vm1".parse().unwrap(),
            request: HotplugRequest::Vcpus {
                count: 3,
                online: false,
            },
            require: Require::Online,
            persistent: false,
            timeout: Duration::from_secs(60),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        let created = Timestamp::from_millis(i64::try_from(millis).unwrap());
        Record::new(OperationId::new(millis, 0), &order, created)
    }

    #[test]
    fn operation_is_counted_once_under_its_action() {
        let registry = MetricRegistry::new();
        let metrics = HotplugMetrics::register(&registry);
        let holds = |line: &str| {
            let text = registry.encode().unwrap();
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        };
        let (mut first, second) = (record(2500), record(3000));
        metrics.changed(&first);
        metrics.changed(&second);
        holds("virtnode_hotplug_in_progress 2");
        holds("virtnode_hotplug_oldest_in_progress_timestamp_seconds 2.5");
        holds("virtnode_hotplug_earliest_deadline_timestamp_seconds 62.5");
        first.state = State::Running;
        metrics.changed(&first);
        first.before = Some(vcpus(1));
        metrics.changed(&first);
        first.evidence.push(Evidence {
            source: Source::HypervisorCall,
            detail: "returned".into(),
            time: Timestamp::from_millis(2600),
        });
        first.end(
            Verdict::GuestSilent,
            "nothing",
            Timestamp::from_millis(4600),
        );
        metrics.changed(&first);
        holds("virtnode_hotplug_in_progress 1");
        holds("virtnode_hotplug_oldest_in_progress_timestamp_seconds 3");
        holds("virtnode_hotplug_earliest_deadline_timestamp_seconds 63");
        first.verdict = Some(Verdict::Verified);
        first.corrected = Some(Timestamp::from_millis(9000));
        metrics.changed(&first);
        holds("virtnode_hotplug_requests_total{action=\"plug\",resource=\"vcpus\"} 1");
        holds(
            "virtnode_hotplug_results_total{action=\"plug\",resource=\"vcpus\",verdict=\"GuestSilent\"} 1",
        );
        holds(
            "virtnode_hotplug_results_total{action=\"plug\",resource=\"vcpus\",verdict=\"Verified\"} 0",
        );
        holds(
            "virtnode_hotplug_duration_seconds_sum{action=\"plug\",phase=\"execute\",resource=\"vcpus\"} 0.1",
        );
        holds(
            "virtnode_hotplug_duration_seconds_sum{action=\"plug\",phase=\"verify\",resource=\"vcpus\"} 2",
        );
        metrics.set_journal([State::Done, State::Queued]);
        holds("virtnode_journal_records{state=\"done\"} 1");
    }
}
