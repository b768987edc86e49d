//! The metrics of verified hotplug and its journal.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use prometheus::{Gauge, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::metrics::Registrar;
use crate::hotplug::{Amount, Evidence, ResourceKind, Source, Verdict};
use crate::operation::{OperationId, Record, State};
use crate::units::Timestamp;

/// What is done to it, as in the label `action`: more, less, as much as before, and not known
/// since the domain could not be looked at.
pub const ACTIONS: [&str; 4] = ["plug", "unplug", "keep", "unknown"];

/// The parts of an operation's time: until the hypervisor had done its part, and from then until
/// the verdict.
pub const PHASES: [&str; 2] = ["execute", "verify"];

/// The calls to the API server about DomainHotplug objects, as in the label `call`.
pub const OBJECT_CALLS: [&str; 4] = ["watch", "status", "own", "delete"];

/// Why they fail, as in the label `reason`.
pub const OBJECT_FAILURES: [&str; 7] = [
    "api-unreachable",
    "api-timeout",
    "api-forbidden",
    "api-not-found",
    "api-node-not-found",
    "api-rejected",
    "api-conflict",
];

/// What is done by going from what there was to what is asked for.
pub fn action(before: Option<Amount>, requested: Amount) -> &'static str {
    match before.and_then(|before| requested.compare(before)) {
        None => "unknown",
        Some(Ordering::Greater) => "plug",
        Some(Ordering::Less) => "unplug",
        Some(Ordering::Equal) => "keep",
    }
}

/// The metrics of verified hotplug.
pub struct HotplugMetrics {
    requests: IntCounterVec,
    results: IntCounterVec,
    duration: HistogramVec,
    in_progress: IntGauge,
    oldest: Gauge,
    deadline: Gauge,
    journal: IntGaugeVec,
    journal_failures: IntCounter,
    objects_watched: IntGauge,
    object_calls: IntCounterVec,
    object_failures: IntCounterVec,
    open: Mutex<HashMap<OperationId, Open>>,
}

/// An operation without a verdict.
struct Open {
    asked: Timestamp,
    /// By when it is to have one.
    deadline: Timestamp,
    /// Whether it is among the requests: what it does is known only after a look at the domain.
    counted: bool,
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
            deadline: new.float_gauge(
                "virtnode_hotplug_earliest_deadline_timestamp_seconds",
                "The earliest deadline of the operations without a verdict; 0 if there is none.",
            )?,
            journal: new.gauges(
                "virtnode_journal_records",
                "Records in the journal, by how far the operation is.",
                &["state"],
            )?,
            journal_failures: new.counter(
                "virtnode_journal_write_failures_total",
                "Times that the journal could not be written.",
            )?,
            objects_watched: new.gauge(
                "virtnode_hotplug_objects_watched",
                "1 while the DomainHotplug objects of this node are watched.",
            )?,
            object_calls: new.counters(
                "virtnode_hotplug_object_calls_total",
                "Calls to the API server to say something of a DomainHotplug object, to own it or to \
                 delete it.",
                &["call"],
            )?,
            object_failures: new.counters(
                "virtnode_hotplug_object_call_failures_total",
                "Calls about DomainHotplug objects that failed, and failures of their watch.",
                &["call", "reason"],
            )?,
            open: Mutex::default(),
        };
        for resource in ResourceKind::ALL.map(ResourceKind::as_str) {
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
        for state in STATES.map(State::as_str) {
            metrics.journal.with_label_values(&[state]);
        }
        for call in OBJECT_CALLS {
            if call != "watch" {
                metrics.object_calls.with_label_values(&[call]);
            }
            for reason in OBJECT_FAILURES {
                metrics.object_failures.with_label_values(&[call, reason]);
            }
        }
        Ok(metrics)
    }

    /// An operation was asked for, began, got its verdict, or had it put right.
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

    /// The journal could not be written.
    pub fn journal_failed(&self) {
        self.journal_failures.inc();
    }

    /// Whether the DomainHotplug objects of this node are watched.
    pub fn objects_watched(&self, watched: bool) {
        self.objects_watched.set(watched.into());
    }

    /// A call about a DomainHotplug object is made: one of [`OBJECT_CALLS`].
    pub fn object_call(&self, call: &'static str) {
        self.object_calls.with_label_values(&[call]).inc();
    }

    /// A call about DomainHotplug objects failed, for one of [`OBJECT_FAILURES`].
    pub fn object_call_failed(&self, call: &'static str, reason: &'static str) {
        self.object_failures
            .with_label_values(&[call, reason])
            .inc();
    }

    /// What the journal holds: how far each record's operation is.
    pub fn journal_holds(&self, records: impl IntoIterator<Item = State>) {
        let mut counts = STATES.map(|_| 0);
        for state in records {
            for (count, each) in counts.iter_mut().zip(STATES) {
                *count += i64::from(each == state);
            }
        }
        for (count, state) in counts.into_iter().zip(STATES) {
            self.journal.with_label_values(&[state.as_str()]).set(count);
        }
    }
}

/// Every state of a record.
const STATES: [State; 3] = [State::Queued, State::Running, State::Done];

#[expect(
    clippy::cast_precision_loss,
    reason = "milliseconds since 1970 are exact in a float"
)]
fn seconds(moment: Timestamp) -> f64 {
    moment.as_millis() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hotplug::{HotplugRequest, Require};
    use crate::operation::{AskedBy, Order};
    use crate::telemetry::Metrics;
    use crate::units::Bytes;

    fn vcpus(vcpus: u32) -> Amount {
        Amount::Vcpus {
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
            timeout: Duration::from_secs(60),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        let created = Timestamp::from_millis(i64::try_from(millis).unwrap());
        Record::new(OperationId::new(millis, 0), &order, created)
    }

    #[test]
    fn an_operation_is_counted_once_as_what_it_does() {
        let metrics = Metrics::new();
        let holds = |line: &str| {
            let text = metrics.encode().unwrap();
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        };
        let (mut first, second) = (record(2500), record(3000));
        metrics.hotplug.changed(&first);
        metrics.hotplug.changed(&second);
        holds("virtnode_hotplug_in_progress 2");
        holds("virtnode_hotplug_oldest_in_progress_timestamp_seconds 2.5");
        holds("virtnode_hotplug_earliest_deadline_timestamp_seconds 62.5");
        first.state = State::Running;
        metrics.hotplug.changed(&first);
        first.before = Some(vcpus(1));
        metrics.hotplug.changed(&first);
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
        metrics.hotplug.changed(&first);
        holds("virtnode_hotplug_in_progress 1");
        holds("virtnode_hotplug_oldest_in_progress_timestamp_seconds 3");
        holds("virtnode_hotplug_earliest_deadline_timestamp_seconds 63");
        first.verdict = Some(Verdict::Verified);
        first.corrected = Some(Timestamp::from_millis(9000));
        metrics.hotplug.changed(&first);
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
        metrics.hotplug.journal_holds([State::Done, State::Queued]);
        holds("virtnode_journal_records{state=\"done\"} 1");
    }
}
