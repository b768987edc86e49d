//! Failures of the publisher: logged once, retried with backoff.

use std::time::Duration;

use tokio::time::Instant;

use super::report::SyncProblem;
use super::{NodePublisher, NodeWatch};
use crate::cluster::ClusterError;

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
