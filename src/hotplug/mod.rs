//! Verified hotplug: what is asked for, what is seen, and what that proves. Pure.
//!
//! An operation is `observe → preflight → call → wait → observe → …  → verdict`. Here is all of it
//! that decides; who calls the hypervisor and looks at domains only keeps a [`History`]:
//!
//! 1. [`preflight`] turns a request and what is seen of the domain into a [`Plan`], or says why
//!    nothing can be done.
//! 2. [`judge`] says what to do next: make a call, wait, or stop with an [`Outcome`]. It knows
//!    nothing but the history, so an operation can be judged again after a restart, and a record
//!    can be put right when the guest follows later.
//!
//! `vcpus` and `memory` have the same files with the same verbs: `preflight` (limits and
//! plan), `evidence` (what the history shows), `verdict` (what that proves) and `diagnosis` (what
//! is wrong and what to do).
//!
//! # What is believed
//! No source alone. libvirt says "done" when QEMU was told, and "timed out" for an unplug that was
//! carried out; a guest that throws a CPU away says "success" through ACPI. So `Verified` needs
//! the *last* look at the domain to show everything that was asked for.
//!
//! # What is done twice
//! Nothing. A call whose answer was lost, because the connection broke or this program was killed,
//! may have been carried out, may still be, or may never have reached libvirt. So the domain is
//! looked at, more than once and for a while: libvirt takes up requests in the order in which they
//! came, so what it answers now comes after what it was asked before. If the domain is then as it
//! was, the call is made again: every call names what is wanted in the end, so even one that comes
//! after all finds nothing left to do. If somebody else changed the domain meanwhile, it is not.

mod event;
mod evidence;
mod history;
mod infeasible;
mod memory;
#[cfg(test)]
mod memory_tests;

mod lifecycle;
#[cfg(test)]
mod lifecycle_tests;
mod observation;
mod outcome;
mod plan;
#[cfg(test)]
mod property_tests;
mod request;
#[cfg(test)]
mod simulation;
mod timeline;
#[cfg(test)]
mod unplug_tests;
mod vcpus;
#[cfg(test)]
mod vcpus_tests;
mod verdict;

pub use event::{Answer, Event, NotAnEvent, Ost, SlotKind};
pub use evidence::{Evidence, Source};
pub use history::{Call, Contact, History, Return};
pub use infeasible::Infeasible;

pub use observation::{Agent, GuestVcpus, Host, Observation};
pub use outcome::{Amount, Diagnosis, Outcome, Step};
pub use plan::{Action, Plan, Preflight, Rejection};
pub use request::{HotplugRequest, NotALevel, Patience, Require, Terms};
pub use verdict::{NotAVerdict, Verdict};

use outcome::{Finding, Ruling};

use crate::domain::PauseReason;
use crate::units::Timestamp;

/// Whether a request can be done, and how. `seen` is what the domain is like now.
///
/// The limits come first: whoever asks for what can never be done is told so, whatever the domain
/// is doing at the moment.
pub fn preflight(request: &HotplugRequest, seen: &Observation, host: &Host) -> Preflight {
    let state = seen.domain.state;
    let not_running = |seen: &Observation| {
        Preflight::Rejected(Rejection::NotRunning(seen.state(), seen.remedy()))
    };
    if !state.is_active() {
        return not_running(seen);
    }
    let plan = match request {
        HotplugRequest::Vcpus { count, .. } => vcpus::preflight(*count, seen),
        HotplugRequest::Memory { size } => memory::preflight(*size, seen, host),
    };
    let plan = match plan {
        Ok(plan) => plan,
        Err(limit) => return Preflight::Rejected(limit.into()),
    };
    match seen.job {
        Some(job) if job.holds_changes() && !plan.actions.is_empty() => {
            Preflight::Blocked(format!("{job} to end"))
        }
        _ if state.runs() => Preflight::Ready(plan),
        // Many a job pauses the domain, and is over a moment before the domain runs again.
        _ if seen.reason.is_some_and(PauseReason::ends_by_itself) => {
            Preflight::Blocked(seen.awaiting())
        }
        _ => not_running(seen),
    }
}

/// What to do next, judging by all that was seen and done so far. `now` must not be before
/// anything in the history.
///
/// After a verdict that [may change](Verdict::may_change), call it again with what is seen later:
/// a record is put right when the answer is `Verified`.
pub fn judge(history: &History, now: Timestamp) -> Step {
    let finding = match rule(history, now) {
        Ruling::Call(action) => return Step::Call(action),
        Ruling::Found(finding) => finding,
        Ruling::Wait { awaiting, until } if !history.is_over(now) => {
            let deadline = history.terms.deadline;
            let until = until.map_or(deadline, |until| until.min(deadline));
            return Step::Wait { awaiting, until };
        }
        Ruling::Wait { awaiting, .. } => Finding::new(
            Verdict::Pending,
            format!("the deadline passed while waiting for {awaiting}"),
        ),
    };
    let (timeline, before, after) = match history.request {
        HotplugRequest::Vcpus { .. } => (
            vcpus::timeline(history),
            vcpus::extent(&history.before),
            vcpus::extent(history.latest()),
        ),
        HotplugRequest::Memory { .. } => (
            memory::timeline(history),
            memory::extent(&history.before),
            memory::extent(history.latest()),
        ),
    };
    Step::Done(Box::new(Outcome {
        verdict: finding.verdict,
        message: finding.message,
        before,
        requested: history.request.extent(),
        after,
        evidence: timeline,
        hypervisor_error: history.last_error(),
        diagnosis: finding.diagnosis,
    }))
}

/// What is still to be called after the verdict of an operation that is watched: only what makes
/// libvirt agree with what the guest and QEMU are known to have done. Nothing is asked of the guest.
pub fn settle(history: &History) -> Option<Action> {
    match history.request {
        HotplugRequest::Vcpus { count, .. } => vcpus::settle(history, count),
        HotplugRequest::Memory { .. } => None,
    }
}

/// How much of what a request is about there is.
pub fn extent(request: &HotplugRequest, seen: &Observation) -> Amount {
    match request {
        HotplugRequest::Vcpus { .. } => vcpus::extent(seen),
        HotplugRequest::Memory { .. } => memory::extent(seen),
    }
}

fn rule(history: &History, now: Timestamp) -> Ruling {
    if let Some(end) = lifecycle::ended(history) {
        return Ruling::Found(end);
    }
    let shows = match history.request {
        HotplugRequest::Vcpus { count, .. } => vcpus::shows(history, count),
        HotplugRequest::Memory { size } => memory::shows(history, size),
    };
    if let Some(ruling) = lifecycle::after_call(history, now, shows) {
        return ruling;
    }
    if let Some(action) = history
        .next_planned()
        .filter(|_| history.running_call().is_none())
    {
        return match history.is_over(now) {
            false => Ruling::Call(action.clone()),
            true => Ruling::Found(Finding::new(
                Verdict::Busy,
                match history.calls().is_empty() {
                    true => {
                        "the deadline passed before the hypervisor could be called: nothing was \
                         changed"
                    }
                    false => {
                        "the deadline passed before the hypervisor could be asked for the rest"
                    }
                },
            )),
        };
    }
    match history.request {
        HotplugRequest::Vcpus { count, online } => vcpus::judge(history, count, online, now),
        HotplugRequest::Memory { size } => memory::judge(history, size, now),
    }
}
