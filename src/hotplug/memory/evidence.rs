//! What a history shows about memory.

use crate::hotplug::evidence::Trail;
use crate::hotplug::history::Return;
use crate::hotplug::{
    Action, Answer, Event, Evidence, Extent, History, Moment, Observation, Ost, SlotKind, Source,
};
use crate::units::Bytes;

/// The signs of one operation, as they stand.
pub(super) struct Signs<'h> {
    /// The last that was seen of the domain since the first call.
    pub(super) latest: Option<&'h Observation>,
    /// What the guest is asked to have, by the live XML.
    pub(super) asked: Bytes,
    /// What it has, by the live XML: virtio-mem as taken, DIMMs in full.
    pub(super) plugged: Bytes,
    /// When the plugged amount was last seen to change.
    pub(super) moved: Option<Moment>,
    /// From when on it has been what was asked for.
    pub(super) reached: Option<Moment>,
    /// The guest's answer through ACPI for the DIMM that was attached.
    pub(super) dimm: Option<(Moment, Answer, &'h Ost)>,
    /// What the guest's own total says.
    pub(super) total: Total,
}

/// What the guest's own total says about memory that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Total {
    /// There is no total: no balloon, no statistics, no driver in the guest.
    Unknown,
    /// The statistics are older than what they should tell of.
    Stale,
    /// It grew by what was added, or is as large as it should be.
    Fits,
    /// It is too small; it grew by so much.
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

/// The alias of the DIMM that the plan attaches.
pub(super) fn planned_dimm(history: &History) -> Option<&str> {
    history.plan.actions.iter().find_map(|action| match action {
        Action::AttachDimm { alias, .. } => Some(alias.as_str()),
        _ => None,
    })
}

fn dimm_answer(history: &History) -> Option<(Moment, Answer, &Ost)> {
    let alias = planned_dimm(history)?;
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

fn total(history: &History, target: Bytes, reached: Option<Moment>) -> Total {
    let seen = history.latest();
    let told = seen.stats.as_ref().map(|stats| stats.balloon);
    let (Some(now), Some(balloon)) = (seen.guest_total(), told) else {
        // A guest that told before will do so again.
        return match history.before.guest_total() {
            Some(_) if history.before.domain.balloon.stats_period.is_some() => Total::Stale,
            _ => Total::Unknown,
        };
    };
    if seen.domain.balloon.stats_period.is_none() {
        return Total::Unknown; // what was told once, and never again
    }
    let memory = &seen.domain.memory;
    let added = target.saturating_sub(history.before.domain.memory.plugged());
    let needed = added.saturating_sub(added.part(OVERHEAD));
    let grew = history
        .before
        .guest_total()
        .map(|before| now.saturating_sub(before));
    // Even without a total from before: what is missing is far more than a kernel takes at boot.
    let has = balloon
        .current
        .unwrap_or(memory.plugged())
        .min(memory.plugged());
    let missing = has.saturating_sub(now);
    let hot = memory.plugged().saturating_sub(memory.boot);
    let boot = memory.boot;
    let at_boot = boot.part(4).max(boot.part(2).min(Bytes::new(256 << 20)));
    let hidden = missing > at_boot.saturating_add(hot.part(OVERHEAD));
    if !hidden && grew.is_none_or(|grew| grew >= needed) {
        return Total::Fits;
    }
    // The statistics carry whole seconds: only those of a later second are surely newer.
    let updated = balloon
        .updated
        .and_then(|seconds| i64::try_from(seconds).ok());
    match (reached, updated) {
        (Some(reached), Some(updated)) if updated > reached.as_seconds() => {
            Total::Short(grew.unwrap_or_default())
        }
        _ => Total::Stale,
    }
}

/// Whether the live XML shows that so much is asked of the guest.
pub(in crate::hotplug) fn shows(history: &History, size: Bytes) -> bool {
    history
        .fresh()
        .is_some_and(|seen| seen.domain.memory.asked() == size)
}

/// How much there is, and how much of it the guest sees.
pub(in crate::hotplug) fn extent(seen: &Observation) -> Extent {
    Extent::Memory {
        memory: seen.domain.memory.plugged(),
        guest_total: seen.guest_total(),
    }
}

/// The evidence, in order of time.
pub(in crate::hotplug) fn trail(history: &History) -> Vec<Evidence> {
    let mut found: Vec<(Moment, Source, String)> = Vec::new();
    for call in history.calls() {
        let what = match &call.action {
            Action::ResizeVirtioMem { alias, requested } => {
                format!("ask the guest to have {requested} of {alias}")
            }
            Action::AttachDimm { alias, size, .. } => format!("attach {alias} of {size}"),
            Action::SetVcpus { .. } | Action::OnlineVcpus { .. } => continue,
        };
        let (at, how) = match &call.returned {
            None => (call.started, "no answer yet".to_owned()),
            Some((at, Return::Done)) => (*at, "accepted".to_owned()),
            Some((at, Return::Failed { message, .. })) => (*at, format!("failed: {message}")),
            Some((at, Return::Overdue)) => (*at, "no answer in time".to_owned()),
            Some((at, Return::Lost)) => (*at, "the answer was lost".to_owned()),
        };
        found.push((at, Source::HypervisorCall, format!("{what}: {how}")));
    }
    for (at, event) in history.all_events() {
        found.extend(event_detail(event).map(|(source, detail)| (at, source, detail)));
    }
    for seen in history.observations() {
        let memory = &seen.domain.memory;
        found.push((
            seen.at,
            Source::LiveXml,
            format!("{} asked for", memory.asked()),
        ));
        for device in memory.virtio_mem() {
            let alias = device.alias.as_deref().unwrap_or("a virtio-mem device");
            let detail = format!("the guest has {} of {alias}", device.plugged());
            found.push((seen.at, Source::VirtioMem, detail));
        }
        if let Some(total) = seen.guest_total() {
            let detail = format!("the guest sees {total} in all");
            found.push((seen.at, Source::BalloonStats, detail));
        }
    }
    found.sort_by_key(|(at, ..)| *at);
    let mut trail = Trail::default();
    for (at, source, detail) in found {
        trail.add(source, at, detail);
    }
    trail.finish()
}

fn event_detail(event: &Event) -> Option<(Source, String)> {
    Some(match event {
        Event::Ost(ost) if ost.kind == SlotKind::Dimm => {
            let name = ost
                .device
                .clone()
                .unwrap_or_else(|| format!("slot {}", ost.slot));
            let to = match ost.answer()? {
                Answer::Added | Answer::NotAdded => "plug",
                Answer::Leaving | Answer::Gone | Answer::Kept => "eject",
            };
            let status = ost.status_text();
            (
                Source::AcpiOst,
                format!("{name}: {to}: {status} ({:#x})", ost.status),
            )
        }
        Event::MemorySize { device, size } => (
            Source::VirtioMem,
            format!("the guest has {size} of {device}"),
        ),
        Event::Reset => (Source::Lifecycle, "the guest was reset".to_owned()),
        Event::Stopped(why) => (Source::Lifecycle, format!("the domain ended: {why}")),
        Event::Paused => (Source::Lifecycle, "the domain was paused".to_owned()),
        Event::Resumed => (Source::Lifecycle, "the domain was resumed".to_owned()),
        Event::Ost(_) | Event::DeviceDeleted { .. } | Event::UnplugFailed { .. } => return None,
    })
}
