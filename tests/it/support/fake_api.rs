//! An in-process API server with one Node and its DomainHotplug objects: label ownership, server-side
//! apply, watches, and faults and races that a real server does not produce on demand.

mod hotplugs;
mod node;

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::{Body, Bytes};
use futures::StreamExt;
use http::{Request, Response};
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use self::hotplugs::Hotplugs;
pub(crate) use self::node::FakeNode;

/// The fake API server; clones share it.
#[derive(Clone, Default)]
pub(crate) struct FakeApi(Arc<Mutex<State>>);

type Change = Box<dyn FnOnce(&mut FakeNode) + Send>;

#[derive(Default)]
struct State {
    node: Option<FakeNode>,
    version: u64,
    nodes_made: u64,
    watches: Vec<mpsc::UnboundedSender<Bytes>>,
    muted: Vec<mpsc::UnboundedSender<Bytes>>,
    asked: Vec<String>,
    events: Vec<Value>,
    faults: Vec<(&'static str, Fault, usize)>,
    answers_left: Option<usize>,
    unanswered: usize,
    before_patch: Option<Change>,
    hotplugs: Hotplugs,
}

/// The fault of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// This HTTP status.
    Status(u16),
    /// 429 with a Retry-After.
    Busy { retry_after: u32 },
    /// The call hangs.
    Hang,
    /// The connection is refused.
    Refuse,
    /// 200 without a body.
    Empty,
    /// 302 to another server.
    Redirect,
}

impl FakeApi {
    /// Starts with a Node `node-a`.
    pub(crate) fn with_node() -> Self {
        let api = Self::default();
        api.create_node();
        api
    }

    pub(crate) fn client(&self) -> Client {
        let api = self.clone();
        let service = tower::service_fn(move |request| {
            let api = api.clone();
            async move { api.answer(request).await }
        });
        Client::new(service, "default")
    }

    /// Creates the Node, or replaces it with another one.
    pub(crate) fn create_node(&self) {
        let mut state = self.state();
        state.nodes_made += 1;
        let uid = format!("uid-{}", state.nodes_made);
        state.node = Some(FakeNode::new(uid));
        state.changed("ADDED");
    }

    /// Changes the Node as another client.
    pub(crate) fn change(&self, change: impl FnOnce(&mut FakeNode)) {
        let mut state = self.state();
        change(state.node.as_mut().expect("a node"));
        state.changed("MODIFIED");
    }

    pub(crate) fn look<T>(&self, look: impl FnOnce(&FakeNode) -> T) -> T {
        look(self.state().node.as_ref().expect("a node"))
    }

    /// Changes the Node just before the next patch.
    pub(crate) fn before_next_patch(&self, change: impl FnOnce(&mut FakeNode) + Send + 'static) {
        self.state().before_patch = Some(Box::new(change));
    }

    /// Makes the next `times` calls of this verb (or `*`) fail.
    pub(crate) fn break_calls(&self, verb: &'static str, fault: Fault, times: usize) {
        self.state().faults.push((verb, fault, times));
    }

    /// Stops answering after this number of calls.
    pub(crate) fn answer_only(&self, calls: usize) {
        self.state().answers_left = Some(calls);
    }

    /// Returns the number of calls that [`Self::answer_only`] left unanswered.
    pub(crate) fn unanswered(&self) -> usize {
        self.state().unanswered
    }

    pub(crate) fn repair(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.answers_left = None;
    }

    /// Ends the watches, after an error event with this status if given.
    pub(crate) fn cut_watches(&self, last: Option<u16>) {
        let mut state = self.state();
        let state = &mut *state;
        let both = [&mut state.watches, &mut state.hotplugs.watches];
        for watch in both.into_iter().flat_map(std::mem::take) {
            if let Some(code) = last {
                let event = json!({"type": "ERROR", "object": status(code, "Expired", json!([]))});
                watch.send(line(&event)).ok();
            }
        }
    }

    /// Keeps the watches open without sending anything further.
    pub(crate) fn mute_watches(&self) {
        let mut state = self.state();
        let mut muted = std::mem::take(&mut state.watches);
        muted.append(&mut state.hotplugs.watches);
        state.muted.append(&mut muted);
    }

    /// Sends a bookmark to each watch, as a real server does every minute.
    pub(crate) fn bookmark_watches(&self) {
        let mut state = self.state();
        let state = &mut *state;
        let meta = json!({"resourceVersion": state.version.to_string()});
        let kinds = [
            ("v1", "Node", &mut state.watches),
            (
                "virtnode.io/v1alpha1",
                "DomainHotplug",
                &mut state.hotplugs.watches,
            ),
        ];
        for (version, kind, watches) in kinds {
            let object = json!({"apiVersion": version, "kind": kind, "metadata": meta});
            // The type comes first.
            let line = format!("{{\"type\":\"BOOKMARK\",\"object\":{object}}}\n");
            watches.retain(|watch| watch.send(line.clone().into()).is_ok());
        }
    }

    pub(crate) fn watches(&self) -> usize {
        self.state().watches.len()
    }

    /// Returns the number of calls with this verb.
    pub(crate) fn asked(&self, verb: &str) -> usize {
        self.state()
            .asked
            .iter()
            .filter(|asked| *asked == verb)
            .count()
    }

    /// Returns the notes of all events.
    pub(crate) fn events(&self) -> Vec<String> {
        let state = self.state();
        let notes = state.events.iter().map(|event| event["note"].to_string());
        notes.collect()
    }

    /// Returns type and reason of the events about one object.
    pub(crate) fn events_about(&self, kind: &str, name: &str) -> Vec<(String, String)> {
        let state = self.state();
        let about = state.events.iter().filter(|event| {
            event["regarding"]["kind"] == kind && event["regarding"]["name"] == name
        });
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        about
            .map(|event| (text(&event["type"]), text(&event["reason"])))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("not poisoned")
    }

    async fn answer(&self, request: Request<kube::client::Body>) -> io::Result<Response<Body>> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.map_err(io::Error::other)?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let query = parts.uri.query().unwrap_or_default().to_owned();
        let verb = match (parts.method.as_str(), parts.uri.path()) {
            ("GET", "/api/v1/nodes") if query.contains("watch=") => "watch",
            ("GET", "/api/v1/nodes") => "list",
            ("GET", "/api/v1/nodes/node-a") => "get",
            ("PATCH", "/api/v1/nodes/node-a") => "patch",
            (_, path) if path.contains("/events") => "event",
            (method, path) if path.starts_with(hotplugs::PATH) => {
                hotplugs::verb(method, path, &query)
            }
            (method, path) => panic!("unexpected {method} {path}"),
        };
        let fault = self.state().fault(verb);
        match fault {
            Some(Fault::Hang) => {}
            Some(Fault::Refuse) => return Err(io::ErrorKind::ConnectionRefused.into()),
            Some(Fault::Empty) => return Ok(Response::new(Body::empty())),
            Some(Fault::Redirect) => {
                let redirect = Response::builder()
                    .status(302)
                    .header("location", "https://login.example/");
                return redirect.body(Body::empty()).map_err(io::Error::other);
            }
            Some(Fault::Status(code)) => return Ok(answer(status(code, reason(code), json!([])))),
            Some(Fault::Busy { retry_after }) => {
                let mut busy = status(429, "TooManyRequests", json!([]));
                busy["details"]["retryAfterSeconds"] = retry_after.into();
                return Ok(answer(busy));
            }
            None if verb.starts_with("hotplug") => {
                let path = parts.uri.path();
                return Ok(self.state().hotplug(verb, path, &query, &body));
            }
            None => return Ok(self.state().carry_out(verb, &query, body)),
        }
        pending().await
    }
}

impl State {
    fn fault(&mut self, verb: &'static str) -> Option<Fault> {
        self.asked.push(verb.to_owned());
        match &mut self.answers_left {
            None => {}
            Some(0) => {
                self.unanswered += 1;
                return Some(Fault::Hang);
            }
            Some(left) => *left -= 1,
        }
        let mut faults = self.faults.iter_mut();
        let fault =
            faults.find(|(broken, _, times)| (*broken == verb || *broken == "*") && *times > 0)?;
        fault.2 -= 1;
        Some(fault.1)
    }

    fn carry_out(&mut self, verb: &str, query: &str, body: Value) -> Response<Body> {
        match (verb, &mut self.node) {
            ("event", _) => {
                self.events.push(body.clone());
                answer(body)
            }
            ("list", node) => answer(json!({
                "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                "metadata": {"resourceVersion": self.version.to_string()},
                "items": node.iter().map(|node| node.json()).collect::<Vec<_>>()})),
            ("watch", _) => self.watch(query),
            (_, None) => answer(status(404, "NotFound", json!([]))),
            ("get", Some(node)) => answer(node.json()),
            (_, Some(_)) => self.patch(query, &body),
        }
    }

    fn patch(&mut self, query: &str, body: &Value) -> Response<Body> {
        if let Some(change) = self.before_patch.take() {
            change(self.node.as_mut().expect("a node"));
            self.changed("MODIFIED");
        }
        let node = self.node.as_mut().expect("a node");
        let applied = node.apply("virtnode", query.contains("force=true"), &body["metadata"]);
        if let Err(refused) = applied {
            return answer(refused);
        }
        self.changed("MODIFIED");
        answer(self.node.as_ref().map(FakeNode::json).unwrap_or_default())
    }

    fn watch(&mut self, query: &str) -> Response<Body> {
        let from = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resourceVersion="));
        let from: u64 = from.and_then(|from| from.parse().ok()).unwrap_or_default();
        let (sender, receiver) = mpsc::unbounded_channel();
        if let Some(node) = self.node.as_ref().filter(|node| node.version > from) {
            let _sent = sender.send(line(&json!({"type": "MODIFIED", "object": node.json()})));
        }
        self.watches.push(sender);
        stream(receiver)
    }

    fn changed(&mut self, kind: &str) {
        self.version += 1;
        let Some(node) = &mut self.node else { return };
        node.version = self.version;
        let event = line(&json!({"type": kind, "object": node.json()}));
        self.watches
            .retain(|watch| watch.send(event.clone()).is_ok());
    }
}

/// Returns a body that ends when its sender is dropped.
fn stream(receiver: mpsc::UnboundedReceiver<Bytes>) -> Response<Body> {
    let lines = futures::stream::unfold(receiver, async |mut receiver| {
        Some((receiver.recv().await?, receiver))
    });
    Response::new(Body::from_stream(lines.map(Ok::<_, Infallible>)))
}

fn reason(code: u16) -> &'static str {
    match code {
        403 => "Forbidden",
        404 => "NotFound",
        500 => "InternalError",
        _ => "",
    }
}

fn status(code: u16, reason: &str, causes: Value) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": format!("fake error {code}"), "details": {"causes": causes}})
}

fn answer(body: Value) -> Response<Body> {
    let code = if body["kind"] == "Status" {
        body["code"].as_u64()
    } else {
        None
    };
    let code = code
        .and_then(|code| u16::try_from(code).ok())
        .unwrap_or(200);
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = http::StatusCode::from_u16(code).expect("a status");
    response
}

fn line(event: &Value) -> Bytes {
    Bytes::from(format!("{event}\n"))
}
