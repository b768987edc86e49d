//! Backoff after failed calls.

use std::time::Duration;

use kube::runtime::utils::Backoff;
use tokio::time::Instant;

use super::ClusterError;

/// Exponential backoff. Each delay is shortened at random by up to a half.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Delay after the first failure, doubled after each further one.
    pub first: Duration,
    /// Maximum delay.
    pub longest: Duration,
    /// Maximum delay if someone has to act first (grant a right, create the Node). The first retries
    /// still come early: an API server that has just started denies everything for a moment.
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
    /// Returns the delay after `failures` consecutive failures, of which `error` is the last.
    pub fn delay(&self, failures: u32, error: &ClusterError) -> Duration {
        let longest = if error.needs_people() {
            self.needs_people
        } else {
            self.longest
        };
        let delay = self.growing(failures, longest);
        match error {
            ClusterError::Rejected {
                retry_after: Some(after),
                ..
            } => delay.max(*after),
            _ => delay,
        }
    }

    fn growing(&self, failures: u32, longest: Duration) -> Duration {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        let delay = self.first.saturating_mul(doubled).min(longest);
        delay.mul_f64(0.5 + 0.5 * fastrand::f64())
    }
}

/// Backoff of a watch. Unlike kube's, it does not restart with each delivered object: a watch may
/// deliver a few and fail, again and again. It restarts after [`Self::FORGET_AFTER`] without a failure.
#[derive(Debug, Default)]
pub(super) struct WatchBackoff {
    retry: Retry,
    failures: u32,
    last: Option<Instant>,
}

impl WatchBackoff {
    const FORGET_AFTER: Duration = Duration::from_secs(120);
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let last = self.last.replace(Instant::now());
        if last.is_some_and(|last| last.elapsed() > Self::FORGET_AFTER) {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        Some(self.retry.growing(self.failures, self.retry.longest))
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ApiObject;

    #[test]
    fn delays_grow_up_to_the_maximum() {
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

    #[tokio::test(start_paused = true)]
    async fn watch_backs_off_until_it_has_worked_for_a_while() {
        let mut backoff = WatchBackoff::default();
        for _ in 0..8 {
            backoff.next();
            backoff.reset();
        }
        let grown = backoff.next().unwrap();
        assert!(grown >= Duration::from_secs(15), "{grown:?}");
        tokio::time::advance(WatchBackoff::FORGET_AFTER + Duration::from_secs(1)).await;
        assert!(backoff.next().unwrap() <= Duration::from_millis(500));
    }

    #[test]
    fn retry_after_of_the_server_is_a_lower_bound() {
        let after = Duration::from_secs(90);
        let error = ClusterError::Rejected {
            verb: "patch",
            object: ApiObject::node("n"),
            message: "busy".into(),
            retry_after: Some(after),
        };
        assert!(Retry::default().delay(1, &error) >= after);
    }
}
