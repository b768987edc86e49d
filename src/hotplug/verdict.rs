//! The verdicts: a closed list, with the same words everywhere.

use serde::Deserialize;

use crate::units::words;

words! {
    /// The result of an operation. The words are a contract: the command line, the API, the objects'
    /// conditions and the metrics use them.
    #[derive(PartialOrd, Ord, Hash, Deserialize)]
    pub enum Verdict {
        /// The request is proven at the required level.
        Verified = "Verified",
        /// The guest took part of it.
        PartiallyApplied = "PartiallyApplied",
        /// The guest has it and does not use it.
        GuestOffline = "GuestOffline",
        /// The guest rejected it, or provably dropped it.
        GuestRefused = "GuestRefused",
        /// The hypervisor did its part, and the guest did not react before the deadline.
        GuestSilent = "GuestSilent",
        /// The hypervisor did its part, and the domain has no source of evidence at the required level.
        Unverifiable = "Unverifiable",
        /// The request is still outstanding in the hypervisor at the deadline. A later completion
        /// changes the record.
        Pending = "Pending",
        /// A limit ruled the request out. Nothing was changed.
        Infeasible = "Infeasible",
        /// Another job held the domain until the deadline.
        Busy = "Busy",
        DomainNotFound = "DomainNotFound",
        /// The domain is not running, or stopped during the operation.
        DomainNotRunning = "DomainNotRunning",
        /// The hypervisor reported an error.
        HypervisorError = "HypervisorError",
        HypervisorUnavailable = "HypervisorUnavailable",
    }
    else "is not a verdict"
}

impl Verdict {
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
