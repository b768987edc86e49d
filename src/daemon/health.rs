//! Liveness and readiness.
//!
//! Alive means that the event loop makes progress, and nothing else: a restart of the daemon would
//! not repair libvirt or the API server. Ready means that one probe was complete and its labels are
//! published.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio::time::{Duration, Instant};

use crate::labeller::LabellerProgress;
use crate::launchers::Launchers;
use crate::monitor::Inventory;
use crate::publish::node::{SyncProblem, SyncState};

/// Maximum time between ticks of the event loop. The loop ticks once a second, so something blocks
/// it after this.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// The state that `/healthz` and `/readyz` report.
pub struct Health {
    started: Instant,
    last_tick_millis: AtomicU64,
    progress: watch::Receiver<LabellerProgress>,
    node: Option<watch::Receiver<SyncState>>,
    domains: Option<Arc<Inventory>>,
    launchers: Option<Arc<Launchers>>,
    hotplug_problem: Option<String>,
}

impl Health {
    /// Reads the progress of the labeller and, if there is one, of the Node publisher.
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
            launchers: None,
            hotplug_problem: None,
        }
    }

    /// Makes the daemon unready if hotplug is configured and could not be started, so that a rollout
    /// of such daemons stops.
    pub fn with_hotplug_problem(self, hotplug_problem: Option<String>) -> Self {
        Self {
            hotplug_problem,
            ..self
        }
    }

    /// Makes readiness depend on the first observation of the running domains.
    pub fn with_domains(self, domains: Arc<Inventory>) -> Self {
        Self {
            domains: Some(domains),
            ..self
        }
    }

    /// Makes readiness depend on the first scan for launchers, if there is one.
    pub fn with_launchers(self, launchers: Option<Arc<Launchers>>) -> Self {
        Self { launchers, ..self }
    }

    /// Records that the event loop runs.
    pub fn tick(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_tick_millis.store(millis, Ordering::Relaxed);
    }

    /// Returns the time since the last tick, if it is too long.
    pub fn stuck_for(&self) -> Option<Duration> {
        let last = Duration::from_millis(self.last_tick_millis.load(Ordering::Relaxed));
        let since = self.started.elapsed().saturating_sub(last);
        (since > STUCK_AFTER).then_some(since)
    }

    /// Returns what the daemon still waits for before it is ready, a line each.
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
            missing.push("first observation of the running domains".to_owned());
        }
        let launchers = self.launchers.as_ref();
        if launchers.is_some_and(|launchers| !launchers.is_scanned()) {
            missing.push("first scan for launchers".to_owned());
        }
        if let Some(problem) = &self.hotplug_problem {
            missing.push("hotplug, which is off until the next start".to_owned());
            missing.push(format!("  {problem}"));
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

    /// Returns problems that do not make the daemon unready, a line each.
    pub fn warnings(&self) -> Vec<String> {
        let state = self.node.as_ref().map(watch::Receiver::borrow);
        let problem = state
            .as_ref()
            .and_then(|state| state.watch_problem.as_ref());
        let warning = |problem: &SyncProblem| format!("cannot watch the Node: {}", problem.message);
        problem.map(warning).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn event_loop_without_ticks_is_stuck() {
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
    fn hotplug_that_could_not_start_makes_the_daemon_unready() {
        let (progress, receiver) = watch::channel(LabellerProgress::default());
        progress.send_modify(|progress| {
            progress.probed = true;
            progress.files_written = true;
        });
        let health = Health::new(receiver, None).with_hotplug_problem(Some("no room".into()));
        assert_eq!(
            health.missing(),
            ["hotplug, which is off until the next start", "  no room"]
        );
    }

    #[test]
    fn readiness_requires_probe_labels_and_domains() {
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
        assert_eq!(
            health.missing(),
            ["first observation of the running domains"]
        );
        inventory.replace(Vec::new());
        assert!(health.missing().is_empty());
    }
}
