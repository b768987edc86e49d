//! Recording of events, and the task that writes them.
//!
//! ```text
//!  EventRecorder ──queue of 256──▶ EventWriter ──▶ create event │ update its count
//! ```
//! Recording never waits and never fails. The writer owns the queue and the series: a repetition
//! within [`SAME_WITHIN`] increments the count of the existing event, which is written at most once
//! in [`COUNT_INTERVAL`]. While the API server is away, the writer blocks on its current event with
//! backoff and the queue fills up. Events that do not fit, or are too old, are dropped and counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::wait_until;
use crate::cluster::{Cluster, ClusterError, EventKind, ObjectEvent, Retry, WrittenEvent};
use crate::publish::metrics::EventMetrics;

/// Capacity of the queue: a hundred simultaneous verdicts yield two events each.
const QUEUE: usize = 256;
/// Maximum number of series in memory.
const SERIES_MAX: usize = 128;
/// Time within which an equal event counts as a repetition, as in client-go's recorder.
pub const SAME_WITHIN: Duration = Duration::from_secs(360);
/// Minimum interval between two writes of one event's count.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of attempts that the API server answers with a transient error.
const REJECTIONS_MAX: u32 = 5;
/// Maximum age of an unwritten event; later it is of no use.
const AGE_MAX: Duration = Duration::from_secs(600);

/// Records events. Cheap to clone.
#[derive(Clone)]
pub struct EventRecorder {
    queue: mpsc::Sender<(ObjectEvent, Timestamp)>,
    metrics: Arc<EventMetrics>,
}

impl EventRecorder {
    /// Returns the recorder and its writer, which must be run.
    pub fn new(cluster: Cluster, metrics: Arc<EventMetrics>) -> (Self, EventWriter) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let recorder = Self {
            queue: sender,
            metrics: Arc::clone(&metrics),
        };
        let writer = EventWriter {
            cluster,
            queue: receiver,
            series: HashMap::new(),
            retry: Retry::default(),
            metrics,
        };
        (recorder, writer)
    }

    /// Records an event that occurs now.
    pub fn record(&self, event: ObjectEvent) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send((event, Timestamp::now())) {
            count_dropped(&self.metrics, "queue-full");
        }
    }
}

fn count_dropped(metrics: &EventMetrics, reason: &str) {
    metrics.dropped.with_label_values(&[reason]).inc();
}

/// Events with equal keys form a series.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct EventKey {
    object: [Option<String>; 4],
    kind: EventKind,
    reason: String,
    note: String,
}

impl From<&ObjectEvent> for EventKey {
    fn from(event: &ObjectEvent) -> Self {
        let about = event.about.clone();
        Self {
            object: [about.kind, about.namespace, about.name, about.uid],
            kind: event.kind,
            reason: event.reason.clone(),
            note: event.note.clone(),
        }
    }
}

/// A written event and its repetitions.
struct EventSeries {
    event: WrittenEvent,
    count: u32,
    last: Timestamp,
    last_recorded: Instant,
    last_written: Instant,
    /// When to write the count; `None` if the API server has the current one.
    due: Option<Instant>,
}

/// Writes recorded events.
pub struct EventWriter {
    cluster: Cluster,
    queue: mpsc::Receiver<(ObjectEvent, Timestamp)>,
    series: HashMap<EventKey, EventSeries>,
    retry: Retry,
    metrics: Arc<EventMetrics>,
}

impl EventWriter {
    /// Writes until `token` is cancelled or all recorders are dropped. Unwritten events are lost.
    pub async fn run(mut self, token: CancellationToken) {
        token.run_until_cancelled_owned(self.write_all()).await;
    }

    async fn write_all(&mut self) {
        loop {
            let due = self.series.values().filter_map(|series| series.due).min();
            tokio::select! {
                recorded = self.queue.recv() => match recorded {
                    Some((event, at)) => self.write(event, at).await,
                    None => return,
                },
                () = wait_until(due) => self.write_due_counts().await,
            }
        }
    }

    async fn write(&mut self, event: ObjectEvent, at: Timestamp) {
        let now = Instant::now();
        self.series.retain(|_, series| {
            series.due.is_some() || series.last_recorded.elapsed() < SAME_WITHIN
        });
        let key = EventKey::from(&event);
        if let Some(series) = self.series.get_mut(&key) {
            series.count = series.count.saturating_add(1);
            series.last = at;
            series.last_recorded = now;
            series
                .due
                .get_or_insert_with(|| now.max(series.last_written + COUNT_INTERVAL));
            return;
        }
        let Some(event) = self.create(&event, at).await else {
            return;
        };
        if self.series.len() >= SERIES_MAX {
            let oldest = self
                .series
                .iter()
                .min_by_key(|(_, series)| series.last_recorded);
            let oldest = oldest.map(|(key, _)| key.clone());
            oldest.and_then(|key| self.series.remove(&key));
        }
        let now = Instant::now();
        let series = EventSeries {
            event,
            count: 1,
            last: at,
            last_recorded: now,
            last_written: now,
            due: None,
        };
        self.series.insert(key, series);
    }

    /// Writes a new event. Retries until it is written, rejected or too old.
    async fn create(&self, event: &ObjectEvent, at: Timestamp) -> Option<WrittenEvent> {
        let mut failures = 0;
        loop {
            let error = match self.cluster.create_event(event, at).await {
                Ok(written) => {
                    self.metrics.written.inc();
                    return Some(written);
                }
                Err(error) => error,
            };
            failures += 1;
            let rejected = !matches!(
                error,
                ClusterError::Unreachable { .. } | ClusterError::Timeout { .. }
            );
            if is_final(&error) || rejected && failures >= REJECTIONS_MAX {
                tracing::debug!(reason = event.reason, %error, "event rejected");
                count_dropped(&self.metrics, "rejected");
                return None;
            }
            let wait = self.retry.delay(failures, &error);
            let age = Timestamp::now().duration_since(at).unsigned_abs();
            if age + wait > AGE_MAX {
                count_dropped(&self.metrics, "api-unreachable");
                return None;
            }
            sleep(wait).await;
        }
    }

    /// Writes the counts that are due. A failed write is repeated after [`COUNT_INTERVAL`].
    async fn write_due_counts(&mut self) {
        let now = Instant::now();
        let mut rejected = Vec::new();
        for (key, series) in &mut self.series {
            if series.due.is_none_or(|due| due > now) {
                continue;
            }
            let result = self
                .cluster
                .repeat_event(&series.event, series.count, series.last)
                .await;
            series.last_written = Instant::now();
            match result {
                Ok(()) => {
                    self.metrics.written.inc();
                    series.due = None;
                }
                Err(error) if is_final(&error) || series.last_recorded.elapsed() > AGE_MAX => {
                    tracing::debug!(reason = key.reason, %error, "count of an event rejected");
                    count_dropped(&self.metrics, "rejected");
                    rejected.push(key.clone());
                }
                Err(_) => series.due = Some(series.last_written + COUNT_INTERVAL),
            }
        }
        for key in rejected {
            self.series.remove(&key);
        }
    }
}

/// True if a retry cannot succeed. A missing right is not final: an API server that has just started
/// denies everything for a moment.
fn is_final(error: &ClusterError) -> bool {
    !matches!(
        error,
        ClusterError::Unreachable { .. }
            | ClusterError::Timeout { .. }
            | ClusterError::Unauthorized { .. }
            | ClusterError::Forbidden { .. }
            | ClusterError::Rejected { .. }
            | ClusterError::Conflict { .. }
    )
}
