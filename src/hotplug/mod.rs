//! Verified hotplug: requests, observations, and the verdicts that they prove. Pure.
//!
//! ```text
//!  observe ──> preflight ──> call ──> wait ──> verdict ──> follow-up
//!     ^            │          ^         │         │            │
//!     └─ Blocked ──┤          └─ next ──┤         └─ may change┘
//!                  └─ Rejected          └─ event, observation, returned call, deadline
//! ```
//!
//! * **observe**: the caller reads the domain into an [`Observation`].
//! * **preflight**: [`preflight`] turns request and observation into a [`Plan`], rejects the
//!   request, or returns [`Preflight::Blocked`] while a job holds the domain.
//! * **call, wait**: [`judge`] reads the [`History`] and returns the next [`Step`]: make a call,
//!   wait, or finish with an [`Outcome`]. The caller appends every event, observation and returned
//!   call to the history and judges again.
//! * **verdict**: [`Step::Done`]. `Verified` needs the *last* observation to show everything that
//!   was requested.
//! * **follow-up**: a verdict that [may change](Verdict::may_change) is judged again with later
//!   observations. [`settle`] returns the only call that is allowed then.
//!
//! # Ownership
//! The caller (the executor) owns the history, the clock and the calls. This module owns every
//! decision, and decides by the history alone, so an operation can be judged again after a restart.
//! `vcpus` and `memory` own the rules of one kind of resource behind [`resource::Resource`], with
//! the same five files each: `preflight` (limits and plan), `evidence` (facts in the history),
//! `verdict` (what they prove), `diagnosis` (cause and remedy) and `timeline` (evidence for
//! people). `lifecycle` owns the rules that no kind can change: ended domains, failed calls, lost
//! answers.
//!
//! # Blocking
//! Nothing blocks: every function returns at once, without IO, clock, log or thread.
//!
//! # Failures
//! No single source is trusted. libvirt reports success once QEMU has been asked, and a timeout for
//! an unplug that was carried out; a guest that drops a CPU reports success through ACPI.
//!
//! A call whose answer was lost may have been carried out, may still be running, or may never have
//! reached libvirt. libvirt serves requests in the order of their arrival, so two observations that
//! were started after the loss show what became of the call. If the domain is then unchanged, the
//! call is repeated: every call names the final state, so a late duplicate changes nothing. If
//! something else changed the domain, the call is not repeated.

mod amount;
mod event;
mod evidence;
mod history;
mod infeasible;
mod kind;
mod lifecycle;
#[cfg(test)]
mod lifecycle_tests;
mod memory;
#[cfg(test)]
mod memory_tests;
mod observation;
mod outcome;
mod plan;
#[cfg(test)]
mod property_tests;
mod request;
mod resource;
#[cfg(test)]
mod simulation;
mod timeline;
#[cfg(test)]
mod unplug_tests;
mod vcpus;
#[cfg(test)]
mod vcpus_tests;
mod verdict;

pub use amount::Amount;
pub use event::{AcpiAnswer, Event, NotAnEvent, Ost, SlotKind};
pub use evidence::{Evidence, Source};
pub use history::{Call, Contact, History, Return};
pub use infeasible::Infeasible;
pub use kind::{ResourceKind, Wanted};
pub use observation::{Agent, GuestVcpus, Host, Observation};
pub use outcome::{Diagnosis, Outcome, Step};
pub use plan::{Action, Plan, Preflight, Rejection};
pub use request::{HotplugRequest, Patience, Require, Terms};
pub use verdict::Verdict;

use memory::MemoryResource;
use outcome::{Conclusion, Ruling};
use resource::Resource;
use vcpus::VcpuResource;

use crate::domain::PauseReason;
use crate::units::Timestamp;

/// Returns the resource of a request: the only match on its kind.
fn resource_of(request: &HotplugRequest) -> Box<dyn Resource> {
    match *request {
        HotplugRequest::Vcpus { count, online } => Box::new(VcpuResource { count, online }),
        HotplugRequest::Memory { size } => Box::new(MemoryResource { size }),
    }
}

impl HotplugRequest {
    pub fn kind(&self) -> ResourceKind {
        resource_of(self).kind()
    }

    /// Returns the requested amount.
    pub fn amount(&self) -> Amount {
        resource_of(self).requested()
    }

    /// Returns the amount of the requested resource that the domain has.
    pub fn amount_of(&self, seen: &Observation) -> Amount {
        resource_of(self).amount(seen)
    }

    /// Returns the evidence that costs calls of its own.
    pub fn wanted(&self) -> Wanted {
        resource_of(self).wanted()
    }
}

/// Plans a request for the domain as it is observed.
///
/// Limits come first: a request that can never be carried out is rejected even while a job holds
/// the domain.
pub fn preflight(request: &HotplugRequest, seen: &Observation, host: &Host) -> Preflight {
    let state = seen.domain.state;
    let not_running = || Preflight::Rejected(Rejection::NotRunning(seen.state(), seen.remedy()));
    if !state.is_active() {
        return not_running();
    }
    let plan = match resource_of(request).preflight(seen, host) {
        Ok(plan) => plan,
        Err(limit) => return Preflight::Rejected(limit.into()),
    };
    match seen.job {
        Some(job) if job.holds_changes() && !plan.actions.is_empty() => {
            Preflight::Blocked(format!("{job} to end"))
        }
        _ if state.runs() => Preflight::Ready(plan),
        // Many jobs pause the domain, and end a moment before the domain resumes.
        _ if seen.reason.is_some_and(PauseReason::ends_by_itself) => {
            Preflight::Blocked(seen.awaiting())
        }
        _ => not_running(),
    }
}

/// Returns the next step. `now` must not be earlier than anything in the history.
///
/// After a verdict that [may change](Verdict::may_change), call it again with later observations:
/// an answer of `Verified` corrects the record.
pub fn judge(history: &History, now: Timestamp) -> Step {
    let finding = match rule(history, now) {
        Ruling::Call(action) => return Step::Call(action),
        Ruling::Conclude(finding) => finding,
        Ruling::Wait { awaiting, until } if !history.is_over(now) => {
            let deadline = history.terms.deadline;
            let until = until.map_or(deadline, |until| until.min(deadline));
            return Step::Wait { awaiting, until };
        }
        Ruling::Wait { awaiting, .. } => Conclusion::new(
            Verdict::Pending,
            format!("the deadline passed while waiting for {awaiting}"),
        ),
    };
    let resource = resource_of(&history.request);
    Step::Done(Box::new(Outcome {
        verdict: finding.verdict,
        message: finding.message,
        before: resource.amount(&history.before),
        requested: resource.requested(),
        after: resource.amount(history.latest()),
        evidence: resource.timeline(history),
        hypervisor_error: history.last_error(),
        diagnosis: finding.diagnosis,
    }))
}

/// Returns the call to make after the verdict of an operation that is still followed: only one
/// that makes libvirt agree with what the guest and QEMU are known to have done.
pub fn settle(history: &History) -> Option<Action> {
    resource_of(&history.request).settle(history)
}

fn rule(history: &History, now: Timestamp) -> Ruling {
    if let Some(end) = lifecycle::ended(history) {
        return Ruling::Conclude(end);
    }
    let resource = resource_of(&history.request);
    if let Some(ruling) = lifecycle::after_call(history, now, resource.is_reached(history)) {
        return ruling;
    }
    let Some(action) = history
        .next_planned()
        .filter(|_| history.running_call().is_none())
    else {
        return resource.judge(history, now);
    };
    if !history.is_over(now) {
        return Ruling::Call(action.clone());
    }
    let message = if history.calls().is_empty() {
        "the deadline passed before the first call to the hypervisor: nothing was changed"
    } else {
        "the deadline passed before the remaining calls to the hypervisor"
    };
    Ruling::Conclude(Conclusion::new(Verdict::Busy, message))
}
