//! Failures: told once, tried again later each time.

use std::time::Duration;

use tokio::time::Instant;

use super::report::SyncProblem;
use super::{NodePublisher, Watch};
use crate::cluster::ClusterError;

/// The labels could not be brought up to date, and why.
pub(super) struct PublishFailures {
    code: &'static str,
    since: Instant,
    failures: u32,
}

impl PublishFailures {
    pub(super) fn code(&self) -> &'static str {
        self.code
    }
}

impl NodePublisher {
    /// The API server does what it is asked.
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
        if self.watch.errors > 0 && !self.watch.told {
            // It may wait for half a minute yet, and the API server is there now. If it is not
            // and only the watch fails, the errors go on being counted.
            let errors = if failures.is_some() {
                0
            } else {
                self.watch.errors
            };
            self.watch = Watch {
                errors,
                ..Watch::new(&self.cluster)
            };
        }
    }

    /// Says when to try again.
    pub(super) fn failed(&mut self, error: &ClusterError) -> Duration {
        let code = error.code();
        self.metrics.sync_failures.with_label_values(&[code]).inc();
        let (since, failures) = match &self.failures {
            Some(failures) if failures.code == code => (failures.since, failures.failures + 1),
            // Another failures: that the server was away for long says nothing about it.
            Some(failures) => (failures.since, 1),
            None => (Instant::now(), 1),
        };
        if self
            .failures
            .as_ref()
            .is_none_or(|failures| failures.code != code)
        {
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "labels cannot be published; trying again"
            );
            let problem = SyncProblem {
                code,
                message: error.to_string(),
            };
            self.state
                .send_modify(|state| state.problem = Some(problem));
        }
        self.failures = Some(PublishFailures {
            code,
            since,
            failures,
        });
        self.options.retry.delay(failures, error)
    }
}
