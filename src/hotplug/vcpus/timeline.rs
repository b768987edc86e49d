//! The evidence about vCPUs for people.

use super::diagnosis::GET_VCPUS;
use super::evidence::{peripheral, vcpu_of};
use crate::domain::IdSet;
use crate::hotplug::timeline::{Timeline, ost_detail};
use crate::hotplug::{Action, Agent, Event, Evidence, History, SlotKind, Source};
use crate::units::Timestamp;
use crate::units::counted;

pub(super) fn timeline(history: &History) -> Vec<Evidence> {
    let mut timeline = Timeline::of(history, describe, describe_event);
    for seen in history.observations() {
        let plugged = seen.domain.vcpus.plugged_ids();
        let detail = format!("{} ({plugged})", counted(plugged.len(), "vCPU"));
        timeline.add(Source::LiveXml, seen.live_at(), detail);
        match &seen.agent {
            Agent::NotAsked => {}
            Agent::NotQueried(why) => {
                timeline.add(
                    Source::GuestAgent,
                    seen.at,
                    format!("agent not queried: {why}"),
                );
            }
            Agent::Silent(why) => {
                timeline.add(
                    Source::GuestAgent,
                    seen.agent_at(),
                    format!("no answer: {why}"),
                );
            }
            Agent::Refused(why) => {
                timeline.add(
                    Source::GuestAgent,
                    seen.at,
                    format!("{GET_VCPUS} rejected: {why}"),
                );
            }
            Agent::Answered(guest) => {
                let detail = format!("has {}, online {}", list(&guest.vcpus), list(&guest.online));
                timeline.add(Source::GuestAgent, seen.agent_at(), detail);
            }
        }
    }
    for (at, detail) in first_and_last_times(history) {
        timeline.add(Source::VcpuTime, at, detail);
    }
    timeline.finish()
}

fn describe(action: &Action) -> Option<String> {
    match action {
        Action::SetVcpus { count, .. } => Some(format!("set vCPUs to {count}")),
        Action::OnlineVcpus { ids } => Some(format!(
            "bring {} online through the agent",
            ids.named("CPU")
        )),
        Action::ResizeVirtioMem { .. }
        | Action::AttachDimm { .. }
        | Action::SetStatsPeriod { .. } => None,
    }
}

fn describe_event(event: &Event) -> Option<(Source, String)> {
    match event {
        Event::Ost(ost) if ost.kind == SlotKind::Cpu => {
            let name = ost.device.clone();
            ost_detail(ost, &name.unwrap_or_else(|| format!("vcpu{}", ost.slot)))
        }
        Event::DeviceDeleted { device, path } => {
            let name = device.as_deref().or_else(|| peripheral(path))?;
            vcpu_of(name)?;
            Some((Source::DeviceEvent, format!("{name} was removed from QEMU")))
        }
        Event::UnplugFailed { device } => {
            vcpu_of(device)?;
            Some((Source::DeviceEvent, format!("{device} was not released")))
        }
        _ => None,
    }
}

fn list(ids: &IdSet) -> String {
    if ids.is_empty() {
        "none".to_owned()
    } else {
        ids.to_string()
    }
}

/// Returns the run times of new vCPUs at their first and last observation; those of all vCPUs if the
/// domain had what is requested, since they are then the proof.
fn first_and_last_times(history: &History) -> Vec<(Timestamp, String)> {
    let before = if history.plan.actions.is_empty() {
        IdSet::default()
    } else {
        history.before.domain.vcpus.plugged_ids()
    };
    let mut entries: Vec<(Timestamp, String)> = Vec::new();
    for seen in history.since_epoch() {
        let added = seen.domain.vcpus.plugged_ids().without(&before);
        let Some(stats) = seen.stats.as_ref().filter(|_| !added.is_empty()) else {
            continue;
        };
        let times: Vec<String> = added
            .iter()
            .filter_map(|id| Some((id, stats.vcpus.get(&id)?.time?)))
            .map(|(id, time)| format!("vcpu{id} ran {} ms", time / 1_000_000))
            .collect();
        if !times.is_empty() {
            entries.push((seen.statistics_at(), times.join(", ")));
        }
    }
    match entries.len() {
        0..=2 => entries,
        _ => {
            let last = entries.pop();
            entries.drain(..1).chain(last).collect()
        }
    }
}
