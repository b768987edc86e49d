//! Labels: derived from a node's facts, kept across probes, reconciled with the Node. Pure.
//!
//! ```text
//! NodeFacts ── derive() ──▶ Derivation ── PublishedLabels::update ──▶ the set to publish
//!             by Policy                    retains labels in use              │
//!                                          or not yet proven absent           ▼
//!                                                            ownership::decide: what to write
//! ```

mod derivation;
mod family;
mod key;
mod kubevirt;
mod native;
mod notes;
pub mod ownership;
pub mod prefix;
mod published;

use std::collections::BTreeMap;

use family::consists_of;

pub use derivation::{Derivation, Policy, RejectedLabel, Schema};
pub use family::{
    FAMILIES, FactSource, KUBEVIRT_KEYS, KUBEVIRT_PREFIXES, family, is_ours, sources,
};
pub use key::{InvalidLabel, LabelKey, LabelValue};
pub use kubevirt::DEFAULT_OBSOLETE_CPU_MODELS;
pub use notes::notes;
pub use published::{
    CapabilitiesInUse, LabelChange, ProbeResult, PublishedLabels, RetainedLabel, RetentionReason,
};

use crate::capability::NodeFacts;

/// Labels by key.
pub type LabelSet = BTreeMap<LabelKey, LabelValue>;

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
