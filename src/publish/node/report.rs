//! What happened, as a log line, a metric, an event and a state, all from one decision.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::sync::Arc;

use super::NodePublisher;
use crate::cluster::{EventKind, ObjectEvent};
use crate::label::ownership::{Conflict, ConflictCause, Decision, LabelWrite};
use crate::label::{LabelKey, LabelSet};

/// What is published on the Node, and what stands in the way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SyncState {
    /// Whether a label set has been applied since the start, or was found in place.
    pub synced: bool,
    /// The labels that the API server has from us, those of the run before until `synced`. To be
    /// kept for the next run.
    pub published: Arc<LabelSet>,
    /// Labels that are left to others.
    pub conflicts: Arc<BTreeMap<LabelKey, Conflict>>,
    /// Why the last attempt failed, until one succeeds.
    pub problem: Option<SyncProblem>,
}

/// A failure to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncProblem {
    /// The bounded word for it, as in the metrics.
    pub code: &'static str,
    /// The sentence for people.
    pub message: String,
}

impl NodePublisher {
    /// Tells what a decision that was carried out means. To be called before it is remembered.
    pub(super) fn report(&self, decision: &Decision) {
        self.count(decision);
        self.log(decision);
        if !decision.new_conflicts.is_empty() {
            let told: Vec<_> = decision
                .new_conflicts
                .iter()
                .map(|key| tell(key, decision))
                .collect();
            self.events.record(ObjectEvent {
                about: self.cluster.node_reference(),
                kind: EventKind::Warning,
                reason: "LabelConflict".to_owned(),
                action: "LeaveLabel",
                note: format!("labels left to others: {}", list(&told)),
            });
        }
        if !decision.removed.is_empty() {
            self.events.record(ObjectEvent {
                about: self.cluster.node_reference(),
                kind: EventKind::Normal,
                reason: "LabelsRemoved".to_owned(),
                action: "RemoveLabel",
                note: format!("no longer on this node: {}", list(&decision.removed)),
            });
        }
        self.state.send_if_modified(|state| {
            let new = SyncState {
                synced: true,
                published: reuse(&state.published, &decision.labels),
                conflicts: reuse(&state.conflicts, &decision.conflicts),
                problem: None,
            };
            let changed = *state != new;
            *state = new;
            changed
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
                .label_changes
                .with_label_values(&[action])
                .inc_by(count as u64);
        }
        let conflicts = [
            ("dropped", decision.new_conflicts.len()),
            ("forced", decision.forced.len()),
        ];
        for (action, count) in conflicts {
            self.metrics
                .label_conflicts
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
            tracing::warn!(node, %labels, "labels deleted or edited by somebody else put back");
        }
        if !decision.forced.is_empty() {
            let labels = list(&decision.forced);
            tracing::warn!(node, %labels, "labels taken from their owners, as configured");
        }
        for key in &decision.new_conflicts {
            tracing::warn!(node, label = %key, "label left alone: {}", tell(key, decision));
        }
        if !decision.ended_conflicts.is_empty() {
            let labels = list(&decision.ended_conflicts);
            tracing::info!(node, %labels, "conflict over labels ended");
        }
    }
}

/// Who has the label, and with which value.
fn tell(key: &LabelKey, decision: &Decision) -> String {
    let Some(conflict) = decision.conflicts.get(key) else {
        return key.to_string();
    };
    let owner = conflict
        .owner
        .as_ref()
        .map_or("somebody", |owner| owner.manager.as_str());
    match (&conflict.value, conflict.cause) {
        (Some(value), ConflictCause::Contested) => {
            format!("{key}: {owner} keeps setting it to {value:?}")
        }
        (Some(value), _) => format!("{key}: {owner} owns it with the value {value:?}"),
        (None, _) => format!("{key}: {owner} keeps deleting it"),
    }
}

/// A daemon at rest has one copy of its labels.
fn reuse<T: Clone + PartialEq>(old: &Arc<T>, new: &T) -> Arc<T> {
    if **old == *new {
        Arc::clone(old)
    } else {
        Arc::new(new.clone())
    }
}

fn list<T: Display>(items: &[T]) -> String {
    let mut text = String::new();
    for item in items {
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ok = write!(text, "{separator}{item}");
    }
    text
}
