//! Liveness and readiness.
//!
//! Alive means that the event loop makes progress, and nothing else: restarting the daemon does
//! not bring a libvirt or an API server back. Ready means that one probe read everything and a
//! label set is out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio::time::{Duration, Instant};

use crate::labeller::LabellerProgress;
use crate::publish::node::SyncState;
use crate::telemetry::Inventory;

/// The event loop has not moved for so long: something blocks it.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// What `/healthz` and `/readyz` answer from.
pub struct Health {
    started: Instant,
    last_tick_millis: AtomicU64,
    progress: watch::Receiver<LabellerProgress>,
    node: Option<watch::Receiver<SyncState>>,
    domains: Option<Arc<Inventory>>,
}

impl Health {
    /// Joins what the labeller and the Node's publisher, if there is one, tell.
    pub fn new(
        progress: watch::Receiver<LabellerProgress>,
        node: Option<watch::Receiver<SyncState>>,
    ) -> Self {
        Self {
            started: Instant::now(),
            last_tick_millis: AtomicU64::new(0),
            progress,
            node,
            domains: None,
        }
    }

    /// Ready only after the running domains have been looked at.
    pub fn with_domains(self, domains: Arc<Inventory>) -> Self {
        Self {
            domains: Some(domains),
            ..self
        }
    }

    /// The event loop moved.
    pub fn tick(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_tick_millis.store(millis, Ordering::Relaxed);
    }

    /// How long ago the event loop last moved, if that is too long.
    pub fn stuck_for(&self) -> Option<Duration> {
        let last = Duration::from_millis(self.last_tick_millis.load(Ordering::Relaxed));
        let since = self.started.elapsed().saturating_sub(last);
        (since > STUCK_AFTER).then_some(since)
    }

    /// What is still missing until the daemon is ready, a line each; empty once it is.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let progress = self.progress.borrow();
        if !progress.probed {
            missing.push("first full probe".to_owned());
            missing.extend(
                progress
                    .failures
                    .iter()
                    .map(|failure| format!("  {}: {}", failure.source.as_str(), failure.message)),
            );
        }
        if !progress.files_written {
            missing.push("first labels in the file".to_owned());
            missing.extend(
                progress
                    .file_problem
                    .iter()
                    .map(|problem| format!("  {problem}")),
            );
        }
        if self
            .domains
            .as_ref()
            .is_some_and(|domains| !domains.is_known())
        {
            missing.push("first look at the running domains".to_owned());
        }
        if let Some(node) = &self.node {
            let state = node.borrow();
            if !state.synced {
                missing.push("first labels on the Node".to_owned());
                missing.extend(
                    state
                        .problem
                        .iter()
                        .map(|problem| format!("  {}", problem.message)),
                );
            }
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_stands_still_is_noticed() {
        let (_progress, progress) = watch::channel(LabellerProgress::default());
        let health = Health::new(progress, None);
        health.tick();
        assert_eq!(health.stuck_for(), None);
        tokio::time::advance(Duration::from_secs(21)).await;
        assert!(health.stuck_for().is_some());
        health.tick();
        assert_eq!(health.stuck_for(), None);
    }

    #[test]
    fn readiness_lists_what_is_missing() {
        let (progress, receiver) = watch::channel(LabellerProgress::default());
        let (node, state) = watch::channel(SyncState::default());
        let health = Health::new(receiver, Some(state));
        assert_eq!(health.missing().len(), 3);
        progress.send_modify(|progress| {
            progress.probed = true;
            progress.files_written = true;
        });
        assert_eq!(health.missing(), ["first labels on the Node"]);
        node.send_modify(|state| state.synced = true);
        assert!(health.missing().is_empty());
        let inventory = Arc::new(Inventory::default());
        let health = health.with_domains(Arc::clone(&inventory));
        assert_eq!(health.missing(), ["first look at the running domains"]);
        inventory.replace(Vec::new());
        assert!(health.missing().is_empty());
    }
}
