//! What a history shows about memory.

use super::diagnosis::LINUX_BLOCK;
use crate::domain::Memory;
use crate::hotplug::{Action, Answer, Event, History, Observation, Ost, SlotKind};
use crate::units::Bytes;
use crate::units::Timestamp;

/// The signs of one operation, as they stand.
pub(super) struct Signs<'h> {
    /// The last that was seen of the domain since the first call.
    pub(super) latest: Option<&'h Observation>,
    /// What the guest is asked to have, by the live XML.
    pub(super) asked: Bytes,
    /// What it has, by the live XML: virtio-mem as taken, DIMMs in full.
    pub(super) plugged: Bytes,
    /// When the plugged amount was last seen to change.
    pub(super) moved: Option<Timestamp>,
    /// From when on it has been what was asked for.
    pub(super) reached: Option<Timestamp>,
    /// The guest's answer through ACPI for the DIMM that was attached.
    pub(super) dimm: Option<(Timestamp, Answer, &'h Ost)>,
    /// What the guest's own total says.
    pub(super) total: Total,
}

/// What the guest's own total says about memory that was plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Total {
    /// It tells nothing: there are no statistics, or what could be missing is less than what a
    /// kernel takes for itself.
    Unknown,
    /// The statistics are older than what they should tell of.
    Stale,
    /// It shows that all of it is used.
    Fits,
    /// It shows that not all of it is used; it grew by so much.
    Short(Bytes),
}

impl<'h> Signs<'h> {
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
            reached = match plugged == target {
                true => reached.or(Some(seen.at)),
                false => None,
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

/// The alias and the size of the DIMM that the plan attaches.
pub(super) fn planned_dimm(history: &History) -> Option<(&str, Bytes)> {
    history.plan.actions.iter().find_map(|action| match action {
        Action::AttachDimm { alias, size, .. } => Some((alias.as_str(), Bytes::from(*size))),
        _ => None,
    })
}

fn dimm_answer(history: &History) -> Option<(Timestamp, Answer, &Ost)> {
    let (alias, _) = planned_dimm(history)?;
    history.events().rev().find_map(|(at, event)| match event {
        Event::Ost(ost) if ost.kind == SlotKind::Dimm && ost.device.as_deref() == Some(alias) => {
            Some((at, ost.answer()?, ost))
        }
        _ => None,
    })
}

/// A kernel spends up to 1/64 of new memory on describing it, where it takes that from the new
/// memory itself; half as much again for other books.
const OVERHEAD: u64 = 40;

fn total(history: &History, target: Bytes, reached: Option<Timestamp>) -> Total {
    let seen = history.latest();
    let period = seen.domain.balloon.stats_period;
    let told = seen.stats.as_ref().map(|stats| stats.balloon);
    let (Some(now), Some(balloon), Some(_)) = (seen.guest_total(), told, period) else {
        // A guest that told before will do so again.
        return match history.before.guest_total().and(period) {
            Some(_) => Total::Stale,
            None => Total::Unknown,
        };
    };
    let (before, memory) = (&history.before, &seen.domain.memory);
    let had = before.domain.memory.plugged();
    let added = target.saturating_sub(had);
    // Without a total from before: the guest cannot have seen more than there was.
    let grew = now.saturating_sub(before.guest_total().unwrap_or(had));
    // What the balloon holds is not missing.
    let has = balloon
        .current
        .unwrap_or(memory.plugged())
        .min(memory.plugged());
    let missing = has.saturating_sub(now);
    if is_hidden(memory, missing) || before.guest_total().is_some() && grew < needed(added) {
        // The statistics carry whole seconds: only those of a later second are surely newer.
        let updated = balloon
            .updated
            .and_then(|seconds| i64::try_from(seconds).ok());
        let newer = reached
            .zip(updated)
            .is_some_and(|(reached, updated)| updated > reached.as_seconds());
        return match newer {
            true => Total::Short(grew),
            false => Total::Stale,
        };
    }
    let shown = match added {
        Bytes::ZERO => missing < smallest_unit(memory),
        added => grew >= needed(added),
    };
    match shown {
        true => Total::Fits,
        false => Total::Unknown,
    }
}

fn needed(added: Bytes) -> Bytes {
    added.saturating_sub(added.part(OVERHEAD))
}

/// Whether more is missing than any kernel takes at boot: a quarter of the memory, in small guests
/// half of it.
fn is_hidden(memory: &Memory, missing: Bytes) -> bool {
    let hot = memory.plugged().saturating_sub(memory.boot);
    let at_boot = memory
        .boot
        .part(4)
        .max(memory.boot.part(2).min(Bytes::new(256 << 20)));
    hot > Bytes::ZERO && missing > at_boot.saturating_add(hot.part(OVERHEAD))
}

/// The least that can be plugged and not used. If less is missing, all is used. Without anything
/// plugged there is nothing to miss.
fn smallest_unit(memory: &Memory) -> Bytes {
    let dimms = memory.dimms().map(|dimm| dimm.size);
    let blocks = memory
        .virtio_mem()
        .map(|device| device.plugged().min(LINUX_BLOCK))
        .filter(|unit| *unit > Bytes::ZERO);
    dimms.chain(blocks).min().unwrap_or(Bytes::new(u64::MAX))
}
