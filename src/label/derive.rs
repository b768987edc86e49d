//! From facts to labels, by one schema or both.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

use super::{InvalidLabel, LabelKey, LabelSet, LabelValue, kubevirt, native};
use crate::capability::NodeFacts;

/// Which keys are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schema {
    /// Our own keys, under `virtnode.io`.
    #[default]
    Native,
    /// The keys of KubeVirt's own labeller.
    Kubevirt,
    /// Both.
    Both,
}

impl FromStr for Schema {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "kubevirt" => Ok(Self::Kubevirt),
            "both" => Ok(Self::Both),
            other => Err(format!("'{other}' is no schema: native, kubevirt or both")),
        }
    }
}

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Kubevirt => "kubevirt",
            Self::Both => "both",
        })
    }
}

/// What an operator decides about labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// Which keys are written.
    pub schema: Schema,
    /// CPU models that no new guest should use. `None` leaves it to the schema: none for the
    /// native one, [`super::DEFAULT_OBSOLETE_CPU_MODELS`] for KubeVirt's. A list replaces both.
    pub obsolete_cpu_models: Option<BTreeSet<String>>,
    /// Guest architectures beside the host's own whose machine types are published.
    pub guest_architectures: Vec<String>,
}

/// A label that was not made, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RejectedLabel {
    /// The key it would have had.
    pub key: String,
    /// The value it would have had.
    pub value: String,
    /// Why it is no label.
    #[serde(serialize_with = "code")]
    pub reason: InvalidLabel,
}

fn code<S: Serializer>(reason: &InvalidLabel, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(reason.code())
}

/// What the facts say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Derivation {
    /// The labels.
    pub labels: LabelSet,
    /// What could be no label, sorted by key.
    pub rejected: Vec<RejectedLabel>,
}

impl Derivation {
    /// Adds `prefix/name=value`, or notes why that is no label. Names are never mangled: a
    /// scheduler would look for the real one.
    pub(super) fn add(&mut self, prefix: &str, name: &str, value: &str) {
        match (LabelKey::new(prefix, name), LabelValue::new(value)) {
            (Ok(key), Ok(value)) => drop(self.labels.insert(key, value)),
            (Err(reason), _) | (_, Err(reason)) => self.rejected.push(RejectedLabel {
                key: format!("{prefix}/{name}"),
                value: value.to_owned(),
                reason,
            }),
        }
    }

    /// Adds `prefix/name=true` for each name.
    pub(super) fn add_all<'n>(&mut self, prefix: &str, names: impl IntoIterator<Item = &'n str>) {
        for name in names {
            self.add(prefix, name, "true");
        }
    }

    /// Adds `prefix/name=true` if `holds`.
    pub(super) fn add_if(&mut self, holds: bool, prefix: &str, name: &str) {
        if holds {
            self.add(prefix, name, "true");
        }
    }
}

/// The labels that the facts call for under a policy.
pub fn derive(facts: &NodeFacts, policy: &Policy) -> Derivation {
    let mut derivation = Derivation::default();
    if policy.schema != Schema::Kubevirt {
        native::derive(facts, policy, &mut derivation);
    }
    if policy.schema != Schema::Native {
        kubevirt::derive(facts, policy, &mut derivation);
    }
    derivation
        .rejected
        .sort_by(|a, b| (&a.key, &a.value).cmp(&(&b.key, &b.value)));
    derivation.rejected.dedup();
    derivation
}
