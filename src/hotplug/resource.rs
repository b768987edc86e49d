//! The seam for kinds of resources.
//!
//! The engine, the executor, the metrics, the API and the command line reach a kind of resource
//! only through [`Resource`], [`ResourceKind`] and [`Amount`]. To add a kind, add a
//! folder with the same five files as `vcpus` and `memory`, a variant to [`HotplugRequest`](super::HotplugRequest),
//! [`ResourceKind`] and `Amount`, and the arm in [`super::resource_of`].

use super::kind::{ResourceKind, Wanted};
use super::outcome::{Conclusion, Ruling};
use super::{Action, Amount, Evidence, History, Host, Infeasible, Observation, Plan, Scope};
use crate::units::Timestamp;

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
    fn preflight(&self, seen: &Observation, host: &Host, scope: Scope) -> Result<Plan, Infeasible>;

    /// Decides before the first change of the guest: a call that prepares the evidence, the wait for
    /// its effect, or a limit that only this evidence shows.
    fn prepare(&self, _: &History, _: Timestamp) -> Option<Ruling> {
        None
    }

    /// Adds what is known about the cause to a finding.
    fn explain(&self, _: &History, finding: Conclusion) -> Conclusion {
        finding
    }

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
