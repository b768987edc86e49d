//! One node's findings, from its labels and from what else is told of it.

use std::collections::BTreeSet;

use super::{Candidate, cure};
use crate::compat::offer::{ARCH_LABEL, family, go_arch};
use crate::compat::{Feasibility, Offer, Requirement, RuleCode, RuleFinding, RuleSeverity, assess};
use crate::label::prefix::{CPU_FEATURE, NODE};

pub(super) fn answer_of(findings: &[RuleFinding]) -> Feasibility {
    match findings.iter().map(|finding| finding.severity).min() {
        Some(RuleSeverity::Blocks) => Feasibility::Infeasible,
        Some(RuleSeverity::Unknown) => Feasibility::Unknown,
        _ => Feasibility::Feasible,
    }
}

/// The findings for one node, and the offer that they rest on.
pub(super) fn judge(
    domain: &Requirement,
    node: &Candidate,
    source: Option<&Candidate>,
) -> (Vec<RuleFinding>, Offer) {
    let by_labels = Offer::from_labels(&node.labels, domain);
    let mut labelled = match beyond_labels(domain, node) {
        Some(finding) => vec![finding],
        None => held_against(domain, &by_labels),
    };
    settle_cpu(domain, node, source, &mut labelled);
    let told = node.reported.offer().map(|offer| {
        let mut findings = held_against(domain, offer);
        settle_cpu(domain, node, source, &mut findings);
        (findings, offer.clone())
    });
    let note = |text: &str| RuleFinding::new(RuleSeverity::Note, RuleCode::Hypervisor, text);
    let (mut findings, offer) = match (answer_of(&labelled), told) {
        (_, None) => (labelled, by_labels),
        (_, Some((told, _))) if answer_of(&told) == Feasibility::Unknown => (labelled, by_labels),
        (Feasibility::Infeasible, Some((told, offer))) => match answer_of(&told) {
            Feasibility::Infeasible => (told, offer),
            _ => {
                labelled.push(note(
                    "its NodeVirtualization says that it could; the label is missing, or not ours",
                ));
                (labelled, by_labels)
            }
        },
        (Feasibility::Feasible, Some((mut told, offer))) => {
            if answer_of(&told) == Feasibility::Infeasible {
                told.push(note(
                    "its labels say that it could: one is kept for a domain that runs there, or \
                     not ours",
                ));
            }
            (told, offer)
        }
        (Feasibility::Unknown, Some(told)) => told,
    };
    findings.extend(other_cpu(domain, node, source));
    for finding in &mut findings {
        cure::for_node(finding, domain, &offer);
    }
    findings.sort_by_key(|finding| finding.severity);
    (findings, offer)
}

/// What labels do not tell at all for such a domain, and what rules it out from the start.
fn beyond_labels(domain: &Requirement, node: &Candidate) -> Option<RuleFinding> {
    let unknown = |code, text: String| Some(RuleFinding::new(RuleSeverity::Unknown, code, text));
    let virt_type = domain.virt_type.as_deref().unwrap_or("kvm");
    if let Some(arch) = domain.arch.as_deref() {
        let wanted = go_arch(arch);
        match node.labels.get(ARCH_LABEL).map(String::as_str) {
            Some(have) if have == wanted => {}
            None => {
                return unknown(
                    RuleCode::Architecture,
                    format!("the kubelet's label {ARCH_LABEL} is not on it"),
                );
            }
            // Software emulation knows no borders, and KVM on x86_64 runs 32 bits as well.
            Some(have) if virt_type == "qemu" || (have, wanted) == ("amd64", "386") => {
                return unknown(
                    RuleCode::Architecture,
                    format!("its labels speak of {have} guests, and the domain is {wanted}"),
                );
            }
            Some(have) => {
                let text =
                    format!("the node is {have}, and the domain needs {wanted} for {virt_type}");
                return Some(RuleFinding::new(
                    RuleSeverity::Blocks,
                    RuleCode::Architecture,
                    text,
                ));
            }
        }
    }
    match node.labels.get(&format!("{NODE}/accelerator")) {
        None => unknown(
            RuleCode::DomainType,
            format!("the label {NODE}/accelerator is not on it"),
        ),
        Some(have) if virt_type == "qemu" && have != "tcg" => unknown(
            RuleCode::DomainType,
            format!("its labels speak of {have} domains, and this one is of type qemu"),
        ),
        Some(_) => None,
    }
}

/// What [`assess`] finds, less what is said once for all nodes.
fn held_against(domain: &Requirement, offer: &Offer) -> Vec<RuleFinding> {
    let mut findings = assess(domain, offer).findings;
    findings.retain(|finding| {
        let is_unsaid = matches!(
            finding.code,
            RuleCode::Firmware
                | RuleCode::MemoryBacking
                | RuleCode::Memory
                | RuleCode::RawArguments
        );
        !(is_unsaid && finding.severity == RuleSeverity::Unknown)
    });
    for finding in &mut findings {
        // Those are about flags for files.
        if finding.severity == RuleSeverity::Unknown {
            finding.remedy = None;
        }
    }
    findings
}

/// A running domain's CPU is no question where it runs, nor on a node that has every feature that
/// the one has where it runs.
fn settle_cpu(
    domain: &Requirement,
    node: &Candidate,
    source: Option<&Candidate>,
    findings: &mut Vec<RuleFinding>,
) {
    let Some(source) = source.filter(|_| domain.live) else {
        return;
    };
    let is_open = |finding: &RuleFinding| {
        finding.severity == RuleSeverity::Unknown && finding.code == RuleCode::CpuModel
    };
    if !findings.iter().any(is_open) {
        return;
    }
    let (had, has) = (features(source), features(node));
    if node.here || (!had.is_empty() && had.is_subset(&has)) {
        findings.retain(|finding| !is_open(finding));
    }
}

fn features(node: &Candidate) -> BTreeSet<&str> {
    family(&node.labels, CPU_FEATURE)
        .map(|(name, _)| name)
        .collect()
}

/// The host's own CPU is handed to the guest as it is, which can be started anywhere and moved to
/// its like only.
fn other_cpu(
    domain: &Requirement,
    node: &Candidate,
    source: Option<&Candidate>,
) -> Option<RuleFinding> {
    let is_plain = domain.cpu.mode.as_deref() == Some("host-passthrough");
    let source = source.filter(|_| domain.live && is_plain && !node.here)?;
    let model = |node: &Candidate| node.labels.get(&format!("{NODE}/host-model")).cloned();
    if features(source) == features(node) && model(source) == model(node) {
        return None;
    }
    let finding = RuleFinding::new(
        RuleSeverity::Warning,
        RuleCode::Migratable,
        "its CPU is another one than where the domain runs: it can be started here anew, and not \
         be migrated",
    );
    Some(finding.remedy("use host-model or a named model for a domain that is to move"))
}

/// What a domain needs, or what stands in its way, that neither labels nor `NodeVirtualization`
/// tell of a node.
pub(super) fn unverified(domain: &Requirement) -> Vec<String> {
    let mut unsaid = Vec::new();
    if let Some(firmware) = &domain.firmware {
        let secure = match domain.secure_boot {
            true => " with secure boot",
            false => "",
        };
        unsaid.push(format!("whether it has {firmware} firmware{secure}"));
    }
    if let Some(facts) = &domain.domain {
        let memory = facts.memory.asked();
        let pages = match domain.huge_pages {
            true => " of huge pages",
            false => "",
        };
        unsaid.push(format!(
            "whether {memory}{pages} are free there: let the pod request them"
        ));
    }
    if let Some(source) = &domain.memory_source {
        unsaid.push(format!("whether memory can come from {source} there"));
    }
    let devices = domain.host_devices;
    if devices.vfio() > 0 || devices.others > 0 {
        unsaid.push(
            "whether the very devices of the host are there that it is given; a domain with them \
             is not migrated while it runs"
                .to_owned(),
        );
    }
    if domain.raw_arguments {
        unsaid.push("whether QEMU takes the arguments behind libvirt's back there".to_owned());
    }
    if domain.cpu.mode.as_deref() == Some("host-passthrough") {
        unsaid.push(
            "whether its CPU, microcode and kernel are the same, without which a domain of the CPU \
             mode host-passthrough is started anew and not migrated"
                .to_owned(),
        );
    }
    unsaid
}
