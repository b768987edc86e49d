//! When to make a call again that failed.

use std::time::Duration;

use super::ClusterError;

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
    /// How long to wait after so many failures in a row, the last of them this one.
    pub fn delay(&self, failures: u32, error: &ClusterError) -> Duration {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Object;

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
            object: Object::node("n"),
            message: "busy".into(),
            retry_after: Some(after),
        };
        assert!(Retry::default().delay(1, &error) >= after);
    }
}
