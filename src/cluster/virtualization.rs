//! Client of the `NodeVirtualization` of this daemon's Node.

use futures::{Stream, StreamExt};
use kube::api::{Api, Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMeta};

use super::objects::node_virtualization::NodeVirtualizationFields;
use super::objects::{NodeVirtualization, NodeVirtualizationStatus};
use super::{ApiObject, Cluster, ClusterError, FIELD_MANAGER};

impl Cluster {
    /// Reads the object. `None` if it does not exist or cannot be parsed.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn virtualization(&self) -> Result<Option<NodeVirtualization>, ClusterError> {
        let api = Api::<NodeVirtualization>::all(self.client.clone());
        let answer = async {
            match api.get(&self.node).await {
                // Written by another version of the daemon; this daemon replaces it.
                Err(kube::Error::SerdeError(_)) => Ok(None),
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                answer => answer.map(Some),
            }
        };
        self.call_about(self.virtualization_object(), "get", answer)
            .await
    }

    /// Replaces the whole status, and creates the object if it does not exist. The Node `uid`
    /// becomes its owner, so that it is deleted with the Node.
    ///
    /// # Errors
    /// [`ClusterError::NotFound`] if the cluster has no definition of the kind; otherwise any.
    pub async fn apply_virtualization(
        &self,
        status: &NodeVirtualizationStatus,
        uid: &str,
    ) -> Result<NodeVirtualization, ClusterError> {
        let object = NodeVirtualization {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                owner_references: Some(vec![self.node_owner(uid)]),
                ..ObjectMeta::default()
            },
            spec: NodeVirtualizationFields {
                facts: status.clone(),
            },
        };
        let api = Api::<NodeVirtualization>::all(self.client.clone());
        // The daemon is the only writer of the object.
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let patch = Patch::Apply(&object);
        let answer = api.patch(&self.node, &params, &patch);
        self.call_about(self.virtualization_object(), "patch", answer)
            .await
    }

    /// Watches the metadata of the object. Yields its resource version at the start and after each
    /// change, `None` while it does not exist. The stream never ends: after an error it retries.
    pub fn watch_virtualization(
        &self,
    ) -> impl Stream<Item = Result<Option<String>, ClusterError>> + Send + use<> {
        let api = Api::<PartialObjectMeta<NodeVirtualization>>::all(self.client.clone());
        self.watch_one(api, self.virtualization_object())
            .map(|change| Ok(change?.and_then(|meta| meta.resource_version)))
    }

    fn virtualization_object(&self) -> ApiObject {
        ApiObject {
            kind: "NodeVirtualization",
            resource: "nodevirtualizations.virtnode.io",
            name: self.node.clone(),
        }
    }
}
