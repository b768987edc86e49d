//! [`NodeCpu`]: the virtual CPUs that one node can give.

use std::collections::BTreeSet;

use super::models::features_of;
use crate::capability::{CpuModel, Usable, is_x86};

/// Features of libvirt's models that QEMU turns off unless the node has them, so their absence does not
/// make a model unusable (`kvm_default_props`, QEMU target/i386/kvm/kvm-cpu.c).
const NEVER_BLOCKERS: [&str; 2] = ["monitor", "svm"];

/// Features that prevent live migration (`migratable='no'` in libvirt's CPU map), which are not part of a
/// CPU for several nodes.
const NOT_MIGRATABLE: [&str; 1] = ["invtsc"];

/// The virtual CPUs that a node gives to domains of its own architecture with its best accelerator.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeCpu {
    /// In libvirt's spelling.
    pub architecture: String,
    /// `kvm`, or `tcg` for none.
    pub accelerator: String,
    pub vendor: Option<String>,
    /// The model that the mode host-model selects.
    pub host_model: Option<String>,
    /// The supported features as the node reports them; empty if it reports none.
    pub features: BTreeSet<String>,
    /// The models by name, with the blockers of those that are not usable. A model that is not listed
    /// counts as not usable.
    pub models: Vec<NodeModel>,
}

/// A named model on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeModel {
    pub name: String,
    /// `None` if the node does not report it.
    pub usable: Option<bool>,
    pub deprecated: bool,
    /// The missing features; empty if unknown.
    pub blockers: Vec<String>,
}

impl From<&CpuModel> for NodeModel {
    fn from(model: &CpuModel) -> Self {
        Self {
            name: model.name.clone(),
            usable: match model.usable {
                Some(Usable::Yes) => Some(true),
                Some(Usable::No) => Some(false),
                Some(Usable::Unknown) | None => None,
            },
            deprecated: model.deprecated,
            blockers: model.blockers.clone(),
        }
    }
}

/// The features of a [`NodeCpu`], derived once.
#[derive(Debug, Clone, Default)]
pub(super) struct CpuView<'c> {
    pub(super) models: &'c [NodeModel],
    pub(super) vendor: Option<&'c str>,
    /// The features that the node reports, which its libvirt knows by name.
    pub(super) listed: BTreeSet<&'c str>,
    /// These, and if they are not all, those of its usable models.
    pub(super) supported: BTreeSet<&'c str>,
    /// Features that make a model unusable.
    pub(super) blockers: BTreeSet<&'c str>,
    /// True if every other feature is absent. A libvirt without hypervisor-cpu-baseline reports only
    /// what its host model adds to a named one, and an object that is too large omits the features.
    pub(super) is_complete: bool,
}

impl NodeCpu {
    pub(super) fn view(&self) -> CpuView<'_> {
        let listed: BTreeSet<&str> = self.features.iter().map(String::as_str).collect();
        // Every x86 CPU has fpu, and no host model adds it.
        let is_complete = if is_x86(&self.architecture) {
            listed.contains("fpu")
        } else {
            !listed.is_empty()
        };
        let mut supported = listed.clone();
        if !is_complete {
            let usable = self.models.iter().filter(|m| m.usable == Some(true));
            for model in usable.filter_map(|m| features_of(&self.architecture, &m.name)) {
                let given = model.features.iter().copied();
                supported.extend(given.filter(|name| !NEVER_BLOCKERS.contains(name)));
            }
        }
        let blockers = self.models.iter().flat_map(|model| &model.blockers);
        CpuView {
            models: &self.models,
            vendor: self.vendor.as_deref(),
            is_complete,
            blockers: blockers.map(String::as_str).collect(),
            listed,
            supported,
        }
    }
}

impl CpuView<'_> {
    /// True if the node supports a feature; `None` if that is unknown.
    pub(super) fn gives(&self, feature: &str) -> Option<bool> {
        if self.supported.contains(feature) {
            Some(true)
        } else {
            (self.is_complete || self.blockers.contains(feature)).then_some(false)
        }
    }
}

/// True if a domain with the feature can be migrated.
pub(super) fn is_migratable(feature: &str) -> bool {
    !NOT_MIGRATABLE.contains(&feature)
}
