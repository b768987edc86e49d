use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

use super::LabelSet;
use super::key::{InvalidLabel, LabelKey, LabelValue};
use crate::units::words;

words! {
    /// The set of keys to write.
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum Schema {
        /// virtnode's keys, under `virtnode.io`.
        #[default]
        Native = "native",
        /// The keys of KubeVirt's node-labeller.
        Kubevirt = "kubevirt",
        Both = "both",
    }
    else "is not a valid schema, expected native, kubevirt or both"
}

/// The operator's settings for labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    pub schema: Schema,
    /// CPU models that no new guest should use. With `None`, the native schema omits no model and
    /// KubeVirt's omits [`super::DEFAULT_OBSOLETE_CPU_MODELS`]. A list replaces both defaults.
    pub obsolete_cpu_models: Option<BTreeSet<String>>,
    /// Guest architectures, in addition to the host's, whose machine types are published.
    pub guest_architectures: Vec<String>,
}

/// A label that the API server would reject, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RejectedLabel {
    pub key: String,
    pub value: String,
    #[serde(serialize_with = "code")]
    pub reason: InvalidLabel,
}

fn code<S: Serializer>(reason: &InvalidLabel, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(reason.code())
}

/// The labels derived from facts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Derivation {
    pub labels: LabelSet,
    /// Sorted by key.
    pub rejected: Vec<RejectedLabel>,
}

impl Derivation {
    /// Adds `prefix/name=value`, or records why it is invalid. A name is never mangled, because a
    /// selector contains the real one.
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

    /// Adds `prefix/name=value` if there is a value.
    pub(super) fn add_some(&mut self, prefix: &str, name: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.add(prefix, name, &value.to_string());
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
