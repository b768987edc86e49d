use super::*;

const EDITOR: &str = "kubectl-label";

fn set(pairs: &[(&str, &str)]) -> LabelSet {
    let pair = |(key, value): &(&str, &str)| (key.parse().unwrap(), value.parse().unwrap());
    pairs.iter().map(pair).collect()
}

fn keys(names: &[&str]) -> Vec<LabelKey> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

#[derive(Default)]
struct OwnershipCase {
    desired: LabelSet,
    shown: ObservedLabels,
    memory: OwnershipHistory,
    refused: BTreeMap<String, FieldManager>,
    force_conflicts: bool,
    now: Duration,
}

impl OwnershipCase {
    fn desiring(pairs: &[(&str, &str)]) -> Self {
        Self {
            desired: set(pairs),
            ..Self::default()
        }
    }

    /// The state after a sync: all desired labels are on the Node, owned by us and recorded.
    fn synced(pairs: &[(&str, &str)]) -> Self {
        let mut case = Self::desiring(pairs);
        for (key, value) in pairs {
            case = case.ours(key, value);
        }
        case.memory.published = case.desired.clone();
        case
    }

    fn ours(mut self, key: &str, value: &str) -> Self {
        self.shown.labels.insert(key.into(), value.into());
        self.shown.owned.insert(key.into());
        self
    }

    fn deleted(mut self, key: &str) -> Self {
        self.shown.labels.remove(key);
        self.shown.owned.remove(key);
        self.shown.owners.remove(key);
        self
    }

    /// Another manager writes a key, which takes it over.
    fn taken(mut self, key: &str, value: &str, applies: bool) -> Self {
        let owner = FieldManager {
            manager: EDITOR.into(),
            applies,
        };
        self.shown.labels.insert(key.into(), value.into());
        self.shown.owned.remove(key);
        self.shown.owners.insert(key.into(), vec![owner]);
        self
    }

    fn decide(&self) -> Decision {
        decide(DecisionInput {
            desired: &self.desired,
            shown: &self.shown,
            memory: &self.memory,
            refused: &self.refused,
            force_conflicts: self.force_conflicts,
            now: self.now,
        })
    }

    /// Decides and applies the decision to the Node.
    fn execute(&mut self) -> Decision {
        let decision = self.decide();
        if let LabelWrite::Apply { .. } = decision.action {
            for (key, value) in &decision.labels {
                self.shown.labels.insert(key.to_string(), value.to_string());
                self.shown.owners.remove(key.as_str());
            }
            self.shown.owned = decision.labels.keys().map(LabelKey::to_string).collect();
        }
        self.memory.record(decision.clone(), self.now);
        decision
    }
}

const APPLY: LabelWrite = LabelWrite::Apply { force: false };
const FORCE: LabelWrite = LabelWrite::Apply { force: true };

#[test]
fn new_node_gets_all_labels() {
    let decision = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "2")]).decide();
    assert_eq!(decision.action, APPLY);
    assert_eq!(decision.added, keys(&["a.io/x", "a.io/y"]));
    assert!(decision.repaired.is_empty());
}

#[test]
fn unchanged_node_is_not_written() {
    let case = OwnershipCase::synced(&[("a.io/x", "1")]).taken("foreign.io/z", "1", false);
    assert!(case.decide().is_noop());
}

#[test]
fn unchanged_node_is_not_written_after_restart_without_history() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1")]);
    case.memory = OwnershipHistory::default();
    assert!(case.decide().is_noop());
}

#[test]
fn changed_value_is_written_without_force() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.desired = set(&[("a.io/x", "2"), ("a.io/y", "1")]);
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.changed),
        (APPLY, keys(&["a.io/x"]))
    );
}

#[test]
fn key_no_longer_desired_is_removed() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.desired = set(&[("a.io/x", "1")]);
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.removed),
        (APPLY, vec!["a.io/y".to_owned()])
    );
    assert_eq!(decision.labels, case.desired);
}

#[test]
fn empty_set_is_never_applied() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1")]);
    case.desired = LabelSet::new();
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.removed),
        (LabelWrite::Nothing, vec![])
    );
    // The same holds if every key is in conflict.
    let case = OwnershipCase::desiring(&[("a.io/x", "1")])
        .taken("a.io/x", "other", false)
        .ours("a.io/z", "1");
    assert_eq!(case.decide().action, LabelWrite::Nothing);
}

#[test]
fn deleted_label_is_restored() {
    let decision = OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")])
        .deleted("a.io/x")
        .decide();
    assert_eq!(
        (decision.action, decision.repaired),
        (APPLY, keys(&["a.io/x"]))
    );
    assert!(decision.added.is_empty());
}

#[test]
fn edited_label_is_restored_by_force() {
    let decision = OwnershipCase::synced(&[("a.io/x", "1")])
        .taken("a.io/x", "2", false)
        .decide();
    assert_eq!(
        (decision.action, decision.repaired),
        (FORCE, keys(&["a.io/x"]))
    );
    assert!(decision.conflicts.is_empty());
}

#[test]
fn earlier_value_of_another_manager_is_conflict_for_this_key_only() {
    for applies in [false, true] {
        let desired = [("a.io/x", "1"), ("a.io/y", "1")];
        let mut case = OwnershipCase::desiring(&desired).taken("a.io/x", "other", applies);
        let decision = case.execute();
        assert_eq!(
            (decision.action, decision.added),
            (APPLY, keys(&["a.io/y"]))
        );
        assert_eq!(decision.new_conflicts, keys(&["a.io/x"]));
        let conflict = &decision.conflicts[&"a.io/x".parse().unwrap()];
        assert_eq!(conflict.value.as_deref(), Some("other"));
        assert_eq!(conflict.owner.as_ref().unwrap().to_string(), EDITOR);
        // The conflict remains, but is reported once and causes no write.
        let again = case.execute();
        assert!(again.is_noop());
        assert_eq!(again.conflicts.len(), 1);
    }
}

#[test]
fn published_label_that_another_manager_applies_is_conflict() {
    let mut case =
        OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")]).taken("a.io/x", "2", true);
    let decision = case.execute();
    assert_eq!(decision.action, LabelWrite::Nothing);
    assert_eq!(decision.new_conflicts, keys(&["a.io/x"]));
    assert!(case.decide().is_noop());
}

#[test]
fn changed_value_of_shared_key_is_conflict() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")]);
    let sharer = FieldManager {
        manager: "gitops".into(),
        applies: true,
    };
    case.shown.owners.insert("a.io/x".into(), vec![sharer]);
    assert!(case.decide().is_noop());
    case.desired = set(&[("a.io/x", "2"), ("a.io/y", "1")]);
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.new_conflicts),
        (APPLY, keys(&["a.io/x"]))
    );
    assert!(decision.removed.is_empty(), "the other manager keeps it");
}

#[test]
fn conflict_ends_when_owner_agrees_or_releases_the_key() {
    let desired = [("a.io/x", "1"), ("a.io/y", "1")];
    let mut case = OwnershipCase::desiring(&desired).taken("a.io/x", "other", true);
    case.execute();
    let agreed = OwnershipCase {
        memory: case.memory.clone(),
        shown: case.shown.clone(),
        ..OwnershipCase::desiring(&desired)
    }
    .taken("a.io/x", "1", true)
    .decide();
    assert_eq!(
        (agreed.action, agreed.ended_conflicts),
        (APPLY, keys(&["a.io/x"]))
    );

    let released = case.deleted("a.io/x").decide();
    assert_eq!(
        (released.action, released.ended_conflicts),
        (APPLY, keys(&["a.io/x"]))
    );
    assert_eq!(
        (released.added, released.repaired),
        (keys(&["a.io/x"]), vec![])
    );
}

#[test]
fn conflict_with_force_conflicts_is_taken_over() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1")]).taken("a.io/x", "other", true);
    case.force_conflicts = true;
    let decision = case.execute();
    assert_eq!(
        (decision.action, decision.forced),
        (FORCE, keys(&["a.io/x"]))
    );
    assert!(decision.conflicts.is_empty());
    assert!(case.decide().is_noop());
}

#[test]
fn changed_value_of_shared_key_with_force_conflicts_is_taken_over() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1")]);
    let sharer = FieldManager {
        manager: "gitops".into(),
        applies: true,
    };
    case.shown.owners.insert("a.io/x".into(), vec![sharer]);
    case.desired = set(&[("a.io/x", "2")]);
    case.force_conflicts = true;
    assert_eq!(case.decide().action, FORCE);
}

#[test]
fn label_repaired_too_often_is_conflict_until_window_ends() {
    for edit in [true, false] {
        let mut case = OwnershipCase::synced(&[("a.io/x", "1"), ("a.io/y", "1")]);
        let meddle = |case: OwnershipCase| {
            if edit {
                case.taken("a.io/x", "2", false)
            } else {
                case.deleted("a.io/x")
            }
        };
        for round in 0..MAX_REPAIRS {
            case = meddle(case);
            case.now += Duration::from_secs(60);
            assert_eq!(case.execute().repaired, keys(&["a.io/x"]), "round {round}");
        }
        case = meddle(case);
        let decision = case.execute();
        assert_eq!(
            (decision.action, decision.new_conflicts),
            (LabelWrite::Nothing, keys(&["a.io/x"]))
        );
        assert!(case.execute().is_noop());

        case.now += REPAIR_WINDOW;
        let decision = case.decide();
        if edit {
            // The editor still owns the key.
            assert!(decision.is_noop());
        } else {
            assert_eq!(decision.added, keys(&["a.io/x"]));
        }
    }
}

#[test]
fn label_taken_over_too_often_is_conflict_until_window_ends() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.force_conflicts = true;
    for _ in 0..MAX_REPAIRS {
        case = case.taken("a.io/x", "other", true);
        assert_eq!(case.execute().forced, keys(&["a.io/x"]));
    }
    case = case.taken("a.io/x", "other", true);
    assert_eq!(case.execute().new_conflicts, keys(&["a.io/x"]));
    case.now += REPAIR_WINDOW;
    assert_eq!(case.decide().forced, keys(&["a.io/x"]));
}

#[test]
fn owner_named_by_rejected_apply_is_remembered() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.shown.labels.insert("a.io/x".into(), "other".into());
    let first = case.decide();
    assert_eq!((first.action, first.changed), (APPLY, keys(&["a.io/x"])));
    let owner = FieldManager {
        manager: "before-first-apply".into(),
        applies: false,
    };
    case.refused.insert("a.io/x".into(), owner);
    assert_eq!(case.execute().new_conflicts, keys(&["a.io/x"]));
    case.refused.clear();
    assert!(case.decide().is_noop());
}

#[test]
fn key_with_desired_value_of_another_manager_is_shared() {
    let decision = OwnershipCase::desiring(&[("a.io/x", "1")])
        .taken("a.io/x", "1", false)
        .decide();
    assert_eq!(decision.action, APPLY);
    assert!(decision.added.is_empty() && decision.repaired.is_empty());
}

#[test]
fn new_node_with_same_name_needs_no_repair() {
    let mut case = OwnershipCase::synced(&[("a.io/x", "1")]).deleted("a.io/x");
    case.memory.reset();
    let decision = case.decide();
    assert_eq!(
        (decision.added, decision.repaired),
        (keys(&["a.io/x"]), vec![])
    );
}
