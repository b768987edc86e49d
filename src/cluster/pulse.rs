//! Whether watches still hear anything.
//!
//! The API server sends a bookmark on a watch about once a minute, however little happens, from
//! the first change of such an object on that it has seen (`defaultBookmarkFrequency`, apiserver's
//! storage/cacher). The client's watcher keeps them to itself; so the bytes are noticed here. As
//! long as they come, there is no need to look at the Node just to be sure. And a watch that had
//! bookmarks and has none any more is dead, whatever its connection looks like: it is ended here,
//! and the watcher begins a new one from where it was. That costs a request when something broke,
//! and none otherwise.

use std::sync::{Arc, Mutex, PoisonError};

use futures::Stream;
use futures::stream::unfold;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame};
use tokio::time::{Duration, Instant, timeout};

/// So long without a byte: two bookmarks are missing.
const SILENCE: Duration = Duration::from_secs(150);

/// How the line of a bookmark begins (`metav1.WatchEvent` as JSON).
const BOOKMARK: &[u8] = br#"{"type":"BOOKMARK","#;

/// When the watch of the Node was last heard.
#[derive(Clone)]
pub(super) struct Pulse(Arc<Mutex<Option<Instant>>>);

/// What listens to one watch.
pub(super) struct Ear {
    /// Of the Node, if it is the watch of the Node.
    pulse: Option<Pulse>,
    /// What is watched.
    path: String,
    /// Whether there was a bookmark, so that there must be more.
    expects: bool,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    /// How long ago it was heard; `None` if it never was.
    pub(super) fn age(&self) -> Option<Duration> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last.elapsed())
    }

    fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What is to listen to the answer, if the request is a watch.
    pub(super) fn ear<B>(&self, request: &Request<B>) -> Option<Ear> {
        let uri = request.uri();
        let mut query = uri.query()?.split('&');
        query.any(|pair| pair == "watch=true").then(|| Ear {
            pulse: (uri.path() == "/api/v1/nodes").then(|| self.clone()),
            path: uri.path().to_owned(),
            expects: false,
        })
    }
}

impl Ear {
    /// The same frames, which end when the watch is dead.
    pub(super) fn listen<B>(
        self,
        body: B,
    ) -> impl Stream<Item = Result<Frame<Bytes>, B::Error>> + Send + use<B>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: Send,
    {
        unfold((self, body), |(mut ear, mut body)| async move {
            let next = body.frame();
            let frame = match ear.expects {
                false => next.await?,
                true => match timeout(SILENCE, next).await {
                    Ok(frame) => frame?,
                    Err(_) => {
                        tracing::info!(
                            watch = ear.path,
                            "nothing was heard of a watch for {SILENCE:?}: beginning it anew"
                        );
                        return None;
                    }
                },
            };
            if let Some(data) = frame.as_ref().ok().and_then(Frame::data_ref) {
                ear.pulse.iter().for_each(Pulse::beat);
                ear.expects |= data.starts_with(BOOKMARK);
            }
            Some((frame, (ear, body)))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt, stream};
    use http_body_util::StreamBody;

    use super::*;

    fn ear(uri: &str) -> Option<Ear> {
        Pulse::new().ear(&Request::get(uri).body(()).unwrap())
    }

    /// How many of these lines are heard, an hour between each, and what ends it.
    async fn heard<const N: usize>(lines: [&'static str; N]) -> usize {
        let hourly = stream::iter(lines).then(|line| async move {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(line.as_bytes())))
        });
        let body = StreamBody::new(Box::pin(hourly));
        let ear = ear("/x?watch=true").unwrap();
        ear.listen(body).count().await
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_watch_that_has_bookmarks_is_taken_for_dead_without() {
        let change = "{\"type\":\"MODIFIED\",\"object\":{}}\n";
        let bookmark = "{\"type\":\"BOOKMARK\",\"object\":{}}\n";
        assert_eq!(heard([]).await, 0);
        assert_eq!(heard(["", change, change]).await, 3);
        assert_eq!(heard([change, bookmark, change, change]).await, 2);
    }

    #[test]
    fn an_ear_is_for_watches_and_a_pulse_for_that_of_the_node() {
        assert!(ear("/api/v1/nodes?limit=500").is_none() && ear("/api/v1/nodes/n").is_none());
        let node = ear("/api/v1/nodes?&watch=true&timeoutSeconds=9").unwrap();
        assert!(node.pulse.is_some());
        let objects = ear("/apis/virtnode.io/v1alpha1/domainhotplugs?watch=true").unwrap();
        assert!(objects.pulse.is_none());
    }
}
