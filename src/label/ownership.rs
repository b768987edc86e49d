//! Decides which labels to write to a Node that other clients write to as well. Pure;
//! [`crate::publish::node`] decides when, and executes the decision.
//!
//! Server-side apply records the field managers that own each label key (Kubernetes:
//! reference/using-api/server-side-apply). A manager that changes the value of a key takes it over.
//! The decision for a desired key depends on the Node's value and owners:
//!
//! | the Node has | owners beside us | decision |
//! | --- | --- | --- |
//! | the desired value | any | keep it |
//! | no label, which we never published | | add it |
//! | no label, which we published | | repair it |
//! | another value, which we wrote | none, or by update | change it |
//! | another value, over ours | by update: an edit by hand | repair it by force |
//! | another value | by apply: a claim | conflict: leave it to the owner |
//! | another value, which we never published | by update | conflict: leave it to the owner |
//! | another value, which we never published | none | change it; the API server may reject that |
//!
//! A key that needs more than [`MAX_REPAIRS`] repairs within [`REPAIR_WINDOW`] becomes a conflict too.
//! With `force_conflicts`, the other conflicts are taken over by force.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use super::{LabelKey, LabelSet};

/// Maximum number of repairs of one key within [`REPAIR_WINDOW`]. After that, the other writer most
/// likely is a controller, and repairing would never end.
pub const MAX_REPAIRS: usize = 3;
/// Period for which a repair counts.
pub const REPAIR_WINDOW: Duration = Duration::from_secs(600);

/// Another field manager that owns a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldManager {
    /// `kubectl-label`
    pub manager: String,
    /// True if it owns the key by server-side apply, which is a permanent claim; false if by an
    /// update (create, replace, patch).
    pub applies: bool,
}

impl fmt::Display for FieldManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.manager)
    }
}

/// The labels of the Node and their owners.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedLabels {
    /// All labels, also those of other owners.
    pub labels: BTreeMap<String, String>,
    /// Keys that our field manager owns by server-side apply.
    pub owned: BTreeSet<String>,
    /// The other owners of each key.
    pub owners: BTreeMap<String, Vec<FieldManager>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConflictCause {
    /// The Node's managed fields name another owner.
    Owned,
    /// The managed fields name no owner, but the API server did when it rejected an apply.
    Refused,
    /// The key was repaired too often.
    Contested,
}

/// The reason not to write a desired label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// `None` if unknown.
    pub owner: Option<FieldManager>,
    /// The value on the Node; `None` if someone keeps deleting the key.
    pub value: Option<String>,
    pub cause: ConflictCause,
}

/// State that the Node itself does not contain.
#[derive(Debug, Clone, Default)]
pub struct OwnershipHistory {
    /// The labels of the last successful apply.
    pub published: LabelSet,
    /// The conflicts of the last executed decision.
    pub conflicts: BTreeMap<LabelKey, Conflict>,
    /// Times of repairs and takeovers, oldest first.
    repairs: BTreeMap<LabelKey, VecDeque<Duration>>,
}

impl OwnershipHistory {
    /// Starts with the labels that a previous run published.
    pub fn new(published: LabelSet) -> Self {
        Self {
            published,
            ..Self::default()
        }
    }

    /// Clears everything, for a new Node with the same name: nobody deleted labels from that one.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Records that a decision was executed at `now`.
    pub fn record(&mut self, decision: Decision, now: Duration) {
        let repaired = decision.repaired.into_iter().chain(decision.forced);
        for key in repaired {
            self.repairs.entry(key).or_default().push_back(now);
        }
        self.repairs.retain(|_, times| {
            times.retain(|time| now.saturating_sub(*time) < REPAIR_WINDOW);
            !times.is_empty()
        });
        self.conflicts = decision.conflicts;
        self.published = decision.labels;
    }

    fn is_contested(&self, key: &LabelKey, now: Duration) -> bool {
        self.repairs.get(key).is_some_and(|times| {
            let recent = |time: &&Duration| now.saturating_sub(**time) < REPAIR_WINDOW;
            times.iter().filter(recent).count() >= MAX_REPAIRS
        })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LabelWrite {
    #[default]
    Nothing,
    /// Apply [`Decision::labels`].
    Apply {
        /// True to take keys from their owners. The write must then depend on the observed version
        /// of the Node, because the owners of other keys may have changed since.
        force: bool,
    },
}

/// The labels to write, with the reasons for logs, metrics and events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    pub action: LabelWrite,
    /// The desired labels without conflicts.
    pub labels: LabelSet,
    /// Keys that are new on the Node.
    pub added: Vec<LabelKey>,
    /// Keys with a new value.
    pub changed: Vec<LabelKey>,
    /// Keys removed because they are no longer desired.
    pub removed: Vec<String>,
    /// Keys restored after someone deleted or edited them.
    pub repaired: Vec<LabelKey>,
    /// Keys taken from another manager because of `force_conflicts`.
    pub forced: Vec<LabelKey>,
    /// All current conflicts.
    pub conflicts: BTreeMap<LabelKey, Conflict>,
    pub new_conflicts: Vec<LabelKey>,
    pub ended_conflicts: Vec<LabelKey>,
}

impl Decision {
    /// True if there is nothing to write and nothing to report.
    pub fn is_noop(&self) -> bool {
        self.action == LabelWrite::Nothing
            && self.new_conflicts.is_empty()
            && self.ended_conflicts.is_empty()
    }
}

/// Input of [`decide`].
#[derive(Debug, Clone, Copy)]
pub struct DecisionInput<'s> {
    pub desired: &'s LabelSet,
    pub shown: &'s ObservedLabels,
    pub memory: &'s OwnershipHistory,
    /// Owners by key that the API server named when it rejected an apply.
    pub refused: &'s BTreeMap<String, FieldManager>,
    /// Take over labels in conflict by force.
    pub force_conflicts: bool,
    /// Current time since an arbitrary fixed point.
    pub now: Duration,
}

/// The decision for one desired key.
enum KeyDecision {
    /// The value is correct. If another manager owns the key, sharing it does no harm.
    Keep,
    Add,
    LabelChange {
        by_force: bool,
    },
    Repair {
        by_force: bool,
    },
    Conflict(Conflict),
}

pub fn decide(situation: DecisionInput<'_>) -> Decision {
    let DecisionInput {
        desired,
        shown,
        memory,
        ..
    } = situation;
    let mut decision = Decision::default();
    let mut force = false;
    for (key, value) in desired {
        match situation.judge(key, value.as_str()) {
            KeyDecision::Keep => {}
            KeyDecision::Add => decision.added.push(key.clone()),
            KeyDecision::LabelChange { by_force } => {
                force |= by_force;
                decision.changed.push(key.clone());
            }
            KeyDecision::Repair { by_force } => {
                force |= by_force;
                decision.repaired.push(key.clone());
            }
            KeyDecision::Conflict(conflict)
                if situation.force_conflicts && conflict.cause != ConflictCause::Contested =>
            {
                force = true;
                decision.forced.push(key.clone());
            }
            KeyDecision::Conflict(conflict) => {
                if !memory.conflicts.contains_key(key) {
                    decision.new_conflicts.push(key.clone());
                }
                decision.conflicts.insert(key.clone(), conflict);
                continue;
            }
        }
        decision.labels.insert(key.clone(), value.clone());
    }
    let ended = |key: &&LabelKey| !decision.conflicts.contains_key(*key);
    decision.ended_conflicts = memory.conflicts.keys().filter(ended).cloned().collect();

    let owned = shown.owned.iter().map(String::as_str);
    let write = !owned.eq(decision.labels.keys().map(LabelKey::as_str))
        || !decision.changed.is_empty()
        || !decision.forced.is_empty();
    // Applying an empty set would remove every label. Only `cleanup` may do that.
    if write && !decision.labels.is_empty() {
        decision.action = LabelWrite::Apply { force };
        let desired: BTreeSet<&str> = desired.keys().map(LabelKey::as_str).collect();
        // A key with another owner stays on the Node after we release it.
        let is_removed = |key: &&String| {
            !desired.contains(key.as_str()) && !shown.owners.contains_key(key.as_str())
        };
        decision.removed = shown.owned.iter().filter(is_removed).cloned().collect();
    }
    decision
}

impl DecisionInput<'_> {
    fn judge(&self, key: &LabelKey, value: &str) -> KeyDecision {
        let name = key.as_str();
        let ours = self.shown.owned.contains(name);
        let was_ours = ours || self.memory.published.contains_key(key);
        let contested = self.memory.is_contested(key, self.now);
        let Some(shown) = self.shown.labels.get(name) else {
            return if contested {
                conflict(Vec::new(), None, ConflictCause::Contested)
            } else if was_ours {
                KeyDecision::Repair { by_force: false }
            } else {
                KeyDecision::Add
            };
        };
        if shown == value {
            return KeyDecision::Keep;
        }
        let (owners, cause) = self.owners(key, shown);
        let claimed = owners.iter().any(|owner| owner.applies);
        if ours && !claimed {
            // We wrote the value, and no co-owner has changed it since.
            return KeyDecision::LabelChange {
                by_force: !owners.is_empty(),
            };
        }
        if contested {
            return conflict(owners, Some(shown), ConflictCause::Contested);
        }
        if was_ours && !claimed {
            return KeyDecision::Repair { by_force: true };
        }
        if owners.is_empty() {
            // The managed fields name no owner. If there is one, the API server rejects the apply.
            return KeyDecision::LabelChange { by_force: false };
        }
        conflict(owners, Some(shown), cause)
    }

    /// Returns the other owners of a key: from the managed fields, else from a rejected apply.
    fn owners(&self, key: &LabelKey, shown: &str) -> (Vec<FieldManager>, ConflictCause) {
        if let Some(owners) = self.shown.owners.get(key.as_str()) {
            return (owners.clone(), ConflictCause::Owned);
        }
        let remembered = || {
            let conflict = self.memory.conflicts.get(key)?;
            let same = conflict.value.as_deref() == Some(shown)
                && conflict.cause == ConflictCause::Refused;
            same.then(|| conflict.owner.clone()).flatten()
        };
        let refused = self.refused.get(key.as_str()).cloned();
        (
            refused.or_else(remembered).into_iter().collect(),
            ConflictCause::Refused,
        )
    }
}

fn conflict(
    owners: Vec<FieldManager>,
    shown: Option<&String>,
    cause: ConflictCause,
) -> KeyDecision {
    let owner = owners.iter().find(|owner| owner.applies).or(owners.first());
    KeyDecision::Conflict(Conflict {
        owner: owner.cloned(),
        value: shown.cloned(),
        cause,
    })
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
