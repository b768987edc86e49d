//! What an object asks for, or what is wrong with it. Pure.

use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use crate::cluster::HotplugObject;
use crate::cluster::objects::domain_hotplug::{DomainReference, MemoryTarget, VcpusTarget};
use crate::cluster::objects::{DomainHotplugSpec, NODE_LABEL};
use crate::domain::is_uuid;
use crate::hotplug::HotplugRequest;
use crate::operation::{AskedBy, DomainName, Order};
use crate::units::{Bytes, shortened};

/// The longest deadline that is taken, as in the object's definition.
const MOST_SECONDS: u32 = 3600;

/// Why an object is not taken on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    /// Its label names this node and its spec another one.
    #[error(
        "spec.nodeName is {spec:?} and the label {NODE_LABEL} is {label:?}: make another object where \
         both name the node that the domain runs on"
    )]
    WrongNode {
        /// What the spec says.
        spec: String,
        /// What the label says: this node.
        label: String,
    },
    /// What it asks for makes no sense.
    #[error("{0}")]
    InvalidSpec(String),
}

impl Refusal {
    /// The reason as a condition has it.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::WrongNode { .. } => "WrongNode",
            Self::InvalidSpec(_) => "InvalidSpec",
        }
    }
}

/// The order that an object of this node gives.
///
/// The object's uid is the key, so that however often it is seen, it is one operation.
///
/// # Errors
/// What is wrong with the object, where the API server did not see it.
pub(super) fn order(object: &HotplugObject, node: &str) -> Result<Order, Refusal> {
    let spec = spec(&object.spec)?;
    if spec.node_name != node {
        return Err(Refusal::WrongNode {
            spec: spec.node_name,
            label: node.to_owned(),
        });
    }
    if !(1..=MOST_SECONDS).contains(&spec.deadline_seconds) {
        return Err(Refusal::InvalidSpec(format!(
            "spec.deadlineSeconds is {}: it must be from 1 to {MOST_SECONDS}",
            spec.deadline_seconds
        )));
    }
    Ok(Order {
        domain: domain(spec.domain)?,
        request: request(spec.vcpus, spec.memory)?,
        require: spec.require.into(),
        timeout: Duration::from_secs(spec.deadline_seconds.into()),
        idempotency_key: Some(object.uid.clone()),
        asked_by: asker(&object.name),
    })
}

/// Who asks, as the journal has it.
pub(super) fn asker(name: &str) -> AskedBy {
    AskedBy::Object {
        object: format!("domainhotplug/{name}"),
        user: None,
    }
}

/// How long after its end the object is to be kept; for ever if it does not say.
pub(super) fn time_to_live(spec: &Value) -> Option<Duration> {
    let seconds = spec.get("ttlSecondsAfterFinished")?.as_u64()?;
    Some(Duration::from_secs(seconds))
}

/// The request in a few words.
pub(super) fn in_words(request: &HotplugRequest) -> String {
    match request {
        HotplugRequest::Vcpus { count, online } => {
            let online = if *online { ",online" } else { "" };
            format!("vcpus={count}{online}")
        }
        HotplugRequest::Memory { size } => format!("memory={}", size.quantity()),
    }
}

fn spec(value: &Value) -> Result<DomainHotplugSpec, Refusal> {
    serde_json::from_value(value.clone()).map_err(|error| {
        Refusal::InvalidSpec(format!(
            "the spec cannot be read: {error}; `kubectl explain domainhotplug.spec` says what it may hold"
        ))
    })
}

fn domain(reference: DomainReference) -> Result<DomainName, Refusal> {
    let (text, field) = match reference {
        DomainReference {
            name: Some(name),
            uuid: None,
        } => (name, "name"),
        DomainReference {
            name: None,
            uuid: Some(uuid),
        } if is_uuid(&uuid) => (uuid.to_lowercase(), "uuid"),
        DomainReference {
            name: None,
            uuid: Some(uuid),
        } => {
            return Err(Refusal::InvalidSpec(format!(
                "spec.domain.uuid is no UUID: {:?}",
                shortened(&uuid, 60)
            )));
        }
        _ => {
            return Err(Refusal::InvalidSpec(
                "spec.domain must have exactly one of name and uuid".to_owned(),
            ));
        }
    };
    text.try_into()
        .map_err(|error| Refusal::InvalidSpec(format!("spec.domain.{field}: {error}")))
}

fn request(
    vcpus: Option<VcpusTarget>,
    memory: Option<MemoryTarget>,
) -> Result<HotplugRequest, Refusal> {
    match (vcpus, memory) {
        (Some(VcpusTarget { count: 0, .. }), None) => Err(Refusal::InvalidSpec(
            "spec.vcpus.count is 0: a domain has at least one vCPU".to_owned(),
        )),
        (Some(VcpusTarget { count, online }), None) => Ok(HotplugRequest::Vcpus { count, online }),
        (None, Some(MemoryTarget { size })) => match size.parse::<Bytes>() {
            Ok(Bytes::ZERO) => Err(Refusal::InvalidSpec(
                "spec.memory.size is 0: a domain has some memory".to_owned(),
            )),
            Ok(size) => Ok(HotplugRequest::Memory { size }),
            Err(error) => Err(Refusal::InvalidSpec(format!("spec.memory.size: {error}"))),
        },
        (Some(_), Some(_)) => Err(Refusal::InvalidSpec(
            "spec has both vcpus and memory: exactly one must be given, one object for each"
                .to_owned(),
        )),
        (None, None) => Err(Refusal::InvalidSpec(
            "spec has neither vcpus nor memory: exactly one must be given".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::hotplug::Require;
    use crate::units::Timestamp;

    fn object(spec: Value) -> HotplugObject {
        HotplugObject {
            name: "vm1-to-4".into(),
            uid: "0b9f2f3c".into(),
            version: "7".into(),
            created: Timestamp::from_millis(0),
            generation: 1,
            leaving: false,
            owned: false,
            spec,
            status: None,
        }
    }

    fn with(change: impl FnOnce(&mut Value)) -> Result<Order, Refusal> {
        let mut spec =
            json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "vcpus": {"count": 4}});
        change(&mut spec);
        order(&object(spec), "node-a")
    }

    #[test]
    fn a_sound_object_is_an_order_with_its_uid_as_the_key() {
        let order = with(|spec| spec["deadlineSeconds"] = 7.into()).unwrap();
        assert_eq!(order.domain.as_str(), "vm1");
        assert_eq!(order.timeout, Duration::from_secs(7));
        assert_eq!(order.require, Require::Online);
        assert_eq!(order.idempotency_key.as_deref(), Some("0b9f2f3c"));
        assert_eq!(order.asked_by.to_string(), "domainhotplug/vm1-to-4");
        assert_eq!(in_words(&order.request), "vcpus=4");

        let memory = with(|spec| {
            spec["vcpus"] = Value::Null;
            spec["memory"] = json!({"size": "1536Mi"});
            spec["domain"] = json!({"uuid": "2C298BD7-DB31-43EC-8CED-225AA039F21B"});
            spec["require"] = "Accepted".into();
        })
        .unwrap();
        assert_eq!(in_words(&memory.request), "memory=1536Mi");
        assert_eq!(
            memory.domain.as_str(),
            "2c298bd7-db31-43ec-8ced-225aa039f21b"
        );
        assert_eq!(memory.timeout, Duration::from_secs(120));
        assert_eq!(memory.require, Require::Accepted);
    }

    #[rstest]
    #[case::none(|spec: &mut Value| spec["vcpus"] = Value::Null, "neither vcpus nor memory")]
    #[case::two(|spec: &mut Value| spec["memory"] = json!({"size": "2Gi"}), "both vcpus and memory")]
    #[case::zero(|spec: &mut Value| spec["vcpus"]["count"] = 0.into(), "count is 0")]
    #[case::negative(|spec: &mut Value| spec["vcpus"]["count"] = (-1).into(), "-1")]
    #[case::huge(|spec: &mut Value| spec["vcpus"]["count"] = 5_000_000_000_u64.into(), "5000000000")]
    #[case::later(|spec: &mut Value| spec["attach"] = json!({"disk": {}}), "unknown field `attach`")]
    #[case::no_domain(|spec: &mut Value| spec["domain"] = json!({}), "exactly one of name and uuid")]
    #[case::both(|spec: &mut Value| spec["domain"]["uuid"] = "x".into(), "exactly one of name and uuid")]
    #[case::uuid(|spec: &mut Value| spec["domain"] = json!({"uuid": "x"}), "no UUID: \"x\"")]
    #[case::name(|spec: &mut Value| spec["domain"]["name"] = "a\nb".into(), "is not a domain's name")]
    #[case::deadline(|spec: &mut Value| spec["deadlineSeconds"] = 3601.into(), "from 1 to 3600")]
    #[case::no_deadline(|spec: &mut Value| spec["deadlineSeconds"] = 0.into(), "from 1 to 3600")]
    #[case::level(|spec: &mut Value| spec["require"] = "Sure".into(), "unknown variant `Sure`")]
    #[case::nothing(|spec: &mut Value| *spec = Value::Null, "the spec cannot be read")]
    #[case::no_node(|spec: &mut Value| drop(spec.as_object_mut().unwrap().remove("nodeName")), "missing field `nodeName`")]
    fn a_wrong_object_is_told_what_is_wrong(
        #[case] change: impl FnOnce(&mut Value),
        #[case] told: &str,
    ) {
        let refusal = with(change).unwrap_err();
        assert_eq!(refusal.reason(), "InvalidSpec");
        assert!(refusal.to_string().contains(told), "{refusal}");
    }

    #[rstest]
    #[case("2147483648", "no unit")]
    #[case("2GB", "unit of 1000 bytes")]
    #[case("99999999Ei", "more than any machine has")]
    #[case("0Gi", "is 0")]
    #[case("-1Gi", "negative")]
    fn a_wrong_size_is_told_what_is_wrong(#[case] size: &str, #[case] told: &str) {
        let refusal = with(|spec| {
            spec["vcpus"] = Value::Null;
            spec["memory"] = json!({"size": size});
        });
        let refusal = refusal.unwrap_err().to_string();
        assert!(refusal.contains(told), "{refusal}");
    }

    #[test]
    fn an_object_that_names_two_nodes_is_told_both() {
        let refusal = with(|spec| spec["nodeName"] = "node-b".into()).unwrap_err();
        assert_eq!(refusal.reason(), "WrongNode");
        let told = refusal.to_string();
        assert!(
            told.contains("\"node-b\"") && told.contains("virtnode.io/node is \"node-a\""),
            "{told}"
        );
    }

    #[test]
    fn without_a_time_to_live_an_object_stays() {
        assert_eq!(time_to_live(&json!({})), None);
        assert_eq!(time_to_live(&json!({"ttlSecondsAfterFinished": -1})), None);
        let zero = json!({"ttlSecondsAfterFinished": 0});
        assert_eq!(time_to_live(&zero), Some(Duration::ZERO));
    }
}
