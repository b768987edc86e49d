//! Exit codes, on which scripts rely.

use std::fmt;

use thiserror::Error;

use crate::hotplug::Verdict;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Succeeded. A hotplug operation is verified.
    Done = 0,
    Failed = 1,
    /// The command line or the configuration is not valid.
    Usage = 2,
    /// The hypervisor accepted the change, but the guest does not use all of it.
    NotTaken = 3,
    /// Not feasible. Nothing was changed.
    Infeasible = 4,
    /// The hypervisor cannot be reached.
    Unreachable = 5,
    /// Neither feasible nor infeasible, because a property is unknown (`check`).
    Unknown = 6,
}

impl Exit {
    pub fn code(self) -> u8 {
        self as u8
    }
}

impl From<Verdict> for Exit {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Verified => Self::Done,
            Verdict::PartiallyApplied
            | Verdict::GuestOffline
            | Verdict::GuestRefused
            | Verdict::GuestSilent
            | Verdict::Unverifiable
            | Verdict::Pending => Self::NotTaken,
            Verdict::Infeasible => Self::Infeasible,
            Verdict::Busy
            | Verdict::DomainNotFound
            | Verdict::DomainNotRunning
            | Verdict::HypervisorError => Self::Failed,
            Verdict::HypervisorUnavailable => Self::Unreachable,
        }
    }
}

impl Exit {
    /// Returns the exit for an error: that of a [`Failure`] in its chain, `Done` if the reader
    /// closed the pipe, else `Failed`.
    pub fn of(error: &anyhow::Error) -> Self {
        match error.downcast_ref::<Failure>() {
            Some(failure) => failure.exit,
            None if is_broken_pipe(error) => Self::Done,
            None => Self::Failed,
        }
    }
}

/// An error with an exit code.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
        }
    }
}

/// Returns true if the reader of the output closed the pipe, as `head` does. That is not a failure.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_verdict_verified_exits_with_zero() {
        for verdict in Verdict::ALL {
            let success = Exit::from(verdict) == Exit::Done;
            assert_eq!(success, verdict == Verdict::Verified, "{verdict}");
            // An accepted change may still be verified later. One that was never begun may not.
            let exit = Exit::from(verdict);
            assert!(exit != Exit::NotTaken || verdict.may_change(), "{verdict}");
            assert!(
                exit != Exit::Infeasible || !verdict.may_change(),
                "{verdict}"
            );
        }
    }
}
