//! Detection of dead watches by their bookmarks.
//!
//! The API server sends a bookmark on each watch about once a minute, however little happens
//! (`defaultBookmarkFrequency`, apiserver's storage/cacher); after its own start it sends none before
//! the first change of the watched kind. kube's watcher does not pass bookmarks on, so this module
//! observes the bytes of the response below kube:
//!
//! * Each byte of the Node's watch updates the [`Heartbeat`]. While it is recent, the publisher need
//!   not read the Node periodically.
//! * A watch that has had a bookmark and then has no byte for [`SILENCE`] is dead, even if its
//!   connection is open. [`WatchMonitor`] ends the response, and kube's watcher resumes the watch
//!   from the last version with one request.
//!
//! A watch that ends within a second of its start is a failure, after which kube's watcher backs off:
//! by itself it would resume such a watch at once, again and again.
//!
//! A watch of five minutes would need neither, but costs 12 requests per hour instead of two.

use std::sync::{Arc, Mutex, PoisonError};

use futures::Stream;
use futures::stream::unfold;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame};
use tokio::time::{Duration, Instant, timeout};
use tower::BoxError;

use super::fault::AnswerFault;

/// Maximum time without a byte: two bookmarks are missing.
const SILENCE: Duration = Duration::from_secs(150);

/// Minimum life of a watch that works.
const LIFE_MIN: Duration = Duration::from_secs(1);

/// Maximum bytes of a line: the API server's storage holds at most 1.5 MiB of one object.
const LINE_MAX: usize = 4 << 20;

/// Start of a bookmark's line (`metav1.WatchEvent` as JSON).
const BOOKMARK: &[u8] = br#"{"type":"BOOKMARK","#;

/// The time of the last byte on the Node's watch.
#[derive(Clone, Default)]
pub(super) struct Heartbeat(Arc<Mutex<Option<Instant>>>);

/// Observes the response of one watch.
pub(super) struct WatchMonitor {
    /// Present on the Node's watch.
    heartbeat: Option<Heartbeat>,
    path: String,
    /// True after the first bookmark.
    expects_bookmarks: bool,
    /// Bytes since the last line break.
    line: usize,
}

impl Heartbeat {
    /// Returns the time since the last byte, `None` before the first.
    pub(super) fn age(&self) -> Option<Duration> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last.elapsed())
    }

    fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Returns the monitor for the response if the request is a watch.
    pub(super) fn monitor<B>(&self, request: &Request<B>) -> Option<WatchMonitor> {
        let uri = request.uri();
        let mut query = uri.query()?.split('&');
        query
            .any(|pair| pair == "watch=true")
            .then(|| WatchMonitor {
                heartbeat: (uri.path() == "/api/v1/nodes").then(|| self.clone()),
                path: uri.path().to_owned(),
                expects_bookmarks: false,
                line: 0,
            })
    }
}

impl WatchMonitor {
    /// Passes the frames of a response on, and ends it when the watch is dead. Fails if a line is too
    /// long, or the response ends at once.
    pub(super) fn frames<B>(
        self,
        body: B,
    ) -> impl Stream<Item = Result<Frame<Bytes>, BoxError>> + Send + use<B>
    where
        B: Body<Data = Bytes> + Send + Unpin,
        B::Error: Into<BoxError> + Send,
    {
        let started = Instant::now();
        unfold(Some((self, body)), move |rest| async move {
            let (mut monitor, mut body) = rest?;
            let next = body.frame();
            let frame = if !monitor.expects_bookmarks {
                next.await
            } else if let Ok(frame) = timeout(SILENCE, next).await {
                frame
            } else {
                tracing::info!(
                    path = monitor.path,
                    "watch stalled: no data for {SILENCE:?}, restarting it"
                );
                return None;
            };
            let frame = match frame {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Some((Err(error.into()), None)),
                None => {
                    let after = started.elapsed();
                    let fault = AnswerFault::WatchEnded { after };
                    return (after < LIFE_MIN).then(|| (Err(fault.into()), None));
                }
            };
            if let Some(data) = frame.data_ref() {
                monitor.heartbeat.iter().for_each(Heartbeat::beat);
                monitor.expects_bookmarks |= data.starts_with(BOOKMARK);
                if monitor.is_line_too_long(data) {
                    let fault = AnswerFault::TooLarge { max: LINE_MAX };
                    return Some((Err(fault.into()), None));
                }
            }
            Some((Ok(frame), Some((monitor, body))))
        })
    }

    /// Counts the bytes of the current line.
    fn is_line_too_long(&mut self, data: &[u8]) -> bool {
        self.line = match data.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => data.len() - end - 1,
            None => self.line + data.len(),
        };
        self.line > LINE_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt, stream};
    use http_body_util::StreamBody;

    use super::*;

    fn monitor(uri: &str) -> Option<WatchMonitor> {
        Heartbeat::default().monitor(&Request::get(uri).body(()).unwrap())
    }

    /// Sends one line an hour; returns how many lines arrive before the watch ends.
    async fn lines_received<const N: usize>(lines: [&'static str; N]) -> usize {
        let hourly = stream::iter(lines).then(|line| async move {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(line.as_bytes())))
        });
        let body = StreamBody::new(Box::pin(hourly));
        let monitor = monitor("/x?watch=true").unwrap();
        monitor.frames(body).count().await
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_only_a_watch_that_has_had_a_bookmark() {
        let change = "{\"type\":\"MODIFIED\",\"object\":{}}\n";
        let bookmark = "{\"type\":\"BOOKMARK\",\"object\":{}}\n";
        assert_eq!(lines_received(["", change, change]).await, 3);
        assert_eq!(lines_received([change, bookmark, change, change]).await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn watch_that_ends_within_a_second_is_a_failure() {
        let end_after = async |life: Duration| {
            let line = stream::once(async move {
                tokio::time::sleep(life).await;
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"{}\n")))
            });
            let body = StreamBody::new(Box::pin(line));
            let monitor = monitor("/x?watch=true").unwrap();
            let frames: Vec<_> = monitor.frames(body).collect().await;
            assert!(frames[0].is_ok());
            frames.len() == 1
        };
        assert!(!end_after(Duration::from_millis(999)).await);
        assert!(end_after(LIFE_MIN).await);
    }

    #[test]
    fn only_watches_are_monitored_and_only_the_nodes_has_a_heartbeat() {
        assert!(monitor("/api/v1/nodes?limit=500").is_none());
        assert!(monitor("/api/v1/nodes/n").is_none());
        let node = monitor("/api/v1/nodes?&watch=true&timeoutSeconds=9").unwrap();
        assert!(node.heartbeat.is_some());
        let objects = monitor("/apis/virtnode.io/v1alpha1/domainhotplugs?watch=true").unwrap();
        assert!(objects.heartbeat.is_none());
    }
}
