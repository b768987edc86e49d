//! The own Node's changes as they happen.

use std::fmt::Debug;
use std::future;
use std::ops::RangeInclusive;
use std::time::Duration;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::core::{PartialObjectMeta, Resource};
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, watcher::Event};
use serde::de::DeserializeOwned;

use super::{Cluster, ClusterError, NodeState, Object};

/// After so many seconds, at random, the server ends a watch and a new one takes over from
/// there. Rare, because nothing is won by it; and a connection that died silently is noticed
/// 5 s later than that at the latest.
pub(super) const WATCH_SECONDS: RangeInclusive<u32> = 27 * 60..=29 * 60;

/// What a watch shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeChange {
    /// The Node, at the start of the watch and after each change.
    Node(NodeState),
    /// There is no such Node.
    Missing,
}

impl Cluster {
    /// Watches the metadata of the Node, and never ends. After an error it goes on by itself, later
    /// each time (0.8 s to 30 s, at random).
    ///
    /// The API server may answer from a cache: what is seen here is a reason to look with
    /// [`Cluster::observe`], not yet to act.
    pub fn watch(&self) -> impl Stream<Item = Result<NodeChange, ClusterError>> + Send + use<> {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        self.steps(self.nodes.clone(), config, Object::node(&self.node))
            .scan(false, |found, event| {
                future::ready(Some(seen(found, event)))
            })
            .filter_map(future::ready)
    }

    /// Watches what a configuration selects, and never ends. The steps of kube's watcher, without
    /// those that are nobody's fault.
    pub(super) fn steps<K>(
        &self,
        objects: Api<K>,
        config: watcher::Config,
        object: Object,
    ) -> impl Stream<Item = Result<Event<K>, ClusterError>> + Send + use<K>
    where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let config = config
            .timeout(fastrand::u32(self.watch_seconds.clone()))
            .any_semantic();
        let cluster = self.clone();
        watcher(objects, config)
            .default_backoff()
            .filter_map(move |step| {
                future::ready(match step {
                    Ok(event) => Some(Ok(event)),
                    // The server no longer knows where we were, and the watch begins anew.
                    Err(watcher::Error::WatchError(status)) if status.code == 410 => None,
                    Err(error) => Some(Err(cluster.watch_error(object.clone(), error))),
                })
            })
    }

    /// How long ago the watch of the Node was last heard, be it by a bookmark; `None` if never.
    pub fn watch_heard(&self) -> Option<Duration> {
        self.pulse.age()
    }

    fn watch_error(&self, object: Object, error: watcher::Error) -> ClusterError {
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
                message: "its answer has no resource version".to_owned(),
                retry_after: None,
            },
        }
    }
}

type WatchEvent = Result<Event<PartialObjectMeta<Node>>, ClusterError>;

/// Makes out of the watcher's steps whether there is a Node; `found` is its memory during a list.
fn seen(found: &mut bool, event: WatchEvent) -> Option<Result<NodeChange, ClusterError>> {
    match event {
        Ok(Event::Init) => {
            *found = false;
            None
        }
        Ok(Event::InitApply(node) | Event::Apply(node)) => {
            *found = true;
            Some(Ok(NodeChange::Node(node.metadata.into())))
        }
        Ok(Event::InitDone) => (!*found).then_some(Ok(NodeChange::Missing)),
        Ok(Event::Delete(_)) => Some(Ok(NodeChange::Missing)),
        Err(error) => Some(Err(error)),
    }
}
