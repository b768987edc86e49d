//! Failures of the publisher: logged once, retried with backoff.

use std::time::Duration;

use tokio::time::Instant;

use super::report::SyncProblem;
use super::{NodePublisher, NodeWatch};
use crate::cluster::{ClusterError, EventKind};

/// The fixed metrics label of standing back.
const ANOTHER_DAEMON: &str = "another-daemon";

/// Consecutive failures.
pub(super) struct PublishFailures {
    code: &'static str,
    since: Instant,
    /// Number of failures with this code.
    count: u32,
}

impl PublishFailures {
    pub(super) fn code(&self) -> &'static str {
        self.code
    }
}

impl NodePublisher {
    pub(super) fn succeeded(&mut self) {
        let failures = self.failures.take();
        if let Some(failures) = &failures {
            tracing::info!(
                node = self.cluster.node(),
                after_seconds = failures.since.elapsed().as_secs(),
                "labels are published again"
            );
            self.state.send_modify(|state| state.problem = None);
        }
        if self.watch.errors > 0 && failures.is_some() {
            // Restarts the watch, whose own retry may be half a minute away. A watch that fails while
            // calls succeed keeps its backoff.
            self.watch = NodeWatch {
                errors: if self.watch.logged {
                    self.watch.errors
                } else {
                    0
                },
                logged: self.watch.logged,
                ..NodeWatch::new(&self.cluster)
            };
        }
    }

    /// Reports that another process wrote labels as virtnode.
    pub(super) fn rival_seen(&self) {
        tracing::warn!(
            node = self.cluster.node(),
            "another process wrote labels of this Node as virtnode; writing the own ones again"
        );
    }

    /// Ends publishing, because another daemon publishes to the Node.
    pub(super) fn stand_back(&mut self) {
        if std::mem::replace(&mut self.stands_back, true) {
            return;
        }
        let message = "another virtnode daemon publishes labels to this Node, and this one stands back \
                       until its next start: run one daemon for each Node (a package and a DaemonSet, \
                       or two with the same node name?)";
        tracing::error!(node = self.cluster.node(), "{message}");
        let failures = &self.metrics.failures;
        failures.with_label_values(&[ANOTHER_DAEMON]).inc();
        self.record_event(
            EventKind::Warning,
            "AnotherDaemon",
            "StandBack",
            message.to_owned(),
        );
        self.state.send_modify(|state| {
            state.synced = false;
            state.problem = Some(SyncProblem {
                code: ANOTHER_DAEMON,
                message: message.to_owned(),
            });
        });
    }

    /// Returns the delay of the retry.
    pub(super) fn failed(&mut self, error: &ClusterError) -> Duration {
        let code = error.code();
        self.metrics.failures.with_label_values(&[code]).inc();
        let failures = self.failures.get_or_insert_with(|| PublishFailures {
            code: "",
            since: Instant::now(),
            count: 0,
        });
        failures.count += 1;
        if failures.code != code {
            failures.code = code;
            // Backoff restarts: a long outage does not predict another kind of failure.
            failures.count = 1;
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "cannot publish labels, retrying"
            );
            let message = error.to_string();
            self.state
                .send_modify(|state| state.problem = Some(SyncProblem { code, message }));
        }
        self.options.retry.delay(failures.count, error)
    }
}
