//! The state of a domain.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A domain's state (`virDomainState`, libvirt-domain.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    Running,
    /// Xen only: waits for a resource, but can run.
    Blocked,
    Paused,
    /// The guest is shutting down and still runs.
    ShuttingDown,
    ShutOff,
    /// The guest crashed; its memory is kept for inspection.
    Crashed,
    /// The guest suspended itself to memory.
    Suspended,
    /// Not reported by libvirt, or newer than this list.
    Unknown,
}

impl DomainState {
    /// Converts libvirt's number.
    pub fn from_libvirt(number: u32) -> Self {
        match number {
            1 => Self::Running,
            2 => Self::Blocked,
            3 => Self::Paused,
            4 => Self::ShuttingDown,
            5 => Self::ShutOff,
            6 => Self::Crashed,
            7 => Self::Suspended,
            _ => Self::Unknown,
        }
    }

    /// True if the guest's vCPUs execute, so that it can react to anything.
    pub fn runs(self) -> bool {
        matches!(self, Self::Running | Self::Blocked | Self::ShuttingDown)
    }

    /// True if the domain has an emulator process, running or paused.
    pub fn is_active(self) -> bool {
        !matches!(self, Self::ShutOff)
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting down",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended to memory",
            Self::Unknown => "in an unknown state",
        })
    }
}
