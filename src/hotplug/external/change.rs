//! The record of one change by another client.

use serde::{Deserialize, Serialize};

use crate::hotplug::{Amount, Diagnosis, Evidence, Outcome, ResourceKind, Verdict};
use crate::units::{Timestamp, bounded, words};

/// Maximum size of a text in bytes of JSON, as in the record of an operation.
const MAX_TEXT: usize = 1200;

/// Identifies a change within the changes of one domain.
pub type ChangeNumber = u64;

words! {
    /// The resource that another client changed, as in the metrics and in JSON.
    #[derive(PartialOrd, Ord, Hash, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum ChangedResource {
        Vcpus = "vcpus",
        Memory = "memory",
        Disk = "disk",
        Interface = "interface",
    }
}

impl From<ResourceKind> for ChangedResource {
    fn from(kind: ResourceKind) -> Self {
        match kind {
            ResourceKind::Vcpus => Self::Vcpus,
            ResourceKind::Memory => Self::Memory,
        }
    }
}

words! {
    #[derive(PartialOrd, Ord, Hash, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum ExternalAction {
        Plug = "plug",
        Unplug = "unplug",
        Detach = "detach",
    }
}

impl ChangedResource {
    /// Returns the actions that are observed on the resource.
    pub fn actions(self) -> &'static [ExternalAction] {
        match self {
            Self::Vcpus | Self::Memory => &[ExternalAction::Plug, ExternalAction::Unplug],
            Self::Disk | Self::Interface => &[ExternalAction::Detach],
        }
    }
}

/// A change by another client, and the verdict. Its shape is a contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalChange {
    pub resource: ChangedResource,
    pub action: ExternalAction,
    /// The detached device: its target or hardware address. Untrusted text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Time at which the change was noticed.
    pub noticed: Timestamp,
    /// True if the domain was in this state when it was first seen: the time of the change is unknown.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub found: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// The time when the verdict became `Verified` because the guest followed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrected: Option<Timestamp>,
    /// The awaited thing, before the verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaiting: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Amount>,
    /// The amount that the hypervisor has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested: Option<Amount>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Amount>,
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

impl ExternalChange {
    pub(super) fn new(
        resource: ChangedResource,
        action: ExternalAction,
        noticed: Timestamp,
        found: bool,
    ) -> Self {
        Self {
            resource,
            action,
            device: None,
            noticed,
            found,
            finished: None,
            corrected: None,
            awaiting: None,
            verdict: None,
            message: None,
            before: None,
            requested: None,
            after: None,
            evidence: Vec::new(),
            diagnosis: None,
        }
    }

    /// True if the verdict says that the guest has not taken the change, or not all of it.
    pub fn is_not_taken(&self) -> bool {
        matches!(
            self.verdict,
            Some(
                Verdict::PartiallyApplied
                    | Verdict::GuestOffline
                    | Verdict::GuestRefused
                    | Verdict::GuestSilent
                    | Verdict::Pending
            )
        )
    }

    /// Sets the verdict. A second one corrects the first.
    pub(super) fn conclude(
        &mut self,
        verdict: Verdict,
        message: &str,
        evidence: Vec<Evidence>,
        diagnosis: Option<Diagnosis>,
        now: Timestamp,
    ) {
        match self.finished {
            None => self.finished = Some(now),
            Some(_) => self.corrected = Some(now),
        }
        self.awaiting = None;
        self.verdict = Some(verdict);
        self.message = Some(bounded(message, MAX_TEXT));
        self.evidence = evidence;
        self.diagnosis = diagnosis.map(|diagnosis| Diagnosis {
            code: diagnosis.code,
            seen: bounded(&diagnosis.seen, MAX_TEXT),
            remedy: bounded(&diagnosis.remedy, MAX_TEXT),
        });
    }

    pub(super) fn conclude_outcome(&mut self, outcome: Outcome, now: Timestamp) {
        self.before = Some(outcome.before);
        self.requested = Some(outcome.requested);
        self.after = Some(outcome.after);
        let (message, evidence) = (outcome.message, outcome.evidence);
        self.conclude(outcome.verdict, &message, evidence, outcome.diagnosis, now);
    }
}
