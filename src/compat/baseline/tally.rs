//! Counts over the CPUs of a group of nodes, and the proposals that follow from them.
//!
//! Counts, because one CPU can be taken out again: that is how the cost of a node is found without
//! computing everything anew.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::models::{features_of, is_established, is_versioned, s390x_generation};
use super::node_cpu::{CpuView, is_migratable};
use super::{CpuProposal, ProposalKind};

/// Maximum number of proposals after the best.
const ALTERNATIVES_MAX: usize = 5;

#[derive(Debug, Default)]
pub(super) struct Tally<'c> {
    architecture: &'c str,
    cpus: usize,
    /// Number of CPUs that list each feature.
    listed: BTreeMap<&'c str, usize>,
    /// Number of CPUs that mention each feature, so that their libvirt knows its name.
    named: BTreeMap<&'c str, usize>,
    /// Number of CPUs that support each feature.
    supported: BTreeMap<&'c str, usize>,
    vendors: BTreeMap<Option<&'c str>, usize>,
    models: BTreeMap<&'c str, ModelTally<'c>>,
}

#[derive(Debug, Default)]
struct ModelTally<'c> {
    usable: usize,
    /// Number of CPUs with known blockers.
    blocked: usize,
    deprecated: usize,
    blockers: BTreeMap<&'c str, usize>,
}

/// The result for a group of nodes.
#[derive(Debug, Default)]
pub(super) struct Solution<'c> {
    /// The features that all nodes support.
    pub(super) features: BTreeSet<&'c str>,
    /// The best first.
    pub(super) proposals: Vec<CpuProposal>,
}

impl<'c> Tally<'c> {
    pub(super) fn new(architecture: &'c str) -> Self {
        Self {
            architecture,
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, cpu: &CpuView<'c>) {
        self.count(cpu, |count| *count += 1);
    }

    /// Takes a CPU out that was added.
    pub(super) fn remove(&mut self, cpu: &CpuView<'c>) {
        self.count(cpu, |count| *count = count.saturating_sub(1));
    }

    fn count(&mut self, cpu: &CpuView<'c>, change: impl Fn(&mut usize)) {
        change(&mut self.cpus);
        for feature in &cpu.listed {
            change(self.listed.entry(feature).or_default());
        }
        for feature in &cpu.supported {
            change(self.supported.entry(feature).or_default());
        }
        for feature in cpu.listed.union(&cpu.blockers) {
            change(self.named.entry(feature).or_default());
        }
        change(self.vendors.entry(cpu.vendor).or_default());
        for model in cpu.models {
            let tally = self.models.entry(&model.name).or_default();
            match model.usable {
                Some(true) => change(&mut tally.usable),
                Some(false) if !model.blockers.is_empty() => change(&mut tally.blocked),
                _ => {}
            }
            if model.deprecated {
                change(&mut tally.deprecated);
            }
            for blocker in &model.blockers {
                change(tally.blockers.entry(blocker).or_default());
            }
        }
    }

    /// Returns the known vendors of the CPUs.
    pub(super) fn vendors(&self) -> Vec<&'c str> {
        let vendors = self.vendors.iter().filter(|(_, count)| **count > 0);
        vendors.filter_map(|(vendor, _)| *vendor).collect()
    }

    /// Returns the features that some but not all CPUs support, with the number of those without.
    pub(super) fn not_common(&self) -> impl Iterator<Item = (&'c str, usize)> {
        let partly = |(name, count): (&&'c str, &usize)| {
            let lacking = self.cpus - count;
            (lacking > 0 && *count > 0 && is_migratable(name)).then_some((*name, lacking))
        };
        self.supported.iter().filter_map(partly)
    }

    /// Returns the models that are usable on all CPUs but one.
    pub(super) fn almost_usable(&self) -> BTreeSet<&'c str> {
        let models = self.models.iter();
        models
            .filter(|(_, model)| model.usable + 1 == self.cpus)
            .map(|(name, _)| *name)
            .collect()
    }

    /// Returns the common features and the best definitions.
    pub(super) fn solve(&self) -> Solution<'c> {
        if self.cpus == 0 {
            return Solution::default();
        }
        let all = |counts: &BTreeMap<&'c str, usize>| -> BTreeSet<&'c str> {
            let counts = counts.iter().filter(|(_, count)| **count == self.cpus);
            let names = counts.map(|(name, _)| *name);
            names.filter(|name| is_migratable(name)).collect()
        };
        let listed = all(&self.listed);
        let features = all(&self.supported);
        let vendors = self.vendors();
        let vendor = vendors.first().copied().filter(|_| vendors.len() == 1);
        let mut candidates: Vec<(Rank<'_>, CpuProposal)> = self
            .models
            .iter()
            .filter_map(|(name, model)| {
                let proposal = self.proposal(name, model, &listed, &features)?;
                let mut rank = Rank::new(self.architecture, name, vendor, &proposal);
                rank.is_32_bit = features.contains("lm")
                    && features_of(self.architecture, name)
                        .is_some_and(|known| !known.features.contains("lm"));
                Some((rank, proposal))
            })
            .collect();
        // A model of another vendor is a last resort: the guest would find a CPU that does not exist.
        let is_foreign = |(rank, _): &(Rank<'_>, CpuProposal)| rank.vendor == VendorRank::Other;
        if !candidates.iter().all(is_foreign) {
            candidates.retain(|candidate| !is_foreign(candidate));
        }
        candidates.sort_by(|(a, _), (b, _)| a.cmp(b));
        let proposals = without_twins(candidates.into_iter().map(|(_, proposal)| proposal));
        Solution {
            features,
            proposals,
        }
    }

    /// Returns the definition with a model that has the common features; `None` if the model does not
    /// run on every node.
    fn proposal(
        &self,
        name: &str,
        model: &ModelTally<'c>,
        listed: &BTreeSet<&'c str>,
        features: &BTreeSet<&'c str>,
    ) -> Option<CpuProposal> {
        let kind = if model.usable == self.cpus {
            ProposalKind::Usable
        } else if model.usable + model.blocked == self.cpus {
            ProposalKind::Reduced
        } else {
            return None;
        };
        let known = features_of(self.architecture, name);
        let of_model = known.map(|known| known.features.iter().chain(&known.removed));
        let blockers = model.blockers.iter().filter(|(_, count)| **count > 0);
        let disable: BTreeSet<&str> = blockers
            .map(|(name, _)| *name)
            .chain(of_model.into_iter().flatten().copied())
            .filter(|name| !features.contains(name))
            .collect();
        // An older libvirt rejects a definition with a name that it does not know.
        let is_known = |name: &&str| {
            is_established(name)
                || self
                    .named
                    .get(*name)
                    .is_some_and(|count| *count == self.cpus)
        };
        if !disable.iter().all(is_known) {
            return None;
        }
        // A feature that the model surely has needs no mention.
        let require: Vec<String> = listed
            .iter()
            .filter(|name| !known.is_some_and(|known| known.features.contains(*name)))
            .filter(|name| !disable.contains(*name))
            .map(|name| (*name).to_owned())
            .collect();
        let total = known.map(|known| {
            let own = known
                .features
                .iter()
                .filter(|name| !disable.contains(*name));
            own.count() + require.len()
        });
        Some(CpuProposal {
            model: name.to_owned(),
            kind,
            vendor: known.and_then(|known| known.vendor).map(str::to_owned),
            deprecated: model.deprecated > 0,
            features: total,
            require,
            disable: disable.into_iter().map(str::to_owned).collect(),
        })
    }
}

/// The order of proposals: the first is the best.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank<'n> {
    /// A model without 64 bits where all nodes have them: few guests expect one with them added.
    is_32_bit: bool,
    /// A model that needs nothing disabled also has a label on each node.
    kind: ProposalKind,
    deprecated: bool,
    vendor: VendorRank,
    /// A model whose features are unknown comes after the known ones, except on s390x.
    is_unknown: bool,
    generation: Reverse<Option<(usize, bool)>>,
    /// The closest model needs the fewest additions; this is how libvirt chooses.
    distance: usize,
    /// An unversioned name exists in more versions of libvirt, and is the one in KubeVirt's labels.
    is_versioned: bool,
    name: Reverse<&'n str>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum VendorRank {
    Same,
    /// A model for all vendors, such as qemu64.
    Any,
    Other,
}

impl<'n> Rank<'n> {
    fn new(
        architecture: &str,
        name: &'n str,
        vendor: Option<&str>,
        proposal: &CpuProposal,
    ) -> Self {
        let generation = s390x_generation(name)
            .filter(|_| architecture == "s390x")
            // Only base models are the same in every QEMU.
            .map(|(generation, is_base)| (generation + if is_base { 1000 } else { 0 }, is_base));
        Self {
            is_32_bit: false,
            kind: proposal.kind,
            deprecated: proposal.deprecated,
            vendor: match (&proposal.vendor, vendor) {
                (Some(own), Some(vendor)) if own == vendor => VendorRank::Same,
                (Some(_), _) => VendorRank::Other,
                (None, _) => VendorRank::Any,
            },
            is_unknown: proposal.features.is_none(),
            generation: Reverse(generation),
            distance: proposal.require.len() + proposal.disable.len(),
            is_versioned: is_versioned(name),
            name: Reverse(name),
        }
    }
}

/// Leaves out names for what an earlier proposal has already, and the end of the list.
fn without_twins(proposals: impl Iterator<Item = CpuProposal>) -> Vec<CpuProposal> {
    let mut kept: Vec<CpuProposal> = Vec::new();
    for proposal in proposals {
        let is_twin = |other: &CpuProposal| {
            proposal.features.is_some()
                && proposal.vendor == other.vendor
                && proposal.require == other.require
                && proposal.disable == other.disable
                && proposal.kind == other.kind
        };
        if !kept.iter().any(is_twin) {
            kept.push(proposal);
        }
        if kept.len() > ALTERNATIVES_MAX {
            break;
        }
    }
    kept
}
