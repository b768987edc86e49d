//! Calls to the hypervisor, as data.

use serde::{Deserialize, Serialize};

use super::{Infeasible, Observation, Verdict};
use crate::domain::{Domain, IdSet};
use crate::units::{Bytes, KiB};

/// The part of a domain that a change applies to.
///
/// Live only is the default, as in libvirt's own clients: a vCPU or a DIMM in the definition is
/// there at the next start, when nobody may have asked for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scope {
    /// The running domain. The change ends with it.
    #[default]
    Live,
    /// The running domain and its persistent definition.
    LiveAndConfig,
}

impl Scope {
    /// Returns the scope for the field `persistent` of a request.
    pub fn of(persistent: bool) -> Self {
        if persistent {
            Self::LiveAndConfig
        } else {
            Self::Live
        }
    }

    /// True if the definition is changed as well.
    pub fn persists(self) -> bool {
        self == Self::LiveAndConfig
    }
}

/// A call to the hypervisor. Each names the final state, so repeating it does no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// `virDomainSetVcpusFlags`. In the definition, added vCPUs become hotpluggable, so that they can
    /// be unplugged after the next start.
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
    /// `virDomainUpdateDeviceFlags` of a virtio-mem device, with another `<requested>`.
    ResizeVirtioMem {
        alias: String,
        requested: KiB,
        /// True if the persistent definition is changed as well.
        #[serde(default)]
        persist: bool,
    },
    /// `virDomainAttachDeviceFlags` of a DIMM.
    AttachDimm {
        /// The alias of the new DIMM, by which it is found again.
        alias: String,
        size: KiB,
        /// The NUMA cell of the DIMM; `None` in a guest without cells.
        node: Option<u32>,
        /// True if the persistent definition is changed as well.
        #[serde(default)]
        persist: bool,
    },
    /// `virDomainSetMemoryStatsPeriod`, live: how often the balloon driver reports the guest's
    /// memory. Only prepares the evidence: it changes no amount, and is put back after the verdict.
    SetStatsPeriod {
        /// Seconds; 0 means never.
        seconds: u32,
        /// The period before.
        was: u32,
    },
}

impl Action {
    /// True if the call changes what the guest has, and not only what is known about it.
    pub(super) fn changes_guest(&self) -> bool {
        !matches!(self, Self::SetStatsPeriod { .. })
    }

    /// Describes the call for people, if it only prepares evidence.
    pub fn describe(&self) -> Option<String> {
        match self {
            Self::SetStatsPeriod { seconds: 0, .. } => {
                Some("switch the balloon statistics off again".to_owned())
            }
            Self::SetStatsPeriod { seconds, .. } => Some(format!(
                "set the period of the balloon statistics to {seconds} s"
            )),
            _ => None,
        }
    }

    /// True if the live XML shows the final state.
    pub(super) fn is_shown(&self, seen: &Observation) -> bool {
        let memory = &seen.domain.memory;
        match self {
            Self::SetVcpus { count, .. } => seen.domain.vcpus.plugged() == *count,
            Self::ResizeVirtioMem {
                alias, requested, ..
            } => memory
                .device(alias)
                .is_some_and(|device| device.asked() == Bytes::from(*requested)),
            Self::AttachDimm { alias, .. } => memory.device(alias).is_some(),
            Self::SetStatsPeriod { seconds, .. } => {
                seen.domain.balloon.stats_period.unwrap_or(0) == *seconds
            }
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
            Self::OnlineVcpus { .. } | Self::SetStatsPeriod { .. } => true,
        }
    }

    /// True if the call changes the persistent definition as well.
    pub(super) fn persists(&self) -> bool {
        match self {
            Self::SetVcpus { persist, .. }
            | Self::ResizeVirtioMem { persist, .. }
            | Self::AttachDimm { persist, .. } => *persist,
            Self::OnlineVcpus { .. } | Self::SetStatsPeriod { .. } => false,
        }
    }

    /// True if the call asks the guest to release something.
    pub(super) fn is_unplug(&self, before: &Observation) -> bool {
        match self {
            Self::SetVcpus { count, .. } => *count < before.domain.vcpus.plugged(),
            Self::ResizeVirtioMem {
                alias, requested, ..
            } => {
                let device = before.domain.memory.device(alias);
                device.is_some_and(|device| Bytes::from(*requested) < device.asked())
            }
            Self::OnlineVcpus { .. } | Self::AttachDimm { .. } | Self::SetStatsPeriod { .. } => {
                false
            }
        }
    }
}

/// The calls for a request, in order. Empty if the hypervisor has what is requested.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub actions: Vec<Action>,
}

impl Plan {
    /// Returns the plan with every call in this scope.
    pub(super) fn in_scope(mut self, scope: Scope) -> Self {
        for action in &mut self.actions {
            match action {
                Action::SetVcpus { persist, .. }
                | Action::ResizeVirtioMem { persist, .. }
                | Action::AttachDimm { persist, .. } => *persist = scope.persists(),
                Action::OnlineVcpus { .. } | Action::SetStatsPeriod { .. } => {}
            }
        }
        self
    }
}

/// The result of checking a request before anything is changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Preflight {
    Ready(Plan),
    /// A job holds the domain: observe again later, and end with `Busy` at the deadline. Carries
    /// the awaited thing, for people.
    Blocked(String),
    /// The domain is paused and libvirt has no reason yet, as for a moment at the start and the end
    /// of a job: observe again, and reject the request only if that stays so.
    Unexplained(Rejection),
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
    /// A launcher's domain, which KubeVirt moves to another node.
    #[error("KubeVirt is migrating the domain: ask again on the node where it runs afterwards")]
    Migrating,
}

impl Rejection {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::NotRunning(..) => Verdict::DomainNotRunning,
            Self::Infeasible(_) => Verdict::Infeasible,
            Self::Migrating => Verdict::Busy,
        }
    }
}
