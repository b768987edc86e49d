//! The state of a domain at one time, from all sources.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Ost;
use crate::domain::{CallError, Domain, DomainState, IdSet, Job, PauseReason, Stats};
use crate::units::{Bytes, ParseError, Timestamp};

/// The state of a domain at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// The *start* of the observation: later changes may be missing. It decides what the observation
    /// proves.
    pub at: Timestamp,
    /// The times of the answers, for the record.
    #[serde(default)]
    pub answered: AnswerTimes,
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

/// The times at which the parts of an observation were received; `None` for a part that was not,
/// or in a journal of an older version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AnswerTimes {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub statistics: Option<Timestamp>,
    /// The answer of the guest agent, or the end of the wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<Timestamp>,
}

/// The result of asking the guest agent for its CPUs (`virDomainGetGuestVcpus`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Agent {
    /// There is no channel, or no agent is connected to it.
    NotAsked,
    /// The agent was to be asked and was not, with the reason: questions to other agents or of other
    /// clients to this one took too long, or libvirt failed. Says nothing about the guest.
    NotQueried(String),
    /// The agent did not answer, with libvirt's text.
    Silent(String),
    /// The agent answered with an error, with libvirt's text: the command is blocked or unknown.
    Refused(String),
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

impl Agent {
    /// Takes the result of asking an agent.
    pub fn from_call(result: Result<GuestVcpus, CallError>) -> Self {
        let error = match result {
            Ok(guest) => return Self::Answered(guest),
            Err(error) => error,
        };
        match error {
            CallError::AgentRefused { text, .. } => Self::Refused(text),
            CallError::AgentSilent { text, .. } => Self::Silent(text),
            // An agent that is asked answers, or is reported as silent, well before the deadline:
            // libvirt was waiting for another client's question to it.
            CallError::Overdue { after, .. } => {
                Self::NotQueried(format!("libvirt did not get to it within {after:?}"))
            }
            CallError::Busy { text, .. } => Self::NotQueried(text),
            error => Self::NotQueried(error.to_string()),
        }
    }
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
    /// Returns the time at which the live XML was received.
    pub fn live_at(&self) -> Timestamp {
        self.answered.live.unwrap_or(self.at)
    }

    /// Returns the time at which the statistics were received.
    pub fn statistics_at(&self) -> Timestamp {
        self.answered.statistics.unwrap_or_else(|| self.live_at())
    }

    /// Returns the time at which the guest agent answered.
    pub fn agent_at(&self) -> Timestamp {
        self.answered.agent.unwrap_or_else(|| self.live_at())
    }

    /// Returns the time of the last answer.
    pub fn ended(&self) -> Timestamp {
        self.live_at()
            .max(self.statistics_at())
            .max(self.agent_at())
    }

    pub fn guest(&self) -> Option<&GuestVcpus> {
        match &self.agent {
            Agent::Answered(guest) => Some(guest),
            Agent::NotAsked | Agent::NotQueried(_) | Agent::Silent(_) | Agent::Refused(_) => None,
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

    /// True if the domain is paused and libvirt reports no reason.
    pub(super) fn is_unexplained(&self) -> bool {
        self.domain.state == DomainState::Paused
            && self
                .reason
                .is_none_or(|reason| reason == PauseReason::Unknown)
    }

    /// Describes the wait for a domain that is paused for a while.
    pub(super) fn awaiting(&self) -> String {
        format!("the domain, {}, to run again", self.state())
    }

    /// Returns the guest's own total memory if its balloon driver reports it at present.
    pub fn guest_total(&self) -> Option<Bytes> {
        let report = self.memory_report()?;
        report.is_current.then_some(report.total)
    }

    /// Returns the last report of the balloon driver. Without a statistics period it may be as old
    /// as the guest: the driver reports once when it starts.
    pub(super) fn memory_report(&self) -> Option<MemoryReport> {
        let balloon = self.stats.as_ref()?.balloon;
        Some(MemoryReport {
            age: balloon.age(self.at)?,
            total: balloon.total?,
            usable: balloon.usable,
            updated: i64::try_from(balloon.updated?).ok()?,
            is_current: balloon.is_current(self.at, self.domain.balloon.stats_period),
        })
    }
}

/// The guest's memory, as its balloon driver reported it last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemoryReport {
    /// The guest's total.
    pub(super) total: Bytes,
    /// The memory that the guest can use without swapping; not every guest reports it.
    pub(super) usable: Option<Bytes>,
    /// Seconds since 1970.
    pub(super) updated: i64,
    /// The age at the time of the observation.
    pub(super) age: Duration,
    /// False if the next report is overdue.
    pub(super) is_current: bool,
}

impl MemoryReport {
    /// Returns what the guest cannot do without.
    pub(super) fn used(&self) -> Option<Bytes> {
        Some(self.total.saturating_sub(self.usable?))
    }
}

/// Facts that an observation of the domain does not show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Host {
    /// Memory that is free or used for caches only; `None` if unknown.
    pub available: Option<Bytes>,
    /// vCPUs that left the domain since its emulator started, as far as they were observed.
    pub released_vcpus: u32,
}
