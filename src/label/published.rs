//! The published label set: it follows the derived labels, but removes a label only on proof.
//!
//! When the kubelet restarts, it evicts pods whose node affinity no longer matches
//! (kubernetes#124586), so a label that disappears for a moment can cost a running domain its pod.
//!
//! ```text
//!          derived                        probe without it
//!  absent ────────▶ published ──────────────────────────────────▶ retained
//!    ▲                  ▲                   derived                  │
//!    │                  └────────────────────────────────────────────┤
//!    └───────────────────────────────────────────────────────────────┘
//!        second complete probe in a row without it, and no running domain uses it
//! ```
//!
//! A running domain whose definition cannot be read may use any capability that a domain can use:
//! while it runs no label of these is removed. It affects nothing else.
//!
//! A probe with a failed source, or without any label, is not complete: it restarts the count and
//! removes nothing. It may add labels, but does not change a value that depends on a failed source.
//! A source that was not read, because nothing can answer at present, affects only its own labels:
//! they keep their values, and those that consist of its answer are not removed.
//! [`PublishedLabels`] owns the set; nothing else adds to it or removes from it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{FactSource, LabelKey, LabelSet, LabelValue, consists_of, sources};
use crate::units::words;

/// Number of consecutive complete probes without a label that prove its absence. A single
/// probe could hit a transient omission.
const PROBES_TO_REMOVE: u8 = 2;

/// Capabilities that running domains use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapabilitiesInUse {
    /// Canonical names of machine types.
    pub machines: BTreeSet<String>,
    pub cpu_models: BTreeSet<String>,
    pub cpu_features: BTreeSet<String>,
    /// Hyper-V enlightenments, by libvirt's names.
    pub enlightenments: BTreeSet<String>,
    /// Kinds of confidential guests: `sev`, `sev-snp`, `tdx`, `s390-pv`.
    pub security: BTreeSet<String>,
    pub real_time: bool,
    /// True if there is a running domain whose use is unknown.
    pub unknown: bool,
}

impl CapabilitiesInUse {
    /// Returns the use of a domain whose definition cannot be read.
    pub fn unknown() -> Self {
        Self {
            unknown: true,
            ..Self::default()
        }
    }

    pub fn extend(&mut self, other: &Self) {
        self.machines.extend(other.machines.iter().cloned());
        self.cpu_models.extend(other.cpu_models.iter().cloned());
        self.cpu_features.extend(other.cpu_features.iter().cloned());
        let enlightenments = other.enlightenments.iter().cloned();
        self.enlightenments.extend(enlightenments);
        self.security.extend(other.security.iter().cloned());
        self.real_time |= other.real_time;
        self.unknown |= other.unknown;
    }

    /// True if a running domain uses the capability behind this label, in either schema.
    pub fn includes(&self, key: &LabelKey) -> bool {
        self.use_of(key) == Some(true)
    }

    /// True if a running domain uses the capability behind this label, or may use it.
    pub fn may_include(&self, key: &LabelKey) -> bool {
        let used = self.use_of(key);
        used.is_some_and(|is_used| self.unknown || is_used)
    }

    /// Returns true if a domain uses the label's capability; `None` if domains do not depend on such
    /// labels.
    fn use_of(&self, key: &LabelKey) -> Option<bool> {
        let name = key.name();
        let kind = key.prefix().split('.').next().unwrap_or_default();
        Some(match (kind, name) {
            ("machine", _) => self.machines.contains(name),
            // A pod selects on the name that its definition has, which may be an alias.
            ("machine-type" | "machine-alias", _) => {
                let mut machines = self.machines.iter();
                machines.any(|machine| machine == name || is_alias(name, machine))
            }
            ("cpu-model" | "cpu-model-migration" | "host-model-cpu", _) => {
                self.cpu_models.contains(name)
            }
            ("cpu-feature" | "host-model-required-features", _) => self.cpu_features.contains(name),
            // The vendor belongs to the model.
            ("cpu-vendor", _) | ("virtnode", "cpu-vendor") => !self.cpu_models.is_empty(),
            // KubeVirt's keys have KVM's names, several for one enlightenment of libvirt.
            ("hyperv", _) if key.prefix().ends_with("kubevirt.io") => {
                !self.enlightenments.is_empty()
            }
            ("hyperv", _) => self.enlightenments.contains(name),
            ("virtnode" | "kubevirt", "sev" | "sev-es" | "sev-snp") => {
                // The policy of a guest of type `sev` decides if its registers are encrypted.
                self.security.iter().any(|kind| kind.starts_with("sev"))
            }
            ("virtnode" | "kubevirt", "tdx" | "s390-pv") => self.security.contains(name),
            ("kubevirt", "realtime") => self.real_time,
            _ => return None,
        })
    }
}

/// True if QEMU names its machine types so that `alias` can mean this one: `q35` and `pc-q35-10.0`,
/// `virt` and `virt-10.0`. The current meaning of an alias is no help: the domain was started under
/// an earlier one.
fn is_alias(alias: &str, canonical: &str) -> bool {
    canonical.match_indices(alias).any(|(at, _)| {
        (at == 0 || canonical[..at].ends_with('-'))
            && canonical[at + alias.len()..].starts_with('-')
    })
}

/// The outcome of one probe.
#[derive(Debug, Clone, Copy)]
pub struct ProbeResult<'p> {
    /// The derived labels.
    pub labels: &'p LabelSet,
    /// The sources that failed.
    pub failed: &'p [FactSource],
    /// The sources that were not read, because nothing can answer at present.
    pub unread: &'p [FactSource],
    pub in_use: &'p CapabilitiesInUse,
}

words! {
    /// The reason to keep a label that the last probe did not yield, as metrics and JSON name it.
    #[derive(PartialOrd, Ord)]
    pub enum RetentionReason {
        DomainUsesIt = "domain-uses-it",
        AwaitingSecondProbe = "awaiting-second-probe",
        /// The definition of a running domain that may use it cannot be read.
        DomainUnreadable = "domain-unreadable",
        /// Its source was not read.
        SourceNotRead = "source-not-read",
    }
}

/// A published label that the last probe did not yield.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RetainedLabel {
    pub key: LabelKey,
    pub value: LabelValue,
    pub reason: RetentionReason,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    Added(LabelKey, LabelValue),
    /// Key, old value, new value
    Changed(LabelKey, LabelValue, LabelValue),
    /// Key, last value
    Removed(LabelKey, LabelValue),
}

impl LabelChange {
    /// Returns the label value in metrics, which logs also use.
    pub fn action(&self) -> &'static str {
        match self {
            Self::Added(..) => "added",
            Self::Changed(..) => "changed",
            Self::Removed(..) => "removed",
        }
    }
}

/// The labels to publish, with the state that spans probes.
#[derive(Debug, Clone, Default)]
pub struct PublishedLabels {
    labels: LabelSet,
    /// Number of consecutive complete probes without each retained label.
    lacking: BTreeMap<LabelKey, u8>,
    retained: Vec<RetainedLabel>,
}

impl PublishedLabels {
    /// Starts with the labels that a previous run published.
    pub fn starting_from(labels: LabelSet) -> Self {
        Self {
            labels,
            ..Self::default()
        }
    }

    /// Adds labels that a previous run published, so that their removal needs proof too. Known
    /// labels keep their values.
    pub fn adopt(&mut self, published: LabelSet) {
        for (key, value) in published {
            self.labels.entry(key).or_insert(value);
        }
    }

    pub fn labels(&self) -> &LabelSet {
        &self.labels
    }

    /// Returns the labels that the last probe did not yield, sorted by key.
    pub fn retained(&self) -> &[RetainedLabel] {
        &self.retained
    }

    /// Applies a probe as the module describes, and returns the changes.
    pub fn update(&mut self, probe: ProbeResult<'_>) -> Vec<LabelChange> {
        let complete = probe.failed.is_empty() && !probe.labels.is_empty();
        let mut changes = Vec::new();
        self.retained.clear();
        let before = std::mem::take(&mut self.labels);
        for (key, value) in probe.labels {
            self.lacking.remove(key);
            let uncertain = || {
                sources(key)
                    .iter()
                    .any(|source| probe.failed.contains(source) || probe.unread.contains(source))
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
            *lacking = if complete {
                lacking.saturating_add(1)
            } else {
                0
            };
            let unread = |source: &FactSource| consists_of(&key, *source);
            let reason = if probe.in_use.includes(&key) {
                RetentionReason::DomainUsesIt
            } else if probe.unread.iter().any(unread) {
                RetentionReason::SourceNotRead
            } else if *lacking < PROBES_TO_REMOVE {
                RetentionReason::AwaitingSecondProbe
            } else if probe.in_use.may_include(&key) {
                RetentionReason::DomainUnreadable
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

    fn update(
        published: &mut PublishedLabels,
        labels: &[(&str, &str)],
        failed: &[FactSource],
    ) -> Vec<String> {
        let in_use = CapabilitiesInUse::default();
        update_with(published, labels, failed, &in_use)
    }

    fn update_with(
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
                unread: &[],
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
    fn label_is_removed_after_two_complete_probes_without_it() {
        let mut published = PublishedLabels::default();
        assert_eq!(update(&mut published, &[Q35, EPYC], &[]).len(), 2);
        assert!(update(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(
            published.retained()[0].reason,
            RetentionReason::AwaitingSecondProbe
        );
        assert_eq!(
            update(&mut published, &[Q35], &[]),
            ["-cpu-model.virtnode.io/EPYC"]
        );
        assert!(published.retained().is_empty());
        assert_eq!(published.labels(), &set(&[Q35]));
    }

    #[test]
    fn failed_probe_restarts_the_count() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        assert!(update(&mut published, &[Q35], &[]).is_empty());
        assert!(update(&mut published, &[Q35], &[FactSource::DomainCapabilities]).is_empty());
        assert!(update(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(update(&mut published, &[Q35], &[]).len(), 1);
    }

    #[test]
    fn label_that_reappears_restarts_the_count() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        for _ in 0..5 {
            assert!(update(&mut published, &[Q35], &[]).is_empty());
            assert!(update(&mut published, &[Q35, EPYC], &[]).is_empty());
        }
    }

    #[test]
    fn adopted_label_is_removed_after_two_complete_probes() {
        let mut published = PublishedLabels::default();
        update(&mut published, &[Q35], &[]);
        published.adopt(set(&[EPYC, ("machine.virtnode.io/pc-q35-10.0", "1")]));
        assert_eq!(published.labels(), &set(&[Q35, EPYC]));
        assert!(update(&mut published, &[Q35], &[]).is_empty());
        assert_eq!(
            update(&mut published, &[Q35], &[]),
            ["-cpu-model.virtnode.io/EPYC"]
        );
    }

    #[test]
    fn probe_without_labels_removes_nothing() {
        let mut published = PublishedLabels::starting_from(set(&[Q35, EPYC]));
        for _ in 0..5 {
            assert!(update(&mut published, &[], &[]).is_empty());
            assert!(update(&mut published, &[], &FactSource::ALL).is_empty());
        }
        assert_eq!(published.labels(), &set(&[Q35, EPYC]));
    }

    #[test]
    fn value_that_depends_on_failed_source_is_kept() {
        let mut published =
            PublishedLabels::starting_from(set(&[Q35, ("virtnode.io/vfio", "true")]));
        let jumped = [
            ("machine.virtnode.io/pc-q35-10.0", "4096"),
            ("virtnode.io/iommu", "vt-d"),
        ];
        let changes = update(&mut published, &jumped, &[FactSource::DomainCapabilities]);
        assert_eq!(changes, ["+virtnode.io/iommu=vt-d"]);
        assert_eq!(published.labels()[&Q35.0.parse().unwrap()].as_str(), "1024");
        let changes = update(&mut published, &jumped, &[FactSource::CpuBaseline]);
        assert_eq!(changes, ["machine.virtnode.io/pc-q35-10.0: 1024 to 4096"]);
    }

    #[test]
    fn label_that_unreadable_domain_may_use_is_kept_until_that_domain_ends() {
        let all = [
            Q35,
            EPYC,
            ("machine-type.node.kubevirt.io/pc-q35-4.0", "true"),
            ("virtnode.io/vfio", "true"),
        ];
        let mut published = PublishedLabels::starting_from(set(&all));
        let unknown = CapabilitiesInUse::unknown();
        let new = ("machine.virtnode.io/pc-q35-11.0", "4096");
        assert_eq!(
            update_with(&mut published, &[Q35, new], &[], &unknown),
            ["+machine.virtnode.io/pc-q35-11.0=4096"]
        );
        // Domains do not depend on this one.
        assert_eq!(
            update_with(&mut published, &[Q35, new], &[], &unknown),
            ["-virtnode.io/vfio"]
        );
        for _ in 0..3 {
            assert!(update_with(&mut published, &[Q35, new], &[], &unknown).is_empty());
        }
        let reasons: Vec<_> = published
            .retained()
            .iter()
            .map(|kept| kept.reason)
            .collect();
        assert_eq!(reasons, [RetentionReason::DomainUnreadable; 2]);
        let mut both = unknown;
        both.cpu_models.insert("EPYC".to_owned());
        assert!(update_with(&mut published, &[Q35, new], &[], &both).is_empty());
        let reasons: Vec<_> = published
            .retained()
            .iter()
            .map(|kept| kept.reason)
            .collect();
        assert!(reasons.contains(&RetentionReason::DomainUsesIt));
        assert_eq!(update(&mut published, &[Q35, new], &[]).len(), 2);
    }

    #[test]
    fn source_that_was_not_read_keeps_only_what_depends_on_it() {
        let mut published = PublishedLabels::starting_from(set(&[
            Q35,
            ("machine.virtnode.io/pc-q35-4.0", "288"),
            ("virtnode.io/eim", "auto"),
            ("virtnode.io/libvirt-version", "11.3.0"),
        ]));
        let probe = set(&[("machine.virtnode.io/pc-q35-10.0", "255"), EPYC]);
        let mut removed = Vec::new();
        for _ in 0..3 {
            let changes = published.update(ProbeResult {
                labels: &probe,
                failed: &[],
                unread: &[FactSource::Versions],
                in_use: &CapabilitiesInUse::default(),
            });
            removed.extend(changes.into_iter().filter_map(|change| match change {
                LabelChange::Removed(key, _) => Some(key.to_string()),
                _ => None,
            }));
        }
        assert_eq!(removed, ["machine.virtnode.io/pc-q35-4.0"]);
        assert_eq!(published.labels()[&Q35.0.parse().unwrap()].as_str(), "1024");
        let retained = published.retained().iter();
        let retained: Vec<_> = retained
            .map(|kept| (kept.key.name(), kept.reason))
            .collect();
        let reason = RetentionReason::SourceNotRead;
        assert_eq!(retained, [("eim", reason), ("libvirt-version", reason)]);
    }

    #[test]
    fn everything_that_a_pod_of_kubevirt_selects_on_is_in_use() {
        let in_use = CapabilitiesInUse {
            machines: ["pc-q35-rhel9.6.0".to_owned()].into(),
            cpu_models: ["EPYC".to_owned()].into(),
            enlightenments: ["stimer".to_owned()].into(),
            security: ["sev".to_owned()].into(),
            real_time: true,
            ..CapabilitiesInUse::default()
        };
        let includes = |key: &str| in_use.includes(&key.parse().unwrap());
        for used in [
            "machine-type.node.kubevirt.io/q35",
            "machine-type.node.kubevirt.io/pc-q35-rhel9.6.0",
            "machine-alias.virtnode.io/q35",
            "cpu-model-migration.node.kubevirt.io/EPYC",
            "cpu-vendor.node.kubevirt.io/AMD",
            "virtnode.io/cpu-vendor",
            "hyperv.node.kubevirt.io/synictimer",
            "hyperv.virtnode.io/stimer",
            "kubevirt.io/sev",
            "kubevirt.io/sev-es",
            "virtnode.io/sev",
            "kubevirt.io/realtime",
        ] {
            assert!(includes(used), "{used}");
        }
        for other in [
            "machine-type.node.kubevirt.io/virt",
            "machine-type.node.kubevirt.io/pc-q35-rhel9.4.0",
            "machine-type.node.kubevirt.io/pc-i440fx",
            "machine.virtnode.io/q35",
            "hyperv.virtnode.io/relaxed",
            "kubevirt.io/tdx",
            "virtnode.io/sgx",
            "virtnode.io/vfio",
            "cpu-timer.node.kubevirt.io/tsc-frequency",
        ] {
            assert!(!includes(other), "{other}");
        }
        let none = CapabilitiesInUse::default();
        assert!(!none.includes(&"cpu-vendor.node.kubevirt.io/AMD".parse().unwrap()));
        let unknown = CapabilitiesInUse::unknown();
        assert!(unknown.may_include(&"kubevirt.io/realtime".parse().unwrap()));
        assert!(!unknown.may_include(&"virtnode.io/vfio".parse().unwrap()));
    }

    #[test]
    fn label_in_use_is_kept_until_its_domain_ends() {
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
            assert!(update_with(&mut published, &[Q35], &[], &in_use).is_empty());
            assert_eq!(published.retained().len(), 2);
            assert!(
                published
                    .retained()
                    .iter()
                    .all(|r| r.reason == RetentionReason::DomainUsesIt)
            );
        }
        assert_eq!(update(&mut published, &[Q35], &[]).len(), 2);
    }
}
