//! What is to be called, as data.

use serde::{Deserialize, Serialize};

use super::{Infeasible, Observation, Verdict};
use crate::domain::{Domain, IdSet};
use crate::units::{Bytes, KiB};

/// One call to the hypervisor. Every one names what is wanted in the end, so that making it twice
/// does no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// `virDomainSetVcpusFlags`, live.
    SetVcpus {
        /// How many there are to be.
        count: u32,
        /// Whether the lasting definition is to say so too.
        persist: bool,
    },
    /// `virDomainSetGuestVcpus`: bring CPUs online through the agent.
    OnlineVcpus {
        /// Which, by the guest's numbers.
        ids: IdSet,
    },
    /// `virDomainUpdateDeviceFlags` of a virtio-mem device, live, with another `<requested>`.
    ResizeVirtioMem {
        /// The device.
        alias: String,
        /// What the guest is to have of it.
        requested: KiB,
    },
    /// `virDomainAttachDeviceFlags` of a DIMM, live.
    AttachDimm {
        /// The alias to give it, so that it is known again.
        alias: String,
        /// Its size.
        size: KiB,
        /// The guest's NUMA cell that it belongs to; `None` in a guest without cells.
        node: Option<u32>,
    },
}

impl Action {
    /// Whether the live XML shows it done.
    pub(super) fn is_shown(&self, seen: &Observation) -> bool {
        let memory = &seen.domain.memory;
        match self {
            Self::SetVcpus { count, .. } => seen.domain.vcpus.plugged() == *count,
            Self::ResizeVirtioMem { alias, requested } => memory
                .device(alias)
                .is_some_and(|device| device.asked() == Bytes::from(*requested)),
            Self::AttachDimm { alias, .. } => memory.device(alias).is_some(),
            // The guest's agent tells, and nothing else.
            Self::OnlineVcpus { .. } => false,
        }
    }

    /// Whether what it changes is as it was before, or on the way from there to what is asked for:
    /// then making it again does nothing that was not asked for.
    pub(super) fn is_open(&self, before: &Observation, seen: &Observation) -> bool {
        let (had, has) = (&before.domain, &seen.domain);
        match self {
            Self::SetVcpus { count, .. } => {
                let (from, now) = (had.vcpus.plugged(), has.vcpus.plugged());
                now != *count && (from.min(*count)..=from.max(*count)).contains(&now)
            }
            Self::ResizeVirtioMem { alias, .. } => {
                let asked = |domain: &Domain| Some(domain.memory.device(alias)?.asked());
                asked(has).is_some() && asked(has) == asked(had)
            }
            Self::AttachDimm { alias, .. } => {
                has.memory.device(alias).is_none() && has.memory.asked() == had.memory.asked()
            }
            Self::OnlineVcpus { .. } => true,
        }
    }

    /// Whether it asks the guest to give something back.
    pub(super) fn is_unplug(&self, before: &Observation) -> bool {
        match self {
            Self::SetVcpus { count, .. } => *count < before.domain.vcpus.plugged(),
            Self::ResizeVirtioMem { alias, requested } => {
                let device = before.domain.memory.device(alias);
                device.is_some_and(|device| Bytes::from(*requested) < device.asked())
            }
            Self::OnlineVcpus { .. } | Self::AttachDimm { .. } => false,
        }
    }
}

/// What is to be called for a request, in order; nothing if the target is met already.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The calls.
    pub actions: Vec<Action>,
}

/// What comes of looking at a request before anything is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preflight {
    /// It can be done, by this plan.
    Ready(Plan),
    /// It cannot be done as long as something else is being done to the domain: look again later,
    /// and say `Busy` at the deadline. What is awaited, for people.
    Blocked(String),
    /// It cannot be done. Nothing was changed.
    Rejected(Rejection),
}

/// Why a request cannot be done at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The domain does not run: its state with the reason, and what to do.
    #[error("the domain is {0}: {1}")]
    NotRunning(String, &'static str),
    /// A limit.
    #[error(transparent)]
    Infeasible(#[from] Infeasible),
}

impl Rejection {
    /// The verdict that it comes to.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::NotRunning(..) => Verdict::DomainNotRunning,
            Self::Infeasible(_) => Verdict::Infeasible,
        }
    }
}
