//! The local API: HTTP and JSON on the Unix socket, described by docs/openapi.json.
//!
//! A hotplug request is validated, enqueued in the executor, and answered with its record; the
//! client then follows the record. A kind of resource is one file with its [`HotplugBody`], one
//! route here, and its description. All other routes answer from memory.

mod access;
mod body;
mod error;
mod external;
mod memory;
mod operations;
mod vcpus;

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
pub use error::ApiProblem;
pub use external::ExternalChangeList;
pub use operations::{OperationService, states};

use self::body::HotplugBody;
use self::error::ApiError;
use self::memory::MemoryBody;
use self::vcpus::VcpusBody;
use super::listener::{self, ConnectionLimits, WhenFull};
use super::socket::{LocalSocket, Peer};
use crate::external::ChangeLog;
use crate::hotplug::Verdict;
use crate::monitor::{DomainFigures, Inventory};
use crate::operation::{AskedBy, OperationId, Record};

/// The description of the API, which it serves itself.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.json");

/// Method and path of every route, for the tests that compare them with the description.
pub const ROUTES: [(&str, &str); 9] = [
    ("post", VcpusBody::PATH),
    ("post", MemoryBody::PATH),
    ("get", "/v1/domains"),
    ("get", "/v1/domains/{name}"),
    ("get", "/v1/operations"),
    ("get", "/v1/operations/{id}"),
    ("get", "/v1/operations/{id}/progress"),
    ("get", "/v1/external-changes"),
    ("get", "/openapi.json"),
];

const BODY_MAX_BYTES: usize = 64 * 1024;
/// Timeout for a body to arrive and its answer, which takes at most a write to the journal.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum delay of the answer to a new operation, so that it can report a domain that does not
/// exist.
const FIRST_OBSERVATION: Duration = Duration::from_millis(200);

/// A progress stream lasts as long as an operation, which is at most an hour.
const LIMITS: ConnectionLimits = ConnectionLimits {
    connections: 256,
    when_full: WhenFull::Wait,
    keep_alive: true,
    age: Duration::from_secs(3700),
};

/// `GET /v1/domains`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainList {
    /// Sorted by name.
    pub domains: Vec<DomainFigures>,
}

/// `GET /v1/operations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationList {
    /// The newest first.
    pub operations: Vec<Record>,
}

struct ApiState<O> {
    /// `None` if the configuration disables hotplug.
    operations: Option<Arc<O>>,
    inventory: Arc<Inventory>,
    /// `None` if the configuration disables it.
    external: Option<Arc<ChangeLog>>,
    access: Access,
}

impl<O> ApiState<O> {
    fn operations(&self) -> Result<&Arc<O>, ApiError> {
        let off = "hotplug is disabled on this node: see hotplug.enabled in its configuration";
        self.operations
            .as_ref()
            .ok_or_else(|| ApiError::new(StatusCode::FORBIDDEN, "hotplug-disabled", off))
    }
}

type Api<O> = State<Arc<ApiState<O>>>;

/// Returns the routes, with their limits. Every request must carry its [`Peer`] as an extension.
pub fn router<O: OperationService>(
    operations: Option<Arc<O>>,
    inventory: Arc<Inventory>,
    external: Option<Arc<ChangeLog>>,
    access: Access,
) -> Router {
    let shared = Arc::new(ApiState {
        operations,
        inventory,
        external,
        access,
    });
    Router::new()
        .route(VcpusBody::PATH, post(submit::<O, VcpusBody>))
        .route(MemoryBody::PATH, post(submit::<O, MemoryBody>))
        .route("/v1/domains", get(domains::<O>))
        .route("/v1/domains/{name}", get(domain::<O>))
        .route("/v1/operations", get(list_operations::<O>))
        .route("/v1/operations/{id}", get(operation::<O>))
        .route("/v1/operations/{id}/progress", get(progress::<O>))
        .route("/v1/external-changes", get(external_changes::<O>))
        .route("/openapi.json", get(openapi))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_MAX_BYTES))
        .layer(from_fn_with_state(Arc::clone(&shared), guard::<O>))
        .with_state(shared)
}

/// Rejects clients without access, and requests that take too long.
async fn guard<O: OperationService>(
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
        let message = "the request was not received and answered within 10 seconds";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", message).into_response()
    })
}

/// Creates the socket, with `gid` as its group.
///
/// # Errors
/// The socket cannot be created, or another daemon listens on it.
pub fn bind(path: &std::path::Path, gid: Option<u32>) -> io::Result<LocalSocket> {
    LocalSocket::bind(path, gid)
}

/// Serves the API on a socket until the future is dropped.
pub fn serve(socket: LocalSocket, router: Router) -> impl Future<Output = ()> + Send + 'static {
    listener::serve(socket, router, LIMITS)
}

async fn submit<O: OperationService, B: HotplugBody>(
    State(shared): Api<O>,
    Extension(peer): Extension<Peer>,
    name: Result<Path<String>, PathRejection>,
    bytes: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let operations = shared.operations()?;
    let Path(name) = name?;
    let order = body::order::<B>(name, &bytes?, AskedBy::Local { uid: peer.uid })?;
    let id = operations.submit(order).await?;
    let record = first_observation(operations.as_ref(), &id).await;
    let record = record.ok_or_else(|| no_such_operation(id.as_str()))?;
    if record.verdict == Some(Verdict::DomainNotFound) {
        let message = not_running(&record.domain.name);
        return Err(ApiError::not_found("domain-not-found", message));
    }
    let status = if record.is_done() {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    let location = format!("/v1/operations/{}", record.id);
    Ok((status, [(header::LOCATION, location)], Json(record)).into_response())
}

/// Waits briefly for a record that shows whether the domain exists.
async fn first_observation<O: OperationService>(
    operations: &O,
    id: &OperationId,
) -> Option<Record> {
    let states = states(operations.watch(id)?);
    let observed = states.filter(|state| {
        let is_observed = state.is_done() || state.before.is_some();
        std::future::ready(is_observed)
    });
    let first = timeout(FIRST_OBSERVATION, pin!(observed).next()).await;
    first.ok().flatten().or_else(|| operations.operation(id))
}

async fn domains<O: OperationService>(State(shared): Api<O>) -> Json<DomainList> {
    let domains = shared.inventory.domains().to_vec();
    Json(DomainList { domains })
}

async fn domain<O: OperationService>(
    State(shared): Api<O>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<DomainFigures>, ApiError> {
    let Path(name) = name?;
    let name = body::domain_name(name)?;
    let domains = shared.inventory.domains();
    let mut found = domains
        .iter()
        .filter(|domain| domain.is_called(name.as_str()));
    match (found.next(), found.next()) {
        (Some(found), None) => Ok(Json(found.clone())),
        (Some(one), Some(other)) => {
            let message = format!(
                "{name} is both {:?} and {:?}: use a name that only one of them has",
                one.display_name(),
                other.display_name()
            );
            Err(ApiError::new(
                StatusCode::CONFLICT,
                "ambiguous-name",
                message,
            ))
        }
        (None, _) => {
            let message = not_running(name.as_str());
            Err(ApiError::not_found("domain-not-found", message))
        }
    }
}

fn not_running(name: &str) -> String {
    format!("domain {name:?} is not running here: GET /v1/domains lists the running ones")
}

async fn list_operations<O: OperationService>(
    State(shared): Api<O>,
) -> Result<Json<OperationList>, ApiError> {
    let operations = shared.operations()?.operations();
    Ok(Json(OperationList { operations }))
}

async fn external_changes<O: OperationService>(
    State(shared): Api<O>,
) -> Result<Json<ExternalChangeList>, ApiError> {
    external::list(shared.external.as_ref())
}

async fn operation<O: OperationService>(
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

async fn progress<O: OperationService>(
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
        // Serialization fails only for maps with other keys than strings, which a record has not.
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
        format!(
            "operation {short:?} is not in the journal: it never existed, or was removed as too old"
        ),
    )
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn no_such_route() -> ApiError {
    ApiError::not_found(
        "no-such-route",
        "this path does not exist: GET /openapi.json lists the paths (encode '/' in a name as %2F)",
    )
}

async fn no_such_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        "this path does not support the method: see GET /openapi.json",
    )
}
