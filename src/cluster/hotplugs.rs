//! Client of the DomainHotplug objects of this daemon's node.

use std::collections::{BTreeMap, BTreeSet};
use std::future::{self, Future};

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::runtime::watcher::{self, Event};
use serde_json::{Value, json};

use super::answer::PAGE_OBJECTS;
use super::objects::{Condition, DomainHotplug, DomainHotplugStatus, NODE_LABEL};
use super::{ApiObject, Cluster, ClusterError, FIELD_MANAGER};
use crate::label::LabelValue;
use crate::units::Timestamp;

/// Maximum size of a spec as JSON, far above what the definition of the kind allows.
const SPEC_MAX_BYTES: usize = 16 * 1024;

/// A DomainHotplug object as read from the API server.
#[derive(Debug, Clone, PartialEq)]
pub struct HotplugObject {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    /// Creation time, in whole seconds.
    pub created: Timestamp,
    pub generation: i64,
    /// True if the object is deleted and only a finalizer keeps it.
    pub is_deleting: bool,
    /// True if the Node is one of its owners.
    pub has_owner: bool,
    /// Not yet validated: an old API server accepts nearly anything.
    pub spec: Value,
    /// `None` if the status is missing or cannot be parsed. Without evidence and diagnosis.
    pub status: Option<DomainHotplugStatus>,
}

/// Identifies an object: after a deletion, another object may have the same name.
#[derive(Debug, Clone, Copy)]
pub struct ObjectId<'o> {
    pub name: &'o str,
    pub uid: &'o str,
}

/// The identity of an object, for objects that are not kept in memory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectStub {
    pub created: Timestamp,
    pub name: String,
    pub uid: String,
}

impl From<&HotplugObject> for ObjectStub {
    fn from(object: &HotplugObject) -> Self {
        Self {
            created: object.created,
            name: object.name.clone(),
            uid: object.uid.clone(),
        }
    }
}

/// Objects of a list that are kept in memory, and their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListOptions {
    /// Maximum number of objects in memory. Only the stubs of further ones are kept.
    pub max: usize,
    /// Maximum number of stubs in memory. The newest objects beyond it are left out.
    pub max_stubs: usize,
    /// Read the list from the API server's storage, in pages. Otherwise the API server serves it from
    /// its cache, in one answer.
    pub in_pages: bool,
}

/// A change of the set of objects of this node.
#[derive(Debug, Clone, PartialEq)]
pub enum HotplugChange {
    /// All objects: at the start, and after a watch that could not be resumed.
    Listed {
        /// The oldest, in the order of their creation: first those that are not settled.
        objects: Vec<HotplugObject>,
        rest: BTreeSet<ObjectStub>,
        /// False if there are more, which were left out.
        is_complete: bool,
    },
    /// An object was created or changed.
    Changed(Box<HotplugObject>),
    /// The object with this uid was deleted, or is no longer assigned to this node.
    Deleted(String),
}

/// The DomainHotplug objects of one node.
#[derive(Clone)]
pub struct HotplugObjects {
    cluster: Cluster,
    objects: Api<DynamicObject>,
}

impl HotplugObjects {
    pub fn new(cluster: &Cluster) -> Self {
        // Untyped: one object that cannot be parsed must not hide all others.
        let kind = ApiResource::erase::<DomainHotplug>(&());
        Self {
            objects: Api::all_with(cluster.client.clone(), &kind),
            cluster: cluster.clone(),
        }
    }

    /// Returns the name of the node.
    pub fn node(&self) -> &str {
        self.cluster.node()
    }

    /// Returns the reference to an object that its events contain.
    pub fn reference(&self, id: ObjectId<'_>) -> ObjectReference {
        ObjectReference {
            api_version: Some(DomainHotplug::api_version(&()).into_owned()),
            kind: Some(DomainHotplug::kind(&()).into_owned()),
            name: Some(id.name.to_owned()),
            uid: Some(id.uid.to_owned()),
            ..ObjectReference::default()
        }
    }

    /// True if objects are selected by `spec.nodeName`, because the node's name exceeds the length
    /// of a label value.
    pub fn are_selected_by_field(&self) -> bool {
        LabelValue::new(self.node()).is_err()
    }

    /// Watches the objects of this node. The stream never ends: after an error it retries with
    /// backoff.
    ///
    /// [`ClusterError::NotFound`] means that the cluster has no definition of DomainHotplug.
    /// [`ClusterError::AnswerTooLarge`] means that the list must be read in pages.
    pub fn watch(
        &self,
        options: ListOptions,
    ) -> impl Stream<Item = Result<HotplugChange, ClusterError>> + Send + use<> {
        let all = if options.in_pages {
            watcher::Config::default().page_size(PAGE_OBJECTS)
        } else {
            watcher::Config::default().any_semantic()
        };
        let config = if self.are_selected_by_field() {
            all.fields(&format!("spec.nodeName={}", self.node()))
        } else {
            all.labels(&format!("{NODE_LABEL}={}", self.node()))
        };
        let node = self.node().to_owned();
        let object = api_object(&format!("objects of node {node}"));
        self.cluster
            .watch_objects(self.objects.clone(), config, object)
            .scan(PendingList::new(options), move |listed, event| {
                future::ready(Some(read_event(listed, event, &node)))
            })
            .filter_map(future::ready)
    }

    /// Reads an object.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if it does not exist; otherwise any.
    pub async fn get(&self, name: &str) -> Result<HotplugObject, ClusterError> {
        let answer = self.objects.get(name);
        let object = self.cluster.call_about(api_object(name), "get", answer);
        Ok(HotplugObject::read(object.await?, self.node()))
    }

    /// Replaces the status of exactly this version of an object. Returns its new version.
    ///
    /// # Errors
    /// [`ClusterError::Conflict`] if the object has another version or uid by now;
    /// [`ClusterError::NotFound`] if it does not exist; otherwise any.
    pub async fn write_status(
        &self,
        id: ObjectId<'_>,
        version: &str,
        status: &DomainHotplugStatus,
    ) -> Result<String, ClusterError> {
        let mut patch = patch_of(id);
        // The API server does not compare the uid in a patch of the status, but it does compare the
        // version.
        patch["metadata"]["resourceVersion"] = version.into();
        patch["status"] = json!(status);
        // The daemon is the only writer of the status.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(patch);
        let answer = self.objects.patch_status(id.name, &params, &patch);
        self.new_version(id, answer).await
    }

    /// Makes the Node an owner of the object, so that it is deleted with the Node. Returns its new
    /// version.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] or [`ClusterError::Conflict`] if the object no longer exists;
    /// otherwise any.
    pub async fn set_owner(
        &self,
        id: ObjectId<'_>,
        node_uid: &str,
    ) -> Result<String, ClusterError> {
        let mut patch = patch_of(id);
        patch["metadata"]["ownerReferences"] = json!([self.cluster.node_owner(node_uid)]);
        let params = PatchParams::apply(FIELD_MANAGER);
        let patch = Patch::Apply(patch);
        let answer = self.objects.patch(id.name, &params, &patch);
        self.new_version(id, answer).await
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// As [`Self::set_owner`].
    pub async fn delete(&self, id: ObjectId<'_>) -> Result<(), ClusterError> {
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: Some(id.uid.to_owned()),
            resource_version: None,
        });
        let answer = self.objects.delete(id.name, &params);
        self.cluster
            .call_about(api_object(id.name), "delete", answer)
            .await?;
        Ok(())
    }

    /// Reads the uid of the Node.
    ///
    /// # Errors
    /// Those of [`Cluster::observe`].
    pub async fn node_uid(&self) -> Result<String, ClusterError> {
        Ok(self.cluster.observe().await?.uid)
    }

    async fn new_version(
        &self,
        id: ObjectId<'_>,
        answer: impl Future<Output = kube::Result<DynamicObject>>,
    ) -> Result<String, ClusterError> {
        let call = self
            .cluster
            .call_about(api_object(id.name), "patch", answer);
        let object = call.await?;
        Ok(object.metadata.resource_version.unwrap_or_default())
    }
}

/// Returns an apply patch without any field. The uid keeps the API server from creating an object
/// that does not exist.
fn patch_of(id: ObjectId<'_>) -> Value {
    json!({
        "apiVersion": DomainHotplug::api_version(&()),
        "kind": DomainHotplug::kind(&()),
        "metadata": {"name": id.name, "uid": id.uid},
    })
}

fn api_object(name: &str) -> ApiObject {
    ApiObject {
        kind: "DomainHotplug",
        resource: "domainhotplugs.virtnode.io",
        name: name.to_owned(),
    }
}

/// True if the object has its verdict or was rejected.
fn is_settled(status: &DomainHotplugStatus) -> bool {
    let accepted = Condition::find(&status.conditions, "Accepted");
    status.completion_time.is_some() || accepted.is_some_and(|accepted| accepted.status == "False")
}

/// The objects of a list that is still being read. Settled ones give way to the others, so that a
/// list always has what is still to be executed.
struct PendingList {
    options: ListOptions,
    oldest: BTreeMap<(bool, ObjectStub), HotplugObject>,
    rest: BTreeSet<(bool, ObjectStub)>,
    is_complete: bool,
}

impl PendingList {
    fn new(options: ListOptions) -> Self {
        Self {
            options,
            oldest: BTreeMap::new(),
            rest: BTreeSet::new(),
            is_complete: true,
        }
    }

    fn add(&mut self, object: HotplugObject) {
        let is_settled = object.status.as_ref().is_some_and(is_settled);
        let key = (is_settled, ObjectStub::from(&object));
        self.oldest.insert(key, object);
        if self.oldest.len() > self.options.max
            && let Some((last, _)) = self.oldest.pop_last()
        {
            self.rest.insert(last);
        }
        if self.rest.len() > self.options.max_stubs {
            self.rest.pop_last();
            self.is_complete = false;
        }
    }

    fn take(&mut self) -> HotplugChange {
        let list = std::mem::replace(self, Self::new(self.options));
        HotplugChange::Listed {
            objects: list.oldest.into_values().collect(),
            rest: list.rest.into_iter().map(|(_, stub)| stub).collect(),
            is_complete: list.is_complete,
        }
    }
}

/// Converts an event of the watcher. `listed` collects the objects of a list until it is complete.
fn read_event(
    listed: &mut PendingList,
    event: Result<Event<DynamicObject>, ClusterError>,
    node: &str,
) -> Option<Result<HotplugChange, ClusterError>> {
    match event {
        Ok(Event::Init) => {
            *listed = PendingList::new(listed.options);
            None
        }
        Ok(Event::InitApply(object)) => {
            listed.add(HotplugObject::read(object, node));
            None
        }
        Ok(Event::InitDone) => Some(Ok(listed.take())),
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

/// Replaces a spec that is too large, which only an API server without the definition's schema accepts.
fn bounded(spec: Value) -> Value {
    if spec.to_string().len() <= SPEC_MAX_BYTES {
        return spec;
    }
    Value::String(format!("more than {SPEC_MAX_BYTES} bytes"))
}

/// Drops the parts of a written status that nothing compares.
fn without_details(status: DomainHotplugStatus) -> DomainHotplugStatus {
    DomainHotplugStatus {
        evidence: Vec::new(),
        diagnosis: None,
        hypervisor_error: None,
        ..status
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
            resource_version: metadata.resource_version.unwrap_or_default(),
            created: metadata
                .creation_timestamp
                .map_or(Timestamp::from_millis(0), |time| time.0.into()),
            generation: metadata.generation.unwrap_or_default(),
            is_deleting: metadata.deletion_timestamp.is_some(),
            has_owner: owners
                .iter()
                .any(|owner| owner.kind == "Node" && owner.name == node),
            spec: bounded(data.get_mut("spec").map(Value::take).unwrap_or_default()),
            status: status
                .and_then(|status| serde_json::from_value(status).ok())
                .map(without_details),
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
    fn malformed_object_is_read_as_far_as_possible() {
        let empty = object(json!({"metadata": {"name": "x", "uid": "u"}}));
        assert_eq!((empty.name.as_str(), empty.uid.as_str()), ("x", "u"));
        assert_eq!((empty.spec, empty.status), (Value::Null, None));
        let odd = json!({"metadata": {"name": "x", "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": "node-a", "uid": "1"}]},
            "spec": ["?"], "status": {"evidence": 7}});
        let odd = object(odd);
        assert_eq!(
            (odd.spec, odd.status, odd.has_owner),
            (json!(["?"]), None, false)
        );
    }

    #[test]
    fn only_the_node_of_this_name_counts_as_owner() {
        let owner = |name: &str| {
            let owners = json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": "1"}]);
            object(json!({"metadata": {"name": "x", "generation": 2, "ownerReferences": owners}}))
        };
        assert!(owner("node-a").has_owner);
        assert!(!owner("node-b").has_owner);
        assert_eq!(owner("node-a").generation, 2);
    }
}
