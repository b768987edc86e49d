//! A domain held against a node.

use serde::Serialize;

use super::{Answer, Finding, Offer, Requirement, Severity};

/// What came of holding a domain against a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fit {
    /// Whether the domain would run there.
    pub answer: Answer,
    /// All that was found, what blocks first.
    pub findings: Vec<Finding>,
}

impl Fit {
    /// The answer that follows from findings.
    pub fn from_findings(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.severity);
        let answer = match findings.first().map(|finding| finding.severity) {
            Some(Severity::Blocks) => Answer::Infeasible,
            Some(Severity::Unknown) => Answer::Unknown,
            _ => Answer::Feasible,
        };
        Self { answer, findings }
    }
}

/// Whether a domain would run on a node, with every reason and remedy.
pub fn fits(_domain: &Requirement, _node: &Offer) -> Fit {
    Fit::from_findings(Vec::new())
}
