//! The state of a domain at one time, from all sources.

use serde::{Deserialize, Serialize};

use super::Ost;
use crate::domain::{Domain, DomainState, IdSet, Job, PauseReason, Stats};
use crate::units::{Bytes, ParseError, Timestamp};

/// The state of a domain at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// The *start* of the observation: later changes may be missing.
    pub at: Timestamp,
    pub domain: Domain,
    /// The reason why the domain is not running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<PauseReason>,
    /// True if the domain has a definition that outlives it.
    pub persistent: bool,
    /// The bulk statistics; `None` if libvirt did not return them.
    pub stats: Option<Stats>,
    pub agent: Agent,
    /// The job on the domain, such as a migration.
    pub job: Option<Job>,
    /// The guest's last answers through ACPI that QEMU remembers; `None` if QEMU was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Vec<Ost>>,
}

/// The result of asking the guest agent for its CPUs (`virDomainGetGuestVcpus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Agent {
    /// There is no channel, or no agent is connected to it.
    NotAsked,
    /// The agent did not answer, with libvirt's text.
    Silent(String),
    Answered(GuestVcpus),
}

/// The guest's own view of its CPUs, in the guest's numbering, which may differ from libvirt's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestVcpus {
    /// CPUs that the guest has.
    pub vcpus: IdSet,
    /// CPUs that the guest uses.
    pub online: IdSet,
}

impl GuestVcpus {
    /// Parses the parameters `vcpus` and `online` of `virDomainGetGuestVcpus`.
    ///
    /// # Errors
    /// A text that is not a list of CPUs.
    pub fn from_libvirt(vcpus: &str, online: &str) -> Result<Self, ParseError> {
        Ok(Self {
            vcpus: vcpus.parse()?,
            online: online.parse()?,
        })
    }

    /// Returns the CPUs that the guest has and does not use.
    pub fn offline(&self) -> IdSet {
        self.vcpus.without(&self.online)
    }
}

impl Observation {
    pub fn guest(&self) -> Option<&GuestVcpus> {
        match &self.agent {
            Agent::Answered(guest) => Some(guest),
            Agent::NotAsked | Agent::Silent(_) => None,
        }
    }

    /// Returns the domain's state and its reason: "paused by a user".
    pub(super) fn state(&self) -> String {
        let state = self.domain.state;
        match self.reason {
            Some(reason) => format!("{state} {reason}"),
            None => state.to_string(),
        }
    }

    /// Returns the remedy that makes a stopped domain run.
    pub(super) fn remedy(&self) -> &'static str {
        match (self.reason, self.domain.state) {
            (Some(reason), _) => reason.remedy(),
            (None, DomainState::ShutOff) => "start it",
            (None, DomainState::Crashed) => "start it again",
            (None, DomainState::Suspended) => "wake it up first (virsh dompmwakeup)",
            (None, _) => "resume it first",
        }
    }

    /// Describes the wait for a domain that is paused for a while.
    pub(super) fn awaiting(&self) -> String {
        format!("the domain, {}, to run again", self.state())
    }

    /// Returns the guest's own total memory if the balloon driver has ever reported it.
    pub fn guest_total(&self) -> Option<Bytes> {
        let balloon = self.stats.as_ref()?.balloon;
        balloon.updated.filter(|updated| *updated > 0)?;
        balloon.total
    }
}

/// Facts about the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Host {
    /// Memory that is free or used for caches only; `None` if unknown.
    pub available: Option<Bytes>,
}
