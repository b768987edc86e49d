//! The DomainHotplug objects of the own node.

use std::future::{self, Future};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::runtime::watcher::{self, Event};
use serde_json::{Value, json};

use super::objects::{DomainHotplug, DomainHotplugStatus, NODE_LABEL};
use super::{Cluster, ClusterError, FIELD_MANAGER, Object};
use crate::label::LabelValue;
use crate::units::Timestamp;

const RESOURCE: &str = "domainhotplugs.virtnode.io";

/// One object, as the API server shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct HotplugObject {
    /// Its name.
    pub name: String,
    /// Which object by this name it is.
    pub uid: String,
    /// Which version of it, as the API server counts.
    pub version: String,
    /// When it was made, to the second.
    pub created: Timestamp,
    /// How often its spec was changed, and once more.
    pub generation: i64,
    /// Whether it is about to go, and only a finalizer keeps it.
    pub leaving: bool,
    /// Whether the Node of this name owns it.
    pub owned: bool,
    /// What is asked for, as it is written: it may be wrong in any way that the API server lets pass.
    pub spec: Value,
    /// What has been said of it; nothing if that cannot be read.
    pub status: Option<DomainHotplugStatus>,
}

/// Which object is meant: another one may have its name by now.
#[derive(Debug, Clone, Copy)]
pub struct ObjectId<'t> {
    /// Its name.
    pub name: &'t str,
    /// Which object by this name.
    pub uid: &'t str,
}

/// What is new about the objects of this node.
#[derive(Debug, Clone, PartialEq)]
pub enum HotplugChange {
    /// All there are, at the start and whenever the API server no longer knows what has been told.
    Listed(Vec<HotplugObject>),
    /// One was made or changed.
    Changed(Box<HotplugObject>),
    /// The one with this uid is gone, or is no longer this node's.
    Deleted(String),
}

/// The objects of one node.
#[derive(Clone)]
pub struct HotplugObjects {
    cluster: Cluster,
    objects: Api<DynamicObject>,
}

impl HotplugObjects {
    /// The objects of the cluster's own node.
    pub fn new(cluster: &Cluster) -> Self {
        // As they are and not as a type: one that is odd must not hide all others.
        let kind = ApiResource::erase::<DomainHotplug>(&());
        Self {
            objects: Api::all_with(cluster.client.clone(), &kind),
            cluster: cluster.clone(),
        }
    }

    /// The name of the node.
    pub fn node(&self) -> &str {
        self.cluster.node()
    }

    /// An object, as events refer to it.
    pub fn reference(&self, target: ObjectId<'_>) -> ObjectReference {
        ObjectReference {
            api_version: Some(DomainHotplug::api_version(&()).into_owned()),
            kind: Some(DomainHotplug::kind(&()).into_owned()),
            name: Some(target.name.to_owned()),
            uid: Some(target.uid.to_owned()),
            ..ObjectReference::default()
        }
    }

    /// Whether objects are found by `spec.nodeName`, since the name of the node is too long for a
    /// label.
    pub fn by_field(&self) -> bool {
        LabelValue::new(self.node()).is_err()
    }

    /// Watches the objects of this node, and never ends. After an error it goes on by itself, later
    /// each time.
    ///
    /// [`ClusterError::NotFound`] is a cluster that does not know such objects.
    pub fn watch(&self) -> impl Stream<Item = Result<HotplugChange, ClusterError>> + Send + use<> {
        let all = watcher::Config::default();
        let config = match self.by_field() {
            false => all.labels(&format!("{NODE_LABEL}={}", self.node())),
            true => all.fields(&format!("spec.nodeName={}", self.node())),
        };
        let node = self.node().to_owned();
        let about = self.about(&format!("objects of node {node}"));
        self.cluster
            .steps(self.objects.clone(), config, about)
            .scan(Vec::new(), move |listed, event| {
                future::ready(Some(change(listed, event, &node)))
            })
            .filter_map(future::ready)
    }

    /// An object as it is now.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if there is none by this name; otherwise any.
    pub async fn look(&self, name: &str) -> Result<HotplugObject, ClusterError> {
        let answer = self.objects.get(name);
        let object = self.cluster.call_about(self.about(name), "get", answer);
        Ok(HotplugObject::read(object.await?, self.node()))
    }

    /// Applies a status, whole, to this version of an object. Says which version it is then.
    ///
    /// # Errors
    /// [`ClusterError::Conflict`] if the object is not that version any more, or not that object;
    /// [`ClusterError::NotFound`] if there is none; otherwise any.
    pub async fn write_status(
        &self,
        target: ObjectId<'_>,
        version: &str,
        status: &DomainHotplugStatus,
    ) -> Result<String, ClusterError> {
        let mut patch = self.patch_of(target, json!({"status": status}));
        if let Patch::Apply(object) = &mut patch {
            // A patch of the status may have any uid; only by the version is it this object's.
            object["metadata"]["resourceVersion"] = version.into();
        }
        // Nobody else has any business in it.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let answer = self.objects.patch_status(target.name, &params, &patch);
        self.patched(target, answer).await
    }

    /// Makes the own Node an owner of the object, so that it goes when the Node goes.
    ///
    /// Says which version the object is then.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] and [`ClusterError::Conflict`] if there is no such object any more;
    /// otherwise any.
    pub async fn own(&self, target: ObjectId<'_>, node_uid: &str) -> Result<String, ClusterError> {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node().to_owned(),
            uid: node_uid.to_owned(),
            ..OwnerReference::default()
        };
        let mut patch = self.patch_of(target, json!({}));
        if let Patch::Apply(object) = &mut patch {
            object["metadata"]["ownerReferences"] = json!([owner]);
        }
        let params = PatchParams::apply(FIELD_MANAGER);
        let answer = self.objects.patch(target.name, &params, &patch);
        self.patched(target, answer).await
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// As [`Self::own`].
    pub async fn delete(&self, target: ObjectId<'_>) -> Result<(), ClusterError> {
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: Some(target.uid.to_owned()),
            resource_version: None,
        });
        let answer = self.objects.delete(target.name, &params);
        self.cluster
            .call_about(self.about(target.name), "delete", answer)
            .await?;
        Ok(())
    }

    /// The uid of the Node as it is now.
    ///
    /// # Errors
    /// Those of [`Cluster::observe`].
    pub async fn node_uid(&self) -> Result<String, ClusterError> {
        Ok(self.cluster.observe().await?.uid)
    }

    async fn patched(
        &self,
        target: ObjectId<'_>,
        answer: impl Future<Output = kube::Result<DynamicObject>>,
    ) -> Result<String, ClusterError> {
        let about = self.about(target.name);
        let object = self.cluster.call_about(about, "patch", answer).await?;
        Ok(object.metadata.resource_version.unwrap_or_default())
    }

    fn patch_of(&self, target: ObjectId<'_>, mut object: Value) -> Patch<Value> {
        object["apiVersion"] = DomainHotplug::api_version(&()).into();
        object["kind"] = DomainHotplug::kind(&()).into();
        // To apply to what does not exist is to create it, unless it must have this uid.
        object["metadata"] = json!({"name": target.name, "uid": target.uid});
        Patch::Apply(object)
    }

    fn about(&self, name: &str) -> Object {
        Object {
            kind: "DomainHotplug",
            resource: RESOURCE,
            name: name.to_owned(),
        }
    }
}

/// Makes out of the watcher's steps what is new; `listed` is its memory during a list.
fn change(
    listed: &mut Vec<HotplugObject>,
    event: Result<Event<DynamicObject>, ClusterError>,
    node: &str,
) -> Option<Result<HotplugChange, ClusterError>> {
    match event {
        Ok(Event::Init) => {
            listed.clear();
            None
        }
        Ok(Event::InitApply(object)) => {
            listed.push(HotplugObject::read(object, node));
            None
        }
        Ok(Event::InitDone) => Some(Ok(HotplugChange::Listed(std::mem::take(listed)))),
        Ok(Event::Apply(object)) => {
            let object = Box::new(HotplugObject::read(object, node));
            Some(Ok(HotplugChange::Changed(object)))
        }
        Ok(Event::Delete(object)) => {
            let uid = object.metadata.uid.unwrap_or_default();
            Some(Ok(HotplugChange::Deleted(uid)))
        }
        Err(error) => Some(Err(error)),
    }
}

impl HotplugObject {
    fn read(object: DynamicObject, node: &str) -> Self {
        let DynamicObject {
            metadata, mut data, ..
        } = object;
        let owners = metadata.owner_references.unwrap_or_default();
        let status = data.get_mut("status").map(Value::take);
        Self {
            name: metadata.name.unwrap_or_default(),
            uid: metadata.uid.unwrap_or_default(),
            version: metadata.resource_version.unwrap_or_default(),
            created: metadata
                .creation_timestamp
                .map_or(Timestamp::from_millis(0), |time| time.0.into()),
            generation: metadata.generation.unwrap_or_default(),
            leaving: metadata.deletion_timestamp.is_some(),
            owned: owners
                .iter()
                .any(|owner| owner.kind == "Node" && owner.name == node),
            spec: data.get_mut("spec").map(Value::take).unwrap_or_default(),
            status: status.and_then(|status| serde_json::from_value(status).ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> HotplugObject {
        HotplugObject::read(serde_json::from_value(value).unwrap(), "node-a")
    }

    #[test]
    fn an_odd_object_is_read_as_far_as_it_goes() {
        let empty = object(json!({"metadata": {"name": "x", "uid": "u"}}));
        assert_eq!((empty.name.as_str(), empty.uid.as_str()), ("x", "u"));
        assert_eq!((empty.spec, empty.status), (Value::Null, None));
        let odd = json!({"metadata": {"name": "x", "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "node-a", "uid": "1"}]},
            "spec": ["?"], "status": {"evidence": 7}});
        let odd = object(odd);
        assert_eq!(
            (odd.spec, odd.status, odd.owned),
            (json!(["?"]), None, false)
        );
    }

    #[test]
    fn the_node_that_owns_an_object_is_the_one_of_this_name() {
        let owner = |name: &str| {
            let owners = json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": "1"}]);
            object(json!({"metadata": {"name": "x", "generation": 2, "ownerReferences": owners}}))
        };
        assert!(owner("node-a").owned);
        assert!(!owner("node-b").owned);
        assert_eq!(owner("node-a").generation, 2);
    }
}
