//! The launcher Pods of this daemon's node: which virtual machine each of them runs, by the word of the
//! API server.
//!
//! A launcher chooses the name of its domain. Its connection is identified by the UID of its Pod, which
//! the kubelet chose; here the UID leads to the Pod's namespace and to the VirtualMachineInstance that
//! controls it. Only metadata is transferred. [`LauncherPods`] is shared with other services, whose
//! questions neither block nor wait; until the first list nothing is known.
//!
//! The watch never ends: it is resumed with backoff after an error, and what was known stays.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::Api;
use kube::core::{ObjectMeta, PartialObjectMeta};
use kube::runtime::watcher::{self, Event};
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::answer::PAGE_OBJECTS;
use super::{ApiObject, Cluster};

/// Selects launcher Pods (KubeVirt: `AppLabel`).
const SELECTOR: &str = "kubevirt.io=virt-launcher";
/// The label with the UID of the instance that the Pod was created for (KubeVirt: `CreatedByLabel`).
const CREATED_BY: &str = "kubevirt.io/created-by";
const INSTANCE_KIND: &str = "VirtualMachineInstance";
const GROUP_PREFIX: &str = "kubevirt.io/";
/// Maximum number of Pods in memory: more than a node runs.
const MAX_PODS: usize = 4096;

/// A launcher Pod and the VirtualMachineInstance that controls it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LauncherPod {
    pub namespace: String,
    /// The Pod's name.
    pub name: String,
    /// The Pod's UID.
    pub uid: String,
    /// The name of the VirtualMachineInstance, in the same namespace.
    pub instance: String,
    /// The UID of the VirtualMachineInstance.
    pub instance_uid: String,
    /// The group and version by which the Pod refers to it.
    api_version: String,
}

impl LauncherPod {
    /// Reads a Pod's metadata. `None` unless a VirtualMachineInstance controls the Pod and was the
    /// reason for it.
    fn read(metadata: ObjectMeta) -> Option<Self> {
        let owners = metadata.owner_references.unwrap_or_default();
        let owner = owners.into_iter().find(|owner| {
            owner.controller == Some(true)
                && owner.kind == INSTANCE_KIND
                && owner.api_version.starts_with(GROUP_PREFIX)
        })?;
        let created_by = metadata.labels?.remove(CREATED_BY)?;
        (created_by == owner.uid).then_some(())?;
        Some(Self {
            namespace: metadata.namespace?,
            name: metadata.name?,
            uid: metadata.uid?,
            instance: owner.name,
            instance_uid: owner.uid,
            api_version: owner.api_version,
        })
    }

    /// Returns the reference to the VirtualMachineInstance that its events contain.
    pub fn instance_reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some(self.api_version.clone()),
            kind: Some(INSTANCE_KIND.to_owned()),
            namespace: Some(self.namespace.clone()),
            name: Some(self.instance.clone()),
            uid: Some(self.instance_uid.clone()),
            ..ObjectReference::default()
        }
    }

    /// Returns the reference to the Pod, for events about its VirtualMachineInstance.
    pub fn pod_reference(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(self.namespace.clone()),
            name: Some(self.name.clone()),
            uid: Some(self.uid.clone()),
            ..ObjectReference::default()
        }
    }
}

/// The reason why a launcher's identity is not known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdentityError {
    #[error("the API server has not listed the launcher Pods of this node yet")]
    NotListed,
    #[error("the API server knows no launcher Pod with the UID {0} on this node")]
    UnknownPod(String),
    #[error("the domain calls itself {claimed}, and its Pod belongs to {confirmed}")]
    OtherInstance { claimed: String, confirmed: String },
}

/// The launcher Pods of the node, shared by clones.
#[derive(Clone, Default)]
pub struct LauncherPods(Arc<RwLock<PodTable>>);

#[derive(Debug, Default)]
struct PodTable {
    is_listed: bool,
    /// By UID.
    pods: BTreeMap<String, LauncherPod>,
}

impl fmt::Debug for LauncherPods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}

impl LauncherPods {
    /// Returns the Pod with a UID.
    ///
    /// # Errors
    /// The Pod is not known.
    pub fn find(&self, uid: &str) -> Result<LauncherPod, IdentityError> {
        let table = self.read();
        match table.pods.get(uid) {
            Some(pod) => Ok(pod.clone()),
            None if table.is_listed => Err(IdentityError::UnknownPod(uid.to_owned())),
            None => Err(IdentityError::NotListed),
        }
    }

    /// Returns the Pod with a UID if it runs the virtual machine that its domain claims to be.
    ///
    /// # Errors
    /// The Pod is not known, or runs another one.
    pub fn verify(
        &self,
        uid: &str,
        claimed: Option<(&str, &str)>,
    ) -> Result<LauncherPod, IdentityError> {
        let pod = self.find(uid)?;
        if claimed == Some((&pod.namespace, &pod.instance)) {
            return Ok(pod);
        }
        let claimed = claimed.map_or_else(
            || "something else".to_owned(),
            |(namespace, name)| format!("{namespace:?}/{name:?}"),
        );
        Err(IdentityError::OtherInstance {
            claimed,
            confirmed: format!("{}/{}", pod.namespace, pod.instance),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, PodTable> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, PodTable> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the Pods of the node until `token` is cancelled.
    pub async fn follow(self, cluster: Cluster, token: CancellationToken) {
        token
            .run_until_cancelled(self.follow_forever(cluster))
            .await;
    }

    async fn follow_forever(&self, cluster: Cluster) {
        let pods: Api<PartialObjectMeta<Pod>> = Api::all(cluster.client.clone());
        let config = watcher::Config::default()
            .page_size(PAGE_OBJECTS)
            .labels(SELECTOR)
            .fields(&format!("spec.nodeName={}", cluster.node()));
        let events = cluster.watch_objects(pods, config, api_object(&cluster));
        let mut events = pin!(events);
        let mut listed = BTreeMap::new();
        let mut reported = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.apply(&mut listed, event),
                Err(error) => {
                    if reported != Some(error.code()) {
                        warn!(%error, "cannot watch launcher Pods, retrying");
                    }
                    reported = Some(error.code());
                    continue;
                }
            }
            if reported.take().is_some() {
                info!("watching launcher Pods again");
            }
        }
    }

    /// Applies an event. `listed` collects the Pods of a list until it is complete.
    fn apply(
        &self,
        listed: &mut BTreeMap<String, LauncherPod>,
        event: Event<PartialObjectMeta<Pod>>,
    ) {
        match event {
            Event::Init => listed.clear(),
            Event::InitApply(pod) => insert(listed, pod.metadata),
            Event::InitDone => {
                let mut table = self.write();
                table.is_listed = true;
                table.pods = std::mem::take(listed);
            }
            Event::Apply(pod) => insert(&mut self.write().pods, pod.metadata),
            Event::Delete(pod) => {
                let uid = pod.metadata.uid.unwrap_or_default();
                self.write().pods.remove(&uid);
            }
        }
    }
}

/// Inserts a Pod, or removes one that no VirtualMachineInstance controls any longer.
fn insert(pods: &mut BTreeMap<String, LauncherPod>, metadata: ObjectMeta) {
    let uid = metadata.uid.clone().unwrap_or_default();
    match LauncherPod::read(metadata) {
        Some(pod) if pods.len() < MAX_PODS || pods.contains_key(&uid) => {
            pods.insert(uid, pod);
        }
        Some(pod) => warn!(
            namespace = pod.namespace,
            pod = pod.name,
            "more launcher Pods than {MAX_PODS}, ignoring one"
        ),
        None => {
            pods.remove(&uid);
        }
    }
}

fn api_object(cluster: &Cluster) -> ApiObject {
    ApiObject {
        kind: "Pod",
        resource: "pods",
        name: format!("launchers of node {}", cluster.node()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str, change: impl FnOnce(&mut Value)) -> PartialObjectMeta<Pod> {
        let mut pod = json!({"metadata": {
            "namespace": "tenant-a", "name": "virt-launcher-web-x7k2p", "uid": uid,
            "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": "vmi-1"},
            "ownerReferences": [{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                "name": "web", "uid": "vmi-1", "controller": true}],
        }});
        change(&mut pod["metadata"]);
        serde_json::from_value(pod).unwrap()
    }

    fn listed(pods: Vec<PartialObjectMeta<Pod>>) -> LauncherPods {
        let table = LauncherPods::default();
        let mut pending = BTreeMap::new();
        table.apply(&mut pending, Event::Init);
        for pod in pods {
            table.apply(&mut pending, Event::InitApply(pod));
        }
        table.apply(&mut pending, Event::InitDone);
        table
    }

    #[test]
    fn pod_of_an_instance_confirms_what_its_domain_claims() {
        let pods = listed(vec![pod("p1", |_| {})]);
        let verified = pods.verify("p1", Some(("tenant-a", "web"))).unwrap();
        assert_eq!((&*verified.instance_uid, &*verified.uid), ("vmi-1", "p1"));
        let reference = verified.instance_reference();
        assert_eq!(reference.kind.as_deref(), Some("VirtualMachineInstance"));
        assert_eq!(reference.namespace.as_deref(), Some("tenant-a"));
        assert_eq!(verified.pod_reference().uid.as_deref(), Some("p1"));

        let other = pods.verify("p1", Some(("tenant-b", "web"))).unwrap_err();
        assert!(
            other.to_string().ends_with("belongs to tenant-a/web"),
            "{other}"
        );
        assert!(pods.verify("p1", None).is_err());
        let unknown = pods.find("p2").unwrap_err();
        assert_eq!(unknown, IdentityError::UnknownPod("p2".to_owned()));
    }

    #[test]
    fn pod_that_no_instance_controls_confirms_nothing() {
        let pods = listed(vec![
            pod("no-owner", |metadata| {
                metadata["ownerReferences"] = json!([])
            }),
            pod("other-kind", |metadata| {
                metadata["ownerReferences"][0]["kind"] = "ReplicaSet".into();
            }),
            pod("other-group", |metadata| {
                metadata["ownerReferences"][0]["apiVersion"] = "example.io/v1".into();
            }),
            pod("no-controller", |metadata| {
                metadata["ownerReferences"][0]["controller"] = false.into();
            }),
            pod("other-uid", |metadata| {
                metadata["labels"]["kubevirt.io/created-by"] = "vmi-2".into();
            }),
        ]);
        for uid in [
            "no-owner",
            "other-kind",
            "other-group",
            "no-controller",
            "other-uid",
        ] {
            assert!(pods.find(uid).is_err(), "{uid}");
        }
    }

    #[test]
    fn changes_follow_the_list_and_nothing_is_known_before_it() {
        let pods = LauncherPods::default();
        assert_eq!(pods.find("p1"), Err(IdentityError::NotListed));
        let pods = listed(vec![pod("p1", |_| {})]);
        let mut pending = BTreeMap::new();
        pods.apply(&mut pending, Event::Apply(pod("p2", |_| {})));
        pods.apply(&mut pending, Event::Delete(pod("p1", |_| {})));
        assert!(pods.find("p2").is_ok() && pods.find("p1").is_err());
        // What is known stays during a new list.
        pods.apply(&mut pending, Event::Init);
        assert!(pods.find("p2").is_ok());
        pods.apply(&mut pending, Event::InitDone);
        assert!(pods.find("p2").is_err());
    }
}
