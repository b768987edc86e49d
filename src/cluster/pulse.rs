//! Whether the watch of the Node still hears anything.
//!
//! The API server sends a bookmark on every watch about once a minute, however little happens
//! (`defaultBookmarkFrequency`, apiserver's storage/cacher). The client's watcher keeps them to
//! itself; so the bytes are noticed here. As long as they come, there is no need to look at the
//! Node just to be sure.

use std::sync::{Arc, Mutex, PoisonError};

use http::Request;
use tokio::time::{Duration, Instant};

/// When the watch of the Node was last heard.
#[derive(Clone)]
pub(super) struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// How long ago it was heard; `None` if it never was.
    pub(super) fn age(&self) -> Option<Duration> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last.elapsed())
    }

    pub(super) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Itself, if the request is the watch of the Node.
    pub(super) fn of<B>(&self, request: &Request<B>) -> Option<Self> {
        let uri = request.uri();
        let watches = uri
            .query()
            .is_some_and(|query| query.split('&').any(|pair| pair == "watch=true"));
        (watches && uri.path() == "/api/v1/nodes").then(|| self.clone())
    }
}
