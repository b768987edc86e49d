//! DomainHotplug objects as in a real API server: generation, uid, status subresource, label selector.
//! Nothing is validated, so that a test can store invalid objects.

use std::collections::BTreeMap;

use axum::body::{Body, Bytes};
use http::Response;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{FakeApi, State, answer, line, status, stream};

pub(super) const PATH: &str = "/apis/virtnode.io/v1alpha1/domainhotplugs";

/// The objects by name, and their watches.
#[derive(Default)]
pub(super) struct Hotplugs {
    objects: BTreeMap<String, Value>,
    made: u64,
    pub(super) watches: Vec<mpsc::UnboundedSender<Bytes>>,
    statuses: Vec<Value>,
}

pub(super) fn verb(method: &str, path: &str, query: &str) -> &'static str {
    match (method, path == PATH) {
        ("GET", true) if query.contains("watch=") => "hotplug-watch",
        ("GET", true) => "hotplug-list",
        ("GET", false) => "hotplug-get",
        ("PATCH", false) if path.ends_with("/status") => "hotplug-status",
        ("PATCH", false) => "hotplug-own",
        ("DELETE", false) => "hotplug-delete",
        _ => panic!("unexpected {method} {path}"),
    }
}

impl FakeApi {
    /// Creates an object for node-a.
    pub(crate) fn make(&self, name: &str, spec: Value) {
        self.make_labelled(name, "node-a", spec);
    }

    /// Creates an object with a node's label.
    pub(crate) fn make_labelled(&self, name: &str, node: &str, spec: Value) {
        let mut state = self.state();
        state.hotplugs.made += 1;
        let made = state.hotplugs.made;
        // In the last minute, in the order of their creation.
        let ago = SignedDuration::from_secs(60 - made.min(59).cast_signed());
        let created = Timestamp::now().checked_sub(ago).unwrap();
        let object = json!({
            "apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
            "metadata": {"name": name, "uid": format!("hotplug-{made}"), "generation": 1,
                "creationTimestamp": format!("{created:.0}"),
                "labels": {"virtnode.io/node": node}},
            "spec": spec,
        });
        state.hotplugs.objects.insert(name.to_owned(), object);
        state.hotplug_changed(name, "ADDED");
    }

    /// Makes an object older, before it is listed.
    pub(crate) fn backdate(&self, name: &str, seconds: i64) {
        let created = Timestamp::now()
            .checked_sub(SignedDuration::from_secs(seconds))
            .unwrap();
        let mut state = self.state();
        let object = state.hotplugs.objects.get_mut(name).unwrap();
        object["metadata"]["creationTimestamp"] = format!("{created:.0}").into();
    }

    /// Returns an object.
    pub(crate) fn object(&self, name: &str) -> Option<Value> {
        self.state().hotplugs.objects.get(name).cloned()
    }

    /// Changes an object's spec as another client.
    pub(crate) fn change_spec(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.state();
        let object = state.hotplugs.objects.get_mut(name).expect("an object");
        change(&mut object["spec"]);
        let generation = object["metadata"]["generation"].as_u64().unwrap_or(0) + 1;
        object["metadata"]["generation"] = generation.into();
        state.hotplug_changed(name, "MODIFIED");
    }

    /// Deletes an object as another client.
    pub(crate) fn delete(&self, name: &str) {
        self.state().hotplug_deleted(name);
    }

    /// Returns all written statuses in order.
    pub(crate) fn statuses(&self) -> Vec<Value> {
        self.state().hotplugs.statuses.clone()
    }

    pub(crate) fn hotplug_watches(&self) -> usize {
        self.state().hotplugs.watches.len()
    }
}

impl State {
    pub(super) fn hotplug(
        &mut self,
        verb: &str,
        path: &str,
        query: &str,
        body: &Value,
    ) -> Response<Body> {
        let ours = |object: &&Value| object["metadata"]["labels"]["virtnode.io/node"] == "node-a";
        match verb {
            "hotplug-list" | "hotplug-watch" => {
                assert!(
                    query.contains("labelSelector=virtnode.io%2Fnode%3Dnode-a"),
                    "not only its own: {query}"
                );
            }
            _ => {}
        }
        let name = path[PATH.len()..].trim_start_matches('/');
        let name = name.trim_end_matches("/status").to_owned();
        match verb {
            "hotplug-list" => answer(json!({
                "kind": "DomainHotplugList", "apiVersion": "virtnode.io/v1alpha1",
                "metadata": {"resourceVersion": self.version.to_string()},
                "items": self.hotplugs.objects.values().filter(ours).collect::<Vec<_>>()})),
            "hotplug-watch" => {
                let from = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("resourceVersion="));
                let from: u64 = from.and_then(|from| from.parse().ok()).unwrap_or_default();
                let (sender, receiver) = mpsc::unbounded_channel();
                for object in self.hotplugs.objects.values().filter(ours) {
                    let version = object["metadata"]["resourceVersion"].as_str();
                    if version.and_then(|version| version.parse().ok()) > Some(from) {
                        let event = json!({"type": "MODIFIED", "object": object});
                        sender.send(line(&event)).ok();
                    }
                }
                self.hotplugs.watches.push(sender);
                stream(receiver)
            }
            _ => {
                let Some(object) = self.hotplugs.objects.get_mut(&name) else {
                    return answer(status(404, "NotFound", json!([])));
                };
                if verb == "hotplug-get" {
                    return answer(object.clone());
                }
                let uid = match verb {
                    "hotplug-delete" => &body["preconditions"]["uid"],
                    _ => &body["metadata"]["uid"],
                };
                // A real API server does not compare the uid here.
                if *uid != object["metadata"]["uid"] && verb != "hotplug-status" {
                    let mut conflict = status(409, "Conflict", json!([]));
                    conflict["message"] = "uid mismatch".into();
                    return answer(conflict);
                }
                let version = &body["metadata"]["resourceVersion"];
                if !version.is_null() && *version != object["metadata"]["resourceVersion"] {
                    return answer(status(409, "Conflict", json!([])));
                }
                match verb {
                    "hotplug-delete" => {
                        self.hotplug_deleted(&name);
                        return answer(json!({"kind": "Status", "apiVersion": "v1",
                            "status": "Success", "code": 200}));
                    }
                    "hotplug-status" => {
                        object["status"] = body["status"].clone();
                        self.hotplugs.statuses.push(body["status"].clone());
                    }
                    _ => {
                        let owners = body["metadata"]["ownerReferences"].clone();
                        object["metadata"]["ownerReferences"] = owners;
                    }
                }
                self.hotplug_changed(&name, "MODIFIED");
                answer(self.hotplugs.objects[&name].clone())
            }
        }
    }

    fn hotplug_changed(&mut self, name: &str, kind: &str) {
        self.version += 1;
        let object = self.hotplugs.objects.get_mut(name).expect("an object");
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let object = object.clone();
        self.send_to_hotplug_watches(kind, &object);
    }

    fn hotplug_deleted(&mut self, name: &str) {
        self.version += 1;
        let mut object = self.hotplugs.objects.remove(name).expect("an object");
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.send_to_hotplug_watches("DELETED", &object);
    }

    fn send_to_hotplug_watches(&mut self, kind: &str, object: &Value) {
        if object["metadata"]["labels"]["virtnode.io/node"] != "node-a" {
            return;
        }
        let event = line(&json!({"type": kind, "object": object}));
        self.hotplugs
            .watches
            .retain(|watch| watch.send(event.clone()).is_ok());
    }
}
