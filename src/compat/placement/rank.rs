//! The order of nodes.

use std::cmp::Reverse;

use super::{Candidate, NodeAssessment};
use crate::capability::Version;
use crate::compat::{Feasibility, Offer, Requirement, RuleSeverity};
use crate::label::prefix::NODE;

/// The sort key of a node; the smaller one comes first. The criteria, in this order:
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// feasible, unknown, infeasible;
    answer: u8,
    /// nodes that accept pods and can start domains first;
    is_closed: bool,
    /// the node where the domain runs last;
    is_here: bool,
    /// the same CPU as that node first;
    is_other_cpu: bool,
    /// no older QEMU than that node first;
    is_older: bool,
    /// fewer warnings;
    warnings: usize,
    /// fewer blocking and unknown findings;
    reasons: usize,
    /// a larger maximum of vCPUs for the machine type;
    room: Reverse<Option<u32>>,
    /// the name.
    name: String,
}

impl Rank {
    pub(super) fn new(
        domain: &Requirement,
        node: &Candidate,
        offer: &Offer,
        source: Option<&Candidate>,
        answer: &NodeAssessment,
    ) -> Self {
        let host_model = |node: &Candidate| node.labels.get(&format!("{NODE}/host-model")).cloned();
        let qemu = |node: &Candidate| {
            let version = node.labels.get(&format!("{NODE}/qemu-version"))?;
            version.parse::<Version>().ok()
        };
        let count = |severity| {
            let findings = answer.findings.iter();
            findings.filter(|f| f.severity == severity).count()
        };
        let machine = domain
            .machine_on(offer.arch.as_deref())
            .and_then(|name| offer.machines.as_ref()?.get(offer.canonical(name)));
        Self {
            answer: match answer.answer {
                Feasibility::Feasible => 0,
                Feasibility::Unknown => 1,
                Feasibility::Infeasible => 2,
            },
            is_closed: node.cordoned || node.ready == Some(false) || node.cut_off,
            is_here: node.here,
            is_other_cpu: source.is_some_and(|source| host_model(source) != host_model(node)),
            is_older: source.is_some_and(|source| qemu(node) < qemu(source)),
            warnings: count(RuleSeverity::Warning),
            reasons: count(RuleSeverity::Blocks) + count(RuleSeverity::Unknown),
            room: Reverse(machine.and_then(|machine| machine.max_vcpus.number())),
            name: node.name.clone(),
        }
    }
}
