//! Facts about memory in a history.

use std::time::Duration;

use crate::domain::Memory;
use crate::hotplug::observation::MemoryReport;
use crate::hotplug::{
    AcpiAnswer, Action, Amount, Event, History, Observation, Ost, SlotKind, Verdict,
};
use crate::units::{Bytes, Timestamp};

/// The minimum block of memory that Linux takes on x86 (`MIN_MEMORY_BLOCK_SIZE`).
pub(super) const LINUX_BLOCK: Bytes = Bytes::new(128 << 20);

/// The facts about memory in one history.
pub(super) struct MemoryFacts<'h> {
    /// The last observation since the first call.
    pub(super) latest: Option<&'h Observation>,
    /// The requested amount in the live XML.
    pub(super) asked: Bytes,
    /// The plugged amount in the live XML: what the guest took of virtio-mem, and all DIMMs.
    pub(super) plugged: Bytes,
    /// The time of the last observed change of the plugged amount.
    pub(super) moved: Option<Timestamp>,
    /// The time since which the plugged amount has been the requested one.
    pub(super) reached: Option<Timestamp>,
    /// The guest's answer through ACPI for the attached DIMM.
    pub(super) dimm: Option<(Timestamp, AcpiAnswer, &'h Ost)>,
    pub(super) total: GuestTotal,
    /// The time since which the guest's total and the size of its balloon have been what they are.
    pub(super) still: Option<Timestamp>,
}

/// The guest's own total compared to the plugged memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestTotal {
    /// The guest reports nothing.
    Unknown,
    /// The last report is older than the change.
    Stale,
    /// The guest uses all of it.
    Fits,
    /// The guest does not use all of it.
    Short {
        /// The growth of the total.
        grew: Bytes,
        missing: Bytes,
    },
    /// This much is missing: the guest's kernel may have reserved it at boot, or it may be offline.
    Unclear(Bytes),
}

impl<'h> MemoryFacts<'h> {
    pub(super) fn read(history: &'h History, target: Bytes) -> Self {
        let latest = history.fresh();
        let seen = latest.unwrap_or(&history.before);
        let mut moved = None;
        let mut reached: Option<&Observation> = None;
        let mut still: Option<&Observation> = None;
        let mut last = history.before.domain.memory.plugged();
        for seen in history.since_epoch() {
            let plugged = seen.domain.memory.plugged();
            if plugged != last {
                moved = Some(seen.at);
                last = plugged;
            }
            reached = if plugged == target {
                reached.or(Some(seen))
            } else {
                None
            };
            still = still
                .filter(|then| figures(then) == figures(seen))
                .or(Some(seen));
        }
        let by_event = history.events().filter_map(|(at, event)| match event {
            Event::MemorySize { .. } => Some(at),
            _ => None,
        });
        Self {
            latest,
            asked: seen.domain.memory.asked(),
            plugged: seen.domain.memory.plugged(),
            moved: moved.into_iter().chain(by_event).max(),
            reached: reached.map(|seen| seen.at),
            dimm: dimm_answer(history),
            total: total(history, target, reached),
            still: still.map(|seen| seen.at),
        }
    }
}

/// Returns the alias and the size of the DIMM in the plan.
pub(super) fn planned_dimm(history: &History) -> Option<(&str, Bytes)> {
    history.plan.actions.iter().find_map(|action| match action {
        Action::AttachDimm { alias, size, .. } => Some((alias.as_str(), Bytes::from(*size))),
        _ => None,
    })
}

fn dimm_answer(history: &History) -> Option<(Timestamp, AcpiAnswer, &Ost)> {
    let (alias, _) = planned_dimm(history)?;
    history.events().rev().find_map(|(at, event)| match event {
        Event::Ost(ost) if ost.kind == SlotKind::Dimm && ost.device.as_deref() == Some(alias) => {
            Some((at, ost.answer()?, ost))
        }
        _ => None,
    })
}

/// Maximum overhead as a fraction of new memory. A kernel spends up to 1/64 on describing it, if it
/// takes that from the new memory, and half as much on other structures.
const OVERHEAD: u64 = 40;

fn total(history: &History, target: Bytes, reached: Option<&Observation>) -> GuestTotal {
    let (before, seen) = (&history.before, history.latest());
    let memory = &seen.domain.memory;
    let hot = memory.plugged().saturating_sub(memory.boot);
    let added = target.saturating_sub(before.domain.memory.plugged());
    if hot == Bytes::ZERO && added == Bytes::ZERO {
        return GuestTotal::Fits;
    }
    let Some(report) = seen.memory_report() else {
        // A balloon driver that reported before will report again.
        return match before.memory_report() {
            Some(_) => GuestTotal::Stale,
            None => GuestTotal::Unknown,
        };
    };
    let is_newer = reached.is_some_and(|reached| is_newer(&report, reached));
    // A complete growth is proof, whatever the guest's kernel reserved before.
    if let (true, Some(had)) = (added > Bytes::ZERO, before.guest_total()) {
        let grew = report.total.saturating_sub(had);
        return if grew >= added.saturating_sub(added.part(OVERHEAD)) {
            GuestTotal::Fits
        } else if is_newer {
            let missing = added.saturating_sub(grew);
            GuestTotal::Short { grew, missing }
        } else {
            GuestTotal::Stale
        };
    }
    let compared = compare(history, seen, &report);
    // A balloon may have taken memory since the report.
    let suffices = compared == GuestTotal::Fits
        && added == Bytes::ZERO
        && held(seen) == Bytes::ZERO
        && report.is_current;
    if is_newer || suffices {
        compared
    } else {
        GuestTotal::Stale
    }
}

/// True if the guest reported after the observation. Reports have whole seconds.
fn is_newer(report: &MemoryReport, seen: &Observation) -> bool {
    let then = seen.memory_report();
    report.updated > seen.at.as_seconds() || then.is_some_and(|then| report.updated > then.updated)
}

/// Compares the guest's total to what is plugged, without an earlier total of the guest.
fn compare(history: &History, seen: &Observation, report: &MemoryReport) -> GuestTotal {
    let memory = &seen.domain.memory;
    let hot = memory.plugged().saturating_sub(memory.boot);
    let missing = memory.plugged().saturating_sub(report.total);
    let grew = Bytes::ZERO;
    if let Some((verdict, total)) = earlier(history, seen) {
        // The same state has the same verdict.
        if verdict == Verdict::Verified && report.total >= total {
            return GuestTotal::Fits;
        }
        if verdict != Verdict::Verified && report.total <= total {
            return GuestTotal::Short { grew, missing };
        }
    }
    let held = held(seen);
    let unseen = missing.saturating_sub(held);
    if unseen < smallest_unit(memory) {
        if held >= hot.part(2) && held > Bytes::ZERO {
            let missing = held;
            GuestTotal::Short { grew, missing }
        } else {
            GuestTotal::Fits
        }
    } else if unseen > memory.boot {
        // More than the boot memory, from which the kernel takes what it reserves.
        GuestTotal::Short { grew, missing }
    } else {
        GuestTotal::Unclear(unseen)
    }
}

/// Returns the verdict and the guest's total of an earlier operation that ended with what is plugged
/// now.
fn earlier(history: &History, seen: &Observation) -> Option<(Verdict, Bytes)> {
    let earlier = history.earlier?;
    let judged = [
        Verdict::Verified,
        Verdict::GuestOffline,
        Verdict::PartiallyApplied,
    ];
    match earlier.after {
        Amount::Memory {
            memory,
            guest_total: Some(total),
        } if memory == seen.domain.memory.plugged() && judged.contains(&earlier.verdict) => {
            Some((earlier.verdict, total))
        }
        _ => None,
    }
}

/// Returns what the balloon has taken of the guest's memory.
pub(super) fn held(seen: &Observation) -> Bytes {
    let plugged = seen.domain.memory.plugged();
    let current = seen.stats.as_ref().and_then(|stats| stats.balloon.current);
    plugged.saturating_sub(current.unwrap_or(plugged))
}

/// Returns what the guest's total is made of: the total, and what the balloon has taken of it.
fn figures(seen: &Observation) -> (Option<Bytes>, Bytes) {
    (seen.guest_total(), held(seen))
}

/// Returns the smallest unit that can be plugged and not used. If less is missing, the guest uses
/// everything. Without plugged memory nothing can be missing.
fn smallest_unit(memory: &Memory) -> Bytes {
    memory
        .devices
        .iter()
        .map(|device| device.plugged().min(LINUX_BLOCK))
        .filter(|unit| *unit > Bytes::ZERO)
        .min()
        .unwrap_or(Bytes::new(u64::MAX))
}

/// Returns what the guest's kernel needs to describe new memory: 64 bytes for each page of 4 KiB.
pub(super) fn description_of(added: Bytes) -> Bytes {
    added.part(64)
}

/// The guest's memory before the first change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need {
    /// The memory that describes the new memory.
    pub(super) need: Bytes,
    pub(super) usable: Bytes,
    pub(super) total: Bytes,
    /// The age of the report at the time of the first change.
    pub(super) age: Duration,
}

impl Need {
    /// Returns the guest's need if new memory takes more to describe than is available.
    pub(super) fn to_describe(history: &History, target: Bytes) -> Option<Self> {
        let before = &history.before;
        let added = target.saturating_sub(before.domain.memory.plugged());
        let report = before.memory_report()?;
        let (need, usable) = (description_of(added), report.usable?);
        (need > usable).then_some(Self {
            need,
            usable,
            total: report.total,
            age: report.age,
        })
    }
}
