//! Events (`events.k8s.io/v1`), which `kubectl describe` and `kubectl get events` show.

use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::core::ObjectMeta;
use serde_json::json;

use super::{ApiObject, Cluster, ClusterError, FIELD_MANAGER};

/// Maximum note in bytes; the API server accepts 1 kB (Kubernetes: `NoteLengthLimit`).
const NOTE_MAX: usize = 1000;
/// Maximum instance, reason and action in characters (Kubernetes: `ReasonLengthLimit` and others).
const WORD_MAX: usize = 128;
/// Maximum part of the object's name in an event's name, whose limit is 253 characters.
const NAME_MAX: usize = 220;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    Normal,
    /// Someone may have to act.
    Warning,
}

/// A new event about an object.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectEvent {
    /// The object. Events about objects without a namespace are written to `default`.
    pub about: ObjectReference,
    /// A second object that it is about.
    pub related: Option<ObjectReference>,
    pub kind: EventKind,
    /// Cause of the event in CamelCase: `LabelConflict`.
    pub reason: String,
    /// Action of virtnode in CamelCase: `RemoveLabel`.
    pub action: &'static str,
    /// Description for people, truncated to 1,000 bytes.
    pub note: String,
}

/// An event stored in the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenEvent {
    namespace: String,
    name: String,
}

impl Cluster {
    /// Returns the reference to the Node that its events contain.
    pub fn node_reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            // As the kubelet does: `kubectl describe node` selects events by this value, not the uid.
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        }
    }

    /// Writes an event with the event time `at`.
    ///
    /// # Errors
    /// Any [`ClusterError`]; [`ClusterError::Conflict`] if the generated name exists.
    pub async fn create_event(
        &self,
        event: &ObjectEvent,
        at: Timestamp,
    ) -> Result<WrittenEvent, ClusterError> {
        let namespace = event.about.namespace.as_deref().unwrap_or("default");
        let mut event = self.api_event(event, namespace, at);
        // API servers up to 1.20.5 require the object's namespace to equal the event's; later ones
        // require it to be empty. The first event shows which of them this one is.
        if self.events_need_namespace.load(Ordering::Relaxed) {
            set_namespace(&mut event, namespace);
        }
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let create = async |event: &Event| {
            let params = PostParams::default();
            let created = events.create(&params, event);
            let name = event.metadata.name.clone().unwrap_or_default();
            self.call_about(event_object(name), "create", created).await
        };
        let mut created = create(&event).await;
        let has_none = event.regarding.iter().any(|it| it.namespace.is_none());
        if matches!(created, Err(ClusterError::Rejected { .. })) && has_none {
            set_namespace(&mut event, namespace);
            created = create(&event).await;
            if created.is_ok() {
                self.events_need_namespace.store(true, Ordering::Relaxed);
            }
        }
        let name = created?.metadata.name.unwrap_or_default();
        Ok(WrittenEvent {
            namespace: namespace.to_owned(),
            name,
        })
    }

    /// Sets the count of an event, and the time of its last occurrence.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the event has expired, by default after an hour; otherwise any.
    pub async fn repeat_event(
        &self,
        event: &WrittenEvent,
        count: u32,
        at: Timestamp,
    ) -> Result<(), ClusterError> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &event.namespace);
        let series = json!({"series": {"count": count, "lastObservedTime": MicroTime(at)}});
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(&series);
        let object = event_object(event.name.clone());
        self.call_about(object, "patch", events.patch(&event.name, &params, &patch))
            .await?;
        Ok(())
    }

    fn api_event(&self, event: &ObjectEvent, namespace: &str, at: Timestamp) -> Event {
        let kind = match event.kind {
            EventKind::Normal => "Normal",
            EventKind::Warning => "Warning",
        };
        let about = event.about.name.as_deref().unwrap_or(FIELD_MANAGER);
        Event {
            metadata: ObjectMeta {
                name: Some(event_name(about, at)),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(at)),
            type_: Some(kind.to_owned()),
            reason: Some(event.reason.chars().take(WORD_MAX).collect()),
            action: Some(event.action.to_owned()),
            note: Some(truncate(&event.note)),
            regarding: Some(event.about.clone()),
            related: event.related.clone(),
            reporting_controller: Some(FIELD_MANAGER.to_owned()),
            reporting_instance: Some(self.node.chars().take(WORD_MAX).collect()),
            ..Event::default()
        }
    }
}

fn set_namespace(event: &mut Event, namespace: &str) {
    if let Some(about) = &mut event.regarding {
        about.namespace.get_or_insert_with(|| namespace.to_owned());
    }
}

fn event_object(name: String) -> ApiObject {
    ApiObject {
        kind: "Event",
        resource: "events.events.k8s.io",
        name,
    }
}

/// Returns the object's name with the time and a random number appended: two events may occur at
/// the same time.
fn event_name(about: &str, at: Timestamp) -> String {
    // Names are ASCII, and each part must end in an alphanumeric character.
    let about = about.get(..NAME_MAX).unwrap_or(about);
    let about = about.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{about}.{:x}{:04x}", at.as_nanosecond(), fastrand::u16(..))
}

fn truncate(note: &str) -> String {
    if note.len() <= NOTE_MAX {
        return note.to_owned();
    }
    let mut end = NOTE_MAX;
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &note[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_name_is_valid_for_the_longest_object_name() {
        let at = Timestamp::now();
        let name = event_name(&format!("{}.{}", "a".repeat(219), "b".repeat(33)), at);
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
        assert!(event_name("vm1-to-4", at).starts_with("vm1-to-4."));
    }

    #[test]
    fn long_note_is_truncated_at_a_character_boundary() {
        let note = truncate(&"é".repeat(600));
        assert!(note.len() <= 1024 && note.ends_with('…'));
        assert_eq!(truncate("short"), "short");
    }
}
