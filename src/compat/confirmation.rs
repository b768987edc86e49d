//! What the hypervisor itself said, held against what was computed.

use serde::Serialize;

use super::{Answer, Code, Finding, Fit, Severity, Stage};

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
const NOT_ASKED: [Code; 5] = [
    Code::Firmware,
    Code::LaunchSecurity,
    Code::MemoryBacking,
    Code::HostDevice,
    Code::RawArguments,
];

/// The answer with the hypervisor's own beside it.
///
/// Where something was unknown and the hypervisor knows, its word decides. Where the two differ,
/// both are said, and the answer is the less hopeful one.
#[must_use]
pub fn confirm(mut fit: Fit, confirmation: &Confirmation) -> Fit {
    match &confirmation.dry_run {
        DryRun::Refused { words } => {
            // Unknown findings that this explains have served.
            fit.findings.retain(|finding| {
                finding.severity != Severity::Unknown || !is_said_by(finding, words)
            });
            let foreseen = fit.blocking().any(|finding| is_asked(finding));
            let message = match foreseen {
                true => return fit.with([]),
                false => {
                    "libvirt itself refuses it in a dry run, for a reason that was not foreseen"
                }
            };
            let finding = Finding::new(Severity::Blocks, Code::Hypervisor, message)
                .at_start(words)
                .remedy("change what it complains of; if it is wrong, tell us");
            fit.with([finding])
        }
        DryRun::Accepted => {
            fit.findings
                .retain(|finding| finding.severity != Severity::Unknown || !is_asked(finding));
            let contradicted = fit.blocking().any(|finding| is_asked(finding));
            match contradicted {
                true => {
                    let message = "libvirt itself accepts it in a dry run, against what is computed \
                                   above: one of the two is wrong; please tell us";
                    let finding = Finding::new(Severity::Warning, Code::Hypervisor, message);
                    fit.with([finding])
                }
                false => fit.with([]),
            }
        }
        DryRun::Failed { .. } => fit,
    }
}

/// Whether a dry run answers what this finding is about.
fn is_asked(finding: &Finding) -> bool {
    !NOT_ASKED.contains(&finding.code)
        && matches!(finding.stage, Some(Stage::Define | Stage::Start))
}

fn is_said_by(finding: &Finding, words: &str) -> bool {
    is_asked(finding)
        && finding
            .words
            .as_deref()
            .is_none_or(|own| words.contains(own))
}

impl Confirmation {
    /// Whether the hypervisor's answer is the computed one, as far as it was asked.
    pub fn agrees_with(&self, computed: &Fit) -> Option<bool> {
        let blocked = computed.blocking().any(is_asked);
        match &self.dry_run {
            DryRun::Accepted => Some(!blocked),
            DryRun::Refused { .. } => Some(blocked || computed.answer == Answer::Unknown),
            DryRun::Failed { .. } => None,
        }
    }
}
