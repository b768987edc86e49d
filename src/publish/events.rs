//! Events: told at once, written in their time.
//!
//! Whoever has something to tell puts it into a short queue and goes on; one task writes. The
//! same thing again within `SAME_WITHIN` is no new event but raises the count of the one there
//! is, at most once in `SPACING`. While the API server is away the task waits with what it has
//! in hand, the queue fills, and what does not fit is dropped and counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, ClusterError, EventKind, ObjectEvent, Retry, WrittenEvent};
use crate::telemetry::metrics::Metrics;

/// So many may wait to be written: a hundred operations that end at once, told on the Node and on
/// their objects.
const QUEUE: usize = 256;
/// So many different ones are remembered, for their repeats.
const SERIES_MAX: usize = 128;
/// The same again within this time is a repeat, as with client-go's recorder.
pub const SAME_WITHIN: Duration = Duration::from_secs(360);
/// Between two writes of one event's count.
const SPACING: Duration = Duration::from_secs(10);
/// So often the API server may answer an event with an error that may pass.
const REFUSALS_MAX: u32 = 5;
/// What could not be written for so long is of no interest any more.
const TOO_OLD: Duration = Duration::from_secs(600);

/// Where to tell what happened. Cheap to clone; never waits, never fails.
#[derive(Clone)]
pub struct EventRecorder {
    queue: mpsc::Sender<(ObjectEvent, Timestamp)>,
    metrics: Arc<Metrics>,
}

impl EventRecorder {
    /// A place to tell, and the task that writes.
    pub fn new(cluster: Cluster, metrics: Arc<Metrics>) -> (Self, EventWriter) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let events = Self {
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
        (events, writer)
    }

    /// Tells that something happened now.
    pub fn record(&self, what: ObjectEvent) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send((what, Timestamp::now())) {
            dropped(&self.metrics, "queue-full");
        }
    }
}

fn dropped(metrics: &Metrics, reason: &str) {
    metrics
        .cluster
        .events_dropped
        .with_label_values(&[reason])
        .inc();
}

/// What makes a happening the same as another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Same {
    object: [Option<String>; 4],
    kind: EventKind,
    reason: String,
    note: String,
}

impl From<&ObjectEvent> for Same {
    fn from(what: &ObjectEvent) -> Self {
        let about = what.about.clone();
        Self {
            object: [about.kind, about.namespace, about.name, about.uid],
            kind: what.kind,
            reason: what.reason.clone(),
            note: what.note.clone(),
        }
    }
}

/// An event that is written, and how often it happened.
struct Series {
    event: WrittenEvent,
    count: u32,
    last: Timestamp,
    /// When it was last told of.
    seen: Instant,
    /// When the count may be written next; `None` while the API server has it.
    due: Option<Instant>,
    written: Instant,
}

/// Writes what was told.
pub struct EventWriter {
    cluster: Cluster,
    queue: mpsc::Receiver<(ObjectEvent, Timestamp)>,
    series: HashMap<Same, Series>,
    retry: Retry,
    metrics: Arc<Metrics>,
}

impl EventWriter {
    /// Writes until `token` is cancelled or nobody is left who could tell anything. What is not
    /// written then is lost.
    pub async fn run(mut self, token: CancellationToken) {
        token.run_until_cancelled_owned(self.write_all()).await;
    }

    async fn write_all(&mut self) {
        loop {
            let due = self.series.values().filter_map(|series| series.due).min();
            tokio::select! {
                told = self.queue.recv() => match told {
                    Some((what, at)) => self.take(what, at).await,
                    None => return,
                },
                () = wait_until(due) => self.count().await,
            }
        }
    }

    async fn take(&mut self, what: ObjectEvent, at: Timestamp) {
        let now = Instant::now();
        self.series
            .retain(|_, series| series.due.is_some() || series.seen.elapsed() < SAME_WITHIN);
        let same = Same::from(&what);
        if let Some(series) = self.series.get_mut(&same) {
            series.count = series.count.saturating_add(1);
            series.last = at;
            series.seen = now;
            series
                .due
                .get_or_insert_with(|| now.max(series.written + SPACING));
            return;
        }
        let Some(event) = self.create(&what, at).await else {
            return;
        };
        if self.series.len() >= SERIES_MAX {
            let oldest = self.series.iter().min_by_key(|(_, series)| series.seen);
            let oldest = oldest.map(|(same, _)| same.clone());
            oldest.and_then(|same| self.series.remove(&same));
        }
        let written = Instant::now();
        let series = Series {
            event,
            count: 1,
            last: at,
            seen: written,
            due: None,
            written,
        };
        self.series.insert(same, series);
    }

    /// Writes a new event, and tries again until it is written, refused or too old.
    async fn create(&self, what: &ObjectEvent, at: Timestamp) -> Option<WrittenEvent> {
        let mut failures = 0;
        loop {
            let error = match self.cluster.create_event(what, at).await {
                Ok(event) => {
                    self.metrics.cluster.events.inc();
                    return Some(event);
                }
                Err(error) => error,
            };
            failures += 1;
            let refused = !matches!(
                error,
                ClusterError::Unreachable { .. } | ClusterError::Timeout { .. }
            );
            if is_final(&error) || refused && failures >= REFUSALS_MAX {
                tracing::debug!(reason = what.reason, %error, "event not written");
                dropped(&self.metrics, "rejected");
                return None;
            }
            let wait = self.retry.delay(failures, &error);
            let age = Timestamp::now().duration_since(at).unsigned_abs();
            if age + wait > TOO_OLD {
                dropped(&self.metrics, "api-unreachable");
                return None;
            }
            sleep(wait).await;
        }
    }

    /// Writes the counts that are due. What fails is tried again with the next round.
    async fn count(&mut self) {
        let now = Instant::now();
        let mut forgotten = Vec::new();
        for (same, series) in &mut self.series {
            if series.due.is_none_or(|due| due > now) {
                continue;
            }
            let told = self
                .cluster
                .repeat_event(&series.event, series.count, series.last)
                .await;
            series.written = Instant::now();
            match told {
                Ok(()) => {
                    self.metrics.cluster.events.inc();
                    series.due = None;
                }
                Err(error) if is_final(&error) || series.seen.elapsed() > TOO_OLD => {
                    tracing::debug!(reason = same.reason, %error, "event not counted on");
                    dropped(&self.metrics, "rejected");
                    forgotten.push(same.clone());
                }
                Err(_) => series.due = Some(series.written + SPACING),
            }
        }
        for same in forgotten {
            self.series.remove(&same);
        }
    }
}

/// Whether it is of no use to try again. A missing right may come: an API server that has just
/// started knows none yet.
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

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
