//! Calls to the hypervisor, as data.

use serde::{Deserialize, Serialize};

use super::{Infeasible, Observation, Verdict};
use crate::domain::{Domain, IdSet};
use crate::units::{Bytes, KiB};

/// A call to the hypervisor. Each names the final state, so repeating it does no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// `virDomainSetVcpusFlags`, live.
    SetVcpus {
        count: u32,
        /// True if the persistent definition is changed as well.
        persist: bool,
    },
    /// `virDomainSetGuestVcpus`: brings CPUs online through the agent.
    OnlineVcpus {
        /// The guest's numbers of the CPUs.
        ids: IdSet,
    },
    /// `virDomainUpdateDeviceFlags` of a virtio-mem device, live, with another `<requested>`.
    ResizeVirtioMem { alias: String, requested: KiB },
    /// `virDomainAttachDeviceFlags` of a DIMM, live.
    AttachDimm {
        /// The alias of the new DIMM, by which it is found again.
        alias: String,
        size: KiB,
        /// The NUMA cell of the DIMM; `None` in a guest without cells.
        node: Option<u32>,
    },
}

impl Action {
    /// True if the live XML shows the final state.
    pub(super) fn is_shown(&self, seen: &Observation) -> bool {
        let memory = &seen.domain.memory;
        match self {
            Self::SetVcpus { count, .. } => seen.domain.vcpus.plugged() == *count,
            Self::ResizeVirtioMem { alias, requested } => memory
                .device(alias)
                .is_some_and(|device| device.asked() == Bytes::from(*requested)),
            Self::AttachDimm { alias, .. } => memory.device(alias).is_some(),
            // Only the guest agent reports this.
            Self::OnlineVcpus { .. } => false,
        }
    }

    /// True if the affected resource is unchanged or on its way from `before` to the final state.
    /// Then repeating the call causes nothing that was not requested.
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

    /// True if the call asks the guest to release something.
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

/// The calls for a request, in order. Empty if the hypervisor has what is requested.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub actions: Vec<Action>,
}

/// The result of checking a request before anything is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preflight {
    Ready(Plan),
    /// A job holds the domain: observe again later, and end with `Busy` at the deadline. Carries
    /// the awaited thing, for people.
    Blocked(String),
    Rejected(Rejection),
}

/// The reason why a request is rejected. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The domain is not running: its state and the remedy.
    #[error("the domain is {0}: {1}")]
    NotRunning(String, &'static str),
    #[error(transparent)]
    Infeasible(#[from] Infeasible),
}

impl Rejection {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::NotRunning(..) => Verdict::DomainNotRunning,
            Self::Infeasible(_) => Verdict::Infeasible,
        }
    }
}
