//! Watches of the API server, and the watch of this daemon's Node.
//!
//! A watch never ends: kube's watcher resumes it after an error, with backoff, or at its timeout, and
//! lists again if the API server no longer has the last version.

use std::fmt::Debug;
use std::future;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::api::Api;
use kube::core::{ObjectMeta, PartialObjectMeta, Resource};
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, watcher::Event};
use serde::de::DeserializeOwned;

use super::retry::WatchBackoff;
use super::{ApiObject, Cluster, ClusterError, NodeState};

/// Timeout of a watch at the API server in seconds, chosen at random. Each timeout costs a request,
/// and dead watches are detected without it (`heartbeat.rs`).
pub(super) const WATCH_SECONDS: RangeInclusive<u32> = 27 * 60..=29 * 60;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeChange {
    /// The Node at the start of the watch and after each change.
    Node(NodeState),
    Missing,
}

impl Cluster {
    /// Watches the metadata of the Node. The stream never ends: after an error it retries with
    /// backoff (0.5 s to 30 s, at random).
    ///
    /// The API server may serve a watch from a cache, so the state can be old: read the Node with
    /// [`Cluster::observe`] before acting on it.
    pub fn watch(&self) -> impl Stream<Item = Result<NodeChange, ClusterError>> + Send + use<> {
        self.watch_one(self.nodes.clone(), ApiObject::node(&self.node))
            .map(|change| {
                Ok(match change? {
                    Some(meta) => NodeChange::Node(meta.into()),
                    None => NodeChange::Missing,
                })
            })
    }

    /// Watches the metadata of the object that has the Node's name; `None` while it does not exist.
    pub(super) fn watch_one<K>(
        &self,
        objects: Api<PartialObjectMeta<K>>,
        object: ApiObject,
    ) -> impl Stream<Item = Result<Option<ObjectMeta>, ClusterError>> + Send + use<K>
    where
        PartialObjectMeta<K>: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let config = watcher::Config::default()
            .any_semantic()
            .fields(&format!("metadata.name={}", self.node));
        self.watch_objects(objects, config, object)
            .scan(false, |is_listed, event| {
                future::ready(Some(existence(is_listed, event)))
            })
            .filter_map(future::ready)
    }

    /// Watches the selected objects. Yields the events of kube's watcher without expired versions,
    /// after which the watcher lists again.
    pub(super) fn watch_objects<K>(
        &self,
        objects: Api<K>,
        config: watcher::Config,
        object: ApiObject,
    ) -> impl Stream<Item = Result<Event<K>, ClusterError>> + Send + use<K>
    where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let config = config.timeout(fastrand::u32(self.watch_seconds.clone()));
        let cluster = self.clone();
        watcher(objects, config)
            .backoff(WatchBackoff::default())
            .filter_map(move |event| {
                future::ready(match event {
                    Ok(event) => Some(Ok(event)),
                    Err(watcher::Error::WatchError(status)) if status.code == 410 => None,
                    Err(error) => Some(Err(cluster.watch_error(object.clone(), error))),
                })
            })
    }

    /// Returns the time since the last byte on the Node's watch, bookmarks included; `None` before
    /// the first.
    pub fn node_watch_age(&self) -> Option<Duration> {
        self.heartbeat.age()
    }

    fn watch_error(&self, object: ApiObject, error: watcher::Error) -> ClusterError {
        match error {
            watcher::Error::InitialListFailed(error) => self.error(object, "list", error),
            watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
                self.error(object, "watch", error)
            }
            watcher::Error::WatchError(status) => {
                ClusterError::from_status("watch", object, *status)
            }
            watcher::Error::NoResourceVersion => ClusterError::Rejected {
                verb: "watch",
                object,
                message: "its response has no resource version".to_owned(),
                retry_after: None,
            },
        }
    }
}

/// Converts an event of a watch that selects one object. `is_listed` is true if the current list
/// contained the object.
fn existence<K>(
    is_listed: &mut bool,
    event: Result<Event<PartialObjectMeta<K>>, ClusterError>,
) -> Option<Result<Option<ObjectMeta>, ClusterError>> {
    match event {
        Ok(Event::Init) => {
            *is_listed = false;
            None
        }
        Ok(Event::InitApply(object) | Event::Apply(object)) => {
            *is_listed = true;
            Some(Ok(Some(object.metadata)))
        }
        Ok(Event::InitDone) => (!*is_listed).then_some(Ok(None)),
        Ok(Event::Delete(_)) => Some(Ok(None)),
        Err(error) => Some(Err(error)),
    }
}
