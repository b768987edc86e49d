//! Before the first change: the balloon statistics are switched on, and a shrink is held against
//! what the guest uses.

use std::time::Duration;

use super::MemoryResource;
use super::preflight::check_use;
use crate::domain::Balloon;
use crate::hotplug::history::{Call, Return};
use crate::hotplug::outcome::{Conclusion, Ruling};
use crate::hotplug::{Action, History, Require, Verdict};
use crate::units::{Bytes, Timestamp};

/// The statistics period during an operation, in seconds.
const PERIOD: u32 = 1;

/// The longest period that is left as it is.
const MAX_PERIOD: u32 = 2;

/// Time for the first report. QEMU asks for it at once, or after [`PERIOD`] if there was a period.
const FIRST_REPORT: Duration = Duration::from_secs(3);

/// Decides what happens before the first change.
pub(super) fn prepare(
    resource: &MemoryResource,
    history: &History,
    now: Timestamp,
) -> Option<Ruling> {
    let seen = history.latest();
    let memory = &seen.domain.memory;
    let shrinks = resource.size < memory.asked();
    let is_hot = resource.size > memory.boot;
    let needs_total = history.terms.require == Require::Online && !shrinks && is_hot;
    if !shrinks && !needs_total {
        return None;
    }
    let call = history.calls().iter().rev().find(|call| is_period(call));
    let Some(call) = call else {
        if is_reporting(&seen.domain.balloon) {
            return refuse(resource, history);
        }
        return Some(Ruling::Call(Action::SetStatsPeriod {
            seconds: PERIOD,
            was: seen.domain.balloon.stats_period.unwrap_or(0),
        }));
    };
    let returned = match &call.returned {
        None => return Some(Ruling::wait("libvirt to switch the balloon statistics on")),
        Some((at, Return::Done)) => *at,
        Some((at, Return::Failed(error))) if error.is_lost() => *at,
        Some((_, Return::Failed(_))) => return refuse(resource, history),
    };
    let asked = call.started;
    let report = seen.memory_report().filter(|_| seen.at >= asked);
    let old = history.before.memory_report().map(|report| report.updated);
    let is_new = report.is_some_and(|report| {
        let updated = report.updated;
        updated > asked.as_seconds()
            || updated == asked.as_seconds() && old.is_some_and(|old| old < updated)
    });
    let until = returned.after(FIRST_REPORT);
    if is_new || now >= until && seen.at >= until {
        return refuse(resource, history);
    }
    Some(Ruling::wait_until_observed_after(
        "a report of the guest's balloon driver",
        Some(until),
        now,
    ))
}

/// True if nothing can be switched on: there is no balloon, or it reports often enough.
fn is_reporting(balloon: &Balloon) -> bool {
    !balloon.present
        || balloon
            .stats_period
            .is_some_and(|period| (1..=MAX_PERIOD).contains(&period))
}

fn is_period(call: &Call) -> bool {
    matches!(call.action, Action::SetStatsPeriod { .. })
}

/// Returns the finding for a shrink below what the guest uses.
fn refuse(resource: &MemoryResource, history: &History) -> Option<Ruling> {
    let size = resource.size;
    if resource.force || size == Bytes::ZERO {
        return None;
    }
    let limit = check_use(size, history.latest()).err()?;
    Some(Ruling::Conclude(Conclusion::new(
        Verdict::Infeasible,
        limit.to_string(),
    )))
}
