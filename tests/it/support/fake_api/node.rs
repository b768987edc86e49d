//! The labels of a Node with owners as in a real API server.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::status;

/// The Node's labels and the keys that each (manager, operation) owns.
#[derive(Default)]
pub(crate) struct FakeNode {
    uid: String,
    pub(super) version: u64,
    pub(crate) labels: BTreeMap<String, String>,
    owned: BTreeMap<(String, String), BTreeSet<String>>,
}

impl FakeNode {
    pub(super) fn new(uid: String) -> Self {
        Self {
            uid,
            ..Self::default()
        }
    }

    /// Edits a label like `kubectl label --overwrite`, or `key-` for `None`.
    pub(crate) fn update(&mut self, manager: &str, key: &str, value: Option<&str>) {
        self.remove_owners(key);
        match value {
            Some(value) => self.set(manager, "Update", key, value),
            None => drop(self.labels.remove(key)),
        }
    }

    /// Applies one key with force.
    pub(crate) fn force_apply(&mut self, manager: &str, key: &str, value: &str) {
        self.remove_owners(key);
        self.set(manager, "Apply", key, value);
    }

    pub(crate) fn owned_by(&self, manager: &str) -> BTreeSet<String> {
        self.owned
            .get(&(manager.into(), "Apply".into()))
            .cloned()
            .unwrap_or_default()
    }

    fn remove_owners(&mut self, key: &str) {
        for keys in self.owned.values_mut() {
            keys.remove(key);
        }
    }

    fn set(&mut self, manager: &str, operation: &str, key: &str, value: &str) {
        self.labels.insert(key.into(), value.into());
        self.owned
            .entry((manager.into(), operation.into()))
            .or_default()
            .insert(key.into());
    }

    pub(super) fn apply(&mut self, manager: &str, force: bool, meta: &Value) -> Result<(), Value> {
        let want = |field: &str, have: &str| meta[field].as_str().is_none_or(|want| want == have);
        if !want("uid", &self.uid) || !want("resourceVersion", &self.version.to_string()) {
            return Err(status(409, "Conflict", json!([])));
        }
        let wanted: BTreeMap<String, String> =
            serde_json::from_value(meta["labels"].clone()).unwrap_or_default();
        let id = (manager.to_owned(), "Apply".to_owned());
        let mut causes = Vec::new();
        for (key, value) in &wanted {
            let others = self
                .owned
                .iter()
                .filter(|(owner, keys)| **owner != id && keys.contains(key));
            if self.labels.get(key).is_some_and(|shown| shown != value) {
                causes.extend(others.map(|((manager, operation), _)| {
                    let using = if operation == "Update" { " using v1" } else { "" };
                    json!({"reason": "FieldManagerConflict", "field": format!(".metadata.labels.{key}"),
                        "message": format!("conflict with \"{manager}\"{using}")})
                }));
            }
        }
        if !causes.is_empty() && !force {
            return Err(status(409, "Conflict", causes.into()));
        }
        for key in self.owned.remove(&id).unwrap_or_default() {
            if !wanted.contains_key(&key) && !self.owned.values().any(|keys| keys.contains(&key)) {
                self.labels.remove(&key);
            }
        }
        for (key, value) in &wanted {
            if self.labels.get(key).is_some_and(|shown| shown != value) {
                self.remove_owners(key);
            }
            self.set(manager, "Apply", key, value);
        }
        Ok(())
    }

    pub(super) fn json(&self) -> Value {
        let fields: Vec<_> = self.owned.iter().filter(|(_, keys)| !keys.is_empty()).map(|((manager, operation), keys)| {
            let keys: BTreeMap<String, Value> = keys.iter().map(|key| (format!("f:{key}"), json!({}))).collect();
            json!({"manager": manager, "operation": operation, "apiVersion": "v1", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": keys}}})
        }).collect();
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {
            "name": "node-a", "uid": self.uid, "resourceVersion": self.version.to_string(),
            "labels": self.labels, "managedFields": fields}})
    }
}
