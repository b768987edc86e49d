//! The evidence about memory for people.

use crate::hotplug::timeline::{Timeline, ost_detail};
use crate::hotplug::{Action, Event, Evidence, History, SlotKind, Source};

pub(super) fn timeline(history: &History) -> Vec<Evidence> {
    let mut timeline = Timeline::of(history, describe, describe_event);
    for seen in history.observations() {
        let memory = &seen.domain.memory;
        let asked = format!("{} asked for", memory.asked());
        timeline.add(Source::LiveXml, seen.at, asked);
        for device in memory.virtio_mem() {
            let alias = device.alias.as_deref().unwrap_or("a virtio-mem device");
            let detail = format!("the guest has {} of {alias}", device.plugged());
            timeline.add(Source::VirtioMem, seen.at, detail);
        }
        if let Some(total) = seen.guest_total() {
            let detail = format!("the guest sees {total} in all");
            timeline.add(Source::BalloonStats, seen.at, detail);
        }
    }
    timeline.finish()
}

fn describe(action: &Action) -> Option<String> {
    match action {
        Action::ResizeVirtioMem { alias, requested } => {
            Some(format!("ask the guest to have {requested} of {alias}"))
        }
        Action::AttachDimm { alias, size, .. } => Some(format!("attach {alias} of {size}")),
        Action::SetVcpus { .. } | Action::OnlineVcpus { .. } => None,
    }
}

fn describe_event(event: &Event) -> Option<(Source, String)> {
    match event {
        Event::Ost(ost) if ost.kind == SlotKind::Dimm => {
            let name = ost.device.clone();
            ost_detail(ost, &name.unwrap_or_else(|| format!("slot {}", ost.slot)))
        }
        Event::MemorySize { device, size } => Some((
            Source::VirtioMem,
            format!("the guest has {size} of {device}"),
        )),
        _ => None,
    }
}
