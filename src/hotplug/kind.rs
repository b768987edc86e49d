//! The kinds of resources.

use crate::units::words;

words! {
    /// The kinds of resources that can be plugged, as in the metrics, the API's routes and the journal.
    #[derive(Hash)]
    pub enum ResourceKind {
        Vcpus = "vcpus",
        Memory = "memory",
    }
}

impl ResourceKind {
    /// Returns the word for people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Vcpus => "vCPUs",
            Self::Memory => "memory",
        }
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
