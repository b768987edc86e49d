use super::*;

const EDITOR: &str = "kubectl-label";

fn set(pairs: &[(&str, &str)]) -> LabelSet {
    let pair = |(key, value): &(&str, &str)| (key.parse().unwrap(), value.parse().unwrap());
    pairs.iter().map(pair).collect()
}

fn keys(names: &[&str]) -> Vec<LabelKey> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

/// A Node and what we know of it.
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

    /// As after a sync: everything desired is there, ours and remembered.
    fn in_place(pairs: &[(&str, &str)]) -> Self {
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

    /// Somebody else writes a key and so takes it over.
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

    /// Decides and lets the Node show the outcome.
    fn carry_out(&mut self) -> Decision {
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
fn a_new_node_gets_everything() {
    let decision = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "2")]).decide();
    assert_eq!(decision.action, APPLY);
    assert_eq!(decision.added, keys(&["a.io/x", "a.io/y"]));
    assert!(decision.repaired.is_empty());
}

#[test]
fn nothing_is_written_at_rest() {
    let case = OwnershipCase::in_place(&[("a.io/x", "1")]).taken("foreign.io/z", "1", false);
    assert!(case.decide().is_noop());
}

#[test]
fn nothing_is_written_at_rest_after_a_restart_without_memory() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1")]);
    case.memory = OwnershipHistory::default();
    assert!(case.decide().is_noop());
}

#[test]
fn a_changed_value_is_written_without_force() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.desired = set(&[("a.io/x", "2"), ("a.io/y", "1")]);
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.changed),
        (APPLY, keys(&["a.io/x"]))
    );
}

#[test]
fn a_key_no_longer_desired_goes() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.desired = set(&[("a.io/x", "1")]);
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.removed),
        (APPLY, vec!["a.io/y".to_owned()])
    );
    assert_eq!(decision.labels, case.desired);
}

#[test]
fn an_empty_set_is_never_applied() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1")]);
    case.desired = LabelSet::new();
    let decision = case.decide();
    assert_eq!(
        (decision.action, decision.removed),
        (LabelWrite::Nothing, vec![])
    );
    // Neither when every key is in conflict.
    let case = OwnershipCase::desiring(&[("a.io/x", "1")])
        .taken("a.io/x", "other", false)
        .ours("a.io/z", "1");
    assert_eq!(case.decide().action, LabelWrite::Nothing);
}

#[test]
fn a_deleted_label_is_put_back() {
    let decision = OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")])
        .deleted("a.io/x")
        .decide();
    assert_eq!(
        (decision.action, decision.repaired),
        (APPLY, keys(&["a.io/x"]))
    );
    assert!(decision.added.is_empty());
}

#[test]
fn an_edited_label_is_put_back_by_force() {
    let decision = OwnershipCase::in_place(&[("a.io/x", "1")])
        .taken("a.io/x", "2", false)
        .decide();
    assert_eq!(
        (decision.action, decision.repaired),
        (FORCE, keys(&["a.io/x"]))
    );
    assert!(decision.conflicts.is_empty());
}

#[test]
fn a_foreign_value_from_before_us_is_a_conflict_for_this_key_only() {
    for applies in [false, true] {
        let desired = [("a.io/x", "1"), ("a.io/y", "1")];
        let mut case = OwnershipCase::desiring(&desired).taken("a.io/x", "other", applies);
        let decision = case.carry_out();
        assert_eq!(
            (decision.action, decision.added),
            (APPLY, keys(&["a.io/y"]))
        );
        assert_eq!(decision.new_conflicts, keys(&["a.io/x"]));
        let conflict = &decision.conflicts[&"a.io/x".parse().unwrap()];
        assert_eq!(conflict.value.as_deref(), Some("other"));
        assert_eq!(conflict.owner.as_ref().unwrap().to_string(), EDITOR);
        // Told once; it stays a conflict and is no reason to write.
        let again = case.carry_out();
        assert!(again.is_noop());
        assert_eq!(again.conflicts.len(), 1);
    }
}

#[test]
fn what_another_applier_takes_is_a_conflict_even_if_it_was_ours() {
    let mut case =
        OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")]).taken("a.io/x", "2", true);
    let decision = case.carry_out();
    assert_eq!(decision.action, LabelWrite::Nothing);
    assert_eq!(decision.new_conflicts, keys(&["a.io/x"]));
    assert!(case.decide().is_noop());
}

#[test]
fn a_value_that_changes_is_a_conflict_if_another_applier_shares_the_key() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")]);
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
    assert!(decision.removed.is_empty(), "it stays the other's");
}

#[test]
fn a_conflict_ends_when_the_owner_is_gone_or_agrees() {
    let desired = [("a.io/x", "1"), ("a.io/y", "1")];
    let mut case = OwnershipCase::desiring(&desired).taken("a.io/x", "other", true);
    case.carry_out();
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

    let gone = case.deleted("a.io/x").decide();
    assert_eq!(
        (gone.action, gone.ended_conflicts),
        (APPLY, keys(&["a.io/x"]))
    );
    assert_eq!((gone.added, gone.repaired), (keys(&["a.io/x"]), vec![]));
}

#[test]
fn a_conflict_can_be_taken_over_by_configuration() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1")]).taken("a.io/x", "other", true);
    case.force_conflicts = true;
    let decision = case.carry_out();
    assert_eq!(
        (decision.action, decision.forced),
        (FORCE, keys(&["a.io/x"]))
    );
    assert!(decision.conflicts.is_empty());
    assert!(case.decide().is_noop());
}

#[test]
fn a_shared_key_whose_value_changes_is_taken_over_too() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1")]);
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
fn a_label_put_back_too_often_is_left_alone_for_a_while() {
    for edit in [true, false] {
        let mut case = OwnershipCase::in_place(&[("a.io/x", "1"), ("a.io/y", "1")]);
        let meddle = |case: OwnershipCase| match edit {
            true => case.taken("a.io/x", "2", false),
            false => case.deleted("a.io/x"),
        };
        for round in 0..FIGHT_REPAIRS {
            case = meddle(case);
            case.now += Duration::from_secs(60);
            assert_eq!(
                case.carry_out().repaired,
                keys(&["a.io/x"]),
                "round {round}"
            );
        }
        case = meddle(case);
        let decision = case.carry_out();
        assert_eq!(
            (decision.action, decision.new_conflicts),
            (LabelWrite::Nothing, keys(&["a.io/x"]))
        );
        assert!(case.carry_out().is_noop());

        case.now += FIGHT_WINDOW;
        let decision = case.decide();
        match edit {
            // Whoever edited it owns it now.
            true => assert!(decision.is_noop()),
            false => assert_eq!(decision.added, keys(&["a.io/x"])),
        }
    }
}

#[test]
fn a_forced_label_is_not_fought_over_for_ever_either() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.force_conflicts = true;
    for _ in 0..FIGHT_REPAIRS {
        case = case.taken("a.io/x", "other", true);
        assert_eq!(case.carry_out().forced, keys(&["a.io/x"]));
    }
    case = case.taken("a.io/x", "other", true);
    assert_eq!(case.carry_out().new_conflicts, keys(&["a.io/x"]));
    case.now += FIGHT_WINDOW;
    assert_eq!(case.decide().forced, keys(&["a.io/x"]));
}

#[test]
fn an_owner_named_by_a_refusal_counts_and_is_remembered() {
    let mut case = OwnershipCase::desiring(&[("a.io/x", "1"), ("a.io/y", "1")]);
    case.shown.labels.insert("a.io/x".into(), "other".into());
    let first = case.decide();
    assert_eq!((first.action, first.changed), (APPLY, keys(&["a.io/x"])));
    let owner = FieldManager {
        manager: "before-first-apply".into(),
        applies: false,
    };
    case.refused.insert("a.io/x".into(), owner);
    assert_eq!(case.carry_out().new_conflicts, keys(&["a.io/x"]));
    case.refused.clear();
    assert!(case.decide().is_noop());
}

#[test]
fn a_shared_value_is_joined() {
    let decision = OwnershipCase::desiring(&[("a.io/x", "1")])
        .taken("a.io/x", "1", false)
        .decide();
    assert_eq!(decision.action, APPLY);
    assert!(decision.added.is_empty() && decision.repaired.is_empty());
}

#[test]
fn another_node_by_the_same_name_was_not_robbed() {
    let mut case = OwnershipCase::in_place(&[("a.io/x", "1")]).deleted("a.io/x");
    case.memory.reset();
    let decision = case.decide();
    assert_eq!(
        (decision.added, decision.repaired),
        (keys(&["a.io/x"]), vec![])
    );
}
