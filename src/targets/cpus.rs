//! Turns the nodes of a cluster into candidates for one CPU, for `virtnode baseline` and `virtnode
//! compare`; [`crate::compat::find_baseline`] judges them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;

use super::{Selector, is_cut_off, is_stale};
use crate::cluster::objects::NodeVirtualizationStatus;
use crate::cluster::objects::node_virtualization::CpuModelStatus;
use crate::cluster::{NodeInventory, Virtualizations};
use crate::compat::{CpuCandidate, CpuExclusion, NodeCpu, NodeModel};

/// The choice among the nodes of an inventory.
#[derive(Debug, Clone, Copy, Default)]
pub struct ChosenNodes<'c> {
    /// All nodes if there are none.
    pub names: &'c [String],
    pub selector: Option<&'c Selector>,
}

/// The chosen nodes.
#[derive(Debug, Clone, Default)]
pub struct CpuInventory {
    pub candidates: Vec<CpuCandidate>,
    /// Nodes whose daemon has no connection to libvirt: what they report may have changed.
    pub cut_off: Vec<String>,
    /// Parts of objects that were too large, by node.
    pub omitted: BTreeMap<String, Vec<String>>,
}

/// Returns the chosen nodes with their CPUs. Without Nodes, as in the output of `kubectl get
/// nodevirtualizations`, the objects count as nodes. `now` is the time of the inventory; if that is
/// unknown, the newest object counts as up to date.
pub fn cpu_candidates(
    inventory: NodeInventory,
    chosen: ChosenNodes<'_>,
    now: Option<Timestamp>,
) -> CpuInventory {
    let NodeInventory {
        nodes,
        mut virtualizations,
        ..
    } = inventory;
    let now = now.or_else(|| newest(&virtualizations));
    let has_nodes = !nodes.is_empty();
    let existing: BTreeSet<String> = if has_nodes {
        nodes.iter().map(|node| node.name.clone()).collect()
    } else {
        virtualizations.keys().cloned().collect()
    };
    let mut names: BTreeSet<String> = if chosen.names.is_empty() {
        existing.clone()
    } else {
        chosen.names.iter().cloned().collect()
    };
    if let Some(selector) = chosen.selector {
        let matching = nodes.iter().filter(|node| selector.matches(&node.labels));
        let matching: BTreeSet<&str> = matching.map(|node| node.name.as_str()).collect();
        names.retain(|name| matching.contains(name.as_str()) || !existing.contains(name));
    } else if chosen.names.is_empty() {
        // An object of a node that was removed.
        names.extend(virtualizations.keys().cloned());
    }
    let mut found = CpuInventory::default();
    let mut shared: BTreeMap<NodeCpu, Arc<NodeCpu>> = BTreeMap::new();
    for name in names {
        let status = virtualizations.remove(&name);
        let cpu = match status {
            _ if !existing.contains(&name) => Err(CpuExclusion::NotFound),
            None => Err(CpuExclusion::NoObject),
            Some(Err(_)) => Err(CpuExclusion::Unreadable),
            Some(Ok(status)) if is_stale(&status, now) => Err(CpuExclusion::Stale),
            Some(Ok(status)) => {
                if is_cut_off(&status) {
                    found.cut_off.push(name.clone());
                }
                let omitted = status.omitted.iter();
                let omitted = omitted.filter(|part| CPU_PARTS.contains(&part.as_str()));
                let omitted: Vec<String> = omitted.cloned().collect();
                if !omitted.is_empty() {
                    found.omitted.insert(name.clone(), omitted);
                }
                node_cpu(status).ok_or(CpuExclusion::NoModels)
            }
        };
        let cpu = cpu.map(|cpu| match shared.get(&cpu) {
            Some(same) => Arc::clone(same),
            None => {
                let cpu = Arc::new(cpu);
                shared.insert((*cpu).clone(), Arc::clone(&cpu));
                cpu
            }
        });
        found.candidates.push(CpuCandidate { name, cpu });
    }
    found
}

/// The parts of a `NodeVirtualization` that describe its CPU and may be omitted.
const CPU_PARTS: [&str; 3] = ["blockers", "unusableModels", "features"];

fn newest(virtualizations: &Virtualizations) -> Option<Timestamp> {
    let statuses = virtualizations.values().filter_map(|it| it.as_ref().ok());
    let times = statuses.filter_map(|status| status.last_probe_time);
    times.max().map(Timestamp::from)
}

/// Returns the CPU that an object describes; `None` if it describes none.
fn node_cpu(status: NodeVirtualizationStatus) -> Option<NodeCpu> {
    let cpu = status.cpu;
    if cpu.models.is_empty() && cpu.features.is_empty() {
        return None;
    }
    let models = models(cpu.models);
    Some(NodeCpu {
        architecture: status.architecture?,
        accelerator: status.accelerator?,
        vendor: cpu.vendor,
        host_model: cpu.host_model,
        features: cpu.features.into_iter().filter(|it| is_name(it)).collect(),
        models,
    })
}

/// True for a text that can be the name of a model or feature. Others have no place in a definition or
/// on a terminal.
fn is_name(text: &str) -> bool {
    const MAX: usize = 64;
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    !text.is_empty() && text.len() <= MAX && text.bytes().all(is_part)
}

fn models(all: Vec<CpuModelStatus>) -> Vec<NodeModel> {
    // The object lists blockers only for the model behind an alias.
    let blockers: BTreeMap<String, Vec<String>> = all
        .iter()
        .filter(|model| model.alias_of.is_some() && model.blockers.is_empty())
        .filter_map(|model| {
            let meant = model.alias_of.as_ref()?;
            let meant = all.iter().find(|other| other.name == *meant)?;
            Some((model.name.clone(), meant.blockers.clone()))
        })
        .collect();
    let model = |model: CpuModelStatus| {
        let usable = match model.usable.as_str() {
            "yes" => Some(true),
            "no" => Some(false),
            _ => None,
        };
        let blockers = match blockers.get(&model.name) {
            Some(blockers) => blockers.clone(),
            None => model.blockers,
        };
        NodeModel {
            name: model.name,
            usable,
            deprecated: model.deprecated,
            // A usable model has none, whatever the object says.
            blockers: if usable == Some(true) {
                Vec::new()
            } else {
                blockers
            },
        }
    };
    let models = all.into_iter().map(model);
    let are_names =
        |model: &NodeModel| is_name(&model.name) && model.blockers.iter().all(|it| is_name(it));
    models.filter(are_names).collect()
}
