//! Facts about memory in a history.

use super::diagnosis::LINUX_BLOCK;
use crate::domain::Memory;
use crate::hotplug::{AcpiAnswer, Action, Event, History, Observation, Ost, SlotKind};
use crate::units::Bytes;
use crate::units::Timestamp;

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
}

/// The guest's own total compared to the plugged memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestTotal {
    /// There are no statistics, or the missing part may be the kernel's own overhead.
    Unknown,
    /// The statistics are older than the change.
    Stale,
    /// The guest uses all of it.
    Fits,
    /// The guest does not use all of it. Carries the growth of the total.
    Short(Bytes),
}

impl<'h> MemoryFacts<'h> {
    pub(super) fn read(history: &'h History, target: Bytes) -> Self {
        let latest = history.fresh();
        let seen = latest.unwrap_or(&history.before);
        let mut moved = None;
        let mut reached = None;
        let mut last = history.before.domain.memory.plugged();
        for seen in history.since_epoch() {
            let plugged = seen.domain.memory.plugged();
            if plugged != last {
                moved = Some(seen.at);
                last = plugged;
            }
            reached = if plugged == target {
                reached.or(Some(seen.at))
            } else {
                None
            };
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
            reached,
            dimm: dimm_answer(history),
            total: total(history, target, reached),
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

fn total(history: &History, target: Bytes, reached: Option<Timestamp>) -> GuestTotal {
    let seen = history.latest();
    let period = seen.domain.balloon.stats_period;
    let reported = seen.stats.as_ref().map(|stats| stats.balloon);
    let (Some(now), Some(balloon), Some(_)) = (seen.guest_total(), reported, period) else {
        // A balloon driver that reported before will report again.
        return match history.before.guest_total().and(period) {
            Some(_) => GuestTotal::Stale,
            None => GuestTotal::Unknown,
        };
    };
    let (before, memory) = (&history.before, &seen.domain.memory);
    let had = before.domain.memory.plugged();
    let added = target.saturating_sub(had);
    // Without an earlier total, the guest cannot have seen more than the plugged memory.
    let grew = now.saturating_sub(before.guest_total().unwrap_or(had));
    // Memory in the balloon is not missing.
    let has = balloon
        .current
        .unwrap_or(memory.plugged())
        .min(memory.plugged());
    let missing = has.saturating_sub(now);
    if is_hidden(memory, missing) || before.guest_total().is_some() && grew < needed(added) {
        // The statistics have whole seconds: only those of a later second are certainly newer.
        let updated = balloon
            .updated
            .and_then(|seconds| i64::try_from(seconds).ok());
        let newer = reached
            .zip(updated)
            .is_some_and(|(reached, updated)| updated > reached.as_seconds());
        return if newer {
            GuestTotal::Short(grew)
        } else {
            GuestTotal::Stale
        };
    }
    let shown = match added {
        Bytes::ZERO => missing < smallest_unit(memory),
        added => grew >= needed(added),
    };
    if shown {
        GuestTotal::Fits
    } else {
        GuestTotal::Unknown
    }
}

fn needed(added: Bytes) -> Bytes {
    added.saturating_sub(added.part(OVERHEAD))
}

/// True if more is missing than any kernel reserves at boot: a quarter of the memory, half of it in
/// small guests.
fn is_hidden(memory: &Memory, missing: Bytes) -> bool {
    let hot = memory.plugged().saturating_sub(memory.boot);
    let at_boot = memory
        .boot
        .part(4)
        .max(memory.boot.part(2).min(Bytes::new(256 << 20)));
    hot > Bytes::ZERO && missing > at_boot.saturating_add(hot.part(OVERHEAD))
}

/// Returns the smallest unit that can be plugged and not used. If less is missing, the guest uses
/// everything. Without plugged memory nothing can be missing.
fn smallest_unit(memory: &Memory) -> Bytes {
    let dimms = memory.dimms().map(|dimm| dimm.size);
    let blocks = memory
        .virtio_mem()
        .map(|device| device.plugged().min(LINUX_BLOCK))
        .filter(|unit| *unit > Bytes::ZERO);
    dimms.chain(blocks).min().unwrap_or(Bytes::new(u64::MAX))
}
