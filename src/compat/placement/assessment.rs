//! Assesses one node by its labels and its `NodeVirtualization`.

use std::collections::BTreeSet;

use super::{Candidate, remedy};
use crate::compat::offer::{ARCH_LABEL, family, go_arch};
use crate::compat::{Feasibility, Offer, Requirement, RuleCode, RuleFinding, RuleSeverity, assess};
use crate::label::prefix::{CPU_FEATURE, NODE};

/// Returns the findings for one node, and the offer that they follow from.
pub(super) fn assess_node(
    domain: &Requirement,
    node: &Candidate,
    source: Option<&Candidate>,
) -> (Vec<RuleFinding>, Offer) {
    let by_labels = Offer::from_labels(&node.labels, domain);
    let mut labelled = match beyond_labels(domain, node) {
        Some(finding) => vec![finding],
        None => node_findings(domain, &by_labels),
    };
    settle_cpu(domain, node, source, &mut labelled);
    let reported = node.reported.offer().map(|offer| {
        let mut findings = node_findings(domain, offer);
        settle_cpu(domain, node, source, &mut findings);
        (findings, offer.clone())
    });
    let note = |text: &str| RuleFinding::note(RuleCode::Hypervisor, text);
    let (mut findings, offer) = match (Feasibility::of(&labelled), reported) {
        (_, None) => (labelled, by_labels),
        (_, Some((reported, _))) if Feasibility::of(&reported) == Feasibility::Unknown => {
            (labelled, by_labels)
        }
        (Feasibility::Infeasible, Some((reported, offer))) => match Feasibility::of(&reported) {
            Feasibility::Infeasible => (reported, offer),
            _ => {
                labelled.push(note(
                    "its NodeVirtualization contradicts that: the label is missing, or not \
                     virtnode's",
                ));
                (labelled, by_labels)
            }
        },
        (Feasibility::Feasible, Some((mut reported, offer))) => {
            if Feasibility::of(&reported) == Feasibility::Infeasible {
                reported.push(note(
                    "its labels say that it could: one is kept for a domain that runs there, or is \
                     not virtnode's",
                ));
            }
            (reported, offer)
        }
        (Feasibility::Unknown, Some(reported)) => reported,
    };
    findings.extend(different_cpu(domain, node, source));
    for finding in &mut findings {
        remedy::add_node_remedy(finding, domain, &offer);
    }
    findings.sort_by_key(|finding| finding.severity);
    (findings, offer)
}

/// Returns the finding for a domain that labels do not describe, or that the node's architecture
/// rules out.
fn beyond_labels(domain: &Requirement, node: &Candidate) -> Option<RuleFinding> {
    let unknown = |code, text: String| Some(RuleFinding::unknown(code, text));
    let virt_type = domain.virt_type.as_deref().unwrap_or("kvm");
    if let Some(arch) = domain.arch.as_deref() {
        let wanted = go_arch(arch);
        match node.labels.get(ARCH_LABEL).map(String::as_str) {
            Some(have) if have == wanted => {}
            None => {
                return unknown(
                    RuleCode::Architecture,
                    format!("the node lacks the kubelet's label {ARCH_LABEL}"),
                );
            }
            // Software emulation runs every architecture, and KVM on x86_64 also runs 32-bit
            // guests.
            Some(have) if virt_type == "qemu" || (have, wanted) == ("amd64", "386") => {
                return unknown(
                    RuleCode::Architecture,
                    format!("its labels describe {have} guests, but the domain is {wanted}"),
                );
            }
            Some(have) => {
                let text =
                    format!("the node is {have}, but the domain requires {wanted} for {virt_type}");
                return Some(RuleFinding::blocking(RuleCode::Architecture, text));
            }
        }
    }
    match node.labels.get(&format!("{NODE}/accelerator")) {
        None => unknown(
            RuleCode::DomainType,
            format!("the node lacks the label {NODE}/accelerator"),
        ),
        Some(have) if virt_type == "qemu" && have != "tcg" => unknown(
            RuleCode::DomainType,
            format!("its labels describe {have} domains, but this one is of type qemu"),
        ),
        Some(_) => None,
    }
}

/// Returns the findings of [`assess`] without those that [`unverified`] reports once for all nodes.
fn node_findings(domain: &Requirement, offer: &Offer) -> Vec<RuleFinding> {
    let mut findings = assess(domain, offer).findings;
    findings.retain(|finding| {
        let is_unverified = matches!(
            finding.code,
            RuleCode::Firmware
                | RuleCode::MemoryBacking
                | RuleCode::Memory
                | RuleCode::RawArguments
        );
        !(is_unverified && finding.severity == RuleSeverity::Unknown)
    });
    for finding in &mut findings {
        // These remedies mention flags of `virtnode check`.
        if finding.severity == RuleSeverity::Unknown {
            finding.remedy = None;
        }
    }
    findings
}

/// Removes unknown findings about a running domain's CPU for the node where it runs, and for nodes
/// with all CPU features of that node.
fn settle_cpu(
    domain: &Requirement,
    node: &Candidate,
    source: Option<&Candidate>,
    findings: &mut Vec<RuleFinding>,
) {
    let Some(source) = source.filter(|_| domain.live) else {
        return;
    };
    let is_unknown = |finding: &RuleFinding| {
        finding.severity == RuleSeverity::Unknown && finding.code == RuleCode::CpuModel
    };
    if !findings.iter().any(is_unknown) {
        return;
    }
    let (had, has) = (features(source), features(node));
    if node.here || (!had.is_empty() && had.is_subset(&has)) {
        findings.retain(|finding| !is_unknown(finding));
    }
}

fn features(node: &Candidate) -> BTreeSet<&str> {
    family(&node.labels, CPU_FEATURE)
        .map(|(name, _)| name)
        .collect()
}

/// Warns if a running domain with host-passthrough would find a different CPU: it can start on any
/// node, but migrate only between equal CPUs.
fn different_cpu(
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
    let finding = RuleFinding::warning(
        RuleCode::Migratable,
        "its CPU differs from the CPU where the domain runs: the domain can be restarted here, but \
         not migrated",
    );
    Some(finding.remedy("use host-model or a named model for a domain to be migrated"))
}

/// Returns the requirements of a domain on which neither labels nor `NodeVirtualization` report.
pub(super) fn unverified(domain: &Requirement) -> Vec<String> {
    let mut unverified = Vec::new();
    if let Some(firmware) = &domain.firmware.automatic {
        let secure = if domain.firmware.is_secure() {
            " with secure boot"
        } else {
            ""
        };
        unverified.push(format!("whether the node has {firmware} firmware{secure}"));
    }
    if let Some(facts) = &domain.domain {
        let memory = facts.memory.asked();
        let pages = if domain.backing.huge_pages {
            " of huge pages"
        } else {
            ""
        };
        unverified.push(format!(
            "whether {memory}{pages} is free: let the pod request it"
        ));
    }
    if let Some(source) = &domain.backing.source {
        unverified.push(format!("whether the node supports memory from {source}"));
    }
    let devices = domain.host_devices;
    if devices.vfio() > 0 || devices.others > 0 {
        unverified.push(
            "whether the host devices of the domain exist there; a domain with such devices cannot \
             be migrated while it runs"
                .to_owned(),
        );
    }
    if domain.raw_arguments {
        unverified.push("whether QEMU there accepts the arguments that bypass libvirt".to_owned());
    }
    if domain.cpu.mode.as_deref() == Some("host-passthrough") {
        unverified.push(
            "whether CPU, microcode and kernel are the same: otherwise a domain with CPU mode \
             host-passthrough can only be restarted there, not migrated"
                .to_owned(),
        );
    }
    unverified
}
