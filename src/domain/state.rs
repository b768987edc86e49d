//! What state a domain is in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A domain's state (`virDomainState`, libvirt-domain.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// It runs.
    Running,
    /// It waits for a resource; it can run. Xen's word, QEMU never says so.
    Blocked,
    /// It is held by a person, a migration, an I/O error …
    Paused,
    /// The guest is being shut down and still runs.
    ShuttingDown,
    /// It does not run.
    ShutOff,
    /// The guest crashed and is kept for inspection.
    Crashed,
    /// The guest suspended itself to memory.
    Suspended,
    /// libvirt said none, or one newer than this list.
    Unknown,
}

impl DomainState {
    /// From libvirt's number.
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

    /// Whether the guest's processors are being run, so that it can answer at all.
    pub fn runs(self) -> bool {
        matches!(self, Self::Running | Self::Blocked | Self::ShuttingDown)
    }

    /// Whether there is an emulator for it, running or held.
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
