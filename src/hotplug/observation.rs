//! What was seen of a domain at one time, from all sides.

use serde::{Deserialize, Serialize};

use super::Ost;
use crate::domain::{Domain, DomainState, IdSet, Job, PauseReason, Stats};
use crate::units::{Bytes, ParseError, Timestamp};

/// A domain as seen at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// When the looking *began*: whatever happened later may not be in it.
    pub at: Timestamp,
    /// The live XML's facts and libvirt's state.
    pub domain: Domain,
    /// Why it does not run, if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<PauseReason>,
    /// Whether the domain has a definition that outlives it.
    pub persistent: bool,
    /// The bulk statistics; `None` if they could not be had.
    pub stats: Option<Stats>,
    /// What the guest agent said.
    pub agent: Agent,
    /// What else is being done to the domain, such as a migration.
    pub job: Option<Job>,
    /// The guest's last answers through ACPI as QEMU remembers them; `None` if it was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Vec<Ost>>,
}

/// What came of asking the guest agent for its vCPUs (`virDomainGetGuestVcpus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Agent {
    /// It was not asked: there is no channel, or nobody at its end.
    NotAsked,
    /// It was asked and did not answer, with libvirt's words.
    Silent(String),
    /// It answered.
    Answered(GuestVcpus),
}

/// The guest's own view of its CPUs. The numbers are the guest's: they need not be libvirt's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestVcpus {
    /// Those that it has.
    pub vcpus: IdSet,
    /// Those that it uses.
    pub online: IdSet,
}

impl GuestVcpus {
    /// From the parameters `vcpus` and `online` of `virDomainGetGuestVcpus`.
    ///
    /// # Errors
    /// A text that is not a list of CPUs.
    pub fn from_libvirt(vcpus: &str, online: &str) -> Result<Self, ParseError> {
        Ok(Self {
            vcpus: vcpus.parse()?,
            online: online.parse()?,
        })
    }

    /// Those that it has and does not use.
    pub fn offline(&self) -> IdSet {
        self.vcpus.without(&self.online)
    }
}

impl Observation {
    /// The agent's answer, if there was one.
    pub fn guest(&self) -> Option<&GuestVcpus> {
        match &self.agent {
            Agent::Answered(guest) => Some(guest),
            Agent::NotAsked | Agent::Silent(_) => None,
        }
    }

    /// The domain's state with the reason for it: "paused by a user".
    pub(super) fn state(&self) -> String {
        let state = self.domain.state;
        match self.reason {
            Some(reason) => format!("{state} {reason}"),
            None => state.to_string(),
        }
    }

    /// What lets the guest run that does not.
    pub(super) fn remedy(&self) -> &'static str {
        match (self.reason, self.domain.state) {
            (Some(reason), _) => reason.remedy(),
            (None, DomainState::ShutOff) => "start it",
            (None, DomainState::Crashed) => "start it anew",
            (None, DomainState::Suspended) => "wake it up first (virsh dompmwakeup)",
            (None, _) => "resume it first",
        }
    }

    /// What is awaited of a guest that is held for a while.
    pub(super) fn awaiting(&self) -> String {
        format!("the domain, {}, to run again", self.state())
    }

    /// What the guest sees of memory in all, if the balloon's driver ever told.
    pub fn guest_total(&self) -> Option<Bytes> {
        let balloon = self.stats.as_ref()?.balloon;
        balloon.updated.filter(|updated| *updated > 0)?;
        balloon.total
    }
}

/// What is known of the machine that the domain runs on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Host {
    /// What can be given out: free, and used for caches only. `None` if it is not known.
    pub available: Option<Bytes>,
}
