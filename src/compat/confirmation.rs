//! Combines libvirt's own answers with the computed assessment.
//!
//! libvirt's answer decides, in both directions. The rules explain a rejection and name the remedy;
//! they decide only where a dry run does not reach: [`Stage::Launch`] and [`Stage::Emulator`].

use serde::Serialize;

use super::{Assessment, DefinitionCopy, NotChecked, RuleCode, RuleFinding, RuleSeverity, Stage};

/// libvirt's answer to a dry run (`virConnectDomainXMLToNative`) of [`super::dry_run_copy`].
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

/// The result of starting [`super::trial_copy`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "answer")]
pub enum Trial {
    /// The copy was started, paused, and destroyed.
    Started,
    Refused {
        /// libvirt's message, with QEMU's.
        words: String,
    },
    /// The copy was not started, or nothing is known of it.
    NotTried { reason: String },
}

/// libvirt's answers about one domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confirmation {
    pub dry_run: DryRun,
    /// `None` if the domain has no named CPU model.
    pub cpu: Option<CpuComparison>,
    /// `None` unless requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial: Option<Trial>,
}

/// The rules for parts of a definition that the started copy does not have.
const NOT_IN_TRIAL: [RuleCode; 4] = [
    RuleCode::RawArguments,
    RuleCode::HostDevice,
    RuleCode::Firmware,
    RuleCode::LaunchSecurity,
];

/// Returns the assessment with libvirt's answers, which decide.
///
/// `asked` is the definition that libvirt was given in the dry run, `tried` the one to start.
#[must_use]
pub fn confirm(
    computed: Assessment,
    confirmation: &Confirmation,
    asked: &DefinitionCopy,
    tried: Option<&DefinitionCopy>,
) -> Assessment {
    let mut assessment = computed;
    let findings = &mut assessment.findings;
    match &confirmation.dry_run {
        DryRun::Accepted => {
            accept(findings, is_in_dry_run);
            findings.extend(lacking_cpu(findings, confirmation.cpu.as_ref()));
        }
        DryRun::Refused { words } => {
            let rejection =
                RuleFinding::blocking(RuleCode::Hypervisor, "libvirt rejects the domain");
            refuse(findings, rejection.at_start(words));
        }
        DryRun::Failed { reason } => {
            findings.push(unanswered("libvirt did not answer the dry run", reason));
            return assessment.with([]);
        }
    }
    assessment.not_checked = asked.omitted.clone();
    match &confirmation.trial {
        Some(Trial::Started) => {
            accept(&mut assessment.findings, is_in_trial);
            let omitted = tried.map(|copy| copy.omitted.clone());
            assessment.not_checked.extend(omitted.unwrap_or_default());
            assessment.not_checked.push(NotChecked::new(
                "the guest's own start",
                "the copy is paused and has nothing to boot from",
            ));
        }
        Some(Trial::Refused { words }) => {
            let message = "libvirt or QEMU fails to start a copy of the domain";
            let mut failure = RuleFinding::blocking(RuleCode::Hypervisor, message);
            failure.words = Some(words.clone());
            refuse(&mut assessment.findings, failure.stage(Stage::Launch));
            assessment.not_checked.extend(asked.at_start.clone());
        }
        Some(Trial::NotTried { reason }) if confirmation.dry_run == DryRun::Accepted => {
            let finding = unanswered("no copy of the domain was started", reason);
            assessment.findings.push(finding);
            assessment.not_checked.extend(asked.at_start.clone());
        }
        Some(Trial::NotTried { .. }) | None => {
            assessment.not_checked.extend(asked.at_start.clone());
        }
    }
    assessment.with([])
}

/// Removes the findings that libvirt's acceptance disproves or settles.
fn accept(findings: &mut Vec<RuleFinding>, is_covered: fn(&RuleFinding) -> bool) {
    let is_open = |finding: &RuleFinding| {
        matches!(
            finding.severity,
            RuleSeverity::Blocks | RuleSeverity::Unknown
        )
    };
    findings.retain(|finding| !(is_open(finding) && is_covered(finding)));
}

/// Records a rejection in libvirt's words. A finding that predicts them explains it instead; other
/// findings remain.
fn refuse(findings: &mut Vec<RuleFinding>, rejection: RuleFinding) {
    let words = rejection.words.as_deref().unwrap_or_default();
    let predicts = |finding: &RuleFinding| {
        let is_open = finding.severity <= RuleSeverity::Unknown;
        let own = finding.words.as_deref();
        is_open && own.is_some_and(|own| words.contains(own))
    };
    let first = match findings.iter().position(predicts) {
        Some(place) => RuleFinding {
            severity: RuleSeverity::Blocks,
            words: rejection.words,
            ..findings.remove(place)
        },
        None => rejection,
    };
    findings.insert(0, first);
}

fn unanswered(what: &str, reason: &str) -> RuleFinding {
    RuleFinding::unknown(RuleCode::Hypervisor, format!("{what}: {reason}"))
}

/// Returns a warning if libvirt starts the domain although the hypervisor lacks CPU features of its
/// model, and no rule says so.
fn lacking_cpu(findings: &[RuleFinding], cpu: Option<&CpuComparison>) -> Option<RuleFinding> {
    let Some(CpuComparison::Incompatible { words }) = cpu else {
        return None;
    };
    let is_about_cpu = |finding: &RuleFinding| {
        matches!(
            finding.code,
            RuleCode::CpuModel | RuleCode::CpuFeature | RuleCode::CpuVendor
        )
    };
    if findings.iter().any(is_about_cpu) {
        return None;
    }
    let mut finding = RuleFinding::warning(
        RuleCode::CpuModel,
        "the hypervisor does not provide the whole CPU, but the definition does not make libvirt \
         insist on it: the guest gets less",
    );
    finding.words = Some(words.clone()).filter(|words| !words.is_empty());
    Some(finding)
}

/// True if a dry run covers the subject of the finding.
fn is_in_dry_run(finding: &RuleFinding) -> bool {
    finding.code != RuleCode::RawArguments
        && !matches!(finding.stage, Some(Stage::Launch | Stage::Emulator))
}

/// True if starting a copy covers the subject of the finding.
fn is_in_trial(finding: &RuleFinding) -> bool {
    !NOT_IN_TRIAL.contains(&finding.code)
}

impl Confirmation {
    /// True if libvirt's answer to the dry run equals the computed one; `None` without an answer.
    pub fn agrees_with(&self, computed: &Assessment) -> Option<bool> {
        let open = |severity| {
            let mut findings = computed.findings.iter();
            findings.any(|f| f.severity == severity && is_in_dry_run(f))
        };
        match &self.dry_run {
            DryRun::Accepted => Some(!open(RuleSeverity::Blocks)),
            DryRun::Refused { .. } => {
                Some(open(RuleSeverity::Blocks) || open(RuleSeverity::Unknown))
            }
            DryRun::Failed { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compat::Feasibility;

    fn computed(findings: Vec<RuleFinding>) -> Assessment {
        let assessment = Assessment {
            answer: Feasibility::Feasible,
            findings: Vec::new(),
            not_checked: vec![NotChecked::new("offline", "offline")],
            headroom: None,
        };
        assessment.with(findings)
    }

    fn copy() -> DefinitionCopy {
        DefinitionCopy {
            xml: String::new(),
            omitted: vec![NotChecked::new("omitted", "omitted")],
            at_start: vec![NotChecked::new("at start", "at start")],
        }
    }

    fn confirmed(findings: Vec<RuleFinding>, dry_run: DryRun, trial: Option<Trial>) -> Assessment {
        let confirmation = Confirmation {
            dry_run,
            cpu: None,
            trial,
        };
        confirm(computed(findings), &confirmation, &copy(), Some(&copy()))
    }

    fn blocking(stage: Stage) -> RuleFinding {
        RuleFinding::blocking(RuleCode::Memory, "no").stage(stage)
    }

    fn refused(words: &str) -> DryRun {
        DryRun::Refused {
            words: words.to_owned(),
        }
    }

    #[test]
    fn acceptance_disproves_findings_of_the_stages_that_a_dry_run_covers() {
        use Feasibility::{Feasible, Infeasible, Unknown};
        let unknown = |stage| RuleFinding::unknown(RuleCode::Memory, "perhaps").stage(stage);
        let raw = RuleFinding::unknown(RuleCode::RawArguments, "raw").stage(Stage::Define);
        for (finding, answer) in [
            (blocking(Stage::Define), Feasible),
            (blocking(Stage::Start), Feasible),
            (blocking(Stage::Launch), Infeasible),
            (blocking(Stage::Emulator), Infeasible),
            (unknown(Stage::Start), Feasible),
            (unknown(Stage::Launch), Unknown),
            (raw, Unknown),
        ] {
            let result = confirmed(vec![finding.clone()], DryRun::Accepted, None);
            assert_eq!(result.answer, answer, "{finding:?}");
            let names: Vec<&str> = result.not_checked.iter().map(|n| n.what.as_str()).collect();
            assert_eq!(names, ["omitted", "at start"]);
        }
    }

    #[test]
    fn refusal_decides_and_a_finding_that_predicts_it_explains_it() {
        let words = "unsupported configuration: too many of 7";
        let predicted = RuleFinding::unknown(RuleCode::Vcpus, "7 are too many")
            .at_start("too many")
            .remedy("use 6");
        let other = RuleFinding::unknown(RuleCode::Gic, "perhaps").stage(Stage::Start);
        let result = confirmed(vec![other, predicted], refused(words), None);
        assert_eq!(result.answer, Feasibility::Infeasible);
        let first = &result.findings[0];
        assert_eq!(first.code, RuleCode::Vcpus);
        assert_eq!(first.words.as_deref(), Some(words));
        assert_eq!(first.remedy.as_deref(), Some("use 6"));

        let result = confirmed(Vec::new(), refused(words), None);
        assert_eq!(result.answer, Feasibility::Infeasible);
        assert_eq!(result.findings[0].code, RuleCode::Hypervisor);
        assert_eq!(result.findings[0].words.as_deref(), Some(words));
    }

    #[test]
    fn missing_answer_is_unknown_and_never_feasible() {
        let failed = DryRun::Failed {
            reason: "no connection".to_owned(),
        };
        let result = confirmed(Vec::new(), failed.clone(), None);
        assert_eq!(result.answer, Feasibility::Unknown);
        assert_eq!(result.not_checked[0].what, "offline");
        let result = confirmed(vec![blocking(Stage::Define)], failed, None);
        assert_eq!(result.answer, Feasibility::Infeasible);
    }

    #[test]
    fn trial_settles_what_only_a_start_shows() {
        let open = || {
            vec![
                RuleFinding::unknown(RuleCode::Memory, "perhaps").stage(Stage::Launch),
                blocking(Stage::Emulator),
            ]
        };
        let result = confirmed(open(), DryRun::Accepted, Some(Trial::Started));
        assert_eq!(result.answer, Feasibility::Feasible, "{result:?}");
        let raw = RuleFinding::unknown(RuleCode::RawArguments, "raw").stage(Stage::Emulator);
        let result = confirmed(vec![raw], DryRun::Accepted, Some(Trial::Started));
        assert_eq!(result.answer, Feasibility::Unknown);
        let words = "cgroups say no".to_owned();
        let result = confirmed(Vec::new(), DryRun::Accepted, Some(Trial::Refused { words }));
        assert_eq!(result.answer, Feasibility::Infeasible);
        let reason = "too large".to_owned();
        let not_tried = Some(Trial::NotTried { reason });
        let result = confirmed(Vec::new(), DryRun::Accepted, not_tried.clone());
        assert_eq!(result.answer, Feasibility::Unknown);
        let result = confirmed(Vec::new(), refused("no"), not_tried);
        assert_eq!(result.answer, Feasibility::Infeasible);
    }

    #[test]
    fn accepted_domain_with_missing_cpu_features_yields_a_warning() {
        let confirmation = Confirmation {
            dry_run: DryRun::Accepted,
            cpu: Some(CpuComparison::Incompatible {
                words: "missing: svm".to_owned(),
            }),
            trial: None,
        };
        let result = confirm(computed(Vec::new()), &confirmation, &copy(), None);
        assert_eq!(result.answer, Feasibility::Feasible);
        let warning = &result.findings[0];
        assert_eq!(warning.severity, RuleSeverity::Warning);
        assert_eq!(warning.words.as_deref(), Some("missing: svm"));
    }
}
