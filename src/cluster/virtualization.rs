//! The `NodeVirtualization` of the own Node.

use std::future;

use futures::{Stream, StreamExt};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{Api, Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMeta};
use kube::runtime::watcher::{self, Event};

use super::objects::node_virtualization::NodeVirtualizationFields;
use super::objects::{NodeVirtualization, NodeVirtualizationStatus};
use super::{Cluster, ClusterError, FIELD_MANAGER, Object};

impl Cluster {
    /// What is published of this Node. `None` if nothing is, or nothing that can be read.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn virtualization(&self) -> Result<Option<NodeVirtualization>, ClusterError> {
        let api = Api::<NodeVirtualization>::all(self.client.clone());
        let answer = async {
            match api.get(&self.node).await {
                // As another daemon wrote it; ours will replace it.
                Err(kube::Error::SerdeError(_)) => Ok(None),
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                answer => answer.map(Some),
            }
        };
        self.call_about(self.nvirt(), "get", answer).await
    }

    /// Applies a status, whole, and makes the object if it is not there. The Node `uid` owns it,
    /// so that it goes away with it.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the cluster does not know the kind; otherwise any.
    pub async fn apply_virtualization(
        &self,
        status: &NodeVirtualizationStatus,
        uid: &str,
    ) -> Result<NodeVirtualization, ClusterError> {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        };
        let object = NodeVirtualization {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: NodeVirtualizationFields {
                facts: status.clone(),
            },
        };
        let api = Api::<NodeVirtualization>::all(self.client.clone());
        // Nobody else has any business in it.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&object);
        self.call_about(
            self.nvirt(),
            "patch",
            api.patch(&self.node, &params, &patch),
        )
        .await
    }

    /// Watches the metadata of the object, and never ends: its resource version at the start and
    /// after each change, `None` while there is no object. After an error it goes on by itself.
    pub fn watch_virtualization(
        &self,
    ) -> impl Stream<Item = Result<Option<String>, ClusterError>> + Send + use<> {
        let api = Api::<PartialObjectMeta<NodeVirtualization>>::all(self.client.clone());
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        self.steps(api, config, self.nvirt())
            .scan(false, |found, step| future::ready(Some(seen(found, step))))
            .filter_map(future::ready)
    }

    fn nvirt(&self) -> Object {
        Object {
            kind: "NodeVirtualization",
            resource: "nodevirtualizations.virtnode.io",
            name: self.node.clone(),
        }
    }
}

type Step = Result<Event<PartialObjectMeta<NodeVirtualization>>, ClusterError>;

/// Makes out of the watcher's steps which version there is; `found` is its memory during a list.
fn seen(found: &mut bool, step: Step) -> Option<Result<Option<String>, ClusterError>> {
    match step {
        Ok(Event::Init) => {
            *found = false;
            None
        }
        Ok(Event::InitApply(object) | Event::Apply(object)) => {
            *found = true;
            Some(Ok(object.metadata.resource_version))
        }
        Ok(Event::InitDone) => (!*found).then_some(Ok(None)),
        Ok(Event::Delete(_)) => Some(Ok(None)),
        Err(error) => Some(Err(error)),
    }
}
