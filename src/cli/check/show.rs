//! Formats the answer for people.

use std::fmt::Write;

use super::CheckReport;
use crate::cli::output::wrap;
use crate::compat::{
    Confirmation, CpuComparison, DryRun, Feasibility, Headroom, NotChecked, RuleFinding,
    RuleSeverity, Stage, Trial,
};
use crate::domain::{AgentChannel, plain};
use crate::units::Bytes;

pub(super) fn report(report: &CheckReport) -> String {
    let mut text = headline(report);
    let groups = [
        (RuleSeverity::Blocks, "Reasons"),
        (RuleSeverity::Unknown, "Unknown"),
        (RuleSeverity::Warning, "Warnings"),
        (RuleSeverity::Note, "Notes"),
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
    show_not_checked(&mut text, &report.fit.not_checked);
    text
}

pub(super) fn show_not_checked(text: &mut String, list: &[NotChecked]) {
    line(text, "\nNot checked:");
    for NotChecked { what, why } in list {
        let words = format!("{}: {}", plain(what), plain(why));
        wrap(text, "  * ", "    ", &words);
    }
}

fn headline(report: &CheckReport) -> String {
    let domain = match &report.domain {
        Some(name) => format!("domain {}", plain(name)),
        None => "the described domain".to_owned(),
    };
    let place = if report.node.live {
        "on this node"
    } else {
        "on the node that the documents describe"
    };
    let confirmation = report.confirmation.as_ref();
    let has_started = confirmation.is_some_and(|c| c.trial == Some(Trial::Started));
    let mut text = match report.fit.answer {
        Feasibility::Feasible if has_started => {
            format!("Feasible: libvirt starts a copy of {domain} {place}")
        }
        Feasibility::Feasible if report.node.live => {
            format!("Feasible: libvirt accepts {domain} {place}")
        }
        Feasibility::Feasible => {
            format!("Feasible: no document and no rule prevents {domain} from running {place}")
        }
        Feasibility::Infeasible => format!("Not feasible: {domain} cannot run {place}"),
        Feasibility::Unknown => format!(
            "Unknown: nothing known prevents {domain} from running {place}, but not all facts are \
             known"
        ),
    };
    let node = &report.node;
    let mut facts = Vec::new();
    facts.extend(
        node.domain_type
            .as_ref()
            .map(|t| format!("domain type {t}")),
    );
    facts.extend(node.arch.clone());
    facts.extend(node.libvirt_version.map(|v| format!("libvirt {v}")));
    facts.extend(node.qemu_version.map(|v| format!("QEMU {v}")));
    if !facts.is_empty() {
        let _ok = write!(text, " ({})", facts.join(", "));
    }
    text.push('\n');
    text
}

fn show_finding(text: &mut String, finding: &RuleFinding) {
    wrap(text, "  * ", "    ", &plain(&finding.message));
    if let Some(words) = &finding.words {
        let outcome = match finding.stage {
            Some(Stage::Define) => "libvirt rejects the definition",
            Some(Stage::Start | Stage::Launch) => "libvirt fails to start the domain",
            Some(Stage::Emulator) => "QEMU exits at startup",
            None => "libvirt reports",
        };
        let line = format!("{outcome}: {}", plain(words));
        wrap(text, "    ", "      ", &line);
    }
    if let Some(remedy) = &finding.remedy {
        wrap(text, "    Remedy: ", "      ", &plain(remedy));
    }
}

pub(super) fn show_headroom(text: &mut String, room: &Headroom) {
    line(text, "\nHeadroom while the domain runs:");
    let vcpus = &room.vcpus;
    let more = if vcpus.pluggable.is_empty() {
        "no more can be plugged".to_owned()
    } else {
        format!(
            "{} more can be plugged ({})",
            vcpus.pluggable.len(),
            vcpus.pluggable
        )
    };
    line(
        text,
        &format!(
            "  vCPUs        {} of {}; {more}",
            vcpus.plugged, vcpus.maximum
        ),
    );
    let memory = &room.memory;
    let mut growth = Vec::new();
    if memory.virtio_mem > Bytes::ZERO {
        growth.push(format!("{} more by virtio-mem", memory.virtio_mem));
    }
    if memory.for_devices > Bytes::ZERO {
        let slots = match memory.free_slots {
            0 => "no DIMM slot is free".to_owned(),
            1 => "1 DIMM slot is free".to_owned(),
            free => format!("{free} DIMM slots are free"),
        };
        growth.push(format!(
            "{} more by new devices, {slots}",
            memory.for_devices
        ));
    }
    let more = if growth.is_empty() {
        "no more can be plugged".to_owned()
    } else {
        growth.join("; ")
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
        AgentChannel::Disconnected => "channel present, agent not connected",
        AgentChannel::Connected => "connected",
        AgentChannel::Unknown => "channel present, agent unknown",
    };
    line(text, &format!("  guest agent  {agent}"));
    for hint in &room.hints {
        wrap(text, "  * ", "    ", hint);
    }
}

fn show_confirmation(text: &mut String, report: &CheckReport) {
    let Some(confirmation) = &report.confirmation else {
        return;
    };
    line(text, "\nThe hypervisor's own answer:");
    let words = match &confirmation.dry_run {
        DryRun::Accepted => "dry run: libvirt accepts the definition".to_owned(),
        DryRun::Refused { words } => {
            format!("dry run: libvirt rejects the definition: {}", plain(words))
        }
        DryRun::Failed { reason } => format!("dry run: no answer: {}", plain(reason)),
    };
    wrap(text, "  ", "    ", &words);
    if report.agrees == Some(false) {
        let words = "(the rules alone, as used offline, predict another answer)";
        wrap(text, "    ", "    ", words);
    }
    show_cpu(text, confirmation);
    let words = match &confirmation.trial {
        None => return,
        Some(Trial::Started) => "start: a copy was started, paused, and destroyed".to_owned(),
        Some(Trial::Refused { words }) => format!("start: a copy failed: {}", plain(words)),
        Some(Trial::NotTried { reason }) => format!("start: not tried: {}", plain(reason)),
    };
    wrap(text, "  ", "    ", &words);
}

fn show_cpu(text: &mut String, confirmation: &Confirmation) {
    let words = match &confirmation.cpu {
        None => return,
        Some(CpuComparison::Identical) => "CPU: identical to the hypervisor's".to_owned(),
        Some(CpuComparison::Superset) => {
            "CPU: the hypervisor provides all of it, and more".to_owned()
        }
        // The dry run already quotes the message.
        Some(CpuComparison::Incompatible { words })
            if is_quoted_by(&confirmation.dry_run, words) =>
        {
            "CPU: the hypervisor does not provide all of it, with the same message".to_owned()
        }
        Some(CpuComparison::Incompatible { words }) => {
            format!(
                "CPU: the hypervisor does not provide all of it: {}",
                plain(words)
            )
        }
        Some(CpuComparison::Failed { reason }) => {
            format!("CPU: comparison failed: {}", plain(reason))
        }
    };
    wrap(text, "  ", "    ", &words);
}

fn is_quoted_by(dry_run: &DryRun, words: &str) -> bool {
    matches!(dry_run, DryRun::Refused { words: refusal } if refusal == words)
}

pub(super) fn line(text: &mut String, words: &str) {
    text.push_str(words);
    text.push('\n');
}
