//! The answer as a person reads it.

use std::fmt::Write;

use super::Report;
use crate::cli::report::plain;
use crate::compat::{
    Confirmation, CpuComparison, DryRun, Feasibility, Headroom, RuleFinding, RuleSeverity, Stage,
};
use crate::domain::AgentChannel;
use crate::units::Bytes;

/// Where a line is broken.
const WIDTH: usize = 100;

pub(super) fn report(report: &Report) -> String {
    let mut text = headline(report);
    let groups = [
        (RuleSeverity::Blocks, "Why not"),
        (RuleSeverity::Unknown, "Not known"),
        (RuleSeverity::Warning, "Mind"),
        (RuleSeverity::Note, "Good to know"),
    ];
    for (severity, title) in groups {
        let findings = report.fit.findings.iter();
        let findings: Vec<&RuleFinding> = findings.filter(|f| f.severity == severity).collect();
        if !findings.is_empty() {
            line(&mut text, &format!("\n{title}:"));
            for finding in findings {
                show_finding(&mut text, finding);
            }
        }
    }
    if let Some(headroom) = &report.fit.headroom
        && report.fit.answer != Feasibility::Infeasible
    {
        show_headroom(&mut text, headroom);
    }
    show_confirmation(&mut text, report);
    text
}

fn headline(report: &Report) -> String {
    let domain = match &report.domain {
        Some(name) => format!("domain {}", plain(name)),
        None => "such a domain".to_owned(),
    };
    let place = match report.node.live {
        true => "on this node",
        false => "on the node of these files",
    };
    let mut text = match report.fit.answer {
        Feasibility::Feasible => format!("Feasible: {domain} would run {place}"),
        Feasibility::Infeasible => format!("Not feasible: {domain} does not run {place}"),
        Feasibility::Unknown => {
            format!(
                "Unknown: nothing known keeps {domain} from running {place}, and not all is known"
            )
        }
    };
    let node = &report.node;
    let mut known = Vec::new();
    known.extend(
        node.domain_type
            .as_ref()
            .map(|t| format!("domain type {t}")),
    );
    known.extend(node.arch.clone());
    known.extend(node.libvirt_version.map(|v| format!("libvirt {v}")));
    known.extend(node.qemu_version.map(|v| format!("QEMU {v}")));
    if !known.is_empty() {
        let _ok = write!(text, " ({})", known.join(", "));
    }
    text.push('\n');
    text
}

fn show_finding(text: &mut String, finding: &RuleFinding) {
    wrapped(text, "  * ", "    ", &plain(&finding.message));
    if let Some(words) = &finding.words {
        let who = match finding.stage {
            Some(Stage::Define) => "libvirt refuses the definition",
            Some(Stage::Start) => "libvirt refuses to start it",
            Some(Stage::Emulator) => "QEMU gives up at the start",
            None => "libvirt says",
        };
        wrapped(text, "    ", "      ", &format!("{who}: {}", plain(words)));
    }
    if let Some(remedy) = &finding.remedy {
        wrapped(text, "    What to do: ", "      ", &plain(remedy));
    }
}

fn show_headroom(text: &mut String, room: &Headroom) {
    line(text, "\nRoom to grow while it runs:");
    let vcpus = &room.vcpus;
    let more = match vcpus.pluggable.is_empty() {
        true => "none can be plugged".to_owned(),
        false => format!(
            "{} can be plugged ({})",
            vcpus.pluggable.len(),
            vcpus.pluggable
        ),
    };
    line(
        text,
        &format!(
            "  vCPUs        {} of {}; {more}",
            vcpus.plugged, vcpus.maximum
        ),
    );
    let memory = &room.memory;
    let mut parts = Vec::new();
    if memory.virtio_mem > Bytes::ZERO {
        parts.push(format!("{} by virtio-mem", memory.virtio_mem));
    }
    if memory.for_devices > Bytes::ZERO {
        let slots = match memory.free_slots {
            0 => "no slot for a DIMM is free".to_owned(),
            1 => "1 slot for a DIMM is free".to_owned(),
            free => format!("{free} slots for DIMMs are free"),
        };
        parts.push(format!("{} by new devices, {slots}", memory.for_devices));
    }
    let more = match parts.is_empty() {
        true => "none can be plugged".to_owned(),
        false => parts.join("; "),
    };
    line(text, &format!("  memory       {}; {more}", memory.plugged));
    if let Some(free) = room.free_root_ports {
        let ports = match free {
            1 => "1 PCIe root port is free".to_owned(),
            _ => format!("{free} PCIe root ports are free"),
        };
        line(text, &format!("  devices      {ports}"));
    }
    let agent = match room.agent {
        AgentChannel::Absent => "no channel",
        AgentChannel::Disconnected => "a channel, and no agent at its end",
        AgentChannel::Connected => "connected",
        AgentChannel::Unknown => "a channel",
    };
    line(text, &format!("  guest agent  {agent}"));
    for hint in &room.hints {
        wrapped(text, "  * ", "    ", hint);
    }
}

fn show_confirmation(text: &mut String, report: &Report) {
    let Some(Confirmation { dry_run, cpu }) = &report.confirmation else {
        return;
    };
    line(text, "\nThe hypervisor's own word:");
    let agrees = match report.agrees {
        Some(true) => "as computed",
        Some(false) => "NOT as computed",
        None => "no answer",
    };
    let words = match dry_run {
        DryRun::Accepted if emulator_refuses(report) => {
            format!("dry run: libvirt takes it ({agrees}); what QEMU says then, no dry run shows")
        }
        DryRun::Accepted => format!("dry run: libvirt takes it ({agrees})"),
        DryRun::Refused { words } => {
            format!("dry run: libvirt refuses it ({agrees}): {}", plain(words))
        }
        DryRun::Failed { reason } => format!("dry run: {agrees}: {}", plain(reason)),
    };
    wrapped(text, "  ", "    ", &words);
    let words = match cpu {
        None => return,
        Some(CpuComparison::Identical) => "CPU: the same as the hypervisor's".to_owned(),
        Some(CpuComparison::Superset) => "CPU: the hypervisor has all of it, and more".to_owned(),
        // The dry run said it already.
        Some(CpuComparison::Incompatible { words }) if is_refused_with(dry_run, words) => {
            "CPU: the hypervisor does not have all of it, in the same words".to_owned()
        }
        Some(CpuComparison::Incompatible { words }) => {
            format!(
                "CPU: the hypervisor does not have all of it: {}",
                plain(words)
            )
        }
        Some(CpuComparison::Failed { reason }) => {
            format!("CPU: could not be compared: {}", plain(reason))
        }
    };
    wrapped(text, "  ", "    ", &words);
}

fn emulator_refuses(report: &Report) -> bool {
    let mut blocking = report.fit.blocking();
    blocking.any(|finding| finding.stage == Some(Stage::Emulator))
}

fn is_refused_with(dry_run: &DryRun, words: &str) -> bool {
    matches!(dry_run, DryRun::Refused { words: said } if said == words)
}

fn line(text: &mut String, words: &str) {
    text.push_str(words);
    text.push('\n');
}

/// Breaks a paragraph at spaces.
fn wrapped(text: &mut String, first: &str, next: &str, paragraph: &str) {
    let mut current = first.to_owned();
    let mut is_bare = true;
    for word in paragraph.split(' ') {
        if !is_bare && current.chars().count() + 1 + word.chars().count() > WIDTH {
            line(text, &current);
            next.clone_into(&mut current);
            is_bare = true;
        }
        if !is_bare {
            current.push(' ');
        }
        current.push_str(word);
        is_bare = false;
    }
    line(text, &current);
}
