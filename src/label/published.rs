//! From what is derived to what is published: removal needs proof, and a running domain's labels
//! stay.
//!
//! The kubelet evicts pods whose node affinity no longer holds when it restarts
//! (kubernetes#124586), so a label that disappears for a moment can cost a running domain its pod.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, Serializer};

use super::{FactSource, LabelKey, LabelSet, LabelValue, sources};

/// How many successful probes in a row must lack a label before it goes.
const PROBES_TO_REMOVE: u8 = 2;

/// What running domains here stand on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapabilitiesInUse {
    /// Machine types by canonical name.
    pub machines: BTreeSet<String>,
    /// CPU models.
    pub cpu_models: BTreeSet<String>,
    /// CPU features.
    pub cpu_features: BTreeSet<String>,
}

impl CapabilitiesInUse {
    /// Adds what others stand on.
    pub fn extend(&mut self, other: &Self) {
        self.machines.extend(other.machines.iter().cloned());
        self.cpu_models.extend(other.cpu_models.iter().cloned());
        self.cpu_features.extend(other.cpu_features.iter().cloned());
    }

    /// Whether a running domain stands on this label, in either schema.
    pub fn includes(&self, key: &LabelKey) -> bool {
        let prefix = key.prefix();
        let family = prefix.split('.').next().unwrap_or_default();
        let names = match family {
            "machine" | "machine-type" => &self.machines,
            "cpu-model" | "cpu-model-migration" | "host-model-cpu" => &self.cpu_models,
            "cpu-feature" | "host-model-required-features" => &self.cpu_features,
            _ => return false,
        };
        names.contains(key.name())
    }
}

/// One probe's outcome.
#[derive(Debug, Clone, Copy)]
pub struct ProbeResult<'p> {
    /// The labels that its facts call for.
    pub labels: &'p LabelSet,
    /// The sources that could not be read. With any, nothing is removed.
    pub failed: &'p [FactSource],
    /// What running domains stand on.
    pub in_use: &'p CapabilitiesInUse,
}

/// Why a label is kept that the last probe does not call for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RetentionReason {
    /// A running domain here stands on it.
    DomainUsesIt,
    /// It takes another successful probe without it to prove that it is gone.
    AwaitingSecondProbe,
}

impl RetentionReason {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::DomainUsesIt, Self::AwaitingSecondProbe];

    /// The word in metrics and JSON.
    pub fn code(self) -> &'static str {
        match self {
            Self::DomainUsesIt => "domain-uses-it",
            Self::AwaitingSecondProbe => "awaiting-second-probe",
        }
    }
}

impl Serialize for RetentionReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

/// A label that is kept though the last probe does not call for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RetainedLabel {
    /// Its key.
    pub key: LabelKey,
    /// Its value.
    pub value: LabelValue,
    /// Why it is kept.
    pub reason: RetentionReason,
}

/// What happened to a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    /// It is new.
    Added(LabelKey, LabelValue),
    /// It has another value: the old, the new.
    Changed(LabelKey, LabelValue, LabelValue),
    /// It is gone; the value it had.
    Removed(LabelKey, LabelValue),
}

impl LabelChange {
    /// The word in metrics and logs.
    pub fn action(&self) -> &'static str {
        match self {
            Self::Added(..) => "added",
            Self::Changed(..) => "changed",
            Self::Removed(..) => "removed",
        }
    }
}

/// The labels to publish, and what is remembered between probes to decide it.
#[derive(Debug, Clone, Default)]
pub struct PublishedLabels {
    labels: LabelSet,
    /// For each label that the last probe lacked, how many successful ones in a row did.
    lacking: BTreeMap<LabelKey, u8>,
    retained: Vec<RetainedLabel>,
}

impl PublishedLabels {
    /// Begins with what was published before, by this process or one before it.
    pub fn starting_from(labels: LabelSet) -> Self {
        Self {
            labels,
            ..Self::default()
        }
    }

    /// Takes over labels that turn out to have been published before: they go as others do, by
    /// proof. What is known already stays as it is.
    pub fn adopt(&mut self, before: LabelSet) {
        for (key, value) in before {
            self.labels.entry(key).or_insert(value);
        }
    }

    /// The labels to publish.
    pub fn labels(&self) -> &LabelSet {
        &self.labels
    }

    /// Those among them that the last probe does not call for.
    pub fn retained(&self) -> &[RetainedLabel] {
        &self.retained
    }

    /// Takes in a probe.
    ///
    /// * A label it calls for is published, with its value; but a known label whose value rests on
    ///   a source that failed keeps the value it has.
    /// * A label it lacks stays while a running domain stands on it, and until
    ///   two successful probes in a row lack it.
    /// * A probe that calls for nothing at all proves nothing, nor does one with a failed source.
    pub fn update(&mut self, probe: ProbeResult<'_>) -> Vec<LabelChange> {
        let proves_absence = probe.failed.is_empty() && !probe.labels.is_empty();
        let mut changes = Vec::new();
        self.retained.clear();
        let before = std::mem::take(&mut self.labels);
        for (key, value) in probe.labels {
            self.lacking.remove(key);
            let uncertain = || {
                sources(key)
                    .iter()
                    .any(|source| probe.failed.contains(source))
            };
            let value = match before.get(key) {
                None => {
                    changes.push(LabelChange::Added(key.clone(), value.clone()));
                    value
                }
                Some(old) if old == value || uncertain() => old,
                Some(old) => {
                    changes.push(LabelChange::Changed(
                        key.clone(),
                        old.clone(),
                        value.clone(),
                    ));
                    value
                }
            };
            self.labels.insert(key.clone(), value.clone());
        }
        for (key, value) in before {
            if self.labels.contains_key(&key) {
                continue;
            }
            let lacking = self.lacking.entry(key.clone()).or_default();
            *lacking = if proves_absence {
                lacking.saturating_add(1)
            } else {
                0
            };
            let reason = if probe.in_use.includes(&key) {
                RetentionReason::DomainUsesIt
            } else if *lacking < PROBES_TO_REMOVE {
                RetentionReason::AwaitingSecondProbe
            } else {
                self.lacking.remove(&key);
                changes.push(LabelChange::Removed(key, value));
                continue;
            };
            self.retained.push(RetainedLabel {
                key: key.clone(),
                value: value.clone(),
                reason,
            });
            self.labels.insert(key, value);
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(labels: &[(&str, &str)]) -> LabelSet {
        labels
            .iter()
            .map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap()))
            .collect()
    }

    fn take(
        published: &mut PublishedLabels,
        labels: &[(&str, &str)],
        failed: &[FactSource],
    ) -> Vec<String> {
        let in_use = CapabilitiesInUse::default();
        take_with(published, labels, failed, &in_use)
    }

    fn take_with(
        published: &mut PublishedLabels,
        labels: &[(&str, &str)],
        failed: &[FactSource],
        in_use: &CapabilitiesInUse,
    ) -> Vec<String> {
        let labels = set(labels);
        published
            .update(ProbeResult {
                labels: &labels,
                failed,
                in_use,
            })
            .iter()
            .map(|change| match change {
                LabelChange::Added(key, value) => format!("+{key}={value}"),
                LabelChange::Changed(key, old, new) => format!("{key}: {old} to {new}"),
                LabelChange::Removed(key, _) => format!("-{key}"),
            })
            .collect()
    }

    const Q35: (&str, &str) = ("machine.virtnode.io/pc-q35-10.0", "1024");
    const EPYC: (&str, &str) = ("cpu-model.virtnode.io/EPYC", "true");

    #[test]
    fn a_label_goes_after_two_successful_probes_without_it() {
        let mut published = PublishedLabels::default();
        assert_eq!(take(&mut published, &[Q35, EPYC], &[]).len(), 2);
        assert!(take(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(
            published.retained()[0].reason,
            RetentionReason::AwaitingSecondProbe
        );
        assert_eq!(
            take(&mut published, &[Q35], &[]),
            ["-cpu-model.virtnode.io/EPYC"]
        );
        assert!(published.retained().is_empty());
        assert_eq!(published.labels(), &set(&[Q35]));
    }

    #[test]
    fn a_failed_probe_in_between_starts_the_count_anew() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        assert!(take(&mut published, &[Q35], &[]).is_empty());
        assert!(take(&mut published, &[Q35], &[FactSource::DomainCapabilities]).is_empty());
        assert!(take(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(take(&mut published, &[Q35], &[]).len(), 1);
    }

    #[test]
    fn a_label_that_comes_back_is_counted_anew() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        for _ in 0..5 {
            assert!(take(&mut published, &[Q35], &[]).is_empty());
            assert!(take(&mut published, &[Q35, EPYC], &[]).is_empty());
        }
    }

    #[test]
    fn adopted_labels_go_by_proof_too() {
        let mut published = PublishedLabels::default();
        take(&mut published, &[Q35], &[]);
        published.adopt(set(&[EPYC, ("machine.virtnode.io/pc-q35-10.0", "1")]));
        assert_eq!(published.labels(), &set(&[Q35, EPYC]));
        assert!(take(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(
            take(&mut published, &[Q35], &[]),
            ["-cpu-model.virtnode.io/EPYC"]
        );
    }

    #[test]
    fn nothing_found_proves_nothing() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        for _ in 0..5 {
            assert!(take(&mut published, &[], &[]).is_empty());
            assert!(take(&mut published, &[], &FactSource::ALL).is_empty());
        }
        assert_eq!(published.labels(), &set(&[Q35, EPYC]));
    }

    #[test]
    fn a_value_that_rests_on_a_failed_source_stays() {
        let mut published =
            PublishedLabels::starting_from(set(&[Q35, ("virtnode.io/vfio", "true")]));
        let jumped = [
            ("machine.virtnode.io/pc-q35-10.0", "4096"),
            ("virtnode.io/iommu", "vt-d"),
        ];
        let changes = take(&mut published, &jumped, &[FactSource::DomainCapabilities]);
        assert_eq!(changes, ["+virtnode.io/iommu=vt-d"]);
        assert_eq!(published.labels()[&Q35.0.parse().unwrap()].as_str(), "1024");
        let changes = take(&mut published, &jumped, &[FactSource::CpuBaseline]);
        assert_eq!(changes, ["machine.virtnode.io/pc-q35-10.0: 1024 to 4096"]);
    }

    #[test]
    fn what_a_running_domain_stands_on_stays_and_goes_with_the_domain() {
        let mut published = PublishedLabels::starting_from(set(&[
            Q35,
            EPYC,
            ("machine-type.node.kubevirt.io/pc-q35-4.0", "true"),
        ]));
        let in_use = CapabilitiesInUse {
            machines: ["pc-q35-4.0".to_owned()].into(),
            cpu_models: ["EPYC".to_owned()].into(),
            ..CapabilitiesInUse::default()
        };
        for _ in 0..3 {
            assert!(take_with(&mut published, &[Q35], &[], &in_use).is_empty());
            assert_eq!(published.retained().len(), 2);
            assert!(
                published
                    .retained()
                    .iter()
                    .all(|r| r.reason == RetentionReason::DomainUsesIt)
            );
        }
        assert_eq!(take(&mut published, &[Q35], &[]).len(), 2);
    }
}
