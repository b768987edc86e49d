//! Facts and policy as labels. Pure.
//!
//! * [`derive()`]: what the facts say, in one schema or both;
//! * [`PublishedLabels`]: what that becomes, given what was published before: nothing is taken away on
//!   the word of one probe, or while a running domain stands on it;
//! * [`ownership`]: which of these may be written to a Node that others write to as well.

mod derive;
mod family;
mod key;
mod kubevirt;
mod native;
pub mod ownership;
pub mod prefix;
mod published;
mod reference;

use std::collections::BTreeMap;

pub use derive::{Derivation, Policy, RejectedLabel, Schema, derive};
pub use family::{
    FAMILIES, FactSource, KUBEVIRT_KEYS, KUBEVIRT_PREFIXES, family, is_ours, sources,
};
pub use key::{InvalidLabel, LabelKey, LabelValue};
pub use kubevirt::DEFAULT_OBSOLETE_CPU_MODELS;
pub use published::{
    CapabilitiesInUse, LabelChange, ProbeResult, PublishedLabels, RetainedLabel, RetentionReason,
};
pub use reference::{LabelEntry, REFERENCE};

/// A set of labels, sorted by key.
pub type LabelSet = BTreeMap<LabelKey, LabelValue>;
