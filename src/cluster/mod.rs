//! The Kubernetes API server: the own Node, its labels, its `NodeVirtualization`, and events.
//!
//! Thin: what is written and why is decided in [`crate::label::ownership`]. Every call has a
//! deadline and is made once; who calls decides when to try again.

mod config;
mod error;
mod events;
mod hotplugs;
mod inventory;
mod managed_fields;
pub mod objects;
mod pulse;
mod retry;
mod virtualization;
mod watch;

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use http_body_util::{Either, StreamBody};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::core::{ObjectMeta, PartialObjectMeta, PartialObjectMetaExt};
use tower::Layer;
use tower::timeout::TimeoutLayer;

use self::pulse::Pulse;
use crate::label::LabelSet;
use crate::label::ownership::ObservedLabels;

pub use config::ClusterConfig;
pub use error::{ApplyConflicts, ClusterError, Object};
pub use events::{EventKind, ObjectEvent, WrittenEvent};
pub use hotplugs::{HotplugChange, HotplugObject, HotplugObjects, ObjectId};
pub use inventory::{Inventory, NodeSummary, Virtualizations};
pub use retry::Retry;
pub use watch::NodeChange;

/// The name under which the API server keeps account of what is ours.
pub const FIELD_MANAGER: &str = "virtnode";

/// Log targets to be silenced: the client logs each failed call of its own accord, however often
/// it fails. What it has to say is in [`ClusterError`].
pub const NOISY_LOG_TARGETS: [&str; 2] = ["kube_client", "kube_runtime"];

/// The Node at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Which Node by this name it is.
    pub uid: String,
    /// Which version of it.
    pub resource_version: String,
    /// Its labels and whose they are.
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

/// How an apply treats labels that others own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners<'s> {
    /// Any other owner of a key with another value makes the API server refuse.
    Respect,
    /// Labels are taken from their owners, if the Node is still as it was at this resource
    /// version; otherwise the API server refuses.
    Override {
        /// [`NodeState::resource_version`] of what the decision was made from.
        seen: &'s str,
    },
}

/// One Node of a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    nodes: Api<PartialObjectMeta<Node>>,
    node: String,
    deadline: Duration,
    pulse: Pulse,
    watch_seconds: RangeInclusive<u32>,
    /// Whether the API server wants a namespace for what has none: see `create_event`.
    events_of_default: Arc<AtomicBool>,
}

impl Cluster {
    /// The Node `node` through a client that does not try again by itself.
    ///
    /// # Errors
    /// [`ClusterError::NodeName`] if no Node can have this name.
    pub fn with_client(
        client: Client,
        node: impl Into<String>,
        deadline: Duration,
    ) -> Result<Self, ClusterError> {
        let node = node.into();
        if !config::is_node_name(&node) {
            return Err(ClusterError::NodeName(node));
        }
        // Until the answer begins; the end of it is awaited for `deadline` in `call`, and of a
        // watch for ever.
        let namespace = client.default_namespace().to_owned();
        let pulse = Pulse::new();
        let heard = pulse.clone();
        let send = tower::service_fn(move |request| {
            let (client, ear) = (client.clone(), heard.ear(&request));
            async move {
                let answer = client.send(request).await?;
                Ok::<_, kube::Error>(answer.map(|body| match ear {
                    Some(ear) => Either::Left(StreamBody::new(ear.listen(body))),
                    None => Either::Right(body),
                }))
            }
        });
        let client = Client::new(TimeoutLayer::new(deadline).layer(send), namespace);
        Ok(Self {
            nodes: Api::all(client.clone()),
            client,
            node,
            deadline,
            pulse,
            watch_seconds: watch::WATCH_SECONDS,
            events_of_default: Arc::default(),
        })
    }

    /// The same with watches that the server ends after other times, in seconds: for measurements
    /// in less time than an hour.
    #[must_use]
    pub fn with_watch_seconds(mut self, seconds: RangeInclusive<u32>) -> Self {
        self.watch_seconds = seconds;
        self
    }

    /// The name of the Node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// How long one call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// What the Node shows now: its metadata only, from the API server's storage.
    ///
    /// # Errors
    /// Any [`ClusterError`] but a conflict.
    pub async fn observe(&self) -> Result<NodeState, ClusterError> {
        let node = self.call("get", self.nodes.get(&self.node)).await?;
        Ok(node.metadata.into())
    }

    /// Applies the whole set of our labels to the Node `uid`. Labels of ours that are not in the
    /// set go; others' stay. A Node that does not exist is not created.
    ///
    /// # Errors
    /// [`ClusterError::Conflict`] if somebody else owns one of the labels with another value or
    /// the Node is another one by now; otherwise any other.
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

    /// Removes every label that is ours alone, and our claim to those that are not. Says which
    /// keys are gone.
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
        let mut gone: Vec<_> = before.shown.owned.into_iter().collect();
        gone.retain(|key| !after.shown.labels.contains_key(key));
        Ok(gone)
    }

    async fn patch(
        &self,
        labels: BTreeMap<String, String>,
        uid: &str,
        owners: Owners<'_>,
    ) -> Result<NodeState, ClusterError> {
        let mut params = PatchParams::apply(FIELD_MANAGER);
        let mut seen = None;
        if let Owners::Override { seen: version } = owners {
            params = params.force();
            // Force is for the owners that were looked at, not for any that came since.
            seen = Some(version.to_owned());
        }
        let patch = ObjectMeta {
            labels: Some(labels),
            // To apply to what does not exist is to create it, unless it must have this uid.
            uid: Some(uid.to_owned()),
            resource_version: seen,
            ..ObjectMeta::default()
        };
        let patch = Patch::Apply(patch.into_request_partial::<Node>());
        let node = self
            .call("patch", self.nodes.patch(&self.node, &params, &patch))
            .await?;
        Ok(node.metadata.into())
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        answer: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        self.call_about(Object::node(&self.node), verb, answer)
            .await
    }

    async fn call_about<T>(
        &self,
        object: Object,
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

    fn error(&self, object: Object, verb: &'static str, error: kube::Error) -> ClusterError {
        ClusterError::from_call(verb, object, self.deadline, error)
    }
}
