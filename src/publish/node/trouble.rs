//! Failures: told once, tried again later each time.

use std::time::Duration;

use tokio::time::Instant;

use super::report::Problem;
use super::{NodePublisher, Watch};
use crate::cluster::ClusterError;

/// When to try again after a failure. Every delay is shortened at random by up to a half.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// After the first failure; twice as long after each further one.
    pub first: Duration,
    /// The longest delay.
    pub longest: Duration,
    /// The longest delay where somebody has to do something first: grant a right, create the
    /// Node. Not at once, because an API server that has just started knows no rights yet.
    pub needs_people: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            longest: Duration::from_secs(30),
            needs_people: Duration::from_secs(120),
        }
    }
}

impl Retry {
    fn delay(&self, failures: u32, error: &ClusterError) -> Duration {
        let growing = self
            .first
            .saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
        let longest = if error.needs_people() {
            self.needs_people
        } else {
            self.longest
        };
        let delay = growing.min(longest).mul_f64(0.5 + 0.5 * fastrand::f64());
        match error {
            ClusterError::Rejected {
                retry_after: Some(after),
                ..
            } => delay.max(*after),
            _ => delay,
        }
    }
}

/// The labels could not be brought up to date, and why.
pub(super) struct Trouble {
    code: &'static str,
    since: Instant,
    failures: u32,
}

impl Trouble {
    pub(super) fn code(&self) -> &'static str {
        self.code
    }
}

impl NodePublisher {
    /// The API server does what it is asked.
    pub(super) fn succeeded(&mut self) {
        let trouble = self.trouble.take();
        if let Some(trouble) = &trouble {
            tracing::info!(
                node = self.cluster.node(),
                after_seconds = trouble.since.elapsed().as_secs(),
                "labels are published again"
            );
            self.state.send_modify(|state| state.problem = None);
        }
        if self.watch.errors > 0 && !self.watch.told {
            // It may wait for half a minute yet, and the API server is there now. If it is not
            // and only the watch fails, the errors go on being counted.
            let errors = if trouble.is_some() {
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
        let (since, failures) = match &self.trouble {
            Some(trouble) if trouble.code == code => (trouble.since, trouble.failures + 1),
            // Another trouble: that the server was away for long says nothing about it.
            Some(trouble) => (trouble.since, 1),
            None => (Instant::now(), 1),
        };
        if self
            .trouble
            .as_ref()
            .is_none_or(|trouble| trouble.code != code)
        {
            tracing::warn!(
                node = self.cluster.node(), code, %error,
                "labels cannot be published; trying again"
            );
            let problem = Problem {
                code,
                message: error.to_string(),
            };
            self.state
                .send_modify(|state| state.problem = Some(problem));
        }
        self.trouble = Some(Trouble {
            code,
            since,
            failures,
        });
        self.options.retry.delay(failures, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_limit_and_differ() {
        let retry = Retry::default();
        let error = ClusterError::Unreachable {
            reason: "refused".into(),
        };
        for (failures, longest) in [(1, 0.5), (2, 1.0), (7, 30.0), (1000, 30.0)] {
            let delay = retry.delay(failures, &error).as_secs_f64();
            assert!(
                (longest / 2.0..=longest).contains(&delay),
                "{failures}: {delay}"
            );
        }
    }

    #[test]
    fn the_server_is_left_alone_for_as_long_as_it_wants() {
        let after = Duration::from_secs(90);
        let error = ClusterError::Rejected {
            verb: "patch",
            node: "n".into(),
            message: "busy".into(),
            retry_after: Some(after),
        };
        assert!(Retry::default().delay(1, &error) >= after);
    }
}
