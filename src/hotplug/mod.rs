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
//! * **preparation**: before the first change of the guest a resource may switch a source of evidence
//!   on. [`put_back`] returns the call that undoes it, which the caller makes before it reports the
//!   verdict.
//! * **follow-up**: a verdict that [may change](Verdict::may_change) is judged again with later
//!   observations. [`settle`] returns the only call that is allowed then.
//!
//! # Ownership
//! The caller (the executor) owns the history, the clock and the calls. This module owns every
//! decision, and decides by the history alone, so an operation can be judged again after a restart.
//! `vcpus` and `memory` own the rules of one kind of resource behind [`resource::Resource`], with
//! the same five files each (memory has `prepare` besides): `preflight` (limits and plan),
//! `evidence` (facts in the history), `verdict` (what they prove), `diagnosis` (cause and remedy)
//! and `timeline` (evidence for people). `lifecycle` owns the rules that no kind can change: ended
//! domains, failed calls, lost answers.
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
pub mod external;
#[cfg(test)]
mod external_property_tests;
#[cfg(test)]
mod external_tests;
mod history;
mod infeasible;
mod kind;
mod launcher;
#[cfg(test)]
mod launcher_tests;
mod lifecycle;
#[cfg(test)]
mod lifecycle_tests;
mod memory;
#[cfg(test)]
mod memory_proof_tests;
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
mod truth_tests;
#[cfg(test)]
mod unplug_tests;
mod vcpus;
#[cfg(test)]
mod vcpus_tests;
mod verdict;

pub use amount::Amount;
pub use event::{AcpiAnswer, Event, NotAnEvent, Ost, SlotKind};
pub use evidence::{Evidence, Source};
pub use history::{Call, Contact, Earlier, History, Return};
pub use infeasible::Infeasible;
pub use kind::{ResourceKind, Wanted};
pub use launcher::{LauncherRight, check_launcher};
pub use observation::{Agent, AnswerTimes, GuestVcpus, Host, Observation};
pub use outcome::{AGENT_SETTINGS, Diagnosis, Outcome, Step};
pub use plan::{Action, Plan, Preflight, Rejection, Scope};
pub use request::{HotplugRequest, Patience, Require, Terms};
pub use vcpus::VcpuLife;
pub use verdict::Verdict;

pub use memory::attachable_memory;

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
        HotplugRequest::Memory { size, force } => Box::new(MemoryResource { size, force }),
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
pub fn preflight(
    request: &HotplugRequest,
    scope: Scope,
    seen: &Observation,
    host: &Host,
) -> Preflight {
    let state = seen.domain.state;
    let not_running = || Preflight::Rejected(Rejection::NotRunning(seen.state(), seen.remedy()));
    if !state.is_active() {
        return not_running();
    }
    if scope.persists() && !seen.persistent {
        return Preflight::Rejected(Infeasible::NoDefinition.into());
    }
    let plan = match resource_of(request).preflight(seen, host, scope) {
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
        _ if seen.is_unexplained() => {
            Preflight::Unexplained(Rejection::NotRunning(seen.state(), seen.remedy()))
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
    let finding = resource.explain(history, finding);
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

/// Returns the call that puts back, after the verdict, what was changed only to obtain evidence.
pub fn put_back(history: &History) -> Option<Action> {
    let (call, seconds, was) = history.calls().iter().find_map(|call| match call.action {
        Action::SetStatsPeriod { seconds, was } => Some((call, seconds, was)),
        _ => None,
    })?;
    // Another client may have changed it again.
    let latest = history.latest();
    let is_seen = latest.at >= call.started && call.returned.is_some();
    let failed = call.error().is_some_and(|error| !error.is_lost());
    let is_ours = if is_seen {
        call.action.is_shown(latest)
    } else {
        !failed
    };
    let was_put_back = history.calls().iter().any(|call| {
        call.action
            == Action::SetStatsPeriod {
                seconds: was,
                was: seconds,
            }
    });
    (is_ours && !was_put_back).then_some(Action::SetStatsPeriod {
        seconds: was,
        was: seconds,
    })
}

fn rule(history: &History, now: Timestamp) -> Ruling {
    if let Some(end) = lifecycle::ended(history) {
        return Ruling::Conclude(end);
    }
    let resource = resource_of(&history.request);
    if let Some(ruling) = lifecycle::after_call(history, now, resource.is_reached(history)) {
        return ruling;
    }
    let prepares =
        history.changes().next().is_none() && !history.is_over(now) && !history.by_another;
    if let Some(ruling) = resource.prepare(history, now).filter(|_| prepares) {
        return ruling;
    }
    let mut changes = history.changes();
    let Some(action) = history
        .next_planned()
        .filter(|_| !changes.next_back().is_some_and(Call::is_running))
    else {
        return lifecycle::with_definition(history, resource.judge(history, now), now);
    };
    if !history.is_over(now) {
        return Ruling::Call(action.clone());
    }
    let message = if history.changes().next().is_none() {
        "the deadline passed before the first call to the hypervisor: nothing was changed"
    } else {
        "the deadline passed before the remaining calls to the hypervisor"
    };
    Ruling::Conclude(Conclusion::new(Verdict::Busy, message))
}
