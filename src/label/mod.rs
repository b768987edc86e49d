//! Facts and policy as labels. Pure.

mod key;
pub mod ownership;

use std::collections::BTreeMap;

pub use key::{Invalid, LabelKey, LabelValue};

/// A set of labels, sorted by key.
pub type LabelSet = BTreeMap<LabelKey, LabelValue>;
