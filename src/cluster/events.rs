//! Events (`events.k8s.io/v1`): what `kubectl describe` and `kubectl get events` show of an object.

use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::core::ObjectMeta;
use serde_json::json;

use super::{Cluster, ClusterError, FIELD_MANAGER, Object};

/// The API server takes 1 kB of note.
const NOTE_MAX: usize = 1000;
/// And 128 characters of instance, reason and action.
const WORD_MAX: usize = 128;
/// Of an object's name in the name of an event, which may have 253 characters.
const NAME_MAX: usize = 220;

/// Whether people should look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// For the record.
    Normal,
    /// Somebody may have to do something.
    Warning,
}

/// Something that happened to an object and that people should see there.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectEvent {
    /// The object. Where it has no namespace, the event is in `default`.
    pub about: ObjectReference,
    /// Whether people should look.
    pub kind: EventKind,
    /// Why the event is there, as one word in CamelCase: `LabelConflict`.
    pub reason: String,
    /// What virtnode did or tried, as one word in CamelCase: `RemoveLabel`.
    pub action: &'static str,
    /// What happened, as a sentence. Cut at 1,000 bytes.
    pub note: String,
}

/// An event that the API server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenEvent {
    namespace: String,
    name: String,
}

impl Cluster {
    /// The Node, as events refer to it.
    pub fn node_reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            // As kubelet does it: `kubectl describe node` looks for this and not for the uid.
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        }
    }

    /// Writes an event of something that happened at `at`.
    ///
    /// # Errors
    /// Any [`ClusterError`]; a name that is taken is a [`ClusterError::Conflict`].
    pub async fn create_event(
        &self,
        what: &ObjectEvent,
        at: Timestamp,
    ) -> Result<WrittenEvent, ClusterError> {
        let namespace = what.about.namespace.as_deref().unwrap_or("default");
        let mut event = self.event(what, namespace, at);
        // Up to 1.20.5 the API server wants the namespace of the object to be that of the event, and
        // later ones want it to have none. Which one this is shows at the first event.
        if self.events_of_default.load(Ordering::Relaxed) {
            set_namespace(&mut event, namespace);
        }
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let create = async |event: &Event| {
            let params = PostParams::default();
            let created = events.create(&params, event);
            self.call_about(object(event), "create", created).await
        };
        let mut created = create(&event).await;
        let has_none = event.regarding.iter().any(|it| it.namespace.is_none());
        if matches!(created, Err(ClusterError::Rejected { .. })) && has_none {
            set_namespace(&mut event, namespace);
            created = create(&event).await;
            if created.is_ok() {
                self.events_of_default.store(true, Ordering::Relaxed);
            }
        }
        let name = created?.metadata.name.unwrap_or_default();
        Ok(WrittenEvent {
            namespace: namespace.to_owned(),
            name,
        })
    }

    /// Says of an event that it happened `count` times by now, last at `at`.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the API server has forgotten the event, as it does after an
    /// hour; otherwise any.
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
        let about = Object {
            kind: "Event",
            resource: EVENTS,
            name: event.name.clone(),
        };
        self.call_about(about, "patch", events.patch(&event.name, &params, &patch))
            .await?;
        Ok(())
    }

    fn event(&self, what: &ObjectEvent, namespace: &str, at: Timestamp) -> Event {
        let kind = match what.kind {
            EventKind::Normal => "Normal",
            EventKind::Warning => "Warning",
        };
        let about = what.about.name.as_deref().unwrap_or(FIELD_MANAGER);
        Event {
            metadata: ObjectMeta {
                name: Some(event_name(about, at)),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(at)),
            type_: Some(kind.to_owned()),
            reason: Some(what.reason.chars().take(WORD_MAX).collect()),
            action: Some(what.action.to_owned()),
            note: Some(shorten(&what.note)),
            regarding: Some(what.about.clone()),
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

const EVENTS: &str = "events.events.k8s.io";

fn object(event: &Event) -> Object {
    Object {
        kind: "Event",
        resource: EVENTS,
        name: event.metadata.name.clone().unwrap_or_default(),
    }
}

/// The object's name, the time, and a little chance: two things may happen at one time.
fn event_name(about: &str, at: Timestamp) -> String {
    // Names are ASCII; a part of one must not end in a dot or dash.
    let about = about.get(..NAME_MAX).unwrap_or(about);
    let about = about.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{about}.{:x}{:04x}", at.as_nanosecond(), fastrand::u16(..))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_an_event_is_legal_for_the_longest_name_of_an_object() {
        let at = Timestamp::now();
        let name = event_name(&format!("{}.{}", "a".repeat(219), "b".repeat(33)), at);
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
        assert!(event_name("vm1-to-4", at).starts_with("vm1-to-4."));
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let note = shorten(&"é".repeat(600));
        assert!(note.len() <= 1024 && note.ends_with('…'));
        assert_eq!(shorten("short"), "short");
    }
}
