//! Comparison of the CPUs that two nodes give, in the words of libvirt's hypervisor-cpu-compare.

use std::collections::BTreeSet;

use serde::Serialize;

use super::NodeCpu;
use super::node_cpu::CpuView;
use super::origin::OriginatedFeature;
use crate::units::words;

words! {
    /// The relation of the CPU that a node gives to another node's.
    pub enum CpuRelation {
        /// It has all of the other's, and no more.
        Identical = "identical",
        /// It has all of the other's, and more.
        Superset = "superset",
        /// The other has all of it, and more.
        Subset = "subset",
        /// Each lacks something of the other.
        Incompatible = "incompatible",
        /// A node does not report enough to decide.
        Unknown = "unknown",
    }
}

/// The comparison of two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuDifference {
    /// The relation of the second node's CPU to the first's.
    pub relation: CpuRelation,
    /// From the first to the second node, then back.
    pub directions: [CpuDirection; 2],
}

/// The fate of a domain with the CPU of one node on another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuDirection {
    pub from: String,
    pub to: String,
    /// libvirt's answer about the CPU of `from` on `to`: identical, superset, incompatible; or
    /// unknown.
    pub answer: CpuRelation,
    /// The sentence of `virsh hypervisor-cpu-compare` for this answer, with the nodes' names.
    pub words: String,
    /// Both vendors, if they differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendors: Option<[String; 2]>,
    /// The features of `from` that `to` lacks.
    pub missing: Vec<OriginatedFeature>,
    /// The features of `from` about which `to` reports nothing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown: Vec<String>,
    /// The models that are usable on `from` and not on `to`.
    pub models: Vec<String>,
}

impl CpuDifference {
    /// Compares two CPUs of one architecture and accelerator; others are unknown to each other.
    pub fn new(first: (&str, &NodeCpu), second: (&str, &NodeCpu)) -> Self {
        let ((_, first_cpu), (_, second_cpu)) = (first, second);
        let is_comparable = first_cpu.architecture == second_cpu.architecture
            && first_cpu.accelerator == second_cpu.accelerator;
        let views = (first_cpu.view(), second_cpu.view());
        let onward = direction((first.0, &views.0), (second.0, &views.1), is_comparable);
        let back = direction((second.0, &views.1), (first.0, &views.0), is_comparable);
        use CpuRelation::{Identical, Incompatible, Subset, Superset, Unknown};
        let relation = match (onward.answer, back.answer) {
            (Unknown, _) | (_, Unknown) => Unknown,
            (Incompatible, Incompatible) => Incompatible,
            (Incompatible, _) => Subset,
            (_, Incompatible) => Superset,
            _ => Identical,
        };
        Self {
            relation,
            directions: [onward, back],
        }
    }
}

fn direction(
    (from, has): (&str, &CpuView<'_>),
    (to, other): (&str, &CpuView<'_>),
    is_comparable: bool,
) -> CpuDirection {
    let mut missing = Vec::new();
    let mut unknown = Vec::new();
    for name in &has.supported {
        match other.gives(name) {
            Some(true) => {}
            Some(false) => missing.push(OriginatedFeature::new(name)),
            None => unknown.push((*name).to_owned()),
        }
    }
    let vendors = match (has.vendor, other.vendor) {
        (Some(a), Some(b)) if a != b => Some([a.to_owned(), b.to_owned()]),
        _ => None,
    };
    let has_more = other
        .supported
        .iter()
        .any(|name| !has.supported.contains(name));
    let answer = if !is_comparable {
        CpuRelation::Unknown
    } else if vendors.is_some() || !missing.is_empty() {
        CpuRelation::Incompatible
    // What `from` has beyond its list is unknown as well.
    } else if !unknown.is_empty() || !has.is_complete || !other.is_complete {
        CpuRelation::Unknown
    } else if has_more {
        CpuRelation::Superset
    } else {
        CpuRelation::Identical
    };
    missing.sort_by(|a, b| (a.origin, &a.name).cmp(&(b.origin, &b.name)));
    let usable = |view: &CpuView<'_>| -> BTreeSet<String> {
        let usable = view.models.iter().filter(|m| m.usable == Some(true));
        usable.map(|model| model.name.clone()).collect()
    };
    let theirs = usable(other);
    CpuDirection {
        words: words_of(answer, from, to),
        from: from.to_owned(),
        to: to.to_owned(),
        answer,
        vendors,
        missing,
        unknown,
        models: usable(has).difference(&theirs).cloned().collect(),
    }
}

/// Returns the sentence of virsh (tools/virsh-host.c), with names for "described in FILE" and "the host".
fn words_of(answer: CpuRelation, from: &str, to: &str) -> String {
    match answer {
        CpuRelation::Identical => format!(
            "CPU described in {from} is identical to the CPU provided by hypervisor on {to}"
        ),
        CpuRelation::Superset => format!(
            "The CPU provided by hypervisor on {to} is a superset of CPU described in {from}"
        ),
        CpuRelation::Incompatible => format!(
            "CPU described in {from} is incompatible with the CPU provided by hypervisor on {to}"
        ),
        CpuRelation::Subset | CpuRelation::Unknown => {
            format!("unknown: {from} or {to} does not report enough to compare them")
        }
    }
}
