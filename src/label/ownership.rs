//! Who owns which label of the Node, and what is to be written: a pure decision.
//!
//! Server-side apply keeps an owner for every label key. A change by anybody else takes the key
//! away from us, and who changed it tells what it means: an edit by hand of a label that was ours
//! is drift and is put back; a label that was never ours, or that another applier claims, is a
//! conflict and is left alone. Ownership is as the API server's documentation of server-side apply
//! describes it (Kubernetes: reference/using-api/server-side-apply).

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use super::{LabelKey, LabelSet};

/// So many times a key is put back within [`FIGHT_WINDOW`]; then somebody means it.
pub const FIGHT_REPAIRS: usize = 3;
/// The time within which repairs of one key are counted.
pub const FIGHT_WINDOW: Duration = Duration::from_secs(600);

/// Another field manager that owns a label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FieldManager {
    /// The field manager's name, `kubectl-label`.
    pub manager: String,
    /// Whether it owns the key by server-side apply, and so claims it for good; otherwise by an
    /// update (create, replace, patch).
    pub applies: bool,
}

impl fmt::Display for FieldManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.manager)
    }
}

/// The labels that the Node shows, and whose they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedLabels {
    /// Every label, ours and foreign.
    pub labels: BTreeMap<String, String>,
    /// The keys that our field manager owns by server-side apply.
    pub owned: BTreeSet<String>,
    /// Who else owns which key.
    pub owners: BTreeMap<String, Vec<FieldManager>>,
}

/// What makes a conflict of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConflictCause {
    /// The Node names another owner.
    Owned,
    /// The Node names none, but the API server did when it refused our apply.
    Refused,
    /// It was put back too often.
    Contested,
}

/// Why a desired label is not written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// Who owns the key; `None` if the Node does not tell.
    pub owner: Option<FieldManager>,
    /// The value that the Node shows; `None` if the key keeps being deleted.
    pub value: Option<String>,
    /// What makes it a conflict.
    pub cause: ConflictCause,
}

/// What is known from before: nothing of it is on the Node itself.
#[derive(Debug, Clone, Default)]
pub struct OwnershipHistory {
    /// The labels that the API server took from us last.
    pub published: LabelSet,
    /// The conflicts at the last decision that was carried out.
    pub conflicts: BTreeMap<LabelKey, Conflict>,
    /// When keys were put back or taken over, oldest first.
    repairs: BTreeMap<LabelKey, VecDeque<Duration>>,
}

impl OwnershipHistory {
    /// Begins with the labels that an earlier run published.
    pub fn new(published: LabelSet) -> Self {
        Self {
            published,
            ..Self::default()
        }
    }

    /// Begins anew: another Node by the same name has none of our labels, and nobody took them
    /// from it.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Writes down that a decision was carried out at `now`.
    pub fn record(&mut self, decision: Decision, now: Duration) {
        let put_back = decision.repaired.into_iter().chain(decision.forced);
        for key in put_back {
            self.repairs.entry(key).or_default().push_back(now);
        }
        self.repairs.retain(|_, times| {
            times.retain(|time| now.saturating_sub(*time) < FIGHT_WINDOW);
            !times.is_empty()
        });
        self.conflicts = decision.conflicts;
        self.published = decision.labels;
    }

    fn is_fight(&self, key: &LabelKey, now: Duration) -> bool {
        self.repairs.get(key).is_some_and(|times| {
            let recent = |time: &&Duration| now.saturating_sub(**time) < FIGHT_WINDOW;
            times.iter().filter(recent).count() >= FIGHT_REPAIRS
        })
    }
}

/// Whether something is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelWrite {
    /// The Node shows all there is to show.
    Nothing,
    /// [`Decision::labels`] are to be applied.
    Apply {
        /// Whether labels are to be taken from their present owners. Only for the Node exactly as
        /// it was seen: the owners of other keys may have changed since.
        force: bool,
    },
}

/// What is to be written, and what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether to write.
    pub action: LabelWrite,
    /// The whole set that is ours: what is desired less the conflicts.
    pub labels: LabelSet,
    /// Keys that appear on the Node.
    pub added: Vec<LabelKey>,
    /// Keys whose value we change.
    pub changed: Vec<LabelKey>,
    /// Keys that go because they are no longer desired.
    pub removed: Vec<String>,
    /// Keys put back after somebody deleted or edited them.
    pub repaired: Vec<LabelKey>,
    /// Keys newly taken from another manager because the configuration says so.
    pub forced: Vec<LabelKey>,
    /// Every present conflict.
    pub conflicts: BTreeMap<LabelKey, Conflict>,
    /// Conflicts that were not there before.
    pub new_conflicts: Vec<LabelKey>,
    /// Conflicts that are no more.
    pub ended_conflicts: Vec<LabelKey>,
}

impl Decision {
    /// Whether there is nothing to write and nothing to tell.
    pub fn is_noop(&self) -> bool {
        self.action == LabelWrite::Nothing
            && self.new_conflicts.is_empty()
            && self.ended_conflicts.is_empty()
    }
}

/// What a decision is made from.
#[derive(Debug, Clone, Copy)]
pub struct DecisionInput<'s> {
    /// The labels that the Node should show.
    pub desired: &'s LabelSet,
    /// The labels that it shows.
    pub shown: &'s ObservedLabels,
    /// What is known from before.
    pub memory: &'s OwnershipHistory,
    /// Owners that the API server named when it refused an apply, where the Node did not.
    pub refused: &'s BTreeMap<String, FieldManager>,
    /// Take over labels in conflict.
    pub force_conflicts: bool,
    /// The time now, from any fixed moment on.
    pub now: Duration,
}

/// What is to become of one desired key.
enum KeyDecision {
    /// It shows our value. If only somebody else owns it so far, to own it too harms nobody.
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

/// Decides what to write, if anything.
pub fn decide(situation: DecisionInput<'_>) -> Decision {
    let DecisionInput {
        desired,
        shown,
        memory,
        ..
    } = situation;
    let mut decision = Decision {
        action: LabelWrite::Nothing,
        labels: LabelSet::new(),
        added: Vec::new(),
        changed: Vec::new(),
        removed: Vec::new(),
        repaired: Vec::new(),
        forced: Vec::new(),
        conflicts: BTreeMap::new(),
        new_conflicts: Vec::new(),
        ended_conflicts: Vec::new(),
    };
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
    // To apply nothing is to remove everything: `cleanup` does that, never a decision.
    if write && !decision.labels.is_empty() {
        decision.action = LabelWrite::Apply { force };
        let desired: BTreeSet<&str> = desired.keys().map(LabelKey::as_str).collect();
        // What somebody else owns too stays on the Node when we let go of it.
        let goes = |key: &&String| {
            !desired.contains(key.as_str()) && !shown.owners.contains_key(key.as_str())
        };
        decision.removed = shown.owned.iter().filter(goes).cloned().collect();
    }
    decision
}

impl DecisionInput<'_> {
    fn judge(&self, key: &LabelKey, value: &str) -> KeyDecision {
        let name = key.as_str();
        let ours = self.shown.owned.contains(name);
        let before = ours || self.memory.published.contains_key(key);
        let fight = self.memory.is_fight(key, self.now);
        let Some(shown) = self.shown.labels.get(name) else {
            return match (fight, before) {
                (true, _) => conflict(Vec::new(), None, ConflictCause::Contested),
                (false, true) => KeyDecision::Repair { by_force: false },
                (false, false) => KeyDecision::Add,
            };
        };
        if shown == value {
            return KeyDecision::Keep;
        }
        let (owners, cause) = self.owners(key, shown);
        let claimed = owners.iter().any(|owner| owner.applies);
        if ours && !claimed {
            // The value is what we wrote; an owner beside us has not touched it since.
            return KeyDecision::LabelChange {
                by_force: !owners.is_empty(),
            };
        }
        if fight {
            return conflict(owners, Some(shown), ConflictCause::Contested);
        }
        if before && !claimed {
            return KeyDecision::Repair { by_force: true };
        }
        if owners.is_empty() {
            // Nobody claims it here. If somebody does over there, the apply is refused.
            return KeyDecision::LabelChange { by_force: false };
        }
        conflict(owners, Some(shown), cause)
    }

    /// Everybody else who owns the key, by the Node or, where it is silent, by a refusal.
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
