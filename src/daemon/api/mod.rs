//! The local API: HTTP and JSON on the unix socket. docs/openapi.json describes it.

mod access;
mod body;
mod error;

use std::convert::Infallible;
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
use tracing::info;

pub use access::Access;
pub use error::Problem;

use self::body::{IntoAsk, MemoryBody, VcpusBody};
use self::error::ApiError;
use super::listener::Bounds;
use super::socket::Peer;
use crate::hotplug::Verdict;
use crate::operations::{Operation, Operations, Phase};
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
pub(super) const BOUNDS: Bounds = Bounds {
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
    /// Those that the journal holds, the oldest first.
    pub operations: Vec<Operation>,
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
        if shared.access.allows(peer).await {
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

async fn submit<O: Operations, B: IntoAsk>(
    State(shared): Api<O>,
    Extension(peer): Extension<Peer>,
    name: Result<Path<String>, PathRejection>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let operations = shared.operations()?;
    let Path(name) = name?;
    let name = body::domain_name(name)?;
    let body: B = body::read(&bytes?)?;
    let ask = body.into_ask(name, format!("uid {}", peer.uid))?;
    let operation = operations.submit(ask).await?;
    info!(operation = %operation.id, domain = ?operation.domain, uid = peer.uid, "asked over the local socket");
    let operation = first_look(operations.as_ref(), operation).await;
    if operation.verdict == Some(Verdict::DomainNotFound) {
        let message = operation.message.unwrap_or_else(|| unknown(&operation.domain));
        return Err(ApiError::not_found("domain-not-found", message));
    }
    let status = match operation.phase {
        Phase::Finished => StatusCode::OK,
        Phase::Queued | Phase::Running => StatusCode::ACCEPTED,
    };
    let location = format!("/v1/operations/{}", operation.id);
    Ok((status, [(header::LOCATION, location)], Json(operation)).into_response())
}

/// Waits a moment for what is known at once.
async fn first_look<O: Operations>(operations: &O, operation: Operation) -> Operation {
    let Some(states) = operations.watch(&operation.id) else {
        return operation;
    };
    let mut telling = states.skip_while(|state| {
        let nothing_known = state.phase != Phase::Finished && state.before.is_none();
        std::future::ready(nothing_known)
    });
    match timeout(FIRST_LOOK, telling.next()).await {
        Ok(Some(state)) => state,
        Ok(None) | Err(_) => operations.operation(&operation.id).unwrap_or(operation),
    }
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
    let found = domains.iter().find(|domain| domain.name == name);
    let found = found.ok_or_else(|| ApiError::not_found("domain-not-found", unknown(&name)))?;
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
) -> Result<Json<Operation>, ApiError> {
    let Path(id) = id?;
    let found = shared.operations()?.operation(&id);
    Ok(Json(found.ok_or_else(|| no_such_operation(&id))?))
}

async fn progress<O: Operations>(
    State(shared): Api<O>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id?;
    let states = shared.operations()?.watch(&id);
    let states = states.ok_or_else(|| no_such_operation(&id))?;
    let lines = states.map(|state| {
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
