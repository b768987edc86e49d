//! Compares libvirt's own answer with the computed assessment.

use serde::Serialize;

use super::{Assessment, Feasibility, RuleCode, RuleFinding, RuleSeverity, Stage};

/// libvirt's answer to a dry run (`virConnectDomainXMLToNative`) of [`super::dry_run_xml`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum DryRun {
    /// libvirt would start the emulator, which may still exit.
    Accepted,
    Refused {
        /// libvirt's message.
        words: String,
    },
    /// The call failed.
    Failed { reason: String },
}

/// libvirt's comparison of the domain's CPU with the hypervisor's
/// (`virConnectCompareHypervisorCPU`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "answer")]
pub enum CpuComparison {
    Identical,
    /// The hypervisor has additional features.
    Superset,
    Incompatible {
        /// libvirt's message, with the missing features.
        words: String,
    },
    /// The call failed.
    Failed {
        reason: String,
    },
}

/// libvirt's answers about one domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confirmation {
    pub dry_run: DryRun,
    /// `None` if the domain has no named CPU model.
    pub cpu: Option<CpuComparison>,
}

/// The rules for parts of a definition that a dry run omits.
const NOT_COVERED: [RuleCode; 5] = [
    RuleCode::Firmware,
    RuleCode::LaunchSecurity,
    RuleCode::MemoryBacking,
    RuleCode::HostDevice,
    RuleCode::RawArguments,
];

/// Returns the assessment, completed by libvirt's answers.
///
/// libvirt's answer settles unknown findings. If it contradicts the computed ones, the assessment
/// reports both and keeps the more pessimistic answer.
#[must_use]
pub fn confirm(assessment: Assessment, confirmation: &Confirmation) -> Assessment {
    let contradiction = cpu_contradiction(&assessment, confirmation.cpu.as_ref());
    confirm_dry_run(assessment, confirmation).with(contradiction)
}

/// Returns a warning if the comparison of CPUs contradicts the computed findings.
fn cpu_contradiction(assessment: &Assessment, cpu: Option<&CpuComparison>) -> Option<RuleFinding> {
    let named =
        |finding: &&RuleFinding| matches!(finding.code, RuleCode::CpuModel | RuleCode::CpuFeature);
    let about_cpu = || assessment.findings.iter().filter(named);
    let is_refused =
        |f: &RuleFinding| f.severity == RuleSeverity::Blocks && f.stage == Some(Stage::Start);
    match cpu? {
        CpuComparison::Incompatible { words } if about_cpu().next().is_none() => {
            let message = "libvirt's comparison of CPUs finds missing features that virtnode did \
                           not predict";
            Some(RuleFinding::warning(RuleCode::Hypervisor, message).at_start(words))
        }
        CpuComparison::Identical | CpuComparison::Superset if about_cpu().any(is_refused) => {
            let message = "libvirt's comparison of CPUs finds nothing missing, contrary to the \
                           computed result; please report this as a bug of virtnode";
            Some(RuleFinding::warning(RuleCode::Hypervisor, message))
        }
        _ => None,
    }
}

fn confirm_dry_run(mut assessment: Assessment, confirmation: &Confirmation) -> Assessment {
    match &confirmation.dry_run {
        DryRun::Refused { words } => {
            if !assessment.blocking().any(is_covered) {
                settle(&mut assessment.findings, words);
            }
            assessment.with([])
        }
        DryRun::Accepted => {
            assessment.findings.retain(|finding| {
                finding.severity != RuleSeverity::Unknown || !is_covered(finding)
            });
            if !assessment.blocking().any(is_covered) {
                return assessment.with([]);
            }
            let message = "libvirt accepts the domain in a dry run, contrary to the computed \
                           result; please report this as a bug of virtnode";
            assessment.with([RuleFinding::warning(RuleCode::Hypervisor, message)])
        }
        DryRun::Failed { .. } => assessment,
    }
}

/// Handles a rejection that no known finding predicts: it settles the unknown finding that it is
/// about, or adds a new one.
fn settle(findings: &mut Vec<RuleFinding>, words: &str) {
    let is_unknown =
        |finding: &RuleFinding| finding.severity == RuleSeverity::Unknown && is_covered(finding);
    let names_it = |finding: &RuleFinding| {
        let own = finding.words.as_deref();
        is_unknown(finding) && own.is_some_and(|own| words.contains(own))
    };
    let place = findings.iter().position(names_it).or_else(|| {
        findings
            .iter()
            .position(|f| is_unknown(f) && f.words.is_none())
    });
    if let Some(finding) = place.and_then(|place| findings.get_mut(place)) {
        finding.severity = RuleSeverity::Blocks;
        finding.words = Some(words.to_owned());
        return;
    }
    let message = "libvirt rejects the domain in a dry run, for a reason that virtnode did not \
                   predict";
    findings.push(
        RuleFinding::blocking(RuleCode::Hypervisor, message)
            .at_start(words)
            .remedy("change what libvirt rejects, and report this as a bug of virtnode"),
    );
}

/// True if a dry run covers the subject of the finding.
fn is_covered(finding: &RuleFinding) -> bool {
    !NOT_COVERED.contains(&finding.code)
        && matches!(finding.stage, Some(Stage::Define | Stage::Start))
}

impl Confirmation {
    /// True if libvirt's answer equals the computed one, for the part that the dry run covers;
    /// `None` without an answer.
    pub fn agrees_with(&self, computed: &Assessment) -> Option<bool> {
        let blocked = computed.blocking().any(is_covered);
        match &self.dry_run {
            DryRun::Accepted => Some(!blocked),
            DryRun::Refused { .. } => Some(blocked || computed.answer == Feasibility::Unknown),
            DryRun::Failed { .. } => None,
        }
    }
}
