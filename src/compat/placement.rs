//! A domain held against every node of a cluster.
//!
//! The labels decide, because the scheduler goes by them. What a node's `NodeVirtualization` tells
//! can take back what the labels promise (one that is only kept for a running domain, say), and
//! settle what they leave open. Where the two differ, the affinity names the nodes, so that it
//! says what the answers say.

mod cure;
mod judge;
mod rank;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use serde::Serialize;

use super::affinity::{Affinity, Expression, NodeLabels, Operator, Term};
use super::offer::family;
use super::{Feasibility, Offer, Requirement, RuleFinding};
use crate::label::prefix::{MACHINE, MACHINE_ALIAS, NODE};

/// The most nodes that an affinity names in one way. What is above is said instead.
const MOST_NAMED: usize = 50;

/// A node as it is known from outside.
#[derive(Debug, Clone, Default)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: NodeLabels,
    /// Whether the kubelet says that it is ready; `None` if that is not told.
    pub ready: Option<bool>,
    /// Whether it takes no new pods.
    pub cordoned: bool,
    /// Whether the domain runs there now.
    pub here: bool,
    /// Whether its daemon says that it has no connection to libvirt.
    pub cut_off: bool,
    /// What is told of it beside the labels, for this very domain.
    pub reported: ReportedOffer,
}

/// What a `NodeVirtualization` tells of a node, for one domain.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ReportedOffer {
    /// Nothing: there is none, or nothing in it about such domains.
    #[default]
    None,
    /// That it has this.
    Offer(Box<Offer>),
    /// What was so long ago that nobody keeps it true any more.
    Stale,
    /// Something that cannot be read.
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

/// What is to be known of a node beside whether it fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateState {
    /// It takes no new pods.
    Cordoned,
    /// The kubelet does not say that it is ready.
    NotReady,
    /// The domain runs there now.
    RunsHere,
    /// Its daemon has no connection to libvirt.
    CutOff,
    /// Its `NodeVirtualization` is out of date, and was not gone by.
    Stale,
    /// Its `NodeVirtualization` cannot be read.
    Unreadable,
}

/// What came of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeAssessment {
    /// The node.
    pub name: String,
    /// Whether the domain would run there.
    pub answer: Feasibility,
    /// Whether its labels alone say so to the scheduler.
    pub matched: bool,
    /// What else is to be known.
    pub states: Vec<CandidateState>,
    /// All that was found, what blocks first.
    pub findings: Vec<RuleFinding>,
}

/// What came of all nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// The nodes of which something is told, the best first.
    pub nodes: Vec<NodeAssessment>,
    /// What a pod has to ask for; `None` if no node fits and labels cannot say so.
    pub affinity: Option<Affinity>,
    /// The nodes that the affinity takes or leaves by name, since their labels say otherwise.
    pub named: Vec<String>,
    /// How many more there are, which it does not name.
    pub unnamed: usize,
    /// What the domain needs and nothing here tells of any node.
    #[serde(rename = "unsaid")]
    pub unverified: Vec<String>,
    /// The nodes of which nothing is told: virtnode does not run there.
    #[serde(rename = "untold")]
    pub unlabeled: Vec<String>,
}

/// Which nodes can take a domain, why each other cannot, and how a pod asks for those that can.
pub fn find_targets(domain: &Requirement, nodes: &[Candidate]) -> Placement {
    let (told, untold): (Vec<&Candidate>, Vec<&Candidate>) =
        nodes.iter().partition(|node| is_told(node));
    let source = told.iter().copied().find(|node| node.here);
    let alias = domain.machine_on(domain.arch.as_deref());
    let alias = alias.map(|name| format!("{MACHINE_ALIAS}/{name}"));
    let meanings: BTreeSet<String> = told
        .iter()
        .filter_map(|node| node.labels.get(alias.as_deref()?).cloned())
        .collect();
    let affinity = Affinity::of(domain, &meanings);
    let mut judged: Vec<(rank::Rank, NodeAssessment)> = told
        .iter()
        .map(|node| {
            let (findings, offer) = judge::judge(domain, node, source);
            let answer = NodeAssessment {
                name: node.name.clone(),
                answer: judge::answer_of(&findings),
                matched: affinity.matches(&node.name, &node.labels),
                states: states(node),
                findings,
            };
            let rank = rank::Rank::new(domain, node, &offer, source, &answer);
            (rank, answer)
        })
        .collect();
    judged.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut targets = Placement {
        nodes: judged.into_iter().map(|(_, answer)| answer).collect(),
        unverified: judge::unverified(domain),
        unlabeled: untold.into_iter().map(|node| node.name.clone()).collect(),
        ..Placement::default()
    };
    targets.correct(affinity);
    targets
}

impl Placement {
    /// How many nodes fit.
    pub fn fitting(&self) -> usize {
        let fits = |node: &&NodeAssessment| node.answer == Feasibility::Feasible;
        self.nodes.iter().filter(fits).count()
    }

    /// Names in the affinity the nodes whose labels say otherwise than their answer.
    fn correct(&mut self, mut affinity: Affinity) {
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
        let (mut without, mut also) = (differs(true), differs(false));
        let mut unnamed = 0;
        for names in [&mut without, &mut also] {
            unnamed += names.len().saturating_sub(MOST_NAMED);
            names.truncate(MOST_NAMED);
        }
        for term in &mut affinity.terms {
            let fields = without
                .iter()
                .map(|name| Expression::name(Operator::NotIn, name));
            term.match_fields.extend(fields);
        }
        affinity.terms.extend(also.iter().map(|name| Term {
            match_fields: vec![Expression::name(Operator::In, name)],
            ..Term::default()
        }));
        self.unnamed = unnamed;
        self.named = without.into_iter().chain(also).collect();
        self.affinity = Some(affinity).filter(|affinity| !affinity.terms.is_empty());
    }
}

fn is_told(node: &Candidate) -> bool {
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
    let there = states.into_iter().filter(|(there, _)| *there);
    there.map(|(_, state)| state).collect()
}
