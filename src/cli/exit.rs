//! Exit codes: a contract with scripts (design: product).

use std::error::Error;
use std::fmt;

use crate::hotplug::Verdict;

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done, and verified where there was something to verify.
    Done,
    /// 1: failed.
    Failed,
    /// 2: the command line or the configuration is wrong.
    Usage,
    /// 3: accepted by the hypervisor, and not taken by the guest, partly or wholly.
    NotTaken,
    /// 4: not feasible; nothing was changed.
    Infeasible,
    /// 5: the hypervisor cannot be reached.
    Unreachable,
}

impl Exit {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotTaken => 3,
            Self::Infeasible => 4,
            Self::Unreachable => 5,
        }
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
    /// The code for an error: that of a [`Failure`] in its chain, 0 for a reader that went away,
    /// else 1.
    pub fn of(error: &anyhow::Error) -> Self {
        match error.downcast_ref::<Failure>() {
            Some(failure) => failure.exit,
            None if is_broken_pipe(error) => Self::Done,
            None => Self::Failed,
        }
    }
}

/// An error that says how the command ends.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    /// An error with an exit code other than 1.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self {
            exit,
            message: message.to_string(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// Whether the reader of the output went away, as `head` does: no mistake.
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
    fn a_verdict_is_a_success_only_if_it_is_verified() {
        for verdict in Verdict::ALL {
            let success = Exit::from(verdict) == Exit::Done;
            assert_eq!(success, verdict == Verdict::Verified, "{verdict}");
            // What was accepted may still become good; what was never begun may not.
            let exit = Exit::from(verdict);
            assert!(exit != Exit::NotTaken || verdict.may_change(), "{verdict}");
            assert!(
                exit != Exit::Infeasible || !verdict.may_change(),
                "{verdict}"
            );
        }
    }
}
