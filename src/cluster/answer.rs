//! Bounds of the API server's answers.
//!
//! kube's client reads an answer of any length into memory, follows no redirect but takes its body
//! for the answer, and resumes a watch as soon as it ends. A broken API server, or a proxy in front of
//! it, must not cost the node its memory or the API server thousands of requests a second. So each
//! answer passes through here, below kube:
//!
//! * an answer has a maximum length and a deadline, and each line of a watch has a maximum length;
//! * a redirect is an error;
//! * a watch that ends at once is an error, after which kube's watcher backs off (`heartbeat.rs`).

use std::time::Duration;

use futures::Stream;
use futures::stream::unfold;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, StreamBody};
use hyper::body::{Body, Bytes, Frame};
use kube::core::Status;
use tokio::time::{Instant, timeout_at};
use tower::BoxError;

use super::fault::AnswerFault;
use super::heartbeat::{Heartbeat, WatchMonitor};

/// Maximum bytes of an answer. The API server's storage holds at most 1.5 MiB of one object.
const ANSWER_MAX: usize = 2 << 20;

/// Number of objects on a page of a list that is too long for one answer.
pub(super) const PAGE_OBJECTS: u32 = 25;

/// Maximum bytes of an answer with such a page: each object may have 256 KiB of annotations.
const PAGE_MAX: usize = 8 << 20;

/// A larger maximum for one request, as an extension of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct AnswerMax(pub(super) usize);

/// The bounds of the answer to one request.
pub(super) struct AnswerBounds {
    monitor: Option<WatchMonitor>,
    max: usize,
    deadline: Duration,
}

impl AnswerBounds {
    pub(super) fn new<B>(request: &Request<B>, heartbeat: &Heartbeat, deadline: Duration) -> Self {
        let mut query = request.uri().query().unwrap_or_default().split('&');
        let page = format!("limit={PAGE_OBJECTS}");
        let usual = if query.any(|pair| pair == page) {
            PAGE_MAX
        } else {
            ANSWER_MAX
        };
        let max = request.extensions().get::<AnswerMax>();
        Self {
            monitor: heartbeat.monitor(request),
            max: max.map_or(usual, |max| max.0),
            deadline,
        }
    }

    /// Applies the bounds to an answer.
    ///
    /// # Errors
    /// The answer is a redirect.
    pub(super) fn apply<B>(
        self,
        answer: Response<B>,
    ) -> kube::Result<Response<impl Body<Data = Bytes, Error = BoxError> + Send + use<B>>>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError> + Send,
    {
        let status = answer.status();
        if status.is_redirection() || status.is_informational() {
            return Err(redirected(&answer));
        }
        Ok(answer.map(|body| match self.monitor {
            Some(monitor) if status.is_success() => {
                Either::Left(StreamBody::new(Box::pin(monitor.frames(body))))
            }
            _ => Either::Right(StreamBody::new(Box::pin(bounded(
                body,
                self.max,
                self.deadline,
            )))),
        }))
    }
}

fn redirected<B>(answer: &Response<B>) -> kube::Error {
    let status = answer.status();
    let location = answer.headers().get(header::LOCATION);
    let target = location
        .and_then(|location| location.to_str().ok())
        .map_or_else(String::new, |location| format!(" to {location}"));
    let message = format!(
        "it answered with a redirect{target}, which an API server does not: check the server in the \
         kubeconfig, and the proxies in front of it"
    );
    let reason = status.canonical_reason().unwrap_or_default();
    let failure = Status::failure(&message, reason).with_code(StatusCode::as_u16(&status));
    kube::Error::Api(failure.boxed())
}

/// Passes the frames of a body on, up to a maximum length and a deadline.
fn bounded<B>(
    body: B,
    max: usize,
    deadline: Duration,
) -> impl Stream<Item = Result<Frame<Bytes>, BoxError>> + Send
where
    B: Body<Data = Bytes> + Send + Unpin,
    B::Error: Into<BoxError> + Send,
{
    let until = Instant::now() + deadline;
    unfold(Some((body, 0)), move |rest| async move {
        let (mut body, mut length) = rest?;
        let fault = match timeout_at(until, body.frame()).await {
            Err(_) => AnswerFault::Late { after: deadline },
            Ok(None) => return None,
            Ok(Some(Err(error))) => return Some((Err(error.into()), None)),
            Ok(Some(Ok(frame))) => {
                length += frame.data_ref().map_or(0, Bytes::len);
                if length <= max {
                    return Some((Ok(frame), Some((body, length))));
                }
                AnswerFault::TooLarge { max }
            }
        };
        Some((Err(fault.into()), None))
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{StreamExt, stream};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// Returns the bytes that pass, and the fault.
    async fn read(
        frames: impl Stream<Item = &'static [u8]> + Send + Unpin + 'static,
        uri: &str,
    ) -> (usize, Option<AnswerFault>) {
        let request = Request::get(uri).body(()).unwrap();
        let bounds = AnswerBounds::new(&request, &Heartbeat::default(), DEADLINE);
        let frames = frames.map(|data| Ok::<_, Infallible>(Frame::data(Bytes::from_static(data))));
        let answer = Response::new(StreamBody::new(frames));
        let mut body = Box::pin(bounds.apply(answer).unwrap().into_body());
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => length += frame.data_ref().unwrap().len(),
                Err(error) => return (length, AnswerFault::find(&*error).cloned()),
            }
        }
        (length, None)
    }

    const MIB: &[u8] = &[b'x'; 1 << 20];

    #[tokio::test(start_paused = true)]
    async fn endless_answer_ends_at_its_maximum() {
        let endless = || stream::repeat(MIB);
        let too_large = |max| Some(AnswerFault::TooLarge { max });
        assert_eq!(
            read(endless(), "/api/v1/nodes/n").await,
            (2 << 20, too_large(ANSWER_MAX))
        );
        assert_eq!(
            read(endless(), "/x?limit=25").await,
            (8 << 20, too_large(PAGE_MAX))
        );
        let (length, fault) = read(endless(), "/x?watch=true").await;
        assert!(length <= 4 << 20, "{length}");
        assert!(matches!(fault, Some(AnswerFault::TooLarge { .. })));
        // Lines may be many.
        let lines = stream::repeat(&b"{\"type\":\"ADDED\"}\n"[..]).take(1_000_000);
        let (length, fault) = read(lines, "/x?watch=true").await;
        assert_eq!(length, 17_000_000);
        assert!(
            matches!(fault, Some(AnswerFault::WatchEnded { .. })),
            "{fault:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn answer_that_does_not_end_is_given_up_at_the_deadline() {
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            Some((&b"x"[..], ()))
        });
        let started = Instant::now();
        let late = AnswerFault::Late { after: DEADLINE };
        assert_eq!(read(Box::pin(drops), "/x").await, (3, Some(late)));
        assert_eq!(started.elapsed(), DEADLINE);
    }

    #[test]
    fn redirect_is_an_error_that_names_its_target() {
        let request = Request::get("/x?watch=true").body(()).unwrap();
        let bounds = AnswerBounds::new(&request, &Heartbeat::default(), DEADLINE);
        let answer = Response::builder()
            .status(302)
            .header(header::LOCATION, "https://login.example/");
        let answer = answer.body(String::new()).unwrap();
        let error = bounds.apply(answer).err().unwrap().to_string();
        assert!(
            error.contains("redirect to https://login.example/"),
            "{error}"
        );
    }
}
