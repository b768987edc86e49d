//! The verdicts: a closed list, with the same words everywhere.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::ParseError;

/// How an operation ended. The words are a contract: they stand in the command line's output, the
/// API, the objects' conditions and the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// Everything that was asked for is proven at the level that was asked for.
    Verified,
    /// The guest took some of it; the result says how much.
    PartiallyApplied,
    /// The guest has it and does not use it.
    GuestOffline,
    /// The guest said no, or provably threw it away.
    GuestRefused,
    /// The hypervisor did its part, and the guest gave no sign within the deadline.
    GuestSilent,
    /// Accepted; the domain offers no source of evidence at the level that was asked for.
    Unverifiable,
    /// The deadline passed and the request is still outstanding in the hypervisor; a later
    /// completion changes the record.
    Pending,
    /// A limit that was known before: nothing was changed.
    Infeasible,
    /// Something else held the domain until the deadline.
    Busy,
    /// There is no such domain.
    DomainNotFound,
    /// The domain does not run, or stopped running in the middle.
    DomainNotRunning,
    /// The hypervisor's own error.
    HypervisorError,
    /// There was no connection to the hypervisor.
    HypervisorUnavailable,
}

impl Verdict {
    /// Every verdict there is, for metrics that begin at zero.
    pub const ALL: [Self; 13] = [
        Self::Verified,
        Self::PartiallyApplied,
        Self::GuestOffline,
        Self::GuestRefused,
        Self::GuestSilent,
        Self::Unverifiable,
        Self::Pending,
        Self::Infeasible,
        Self::Busy,
        Self::DomainNotFound,
        Self::DomainNotRunning,
        Self::HypervisorError,
        Self::HypervisorUnavailable,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Verified => "Verified",
            Self::PartiallyApplied => "PartiallyApplied",
            Self::GuestOffline => "GuestOffline",
            Self::GuestRefused => "GuestRefused",
            Self::GuestSilent => "GuestSilent",
            Self::Unverifiable => "Unverifiable",
            Self::Pending => "Pending",
            Self::Infeasible => "Infeasible",
            Self::Busy => "Busy",
            Self::DomainNotFound => "DomainNotFound",
            Self::DomainNotRunning => "DomainNotRunning",
            Self::HypervisorError => "HypervisorError",
            Self::HypervisorUnavailable => "HypervisorUnavailable",
        }
    }

    /// Whether the hypervisor has done its part, or may still do it, and the guest may follow: such
    /// a record can become `Verified` later, when the guest is seen to have followed.
    pub fn may_change(self) -> bool {
        matches!(
            self,
            Self::PartiallyApplied
                | Self::GuestOffline
                | Self::GuestRefused
                | Self::GuestSilent
                | Self::Unverifiable
                | Self::Pending
                | Self::Busy
                | Self::HypervisorUnavailable
        )
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Verdict {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|verdict| verdict.as_str() == text)
            .ok_or_else(|| ParseError::new(text, "is not a verdict"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_has_one_word_everywhere() {
        for verdict in Verdict::ALL {
            let json = serde_json::to_string(&verdict).unwrap();
            assert_eq!(json, format!("\"{verdict}\""));
            assert_eq!(verdict.as_str().parse(), Ok(verdict));
        }
        assert!("verified".parse::<Verdict>().is_err());
    }
}
