//! The evidence about memory for people.

use std::collections::BTreeMap;
use std::time::Duration;

use super::evidence::Need;
use crate::hotplug::timeline::{Timeline, ost_detail};
use crate::hotplug::{Action, Event, Evidence, History, SlotKind, Source};
use crate::units::{Bytes, Timestamp, seconds};

/// The age from which a figure is printed with its age.
const OLD: Duration = Duration::from_secs(2);

pub(super) fn timeline(history: &History, size: Bytes) -> Vec<Evidence> {
    let mut timeline = Timeline::of(history, describe, describe_event);
    let mut last_total = None;
    let mut sizes: Vec<(Timestamp, &str, Bytes)> = Vec::new();
    for seen in history.observations() {
        let memory = &seen.domain.memory;
        let asked = format!("{} asked for", memory.asked());
        timeline.add(Source::LiveXml, seen.live_at(), asked);
        for device in memory.virtio_mem() {
            let alias = device.alias.as_deref().unwrap_or("a virtio-mem device");
            sizes.push((seen.live_at(), alias, device.plugged()));
        }
        if let Some(report) = seen.memory_report()
            && report.is_current
            && last_total.replace(report.total) != Some(report.total)
        {
            let age = if report.age >= OLD {
                format!(" (reported {} before)", seconds(report.age))
            } else {
                String::new()
            };
            let detail = format!("the guest sees {} in all{age}", report.total);
            timeline.add(Source::BalloonStats, seen.statistics_at(), detail);
        }
    }
    for (at, event) in history.all_events() {
        if let Event::MemorySize { device, size } = event {
            sizes.push((at, device, *size));
        }
    }
    add_changes(&mut timeline, sizes);
    add_figures(&mut timeline, history, size);
    timeline.finish()
}

/// Adds the sizes of virtio-mem devices, each when it changed.
fn add_changes(timeline: &mut Timeline, mut sizes: Vec<(Timestamp, &str, Bytes)>) {
    sizes.sort_by_key(|(at, ..)| *at);
    let mut last = BTreeMap::new();
    for (at, alias, size) in sizes {
        if last.insert(alias, size) != Some(size) {
            let detail = format!("the guest has {size} of {alias}");
            timeline.add(Source::VirtioMem, at, detail);
        }
    }
}

/// Adds the guest's figures before the change that the change has to be held against.
fn add_figures(timeline: &mut Timeline, history: &History, size: Bytes) {
    let before = &history.before;
    let Some(report) = before.memory_report().filter(|report| report.is_current) else {
        return;
    };
    let age = seconds(report.age);
    if let Some(need) = Need::to_describe(history, size) {
        let detail = format!(
            "warning: the guest's kernel needs {} to describe the new memory, and {} are available \
             (reported {age} before)",
            need.need, need.usable
        );
        timeline.add(Source::BalloonStats, before.at, detail);
    }
    if let Some(used) = report
        .used()
        .filter(|_| size < before.domain.memory.plugged())
    {
        let detail = format!(
            "the guest uses {used} of {} (reported {age} before)",
            report.total
        );
        timeline.add(Source::BalloonStats, before.at, detail);
    }
}

fn describe(action: &Action) -> Option<String> {
    match action {
        Action::ResizeVirtioMem {
            alias, requested, ..
        } => Some(format!("ask the guest to have {requested} of {alias}")),
        Action::AttachDimm { alias, size, .. } => Some(format!("attach {alias} of {size}")),
        Action::SetStatsPeriod { .. } => action.describe(),
        Action::SetVcpus { .. } | Action::OnlineVcpus { .. } => None,
    }
}

fn describe_event(event: &Event) -> Option<(Source, String)> {
    match event {
        Event::Ost(ost) if ost.kind == SlotKind::Dimm => {
            let name = ost.device.clone();
            ost_detail(ost, &name.unwrap_or_else(|| format!("slot {}", ost.slot)))
        }
        _ => None,
    }
}
