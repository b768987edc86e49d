//! A running Node publisher.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use virtnode::cluster::Cluster;
use virtnode::daemon::Metrics;
use virtnode::label::LabelSet;
use virtnode::publish::events::EventRecorder;
use virtnode::publish::node::{NodePublisher, NodePublisherOptions, SyncState};

use super::eventually;

/// Timeout for actions that take milliseconds on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn labels(pairs: &[(&str, &str)]) -> LabelSet {
    let pair = |(key, value): &(&str, &str)| {
        (key.parse().expect("a key"), value.parse().expect("a value"))
    };
    pairs.iter().map(pair).collect()
}

/// Waits for a condition.
pub(crate) async fn until(is: impl Fn() -> bool) -> anyhow::Result<()> {
    eventually(SOON, async || {
        ensure!(is(), "it is not so");
        Ok(())
    })
    .await
}

/// A running publisher, stopped when dropped.
pub(crate) struct Publisher {
    pub(crate) desired: watch::Sender<Option<Arc<LabelSet>>>,
    pub(crate) state: watch::Receiver<SyncState>,
    pub(crate) metrics: Arc<Metrics>,
    token: CancellationToken,
    task: JoinHandle<()>,
}

impl Publisher {
    pub(crate) fn start(
        cluster: Cluster,
        desired: LabelSet,
        already_published: LabelSet,
        options: NodePublisherOptions,
    ) -> Self {
        let metrics = Arc::new(Metrics::new());
        let token = CancellationToken::new();
        let (events, writer) = EventRecorder::new(cluster.clone(), metrics.events.clone());
        tokio::spawn(writer.run(token.clone()));
        let publisher = NodePublisher::new(cluster, events, metrics.sync.clone(), options);
        let desired = watch::Sender::new(Some(Arc::new(desired)));
        let state = publisher.state();
        let run = publisher.run(desired.subscribe(), already_published, token.clone());
        Self {
            desired,
            state,
            metrics,
            token,
            task: tokio::spawn(run),
        }
    }

    /// Stops it as the daemon does.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.token.cancel();
        Ok(self.task.await?)
    }

    pub(crate) fn publish(&self, pairs: &[(&str, &str)]) {
        self.desired.send_replace(Some(Arc::new(labels(pairs))));
    }

    /// Waits for a state.
    pub(crate) async fn state(
        &mut self,
        is: impl FnMut(&SyncState) -> bool,
    ) -> anyhow::Result<SyncState> {
        let state = tokio::time::timeout(SOON, self.state.wait_for(is)).await;
        Ok(state.context("not in this state in time")??.clone())
    }

    pub(crate) fn changes(&self, action: &str) -> u64 {
        self.metrics.sync.changes.with_label_values(&[action]).get()
    }

    pub(crate) fn conflicts(&self, action: &str) -> u64 {
        self.metrics
            .sync
            .conflicts
            .with_label_values(&[action])
            .get()
    }

    pub(crate) fn failures(&self, reason: &str) -> u64 {
        self.metrics
            .sync
            .failures
            .with_label_values(&[reason])
            .get()
    }
}
