//! The verdicts: a closed list, with the same words everywhere.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::ParseError;

/// The result of an operation. The words are a contract: the command line, the API, the objects'
/// conditions and the metrics use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// The request is proven at the required level.
    Verified,
    /// The guest took part of it.
    PartiallyApplied,
    /// The guest has it and does not use it.
    GuestOffline,
    /// The guest rejected it, or provably dropped it.
    GuestRefused,
    /// The hypervisor did its part, and the guest did not react before the deadline.
    GuestSilent,
    /// The hypervisor did its part, and the domain has no source of evidence at the required level.
    Unverifiable,
    /// The request is still outstanding in the hypervisor at the deadline. A later completion
    /// changes the record.
    Pending,
    /// A limit ruled the request out. Nothing was changed.
    Infeasible,
    /// Another job held the domain until the deadline.
    Busy,
    DomainNotFound,
    /// The domain is not running, or stopped during the operation.
    DomainNotRunning,
    /// The hypervisor reported an error.
    HypervisorError,
    HypervisorUnavailable,
}

impl Verdict {
    /// All verdicts. Their metrics start at zero.
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

    /// True if the guest may still follow. Such a record becomes `Verified` once the guest is
    /// observed to have followed.
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
    fn verdict_has_one_word_everywhere() {
        for verdict in Verdict::ALL {
            let json = serde_json::to_string(&verdict).unwrap();
            assert_eq!(json, format!("\"{verdict}\""));
            assert_eq!(verdict.as_str().parse(), Ok(verdict));
        }
        assert!("verified".parse::<Verdict>().is_err());
    }
}
