//! Validation of an object, and conversion into an order. Pure.

use std::time::Duration;

use serde_json::Value;
use thiserror::Error;

use crate::cluster::HotplugObject;
use crate::cluster::objects::domain_hotplug::{DomainReference, MemoryTarget, VcpusTarget};
use crate::cluster::objects::{DomainHotplugSpec, NODE_LABEL};
use crate::domain::is_uuid;
use crate::hotplug::HotplugRequest;
use crate::operation::{AskedBy, DomainName, Order};
use crate::units::{Bytes, Timestamp, shortened};

/// Maximum deadline in seconds, as in the definition of the kind.
const DEADLINE_MAX: u32 = 3600;

/// The reason why an object is rejected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ObjectError {
    /// The label names this node and the spec another one. Only this daemon can report it: the other
    /// node's does not see the object.
    #[error(
        "spec.nodeName is {spec:?} and the label {NODE_LABEL} is {label:?}: create another object where \
         both name the node on which the domain runs"
    )]
    WrongNode { spec: String, label: String },
    #[error("{0}")]
    InvalidSpec(String),
    /// Only for an object that was never accepted.
    #[error(
        "the object was created at {created} and could not be accepted within {} s \
         (spec.startingDeadlineSeconds): create another object if the change is still wanted",
        .within.as_secs()
    )]
    Expired {
        created: Timestamp,
        within: Duration,
    },
}

impl ObjectError {
    /// Returns the reason of the condition.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::WrongNode { .. } => "WrongNode",
            Self::InvalidSpec(_) => "InvalidSpec",
            Self::Expired { .. } => "Expired",
        }
    }
}

/// Converts an object into an order. The object's uid is the idempotency key: each object is one
/// operation, however often it is submitted.
///
/// # Errors
/// Errors in the object that the API server did not reject.
pub(super) fn order(object: &HotplugObject, node: &str) -> Result<Order, ObjectError> {
    let spec = parse_spec(&object.spec)?;
    if spec.node_name != node {
        return Err(ObjectError::WrongNode {
            spec: spec.node_name,
            label: node.to_owned(),
        });
    }
    if spec.starting_deadline_seconds == 0 {
        return Err(invalid(
            "spec.startingDeadlineSeconds is 0: it must be at least 1",
        ));
    }
    if !(1..=DEADLINE_MAX).contains(&spec.deadline_seconds) {
        return Err(invalid(format!(
            "spec.deadlineSeconds is {}: it must be from 1 to {DEADLINE_MAX}",
            spec.deadline_seconds
        )));
    }
    Ok(Order {
        domain: domain(spec.domain)?,
        request: request(spec.vcpus, spec.memory)?,
        require: spec.require.into(),
        persistent: spec.persistent,
        timeout: Duration::from_secs(spec.deadline_seconds.into()),
        idempotency_key: Some(object.uid.clone()),
        asked_by: asker(&object.name),
    })
}

/// Checks that an object that was never accepted is not too old to be executed: nobody may still
/// expect the change. The API server's clock gives the creation, so clocks that differ count.
///
/// # Errors
/// The object is older than its `startingDeadlineSeconds`.
pub(super) fn check_age(object: &HotplugObject, now: Timestamp) -> Result<(), ObjectError> {
    let within = parse_spec(&object.spec)?.starting_deadline_seconds;
    let within = Duration::from_secs(within.into());
    if now.since(object.created) <= within {
        return Ok(());
    }
    Err(ObjectError::Expired {
        created: object.created,
        within,
    })
}

/// Returns the object as the requester of an operation in the journal.
pub(super) fn asker(name: &str) -> AskedBy {
    AskedBy::Object {
        object: format!("domainhotplug/{name}"),
        user: None,
    }
}

/// Returns the time after its completion until the object is deleted; `None` means never.
pub(super) fn time_to_live(spec: &Value) -> Option<Duration> {
    let seconds = spec.get("ttlSecondsAfterFinished")?.as_u64()?;
    Some(Duration::from_secs(seconds))
}

/// Returns the short form of a request.
pub(super) fn in_words(request: &HotplugRequest) -> String {
    match request {
        HotplugRequest::Vcpus { count, online } => {
            let online = if *online { ",online" } else { "" };
            format!("vcpus={count}{online}")
        }
        HotplugRequest::Memory { size, force } => {
            let force = if *force { ",force" } else { "" };
            format!("memory={}{force}", size.quantity())
        }
    }
}

fn parse_spec(value: &Value) -> Result<DomainHotplugSpec, ObjectError> {
    serde_json::from_value(value.clone()).map_err(|error| {
        invalid(format!(
            "cannot parse the spec: {error}; see `kubectl explain domainhotplug.spec`"
        ))
    })
}

fn domain(reference: DomainReference) -> Result<DomainName, ObjectError> {
    let (text, field) = match reference {
        DomainReference {
            namespace: Some(namespace),
            name: Some(name),
            uuid: None,
        } => (format!("{namespace}/{name}"), "name"),
        DomainReference {
            namespace: None,
            name: Some(name),
            uuid: None,
        } => (name, "name"),
        DomainReference {
            namespace: None,
            name: None,
            uuid: Some(uuid),
        } if is_uuid(&uuid) => (uuid.to_lowercase(), "uuid"),
        DomainReference {
            namespace: None,
            name: None,
            uuid: Some(uuid),
        } => {
            return Err(invalid(format!(
                "spec.domain.uuid is not a valid UUID: {:?}",
                shortened(&uuid, 60)
            )));
        }
        _ => {
            return Err(invalid(
                "spec.domain must have exactly one of name and uuid, and a namespace only with a name",
            ));
        }
    };
    text.try_into()
        .map_err(|error| invalid(format!("spec.domain.{field}: {error}")))
}

/// Returns the only requested change. Each kind of resource is one field of the spec and one entry.
fn request(
    vcpus: Option<VcpusTarget>,
    memory: Option<MemoryTarget>,
) -> Result<HotplugRequest, ObjectError> {
    let requests = [vcpus.map(vcpus_request), memory.map(memory_request)];
    let mut requests = requests.into_iter().flatten();
    match (requests.next(), requests.next()) {
        (Some(request), None) => request,
        (None, _) => Err(invalid(
            "spec has no resource: exactly one of vcpus and memory must be given",
        )),
        (Some(_), Some(_)) => Err(invalid(
            "spec has several resources: exactly one of vcpus and memory must be given, one object for \
             each",
        )),
    }
}

fn vcpus_request(target: VcpusTarget) -> Result<HotplugRequest, ObjectError> {
    let VcpusTarget { count, online } = target;
    if count == 0 {
        return Err(invalid(
            "spec.vcpus.count is 0: a domain has at least one vCPU",
        ));
    }
    Ok(HotplugRequest::Vcpus { count, online })
}

fn memory_request(target: MemoryTarget) -> Result<HotplugRequest, ObjectError> {
    match target.size.parse() {
        Ok(Bytes::ZERO) => Err(invalid("spec.memory.size is 0: a domain has some memory")),
        Ok(size) => Ok(HotplugRequest::Memory {
            size,
            force: target.force,
        }),
        Err(error) => Err(invalid(format!("spec.memory.size: {error}"))),
    }
}

fn invalid(message: impl Into<String>) -> ObjectError {
    ObjectError::InvalidSpec(message.into())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::hotplug::Require;

    fn object(spec: Value) -> HotplugObject {
        HotplugObject {
            name: "vm1-to-4".into(),
            uid: "0b9f2f3c".into(),
            resource_version: "7".into(),
            created: Timestamp::from_millis(0),
            generation: 1,
            is_deleting: false,
            has_owner: false,
            spec,
            status: None,
        }
    }

    fn order_with(change: impl FnOnce(&mut Value)) -> Result<Order, ObjectError> {
        let mut spec =
            json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "vcpus": {"count": 4}});
        change(&mut spec);
        order(&object(spec), "node-a")
    }

    #[test]
    fn valid_object_yields_an_order_with_its_uid_as_key() {
        let order = order_with(|spec| spec["deadlineSeconds"] = 7.into()).unwrap();
        assert_eq!(order.domain.as_str(), "vm1");
        assert_eq!(order.timeout, Duration::from_secs(7));
        assert_eq!(order.require, Require::Online);
        assert_eq!(order.idempotency_key.as_deref(), Some("0b9f2f3c"));
        assert_eq!(order.asked_by.to_string(), "domainhotplug/vm1-to-4");
        assert_eq!(in_words(&order.request), "vcpus=4");

        let kubevirt = order_with(|spec| {
            spec["domain"] = json!({"namespace": "tenant-a", "name": "web"});
        });
        assert_eq!(kubevirt.unwrap().domain.as_str(), "tenant-a/web");

        let memory = order_with(|spec| {
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
    #[case::none(|spec: &mut Value| spec["vcpus"] = Value::Null, "no resource: exactly one of vcpus and memory")]
    #[case::two(|spec: &mut Value| spec["memory"] = json!({"size": "2Gi"}), "several resources: exactly one of vcpus and memory")]
    #[case::zero(|spec: &mut Value| spec["vcpus"]["count"] = 0.into(), "count is 0")]
    #[case::negative(|spec: &mut Value| spec["vcpus"]["count"] = (-1).into(), "-1")]
    #[case::huge(|spec: &mut Value| spec["vcpus"]["count"] = 5_000_000_000_u64.into(), "5000000000")]
    #[case::later(|spec: &mut Value| spec["attach"] = json!({"disk": {}}), "unknown field `attach`")]
    #[case::no_domain(|spec: &mut Value| spec["domain"] = json!({}), "exactly one of name and uuid")]
    #[case::both(|spec: &mut Value| spec["domain"]["uuid"] = "x".into(), "exactly one of name and uuid")]
    #[case::namespace_of_a_uuid(|spec: &mut Value| spec["domain"] = json!({"namespace": "tenant-a", "uuid": "2c298bd7-db31-43ec-8ced-225aa039f21b"}), "a namespace only with a name")]
    #[case::uuid(|spec: &mut Value| spec["domain"] = json!({"uuid": "x"}), "not a valid UUID: \"x\"")]
    #[case::name(|spec: &mut Value| spec["domain"]["name"] = "a\nb".into(), "is not a domain's name")]
    #[case::deadline(|spec: &mut Value| spec["deadlineSeconds"] = 3601.into(), "from 1 to 3600")]
    #[case::no_deadline(|spec: &mut Value| spec["deadlineSeconds"] = 0.into(), "from 1 to 3600")]
    #[case::no_start(|spec: &mut Value| spec["startingDeadlineSeconds"] = 0.into(), "at least 1")]
    #[case::level(|spec: &mut Value| spec["require"] = "Sure".into(), "unknown variant `Sure`")]
    #[case::nothing(|spec: &mut Value| *spec = Value::Null, "cannot parse the spec")]
    #[case::no_node(|spec: &mut Value| drop(spec.as_object_mut().unwrap().remove("nodeName")), "missing field `nodeName`")]
    fn invalid_object_yields_the_error(
        #[case] change: impl FnOnce(&mut Value),
        #[case] message: &str,
    ) {
        let error = order_with(change).unwrap_err();
        assert_eq!(error.reason(), "InvalidSpec");
        assert!(error.to_string().contains(message), "{error}");
    }

    #[rstest]
    #[case("2147483648", "no unit")]
    #[case("2GB", "unit of 1000 bytes")]
    #[case("99999999Ei", "more than any machine has")]
    #[case("0Gi", "is 0")]
    #[case("-1Gi", "negative")]
    fn invalid_size_yields_the_error(#[case] size: &str, #[case] message: &str) {
        let order = order_with(|spec| {
            spec["vcpus"] = Value::Null;
            spec["memory"] = json!({"size": size});
        });
        let error = order.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }

    #[test]
    fn object_older_than_its_starting_deadline_is_expired() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let spec = json!({"nodeName": "node-a", "domain": {"name": "vm1"}, "vcpus": {"count": 4}});
        let mut object = object(spec);
        assert_eq!(check_age(&object, at(600)), Ok(()));
        let expired = check_age(&object, at(601)).unwrap_err();
        assert_eq!(expired.reason(), "Expired");
        let text = expired.to_string();
        assert!(
            text.contains("1970-01-01T00:00:00") && text.contains("600 s"),
            "{text}"
        );
        // The same text each time, or the status would be written again and again.
        assert_eq!(check_age(&object, at(700)), Err(expired));
        object.spec["startingDeadlineSeconds"] = 86_400.into();
        assert_eq!(check_age(&object, at(86_400)), Ok(()));
        // A node's clock that is behind.
        assert_eq!(check_age(&object, at(-60)), Ok(()));
    }

    #[test]
    fn label_and_spec_with_different_nodes_yield_wrong_node() {
        let error = order_with(|spec| spec["nodeName"] = "node-b".into()).unwrap_err();
        assert_eq!(error.reason(), "WrongNode");
        let text = error.to_string();
        assert!(
            text.contains("\"node-b\"") && text.contains("virtnode.io/node is \"node-a\""),
            "{text}"
        );
    }

    #[test]
    fn missing_or_invalid_time_to_live_yields_none() {
        assert_eq!(time_to_live(&json!({})), None);
        assert_eq!(time_to_live(&json!({"ttlSecondsAfterFinished": -1})), None);
        let zero = json!({"ttlSecondsAfterFinished": 0});
        assert_eq!(time_to_live(&zero), Some(Duration::ZERO));
    }
}
