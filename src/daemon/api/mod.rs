//! The local API: HTTP and JSON on the unix socket. docs/openapi.json describes it.

mod access;
mod body;
mod error;
mod operations;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Extension, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

pub use access::Access;
pub use error::Problem;
pub use operations::{Operations, states};

use self::body::{IntoOrder, MemoryBody, VcpusBody};
use self::error::ApiError;
use super::listener::{self, Bounds};
use super::socket::{LocalSocket, Peer};
use crate::hotplug::Verdict;
use crate::operation::{AskedBy, OperationId, Record};
use crate::telemetry::{DomainFigures, Metrics};

/// The API's description, as served and committed.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.json");

/// Every route there is, as in the description.
pub const ROUTES: [(&str, &str); 8] = [
    ("post", "/v1/domains/{name}/vcpus"),
    ("post", "/v1/domains/{name}/memory"),
    ("get", "/v1/domains"),
    ("get", "/v1/domains/{name}"),
    ("get", "/v1/operations"),
    ("get", "/v1/operations/{id}"),
    ("get", "/v1/operations/{id}/progress"),
    ("get", "/openapi.json"),
];

const BODY_MAX_BYTES: usize = 64 * 1024;
/// For a body to arrive and an answer to be found, which is in memory or, for a new operation, in
/// the journal.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long the answer to a new operation is held back to see whether there is such a domain.
const FIRST_LOOK: Duration = Duration::from_millis(200);

/// Progress is streamed for as long as an operation may take.
const BOUNDS: Bounds = Bounds {
    connections: 256,
    age: Duration::from_secs(3700),
};

/// `GET /v1/domains`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domains {
    /// The running domains, by name.
    pub domains: Vec<DomainFigures>,
}

/// `GET /v1/operations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationList {
    /// Those that the journal holds, the newest first.
    pub operations: Vec<Record>,
}

struct Shared<O> {
    /// `None` where hotplug is switched off.
    operations: Option<Arc<O>>,
    metrics: Arc<Metrics>,
    access: Access,
}

impl<O> Shared<O> {
    fn operations(&self) -> Result<&Arc<O>, ApiError> {
        let off = "hotplug is switched off on this node: see hotplug.enabled in its configuration";
        self.operations
            .as_ref()
            .ok_or_else(|| ApiError::new(StatusCode::FORBIDDEN, "hotplug-disabled", off))
    }
}

type Api<O> = State<Arc<Shared<O>>>;

/// The routes, with their bounds. Every request must carry its [`Peer`] as an extension.
pub fn router<O: Operations>(
    operations: Option<Arc<O>>,
    metrics: Arc<Metrics>,
    access: Access,
) -> Router {
    let shared = Arc::new(Shared {
        operations,
        metrics,
        access,
    });
    Router::new()
        .route("/v1/domains/{name}/vcpus", post(submit::<O, VcpusBody>))
        .route("/v1/domains/{name}/memory", post(submit::<O, MemoryBody>))
        .route("/v1/domains", get(domains::<O>))
        .route("/v1/domains/{name}", get(domain::<O>))
        .route("/v1/operations", get(operations_known::<O>))
        .route("/v1/operations/{id}", get(operation::<O>))
        .route("/v1/operations/{id}/progress", get(progress::<O>))
        .route("/openapi.json", get(openapi))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_MAX_BYTES))
        .layer(from_fn_with_state(Arc::clone(&shared), guard::<O>))
        .with_state(shared)
}

/// Lets in who may, and nobody for too long.
async fn guard<O: Operations>(
    State(shared): Api<O>,
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let answer = async {
        if shared.access.allows(&peer) {
            return next.run(request).await;
        }
        let message = format!(
            "uid {} may not use this socket: add it to api.allowedUids in the configuration, or \
             one of its groups to api.allowedGids",
            peer.uid
        );
        ApiError::new(StatusCode::FORBIDDEN, "not-allowed", message).into_response()
    };
    timeout(TIMEOUT, answer).await.unwrap_or_else(|_| {
        let message = "the request did not arrive whole, or could not be answered, in time";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).into_response()
    })
}

/// Makes the socket. Its group, and that of a directory that had to be made, is `gid`.
///
/// # Errors
/// The socket cannot be made, or another daemon answers there.
pub fn bind(path: &std::path::Path, gid: Option<u32>) -> io::Result<LocalSocket> {
    LocalSocket::bind(path, gid)
}

/// Serves the API on a socket for as long as the future lives.
pub fn serve(socket: LocalSocket, router: Router) -> impl Future<Output = ()> + Send + 'static {
    listener::serve(socket, router, BOUNDS)
}

async fn submit<O: Operations, B: IntoOrder>(
    State(shared): Api<O>,
    Extension(peer): Extension<Peer>,
    name: Result<Path<String>, PathRejection>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let operations = shared.operations()?;
    let Path(name) = name?;
    let name = body::domain_name(name)?;
    let body: B = body::read(&bytes?)?;
    let order = body.into_order(name, AskedBy::Local { uid: peer.uid })?;
    let id = operations.submit(order).await?;
    let record = first_look(operations.as_ref(), &id).await;
    let record = record.ok_or_else(|| no_such_operation(id.as_str()))?;
    if record.verdict == Some(Verdict::DomainNotFound) {
        let message = unknown(&record.domain.name);
        return Err(ApiError::not_found("domain-not-found", message));
    }
    let status = match record.is_done() {
        true => StatusCode::OK,
        false => StatusCode::ACCEPTED,
    };
    let location = format!("/v1/operations/{}", record.id);
    Ok((status, [(header::LOCATION, location)], Json(record)).into_response())
}

/// Waits a moment for what is known at once.
async fn first_look<O: Operations>(operations: &O, id: &OperationId) -> Option<Record> {
    let states = states(operations.watch(id)?);
    let telling = states.filter(|state| {
        let tells = state.is_done() || state.before.is_some();
        std::future::ready(tells)
    });
    let first = timeout(FIRST_LOOK, pin!(telling).next()).await;
    first.ok().flatten().or_else(|| operations.operation(id))
}

async fn domains<O: Operations>(State(shared): Api<O>) -> Json<Domains> {
    let domains = shared.metrics.inventory.domains().to_vec();
    Json(Domains { domains })
}

async fn domain<O: Operations>(
    State(shared): Api<O>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<DomainFigures>, ApiError> {
    let Path(name) = name?;
    let name = body::domain_name(name)?;
    let domains = shared.metrics.inventory.domains();
    let found = domains.iter().find(|domain| domain.name == name.as_str());
    let found =
        found.ok_or_else(|| ApiError::not_found("domain-not-found", unknown(name.as_str())))?;
    Ok(Json(found.clone()))
}

fn unknown(name: &str) -> String {
    format!("no domain {name:?} runs here: GET /v1/domains lists those that do")
}

async fn operations_known<O: Operations>(
    State(shared): Api<O>,
) -> Result<Json<OperationList>, ApiError> {
    let operations = shared.operations()?.operations();
    Ok(Json(OperationList { operations }))
}

async fn operation<O: Operations>(
    State(shared): Api<O>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Record>, ApiError> {
    let Path(id) = id?;
    let operations = shared.operations()?;
    let found = id
        .parse()
        .ok()
        .and_then(|id: OperationId| operations.operation(&id));
    Ok(Json(found.ok_or_else(|| no_such_operation(&id))?))
}

async fn progress<O: Operations>(
    State(shared): Api<O>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id?;
    let operations = shared.operations()?;
    let record = id
        .parse()
        .ok()
        .and_then(|id: OperationId| operations.watch(&id));
    let record = record.ok_or_else(|| no_such_operation(&id))?;
    let lines = states(record).map(|state| {
        // A record has no map with keys that are no text, so this does not fail.
        let mut line = serde_json::to_string(&state).unwrap_or_default();
        line.push('\n');
        Ok::<_, Infallible>(line)
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::from_stream(lines)).into_response())
}

fn no_such_operation(id: &str) -> ApiError {
    let short: String = id.chars().take(80).collect();
    ApiError::not_found(
        "operation-not-found",
        format!("the journal has no operation {short:?}: it was never there, or is too old"),
    )
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn no_such_route() -> ApiError {
    ApiError::not_found(
        "no-such-route",
        "there is nothing here: GET /openapi.json lists what there is (a '/' in a name is %2F)",
    )
}

async fn no_such_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "this path has another method: see GET /openapi.json",
    )
}
