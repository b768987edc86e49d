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

/// The label by which a node's daemon finds the objects that are its own; the value is the name
/// of the Node.
pub const NODE_LABEL: &str = "virtnode.io/node";

/// The definition of every custom resource, as the API server takes it.
pub fn definitions() -> Vec<Value> {
    let definitions: [CustomResourceDefinition; 2] =
        [DomainHotplug::crd(), NodeVirtualization::crd()];
    let as_json = |definition| {
        let mut definition = serde_json::to_value(definition).unwrap_or_default();
        structural(&mut definition);
        definition
    };
    definitions.into_iter().map(as_json).collect()
}

/// Makes the schema of a type into one that says what Kubernetes means, and no more: no `null` as a
/// value of what is optional, no formats of numbers that it does not know (and warns of), no word
/// that further fields are forbidden (it drops them anyway, and forbids the word), and
/// descriptions that are not broken into lines where comments are.
fn structural(schema: &mut Value) {
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
                fields.iter_mut().for_each(|(key, value)| tidy(key, value));
            }
            fields.values_mut().for_each(structural);
        }
        Value::Array(items) => items.iter_mut().for_each(structural),
        _ => {}
    }
}

fn tidy(key: &str, value: &mut Value) {
    match (key, &*value) {
        ("description", Value::String(text)) => *value = text.replace('\n', " ").into(),
        ("format", Value::String(format)) if format.starts_with("uint") => *value = "int64".into(),
        ("minimum" | "maximum", Value::Number(number)) => {
            let whole = number.as_f64().filter(|number| number.fract() == 0.0);
            // Far inside of what an i64 and an f64 both hold.
            #[expect(clippy::cast_possible_truncation, reason = "a whole number of our own")]
            let whole = whole.map(|number| number as i64);
            if let Some(whole) = whole {
                *value = whole.into();
            }
        }
        _ => {}
    }
}
