//! The kinds of resources.

use std::fmt;

/// The kinds of resources that can be plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResourceKind {
    Vcpus,
    Memory,
}

impl ResourceKind {
    pub const ALL: [Self; 2] = [Self::Vcpus, Self::Memory];

    /// Returns the word of the metrics, the API's routes and the journal.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
        }
    }

    /// Returns the word for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Vcpus => "vCPUs",
            Self::Memory => "memory",
        }
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Evidence that costs a call of its own and that not every kind needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The guest agent's list of CPUs.
    pub guest_cpus: bool,
    /// The memory that is available on the node.
    pub host_memory: bool,
}
