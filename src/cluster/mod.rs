//! Client of the Kubernetes API server: this daemon's Node, its labels, its `NodeVirtualization`,
//! DomainHotplug objects, and events.
//!
//! A thin adapter without decisions of its own; [`crate::label::ownership`] decides which labels to
//! write. Each call is sent once and has a timeout; retries are the caller's. Nothing here blocks a
//! thread.

mod answer;
mod config;
mod error;
mod events;
mod fault;
mod heartbeat;
mod hotplugs;
mod inventory;
mod managed_fields;
pub mod objects;
mod pods;
mod retry;
mod virtualization;
mod watch;

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMeta, PartialObjectMetaExt};
use tower::Layer;
use tower::timeout::TimeoutLayer;

use self::answer::AnswerBounds;
use self::heartbeat::Heartbeat;
use crate::label::LabelSet;
use crate::label::ownership::ObservedLabels;

pub use config::ClusterConfig;
pub use error::{ApiObject, ApplyConflicts, ClusterError};
pub use events::{EventKind, ObjectEvent, WrittenEvent};
pub use hotplugs::{
    HotplugChange, HotplugObject, HotplugObjects, ListOptions, ObjectId, ObjectStub,
};
pub use inventory::{NodeInventory, NodeSummary, Virtualizations};
pub use pods::{IdentityError, LauncherPod, LauncherPods};
pub use retry::Retry;
pub use watch::NodeChange;

/// The field manager of virtnode's server-side applies.
pub const FIELD_MANAGER: &str = "virtnode";

/// The metadata of the Node in one version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    pub uid: String,
    pub resource_version: String,
    /// The labels and their owners.
    pub shown: ObservedLabels,
}

impl From<ObjectMeta> for NodeState {
    fn from(mut meta: ObjectMeta) -> Self {
        Self {
            uid: meta.uid.take().unwrap_or_default(),
            resource_version: meta.resource_version.take().unwrap_or_default(),
            shown: managed_fields::shown(meta),
        }
    }
}

/// Treatment of labels that other field managers own with another value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners<'s> {
    /// The API server refuses the apply.
    Respect,
    /// The apply takes ownership, but only of exactly the version that the decision was made from.
    Override {
        /// [`NodeState::resource_version`]
        version: &'s str,
    },
}

/// A connection to the API server, for one Node. Clones share it.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    nodes: Api<PartialObjectMeta<Node>>,
    node: String,
    deadline: Duration,
    heartbeat: Heartbeat,
    watch_seconds: RangeInclusive<u32>,
    /// True if the API server requires a namespace in events about cluster-scoped objects: see
    /// `create_event`.
    events_need_namespace: Arc<AtomicBool>,
}

impl Cluster {
    /// Uses a client that does not retry by itself.
    ///
    /// # Errors
    /// [`ClusterError::NodeName`] if the name is not a valid Node name.
    pub fn with_client(
        client: Client,
        node: impl Into<String>,
        deadline: Duration,
    ) -> Result<Self, ClusterError> {
        let node = node.into();
        if !config::is_node_name(&node) {
            return Err(ClusterError::NodeName(node));
        }
        // The layer's timeout ends with the start of the response. The bounds limit the rest; the
        // response of a watch has no deadline.
        let namespace = client.default_namespace().to_owned();
        let heartbeat = Heartbeat::default();
        let observed = heartbeat.clone();
        let send = tower::service_fn(move |request| {
            let bounds = AnswerBounds::new(&request, &observed, deadline);
            let client = client.clone();
            async move { bounds.apply(client.send(request).await?) }
        });
        let client = Client::new(TimeoutLayer::new(deadline).layer(send), namespace);
        Ok(Self {
            nodes: Api::all(client.clone()),
            client,
            node,
            deadline,
            heartbeat,
            watch_seconds: watch::WATCH_SECONDS,
            events_need_namespace: Arc::default(),
        })
    }

    /// Sets another timeout of watches, for measurements that take less than an hour.
    #[must_use]
    pub fn with_watch_seconds(mut self, seconds: RangeInclusive<u32>) -> Self {
        self.watch_seconds = seconds;
        self
    }

    /// Returns the name of the Node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns the timeout of each call.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Reads the Node's metadata from the API server's storage, not from its cache.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn observe(&self) -> Result<NodeState, ClusterError> {
        let node = self.call("get", self.nodes.get(&self.node)).await?;
        Ok(node.metadata.into())
    }

    /// Applies the complete set of virtnode's labels to the Node `uid`. Labels of virtnode's that are
    /// not in the set are removed; labels of others are kept. Never creates a Node.
    ///
    /// # Errors
    /// [`ClusterError::Conflict`] if another manager owns one of the labels with another value, or if
    /// the Node has another uid by now; otherwise any other.
    pub async fn apply(
        &self,
        labels: &LabelSet,
        uid: &str,
        owners: Owners<'_>,
    ) -> Result<NodeState, ClusterError> {
        let pair = |(key, value): (&crate::label::LabelKey, &crate::label::LabelValue)| {
            (key.as_str().to_owned(), value.as_str().to_owned())
        };
        self.patch(labels.iter().map(pair).collect(), uid, owners)
            .await
    }

    /// Removes each label that only virtnode owns, and gives up the ownership of the others. Returns
    /// the removed keys.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn clear(&self) -> Result<Vec<String>, ClusterError> {
        let before = self.observe().await?;
        if before.shown.owned.is_empty() {
            return Ok(Vec::new());
        }
        let after = self
            .patch(BTreeMap::new(), &before.uid, Owners::Respect)
            .await?;
        let mut removed: Vec<_> = before.shown.owned.into_iter().collect();
        removed.retain(|key| !after.shown.labels.contains_key(key));
        Ok(removed)
    }

    async fn patch(
        &self,
        labels: BTreeMap<String, String>,
        uid: &str,
        owners: Owners<'_>,
    ) -> Result<NodeState, ClusterError> {
        let mut params = PatchParams::apply(FIELD_MANAGER);
        let mut resource_version = None;
        if let Owners::Override { version } = owners {
            params = params.force();
            // Restricts force to the owners of this version: others may have been added since.
            resource_version = Some(version.to_owned());
        }
        let patch = ObjectMeta {
            labels: Some(labels),
            // The uid keeps the API server from creating a Node that does not exist.
            uid: Some(uid.to_owned()),
            resource_version,
            ..ObjectMeta::default()
        };
        let patch = Patch::Apply(patch.into_request_partial::<Node>());
        let node = self
            .call("patch", self.nodes.patch(&self.node, &params, &patch))
            .await?;
        Ok(node.metadata.into())
    }

    /// Returns the owner reference that has an object deleted together with the Node `uid`.
    fn node_owner(&self, uid: &str) -> OwnerReference {
        OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.node.clone(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        }
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        answer: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        self.call_about(ApiObject::node(&self.node), verb, answer)
            .await
    }

    async fn call_about<T>(
        &self,
        object: ApiObject,
        verb: &'static str,
        answer: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        match tokio::time::timeout(self.deadline, answer).await {
            Ok(answer) => answer.map_err(|error| self.error(object, verb, error)),
            Err(_) => Err(ClusterError::Timeout {
                verb,
                object,
                after: self.deadline,
            }),
        }
    }

    fn error(&self, object: ApiObject, verb: &'static str, error: kube::Error) -> ClusterError {
        ClusterError::from_call(verb, object, self.deadline, error)
    }
}
