//! Assesses a domain on every node of a cluster and builds the affinity for the scheduler.
//!
//! Each node has up to two offers: one from its labels, one from its `NodeVirtualization`. The
//! labels have priority, because the scheduler sees nothing else:
//!
//! ```text
//! labels      NodeVirtualization   result
//! infeasible  not infeasible       infeasible, with a note: the scheduler would skip the node
//! feasible    infeasible           infeasible, with a note: the label is out of date
//! otherwise   known                that of the NodeVirtualization
//! otherwise   unknown or none      that of the labels
//! ```
//!
//! The affinity is built from labels alone. It lists by name the nodes whose result differs from
//! what their labels imply, at most 50 each way, so that the scheduler agrees with the results.
//! [`assessment`] decides one node, [`rank`] orders the nodes, [`remedy`] adds remedies on the
//! node's side.

mod assessment;
mod rank;
mod remedy;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use serde::Serialize;

use super::affinity::{Affinity, Expression, Operator, Term};
use super::offer::{NodeLabels, family};
use super::{Feasibility, Offer, Requirement, RuleFinding};
use crate::label::prefix::{MACHINE, MACHINE_ALIAS, NODE};

/// Maximum number of nodes that an affinity includes, or excludes, by name: it keeps the pod's
/// specification readable. `Placement::unnamed` counts the rest.
const MAX_NAMED: usize = 50;

/// A node of the cluster, as its objects describe it.
#[derive(Debug, Clone, Default)]
pub struct Candidate {
    pub name: String,
    pub labels: NodeLabels,
    /// The condition Ready; `None` if the node has none.
    pub ready: Option<bool>,
    /// True if the node accepts no new pods.
    pub cordoned: bool,
    /// True if the domain runs there now.
    pub here: bool,
    /// True if the node's daemon reports that it has no connection to libvirt.
    pub cut_off: bool,
    /// The offer from the node's `NodeVirtualization`.
    pub reported: ReportedOffer,
}

/// The offer of a `NodeVirtualization` for one domain.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ReportedOffer {
    /// There is no object, or it lists nothing for such domains.
    #[default]
    None,
    Offer(Box<Offer>),
    /// The object is so old that its daemon no longer updates it.
    Stale,
    /// The object does not match its schema.
    Unreadable,
}

impl ReportedOffer {
    fn offer(&self) -> Option<&Offer> {
        match self {
            Self::Offer(offer) => Some(offer),
            _ => None,
        }
    }
}

/// A property of a node that does not affect the assessment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateState {
    /// The node accepts no new pods.
    Cordoned,
    /// The condition Ready is not true.
    NotReady,
    RunsHere,
    /// The node's daemon has no connection to libvirt.
    CutOff,
    /// The `NodeVirtualization` is out of date and was ignored.
    Stale,
    /// The `NodeVirtualization` does not match its schema and was ignored.
    Unreadable,
}

/// The result for one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeAssessment {
    pub name: String,
    pub answer: Feasibility,
    /// True if the node's labels match the affinity, before names are added to it.
    pub matched: bool,
    pub states: Vec<CandidateState>,
    /// Ordered by severity, the worst first.
    pub findings: Vec<RuleFinding>,
}

/// The result for all nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// The nodes with labels or an offer, the best first.
    pub nodes: Vec<NodeAssessment>,
    /// The node affinity for the domain's pod; `None` if no node fits and labels cannot express
    /// that.
    pub affinity: Option<Affinity>,
    /// The nodes that the affinity includes or excludes by name, because their labels imply the
    /// opposite.
    pub named: Vec<String>,
    /// Number of further such nodes, which the affinity does not name.
    pub unnamed: usize,
    /// Requirements of the domain that no node reports on.
    #[serde(rename = "unsaid")]
    pub unverified: Vec<String>,
    /// The nodes without labels and offer: virtnode does not run there.
    #[serde(rename = "untold")]
    pub unlabeled: Vec<String>,
}

/// Returns the nodes that can run a domain, the reasons against each other one, and the affinity
/// that selects the former.
pub fn find_targets(domain: &Requirement, nodes: &[Candidate]) -> Placement {
    let (known, unlabeled): (Vec<&Candidate>, Vec<&Candidate>) =
        nodes.iter().partition(|node| is_known(node));
    let source = known.iter().copied().find(|node| node.here);
    let alias = domain.machine_on(domain.arch.as_deref());
    let alias = alias.map(|name| format!("{MACHINE_ALIAS}/{name}"));
    let meanings: BTreeSet<String> = known
        .iter()
        .filter_map(|node| node.labels.get(alias.as_deref()?).cloned())
        .collect();
    let affinity = Affinity::of(domain, &meanings);
    let mut ranked: Vec<(rank::Rank, NodeAssessment)> = known
        .iter()
        .map(|node| {
            let (findings, offer) = assessment::assess_node(domain, node, source);
            let assessment = NodeAssessment {
                name: node.name.clone(),
                answer: Feasibility::of(&findings),
                matched: affinity.matches(&node.name, &node.labels),
                states: states(node),
                findings,
            };
            let rank = rank::Rank::new(domain, node, &offer, source, &assessment);
            (rank, assessment)
        })
        .collect();
    ranked.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut placement = Placement {
        nodes: ranked
            .into_iter()
            .map(|(_, assessment)| assessment)
            .collect(),
        unverified: assessment::unverified(domain),
        unlabeled: unlabeled
            .into_iter()
            .map(|node| node.name.clone())
            .collect(),
        ..Placement::default()
    };
    placement.set_affinity(affinity);
    placement
}

impl Placement {
    /// Returns the number of nodes that can run the domain.
    pub fn fitting(&self) -> usize {
        let fits = |node: &&NodeAssessment| node.answer == Feasibility::Feasible;
        self.nodes.iter().filter(fits).count()
    }

    /// Adds to the affinity the names of nodes whose labels imply the opposite of their result.
    fn set_affinity(&mut self, mut affinity: Affinity) {
        let fits = |node: &NodeAssessment| node.answer == Feasibility::Feasible;
        if self.fitting() == 0 && self.nodes.iter().any(|node| node.matched) {
            return;
        }
        let differs = |matched: bool| {
            let wrong =
                move |node: &&NodeAssessment| node.matched == matched && fits(node) != matched;
            let names = self.nodes.iter().filter(wrong);
            let mut names: Vec<String> = names.map(|node| node.name.clone()).collect();
            names.sort_unstable();
            names
        };
        let (mut excluded, mut included) = (differs(true), differs(false));
        let mut unnamed = 0;
        for names in [&mut excluded, &mut included] {
            unnamed += names.len().saturating_sub(MAX_NAMED);
            names.truncate(MAX_NAMED);
        }
        for term in &mut affinity.terms {
            let fields = excluded
                .iter()
                .map(|name| Expression::name(Operator::NotIn, name));
            term.match_fields.extend(fields);
        }
        affinity.terms.extend(included.iter().map(|name| Term {
            match_fields: vec![Expression::name(Operator::In, name)],
            ..Term::default()
        }));
        self.unnamed = unnamed;
        self.named = excluded.into_iter().chain(included).collect();
        self.affinity = Some(affinity).filter(|affinity| !affinity.terms.is_empty());
    }
}

fn is_known(node: &Candidate) -> bool {
    node.reported.offer().is_some()
        || node.labels.contains_key(&format!("{NODE}/accelerator"))
        || family(&node.labels, MACHINE).next().is_some()
}

fn states(node: &Candidate) -> Vec<CandidateState> {
    let states = [
        (node.here, CandidateState::RunsHere),
        (node.cordoned, CandidateState::Cordoned),
        (node.ready == Some(false), CandidateState::NotReady),
        (node.cut_off, CandidateState::CutOff),
        (node.reported == ReportedOffer::Stale, CandidateState::Stale),
        (
            node.reported == ReportedOffer::Unreadable,
            CandidateState::Unreadable,
        ),
    ];
    let present = states.into_iter().filter(|(present, _)| *present);
    present.map(|(_, state)| state).collect()
}
