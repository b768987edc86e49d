//! The custom resources of group `virtnode.io`, as types; `virtnode crd` prints their definitions.

pub mod condition;
pub mod domain_hotplug;
pub mod node_virtualization;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

pub use condition::Condition;
pub use domain_hotplug::{DomainHotplug, DomainHotplugSpec, DomainHotplugStatus};
pub use node_virtualization::{NodeVirtualization, NodeVirtualizationStatus};

/// The label by which a daemon selects its objects; the value is the name of the Node.
pub const NODE_LABEL: &str = "virtnode.io/node";

/// Returns the definitions of all custom resources as the API server accepts them.
pub fn definitions() -> Vec<Value> {
    let definitions: [CustomResourceDefinition; 2] =
        [DomainHotplug::crd(), NodeVirtualization::crd()];
    let as_json = |definition| {
        let mut definition = serde_json::to_value(definition).unwrap_or_default();
        make_structural(&mut definition);
        definition
    };
    definitions.into_iter().map(as_json).collect()
}

/// Converts the schema of a type into a structural schema of Kubernetes: without `null` as a value of
/// optional fields, without number formats that the API server warns about, without
/// `additionalProperties: false` (which it forbids; it drops unknown fields anyway), and without the
/// line breaks of comments in descriptions.
fn make_structural(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("type").is_some_and(Value::is_string) {
                fields.remove("nullable");
                fields.remove("title");
                fields.retain(|key, value| match key.as_str() {
                    "default" => !value.is_null(),
                    "additionalProperties" => *value != Value::Bool(false),
                    _ => true,
                });
                fields
                    .iter_mut()
                    .for_each(|(key, value)| normalize(key, value));
            }
            fields.values_mut().for_each(make_structural);
        }
        Value::Array(items) => items.iter_mut().for_each(make_structural),
        _ => {}
    }
}

fn normalize(key: &str, value: &mut Value) {
    match (key, &*value) {
        ("description", Value::String(text)) => *value = text.replace('\n', " ").into(),
        ("format", Value::String(format)) if format.starts_with("uint") => *value = "int64".into(),
        ("minimum" | "maximum", Value::Number(number)) => {
            let whole = number.as_f64().filter(|number| number.fract() == 0.0);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "whole numbers of this crate, far below 2^53"
            )]
            let whole = whole.map(|number| number as i64);
            if let Some(whole) = whole {
                *value = whole.into();
            }
        }
        _ => {}
    }
}
