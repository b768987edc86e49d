//! Facts and policy as labels. Pure.

mod key;

use std::collections::BTreeMap;

pub use key::{Invalid, LabelKey, LabelValue};

/// A set of labels, sorted by key.
pub type LabelSet = BTreeMap<LabelKey, LabelValue>;
