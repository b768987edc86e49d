//! One CPU for many nodes: the best definition that all of them can give, and the differences between
//! them.
//!
//! ```text
//! NodeCpu of each node ─▶ group: one architecture and accelerator ─▶ Tally ─▶ proposals
//!                            │ others are excluded, with a reason       └─▶ cost of each CPU
//! ```
//! * A proposal consists of a model that every node's libvirt reports as usable, the common features that
//!   the model lacks (`require`), and features of the model that a node may lack (`disable`). If no model
//!   is usable everywhere, one whose missing features are known is reduced by them.
//! * Nothing is compatible because it is unknown: a node that does not report a model or feature does not
//!   have it, and a node that reports nothing is excluded.
//! * Nodes with the same CPU are one [`CpuClass`], so the result depends neither on their number nor on
//!   their order.

mod comparison;
mod definition;
mod models;
mod node_cpu;
mod origin;
mod tally;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

pub use self::comparison::{CpuDifference, CpuDirection, CpuRelation};
pub use self::definition::{KubevirtCpu, KubevirtFeature};
use self::node_cpu::CpuView;
pub use self::node_cpu::{NodeCpu, NodeModel};
pub use self::origin::{FeatureOrigin, OriginatedFeature};
use self::tally::{Solution, Tally};
use crate::units::words;

/// Maximum number of costs that are computed, the greatest first.
const COSTS_MAX: usize = 64;
/// Maximum number of nodes that are named as those without a feature.
const NAMES_MAX: usize = 10;

words! {
    /// The reason why a node is not part of a baseline.
    #[derive(PartialOrd, Ord)]
    pub enum CpuExclusion {
        NotFound = "not-found",
        NoObject = "no-object",
        Unreadable = "unreadable",
        Stale = "stale",
        NoModels = "no-models",
        OtherArchitecture = "other-architecture",
        OtherAccelerator = "other-accelerator",
    }
}

impl CpuExclusion {
    /// Returns the reason for people, as the end of a sentence about the node.
    pub fn describe(self) -> &'static str {
        match self {
            Self::NotFound => "does not exist",
            Self::NoObject => "has no NodeVirtualization: virtnode does not run there",
            Self::Unreadable => "has a NodeVirtualization that cannot be read",
            Self::Stale => "has a NodeVirtualization that is out of date",
            Self::NoModels => "reports no CPU models",
            Self::OtherArchitecture => "has another architecture",
            Self::OtherAccelerator => "has another accelerator",
        }
    }
}

/// A chosen node.
#[derive(Debug, Clone)]
pub struct CpuCandidate {
    pub name: String,
    /// Shared by nodes with the same CPU, or the reason why it is unknown.
    pub cpu: Result<Arc<NodeCpu>, CpuExclusion>,
}

/// A node that is not part of the result.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExcludedNode {
    pub name: String,
    pub reason: CpuExclusion,
    /// The architecture or accelerator, if that is the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
}

/// A way to define a CPU that all nodes can give.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuProposal {
    pub model: String,
    pub kind: ProposalKind,
    /// The CPU vendor of the model, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    /// True if a node's QEMU plans to remove the model.
    pub deprecated: bool,
    /// Number of the guest's features; absent if the features of the model are unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<usize>,
    /// Common features that the model lacks.
    pub require: Vec<String>,
    /// Features of the model that a node lacks.
    pub disable: Vec<String>,
}

/// The usability of a proposal's model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProposalKind {
    /// Every node reports the model as usable.
    Usable,
    /// A node lacks features of the model, all of which are disabled.
    Reduced,
}

/// Nodes with the same CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuClass {
    pub nodes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_model: Option<String>,
    /// Number of the features that the nodes are known to support.
    pub features: usize,
    /// False if the nodes do not report all of their features, so that only those of usable models are
    /// known.
    pub complete: bool,
}

/// The gain of the other nodes without those of one CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuCost {
    /// The nodes, all with the same CPU.
    pub nodes: Vec<String>,
    /// The best model without them; absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The features that only they lack.
    pub lacking: Vec<OriginatedFeature>,
    /// Usable models without them, which they lack. The first few.
    pub models: Vec<String>,
}

/// A feature that some of the nodes lack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UncommonFeature {
    #[serde(flatten)]
    pub feature: OriginatedFeature,
    /// Number of nodes that are not known to support it.
    pub lacking: usize,
    /// The names of the first ten.
    pub nodes: Vec<String>,
}

/// The best CPU for a group of nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuBaseline {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// The vendors of the nodes' CPUs. If there are several, libvirt calls the CPUs incompatible, and
    /// QEMU does not support migration between them, whatever the model.
    pub vendors: Vec<String>,
    /// Absent if no model is known to run on every node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<CpuProposal>,
    pub alternatives: Vec<CpuProposal>,
    /// The nodes by CPU, in the order of their names.
    pub classes: Vec<CpuClass>,
    pub excluded: Vec<ExcludedNode>,
    /// The features that every node supports.
    pub common: Vec<String>,
    /// The features that only some of them support, those that most nodes lack last.
    pub uncommon: Vec<UncommonFeature>,
    /// The most expensive nodes first.
    pub costs: Vec<CpuCost>,
}

/// Returns the best CPU for these nodes.
pub fn find_baseline(nodes: &[CpuCandidate]) -> CpuBaseline {
    let (groups, mut excluded) = grouped(nodes);
    // The largest group; of equal ones the first by name.
    let chosen = groups.iter().max_by(|(a, members), (b, others)| {
        let size = |group: &Group<'_>| group.values().map(Vec::len).sum::<usize>();
        size(members).cmp(&size(others)).then_with(|| b.cmp(a))
    });
    let Some(((architecture, accelerator), members)) = chosen else {
        excluded.sort();
        return CpuBaseline {
            excluded,
            ..CpuBaseline::default()
        };
    };
    for ((other, with), group) in &groups {
        let (reason, found) = if other != architecture {
            (CpuExclusion::OtherArchitecture, other)
        } else if with != accelerator {
            (CpuExclusion::OtherAccelerator, with)
        } else {
            continue;
        };
        excluded.extend(group.values().flatten().map(|name| ExcludedNode {
            name: (*name).to_owned(),
            reason,
            found: Some((*found).to_owned()),
        }));
    }
    excluded.sort();
    let mut classes: Vec<(Vec<&str>, &NodeCpu, CpuView<'_>)> = members
        .iter()
        .map(|(cpu, names)| {
            let mut names = names.clone();
            names.sort_unstable();
            (names, *cpu, cpu.view())
        })
        .collect();
    classes.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    let mut tally = Tally::new(architecture);
    for (_, _, view) in &classes {
        tally.add(view);
    }
    let Solution {
        features,
        proposals,
    } = tally.solve();
    let vendors = owned(&tally.vendors());
    let common = features.iter().map(|name| (*name).to_owned()).collect();
    let mut proposals = proposals.into_iter();
    let best = proposals.next();
    let uncommon = uncommon(&tally, &classes);
    let costs = costs(&mut tally, &classes, best.as_ref());
    let class = |(names, cpu, view): (Vec<&str>, &NodeCpu, CpuView<'_>)| CpuClass {
        nodes: owned(&names),
        vendor: cpu.vendor.clone(),
        host_model: cpu.host_model.clone(),
        features: view.supported.len(),
        complete: view.is_complete,
    };
    CpuBaseline {
        architecture: Some((*architecture).to_owned()),
        accelerator: Some((*accelerator).to_owned()),
        vendors,
        best,
        alternatives: proposals.collect(),
        common,
        uncommon,
        costs,
        excluded,
        classes: classes.into_iter().map(class).collect(),
    }
}

impl CpuBaseline {
    /// Number of nodes that the result is about.
    pub fn nodes(&self) -> usize {
        self.classes.iter().map(|class| class.nodes.len()).sum()
    }
}

/// The names of the nodes by CPU.
type Group<'n> = BTreeMap<&'n NodeCpu, Vec<&'n str>>;

/// Groups nodes by architecture and accelerator.
fn grouped(nodes: &[CpuCandidate]) -> (BTreeMap<(&str, &str), Group<'_>>, Vec<ExcludedNode>) {
    // Most nodes share the CPU of another, which its address shows at once.
    let mut shared: BTreeMap<*const NodeCpu, (&NodeCpu, Vec<&str>)> = BTreeMap::new();
    let mut excluded = Vec::new();
    for node in nodes {
        match &node.cpu {
            Ok(cpu) => {
                let (_, names) = shared
                    .entry(Arc::as_ptr(cpu))
                    .or_insert_with(|| (cpu, Vec::new()));
                names.push(node.name.as_str());
            }
            Err(reason) => excluded.push(ExcludedNode {
                name: node.name.clone(),
                reason: *reason,
                found: None,
            }),
        }
    }
    let mut groups: BTreeMap<(&str, &str), Group<'_>> = BTreeMap::new();
    for (cpu, names) in shared.into_values() {
        let group = groups.entry((&cpu.architecture, &cpu.accelerator));
        group.or_default().entry(cpu).or_default().extend(names);
    }
    (groups, excluded)
}

fn uncommon(
    tally: &Tally<'_>,
    classes: &[(Vec<&str>, &NodeCpu, CpuView<'_>)],
) -> Vec<UncommonFeature> {
    let describe = |(name, _): (&str, usize)| {
        let without = classes
            .iter()
            .filter(|(_, _, view)| !view.supported.contains(name));
        let mut nodes: Vec<&str> = without
            .flat_map(|(names, ..)| names.iter().copied())
            .collect();
        nodes.sort_unstable();
        UncommonFeature {
            feature: OriginatedFeature::new(name),
            lacking: nodes.len(),
            nodes: owned(&nodes[..nodes.len().min(NAMES_MAX)]),
        }
    };
    let mut features: Vec<UncommonFeature> = tally.not_common().map(describe).collect();
    features.sort_by(|a, b| (a.lacking, &a.feature).cmp(&(b.lacking, &b.feature)));
    features
}

fn costs<'c>(
    tally: &mut Tally<'c>,
    classes: &[(Vec<&str>, &NodeCpu, CpuView<'c>)],
    best: Option<&CpuProposal>,
) -> Vec<CpuCost> {
    const MODELS_MAX: usize = 5;
    if classes.len() < 2 {
        return Vec::new();
    }
    let sole: Vec<&str> = tally
        .not_common()
        .filter(|(_, lacking)| *lacking == 1)
        .map(|(name, _)| name)
        .collect();
    let almost = tally.almost_usable();
    let mut ranked: Vec<_> = classes
        .iter()
        .filter_map(|class| {
            let (names, _, view) = class;
            let lacking: Vec<&str> = sole
                .iter()
                .copied()
                .filter(|name| !view.supported.contains(name))
                .collect();
            let usable = view.models.iter().filter(|m| m.usable == Some(true));
            let usable: std::collections::BTreeSet<&str> =
                usable.map(|model| model.name.as_str()).collect();
            let models: Vec<&str> = almost.difference(&usable).copied().collect();
            let is_free = lacking.is_empty() && models.is_empty();
            (!is_free).then_some((names, view, lacking, models))
        })
        .collect();
    ranked.sort_by(|(a, _, lacking, models), (b, _, fewer, others)| {
        let size = (fewer.len(), others.len()).cmp(&(lacking.len(), models.len()));
        size.then_with(|| a.cmp(b))
    });
    ranked.truncate(COSTS_MAX);
    let cost =
        |(names, view, lacking, models): (&Vec<&str>, &CpuView<'c>, Vec<&str>, Vec<&str>)| {
            tally.remove(view);
            let without = tally.solve();
            tally.add(view);
            let model = without.proposals.into_iter().next();
            let mut lacking: Vec<OriginatedFeature> =
                lacking.into_iter().map(OriginatedFeature::new).collect();
            lacking.sort_by(|a, b| (a.origin, &a.name).cmp(&(b.origin, &b.name)));
            let is_other =
                |proposal: &CpuProposal| best.map(|best| &best.model) != Some(&proposal.model);
            let gains = !lacking.is_empty() || model.as_ref().is_some_and(is_other);
            gains.then(|| CpuCost {
                nodes: owned(names),
                model: model.map(|proposal| proposal.model),
                lacking,
                models: owned(&models[..models.len().min(MODELS_MAX)]),
            })
        };
    ranked.into_iter().filter_map(cost).collect()
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}
