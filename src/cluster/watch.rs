//! The own Node's changes as they happen.

use std::future;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, watcher};
use kube::runtime::{WatchStreamExt, watcher::Event};

use super::{Cluster, ClusterError, NodeState};

/// After so many seconds, at random, the server ends a watch and a new one takes over from
/// there. Rare, because nothing is won by it; and a connection that died silently is noticed
/// 5 s later than that at the latest.
const WATCH_SECONDS: std::ops::RangeInclusive<u32> = 27 * 60..=29 * 60;

/// What a watch shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The Node, at the start of the watch and after each change.
    Node(NodeState),
    /// There is no such Node.
    Gone,
}

impl Cluster {
    /// Watches the metadata of the Node, and never ends. After an error it goes on by itself, later
    /// each time (0.8 s to 30 s, at random).
    ///
    /// The API server may answer from a cache: what is seen here is a reason to look with
    /// [`Cluster::observe`], not yet to act.
    pub fn watch(&self) -> impl Stream<Item = Result<Seen, ClusterError>> + Send + use<> {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={}", self.node))
            .timeout(fastrand::u32(WATCH_SECONDS))
            .any_semantic();
        let cluster = self.clone();
        watcher(self.nodes.clone(), config)
            .default_backoff()
            .scan(false, |found, event| {
                future::ready(Some(seen(found, event)))
            })
            .filter_map(future::ready)
            .map(move |outcome| outcome.map_err(|error| cluster.watch_error(error)))
    }

    fn watch_error(&self, error: watcher::Error) -> ClusterError {
        match error {
            watcher::Error::InitialListFailed(error) => self.error("list", error),
            watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
                self.error("watch", error)
            }
            watcher::Error::WatchError(status) => {
                ClusterError::from_status("watch", &self.node, *status)
            }
            watcher::Error::NoResourceVersion => ClusterError::Rejected {
                verb: "watch",
                node: self.node.clone(),
                message: "its answer has no resource version".to_owned(),
                retry_after: None,
            },
        }
    }
}

type WatchEvent = watcher::Result<Event<PartialObjectMeta<Node>>>;

/// Makes out of the watcher's steps whether there is a Node; `found` is its memory during a list.
fn seen(found: &mut bool, event: WatchEvent) -> Option<watcher::Result<Seen>> {
    match event {
        Ok(Event::Init) => {
            *found = false;
            None
        }
        Ok(Event::InitApply(node) | Event::Apply(node)) => {
            *found = true;
            Some(Ok(Seen::Node(node.metadata.into())))
        }
        Ok(Event::InitDone) => (!*found).then_some(Ok(Seen::Gone)),
        Ok(Event::Delete(_)) => Some(Ok(Seen::Gone)),
        // The server no longer knows where we were, and the watch begins anew: nobody's fault.
        Err(watcher::Error::WatchError(status)) if status.code == 410 => None,
        Err(error) => Some(Err(error)),
    }
}
