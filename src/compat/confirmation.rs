//! What the hypervisor itself said, held against what was computed.

use serde::Serialize;

use super::{Assessment, Feasibility, RuleCode, RuleFinding, RuleSeverity, Stage};

/// libvirt's answer to a dry run (`virConnectDomainXMLToNative`) of the judged part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum DryRun {
    /// It would define and start it. What the emulator then says is not known.
    Accepted,
    /// It would not.
    Refused {
        /// Its words.
        words: String,
    },
    /// It could not be asked.
    Failed {
        /// Why.
        reason: String,
    },
}

/// libvirt's answer to a comparison of the domain's CPU with what the hypervisor has
/// (`virConnectCompareHypervisorCPU`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum CpuComparison {
    /// The same.
    Identical,
    /// The hypervisor has more, which does no harm.
    Superset,
    /// The hypervisor lacks something.
    Incompatible {
        /// libvirt's words, with the features.
        words: String,
    },
    /// It could not be asked.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What the hypervisor was asked, and what it said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confirmation {
    /// The dry run.
    pub dry_run: DryRun,
    /// The comparison of CPUs; `None` where the domain names no CPU.
    pub cpu: Option<CpuComparison>,
}

/// What a dry run leaves out of a definition, so that it says nothing of it.
const NOT_ASKED: [RuleCode; 5] = [
    RuleCode::Firmware,
    RuleCode::LaunchSecurity,
    RuleCode::MemoryBacking,
    RuleCode::HostDevice,
    RuleCode::RawArguments,
];

/// The answer with the hypervisor's own beside it.
///
/// Where something was unknown and the hypervisor knows, its word decides. Where the two differ,
/// both are said, and the answer is the less hopeful one.
#[must_use]
pub fn confirm(fit: Assessment, confirmation: &Confirmation) -> Assessment {
    let doubt = doubt_about_cpu(&fit, confirmation.cpu.as_ref());
    confirm_dry_run(fit, confirmation).with(doubt)
}

/// What is to be said where the comparison of CPUs differs from what was computed.
fn doubt_about_cpu(fit: &Assessment, cpu: Option<&CpuComparison>) -> Option<RuleFinding> {
    let named =
        |finding: &&RuleFinding| matches!(finding.code, RuleCode::CpuModel | RuleCode::CpuFeature);
    let about_cpu = || fit.findings.iter().filter(named);
    let is_refused =
        |f: &RuleFinding| f.severity == RuleSeverity::Blocks && f.stage == Some(Stage::Start);
    match cpu? {
        CpuComparison::Incompatible { words } if about_cpu().next().is_none() => {
            let message = "libvirt's comparison of CPUs finds something missing that was not \
                           foreseen";
            Some(
                RuleFinding::new(RuleSeverity::Warning, RuleCode::Hypervisor, message)
                    .at_start(words),
            )
        }
        CpuComparison::Identical | CpuComparison::Superset if about_cpu().any(is_refused) => {
            let message = "libvirt's comparison of CPUs finds nothing missing, against what is \
                           computed above: one of the two is wrong; please tell us";
            Some(RuleFinding::new(
                RuleSeverity::Warning,
                RuleCode::Hypervisor,
                message,
            ))
        }
        _ => None,
    }
}

fn confirm_dry_run(mut fit: Assessment, confirmation: &Confirmation) -> Assessment {
    match &confirmation.dry_run {
        DryRun::Refused { words } => {
            if !fit.blocking().any(is_asked) {
                settle(&mut fit.findings, words);
            }
            fit.with([])
        }
        DryRun::Accepted => {
            fit.findings
                .retain(|finding| finding.severity != RuleSeverity::Unknown || !is_asked(finding));
            let contradicted = fit.blocking().any(is_asked);
            match contradicted {
                true => {
                    let message = "libvirt itself accepts it in a dry run, against what is computed \
                                   above: one of the two is wrong; please tell us";
                    let finding =
                        RuleFinding::new(RuleSeverity::Warning, RuleCode::Hypervisor, message);
                    fit.with([finding])
                }
                false => fit.with([]),
            }
        }
        DryRun::Failed { .. } => fit,
    }
}

/// libvirt refuses what nothing known blocks: what was unknown is settled, if this is about it.
fn settle(findings: &mut Vec<RuleFinding>, words: &str) {
    let is_open =
        |finding: &RuleFinding| finding.severity == RuleSeverity::Unknown && is_asked(finding);
    let names_it = |finding: &RuleFinding| {
        let own = finding.words.as_deref();
        is_open(finding) && own.is_some_and(|own| words.contains(own))
    };
    let place = findings.iter().position(names_it).or_else(|| {
        findings
            .iter()
            .position(|f| is_open(f) && f.words.is_none())
    });
    if let Some(finding) = place.and_then(|place| findings.get_mut(place)) {
        finding.severity = RuleSeverity::Blocks;
        finding.words = Some(words.to_owned());
        return;
    }
    let message = "libvirt itself refuses it in a dry run, for a reason that was not foreseen";
    findings.push(
        RuleFinding::new(RuleSeverity::Blocks, RuleCode::Hypervisor, message)
            .at_start(words)
            .remedy("change what it complains of; and tell us, for it should have been foreseen"),
    );
}

/// Whether a dry run answers what this finding is about.
fn is_asked(finding: &RuleFinding) -> bool {
    !NOT_ASKED.contains(&finding.code)
        && matches!(finding.stage, Some(Stage::Define | Stage::Start))
}

impl Confirmation {
    /// Whether the hypervisor's answer is the computed one, as far as it was asked.
    pub fn agrees_with(&self, computed: &Assessment) -> Option<bool> {
        let blocked = computed.blocking().any(is_asked);
        match &self.dry_run {
            DryRun::Accepted => Some(!blocked),
            DryRun::Refused { .. } => Some(blocked || computed.answer == Feasibility::Unknown),
            DryRun::Failed { .. } => None,
        }
    }
}
