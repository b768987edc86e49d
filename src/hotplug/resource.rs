//! The seam for kinds of resources.
//!
//! The engine, the executor, the metrics, the API and the command line reach a kind of resource
//! only through [`Resource`], [`ResourceKind`] and [`Amount`](super::Amount). To add a kind, add a
//! folder with the same five files as `vcpus` and `memory`, a variant to [`HotplugRequest`],
//! [`ResourceKind`] and `Amount`, and the arm in [`resource`].

use std::fmt;

use super::memory::MemoryResource;
use super::outcome::Ruling;
use super::vcpus::VcpuResource;
use super::{
    Action, Amount, Evidence, History, Host, HotplugRequest, Infeasible, Observation, Plan,
};
use crate::units::Timestamp;

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

/// A request for one kind of resource: its limits, its evidence and the rules of its verdict.
pub(super) trait Resource {
    fn kind(&self) -> ResourceKind;

    fn wanted(&self) -> Wanted;

    /// Returns the requested amount.
    fn requested(&self) -> Amount;

    /// Returns the amount that the domain has.
    fn amount(&self, seen: &Observation) -> Amount;

    /// Plans the calls. An empty plan means that the hypervisor has what is requested.
    ///
    /// # Errors
    /// The first limit that rules the request out.
    fn preflight(&self, seen: &Observation, host: &Host) -> Result<Plan, Infeasible>;

    /// True if the live XML shows what is requested.
    fn is_reached(&self, history: &History) -> bool;

    /// Decides the next step once the calls of the plan were made.
    fn judge(&self, history: &History, now: Timestamp) -> Ruling;

    /// Returns the call that makes the hypervisor agree, after the verdict, with what the guest is
    /// known to have done. It must not ask the guest for anything.
    fn settle(&self, _: &History) -> Option<Action> {
        None
    }

    /// Returns the evidence in order of time.
    fn timeline(&self, history: &History) -> Vec<Evidence>;
}

/// Returns the resource of a request: the only match on its kind.
pub(super) fn resource(request: &HotplugRequest) -> Box<dyn Resource> {
    match *request {
        HotplugRequest::Vcpus { count, online } => Box::new(VcpuResource { count, online }),
        HotplugRequest::Memory { size } => Box::new(MemoryResource { size }),
    }
}
