//! Events on the Node (`events.k8s.io/v1`): what `kubectl describe node` shows.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use super::{Cluster, ClusterError, FIELD_MANAGER};

/// The API server takes 1 kB of note.
const NOTE_MAX: usize = 1000;
/// And 128 characters of instance.
const INSTANCE_MAX: usize = 128;

/// What an operator should see on the Node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeEvent {
    /// Another field manager owns labels of ours with another value.
    LabelConflict,
    /// Labels are gone because the node no longer has what they say.
    LabelsRemoved,
}

impl NodeEvent {
    /// The event's `reason`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::LabelConflict => "LabelConflict",
            Self::LabelsRemoved => "LabelsRemoved",
        }
    }

    fn action(self) -> &'static str {
        match self {
            Self::LabelConflict => "LeaveLabel",
            Self::LabelsRemoved => "RemoveLabel",
        }
    }

    fn event_type(self) -> EventType {
        match self {
            Self::LabelConflict => EventType::Warning,
            Self::LabelsRemoved => EventType::Normal,
        }
    }
}

/// Writes events on the Node. To be made once: repeats within minutes become one series.
#[derive(Clone)]
pub struct NodeEvents {
    cluster: Cluster,
    recorder: Recorder,
}

impl NodeEvents {
    /// Events on the Node of this cluster.
    pub fn new(cluster: &Cluster) -> Self {
        let reporter = Reporter {
            controller: FIELD_MANAGER.to_owned(),
            instance: Some(cluster.node.chars().take(INSTANCE_MAX).collect()),
        };
        let recorder = Recorder::new(cluster.client.clone(), reporter);
        Self {
            cluster: cluster.clone(),
            recorder,
        }
    }

    /// Writes one event. It is lost if that fails, which is of no consequence for the labels.
    pub async fn publish(&self, event: NodeEvent, note: &str) {
        let mut node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.cluster.node.clone()),
            // As kubelet does it: `kubectl describe node` looks for this and not for the uid.
            uid: Some(self.cluster.node.clone()),
            ..ObjectReference::default()
        };
        let what = Event {
            type_: event.event_type(),
            reason: event.reason().to_owned(),
            note: Some(shorten(note)),
            action: event.action().to_owned(),
            secondary: None,
        };
        let mut published = self
            .cluster
            .call("create", self.recorder.publish(&what, &node))
            .await;
        if matches!(published, Err(ClusterError::Rejected { .. })) {
            // Up to 1.20.5 the API server wants the namespace of a Node to be that of the event.
            node.namespace = Some("default".to_owned());
            published = self
                .cluster
                .call("create", self.recorder.publish(&what, &node))
                .await;
        }
        if let Err(error) = published {
            tracing::debug!(reason = event.reason(), %error, "event not written");
        }
    }
}

fn shorten(note: &str) -> String {
    if note.len() <= NOTE_MAX {
        return note.to_owned();
    }
    let mut end = NOTE_MAX;
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &note[..end])
}
