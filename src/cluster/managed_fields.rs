//! Owners of labels, read from `metadata.managedFields`.
//!
//! An entry has a manager, an operation, from Kubernetes 1.22 on a subresource, and the fields as
//! nested maps with keys `f:<name>` (Kubernetes: `FieldsV1`). Entries of an unknown shape are
//! skipped: the API server still refuses an apply to labels of other owners.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::core::ObjectMeta;

use super::FIELD_MANAGER;
use crate::label::ownership::{FieldManager, ObservedLabels};

pub(super) fn shown(meta: ObjectMeta) -> ObservedLabels {
    let mut shown = ObservedLabels {
        labels: meta.labels.unwrap_or_default(),
        ..ObservedLabels::default()
    };
    for entry in meta.managed_fields.unwrap_or_default() {
        let applies = entry.operation.as_deref() == Some("Apply");
        let is_main = entry.subresource.as_deref().unwrap_or_default().is_empty();
        let manager = entry.manager.as_deref().unwrap_or_default();
        if applies && is_main && manager == FIELD_MANAGER {
            shown.owned.extend(labels(&entry).map(str::to_owned));
            continue;
        }
        for key in labels(&entry) {
            let owner = FieldManager {
                manager: manager.to_owned(),
                applies,
            };
            shown.owners.entry(key.to_owned()).or_default().push(owner);
        }
    }
    shown
}

fn labels(entry: &ManagedFieldsEntry) -> impl Iterator<Item = &str> {
    let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
    let labels = fields.and_then(|fields| fields.get("f:metadata")?.get("f:labels")?.as_object());
    // The key `.` stands for the map itself.
    labels
        .into_iter()
        .flat_map(|labels| labels.keys())
        .filter_map(|key| key.strip_prefix("f:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown_by(managed_fields: serde_json::Value) -> ObservedLabels {
        let meta = serde_json::json!({"labels": {"a.io/x": "1"}, "managedFields": managed_fields});
        shown(serde_json::from_value(meta).unwrap())
    }

    #[test]
    fn only_an_apply_by_virtnode_makes_a_label_owned() {
        let fields = |key: &str| serde_json::json!({"f:metadata": {"f:labels": {".": {}, format!("f:{key}"): {}}}});
        let shown = shown_by(serde_json::json!([
            {"manager": "virtnode", "operation": "Apply", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields("a.io/ours")},
            {"manager": "virtnode", "operation": "Update", "fieldsV1": fields("a.io/update")},
            {"manager": "virtnode", "operation": "Apply", "subresource": "status", "fieldsV1": fields("a.io/status")},
            {"manager": "kubelet", "operation": "Update", "subresource": "", "fieldsV1": fields("a.io/x")},
            {"manager": "gitops", "operation": "Apply", "fieldsV1": fields("a.io/x")},
        ]));
        assert_eq!(shown.owned, ["a.io/ours".to_owned()].into());
        let owners: Vec<_> = shown.owners["a.io/x"]
            .iter()
            .map(|o| (o.manager.as_str(), o.applies))
            .collect();
        assert_eq!(owners, [("kubelet", false), ("gitops", true)]);
        assert_eq!(shown.owners.len(), 3);
    }

    #[test]
    fn unknown_shapes_are_skipped() {
        let odd = serde_json::json!([
            {}, {"manager": "virtnode", "operation": "Apply"},
            {"manager": "virtnode", "operation": "Apply", "fieldsType": "FieldsV2", "fieldsV1": {"f:metadata": ["f:labels"]}},
            {"manager": "virtnode", "operation": "Apply", "fieldsV1": {"f:metadata": {"f:labels": {"k:{}": {}, "v:1": {}}}}},
        ]);
        let shown = shown_by(odd);
        assert!(shown.owned.is_empty() && shown.owners.is_empty());
        assert_eq!(shown.labels.len(), 1);
    }
}
