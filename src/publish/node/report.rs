//! Report of an executed decision: log, metrics, events and state.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::Arc;

use super::NodePublisher;
use crate::cluster::{EventKind, ObjectEvent};
use crate::label::ownership::{Conflict, ConflictCause, Decision, LabelWrite};
use crate::label::{LabelKey, LabelSet};

/// The labels on the Node, and the obstacles to publishing them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncState {
    /// True after the first sync since the start.
    pub synced: bool,
    /// The labels that virtnode has published, until `synced` those of the last run. To be stored for
    /// the next run.
    pub published: Arc<LabelSet>,
    /// Labels that virtnode leaves to their owners.
    pub conflicts: Arc<BTreeMap<LabelKey, Conflict>>,
    /// The current failure, if any.
    pub problem: Option<SyncProblem>,
    /// The failure of the Node's watch, while calls succeed.
    pub watch_problem: Option<SyncProblem>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncProblem {
    /// The fixed metrics label.
    pub code: &'static str,
    /// The text for people.
    pub message: String,
}

impl NodePublisher {
    /// Reports an executed decision. Must be called before the memory contains it.
    pub(super) fn report(&self, decision: &Decision) {
        self.count(decision);
        self.log(decision);
        if !decision.new_conflicts.is_empty() {
            let conflicts = decision.new_conflicts.iter();
            let conflicts: Vec<_> = conflicts.map(|key| describe(key, decision)).collect();
            let note = format!("labels left to their owners: {}", list(&conflicts));
            self.record_event(EventKind::Warning, "LabelConflict", "LeaveLabel", note);
        }
        if !decision.removed.is_empty() {
            let note = format!("labels removed: {}", list(&decision.removed));
            self.record_event(EventKind::Normal, "LabelsRemoved", "RemoveLabel", note);
        }
        self.state.send_if_modified(|state| {
            let new = SyncState {
                synced: true,
                published: reuse(&state.published, &decision.labels),
                conflicts: reuse(&state.conflicts, &decision.conflicts),
                problem: None,
                watch_problem: state.watch_problem.clone(),
            };
            let changed = *state != new;
            *state = new;
            changed
        });
    }

    pub(super) fn record_event(
        &self,
        kind: EventKind,
        reason: &str,
        action: &'static str,
        note: String,
    ) {
        self.events.record(ObjectEvent {
            about: self.cluster.node_reference(),
            related: None,
            kind,
            reason: reason.to_owned(),
            action,
            note,
        });
    }

    fn count(&self, decision: &Decision) {
        let changes = [
            ("added", decision.added.len()),
            ("changed", decision.changed.len()),
            ("removed", decision.removed.len()),
            ("repaired", decision.repaired.len()),
        ];
        for (action, count) in changes {
            self.metrics
                .changes
                .with_label_values(&[action])
                .inc_by(count as u64);
        }
        let conflicts = [
            ("dropped", decision.new_conflicts.len()),
            ("forced", decision.forced.len()),
        ];
        for (action, count) in conflicts {
            self.metrics
                .conflicts
                .with_label_values(&[action])
                .inc_by(count as u64);
        }
    }

    fn log(&self, decision: &Decision) {
        let node = self.cluster.node();
        if let LabelWrite::Apply { .. } = decision.action {
            tracing::info!(
                node,
                labels = decision.labels.len(),
                added = decision.added.len(),
                changed = decision.changed.len(),
                removed = decision.removed.len(),
                repaired = decision.repaired.len(),
                "labels applied"
            );
        }
        if !decision.removed.is_empty() {
            tracing::info!(node, labels = %list(&decision.removed), "labels removed");
        }
        if !decision.repaired.is_empty() {
            let labels = list(&decision.repaired);
            tracing::warn!(node, %labels, "labels restored that someone else deleted or edited");
        }
        if !decision.forced.is_empty() {
            let labels = list(&decision.forced);
            tracing::warn!(node, %labels, "labels taken from their owners, as configured");
        }
        for key in decision.new_conflicts.iter().take(LISTED) {
            tracing::warn!(node, label = %key, "label left to its owner: {}", describe(key, decision));
        }
        if let Some(more) = decision.new_conflicts.len().checked_sub(LISTED + 1) {
            tracing::warn!(node, labels = more + 1, "more labels left to their owners");
        }
        if !decision.ended_conflicts.is_empty() {
            let labels = list(&decision.ended_conflicts);
            tracing::info!(node, %labels, "conflict over labels ended");
        }
    }
}

/// Returns a conflict's key, owner and value.
fn describe(key: &LabelKey, decision: &Decision) -> String {
    let Some(conflict) = decision.conflicts.get(key) else {
        return key.to_string();
    };
    let owner = conflict
        .owner
        .as_ref()
        .map_or("an unknown manager", |owner| owner.manager.as_str());
    match (&conflict.value, conflict.cause) {
        (Some(value), ConflictCause::Contested) => {
            format!("{key}: {owner} keeps setting it to {value:?}")
        }
        (Some(value), _) => format!("{key}: {owner} owns it with the value {value:?}"),
        (None, _) => format!("{key}: {owner} keeps deleting it"),
    }
}

/// Returns `old` if it is equal, so that an idle daemon has one copy of its labels.
fn reuse<T: Clone + PartialEq>(old: &Arc<T>, new: &T) -> Arc<T> {
    if **old == *new {
        Arc::clone(old)
    } else {
        Arc::new(new.clone())
    }
}

/// Maximum number of labels in one line of the log or one Event, which has room for about ten. A Node
/// has hundreds of labels.
const LISTED: usize = 12;

/// Lists the first [`LISTED`] items and the number of the others.
fn list<T: Display>(items: &[T]) -> String {
    let mut text = String::new();
    for item in items.iter().take(LISTED) {
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a String cannot fail.
        let _ok = write!(text, "{separator}{item}");
    }
    if items.len() > LISTED {
        let _ok = write!(text, " and {} more", items.len() - LISTED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_list_is_cut_and_counts_the_rest() {
        let items: Vec<u32> = (1..=14).collect();
        assert_eq!(
            list(&items),
            "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 2 more"
        );
        assert_eq!(list(&items[..2]), "1, 2");
    }
}
