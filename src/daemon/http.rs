//! `/metrics`, `/healthz` and `/readyz`, which are answered from memory: a scrape calls neither
//! libvirt nor the API server.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower::limit::GlobalConcurrencyLimitLayer;
use tower_http::compression::CompressionLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::timeout::TimeoutLayer;

use super::Health;
use crate::telemetry::MetricRegistry;

/// Maximum number of concurrent requests for metrics.
const CONCURRENT_SCRAPES: usize = 16;
/// Maximum size of a request's body, which no route reads.
const BODY_MAX_BYTES: usize = 1024;
/// Timeout for a request, which waits only for its turn.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
struct HttpState {
    metrics: MetricRegistry,
    health: Arc<Health>,
}

/// Returns the routes, with their limits.
pub(super) fn router(metrics: MetricRegistry, health: Arc<Health>) -> Router {
    // Health checks do not wait for scrapes.
    let scrapes = GlobalConcurrencyLimitLayer::new(CONCURRENT_SCRAPES);
    Router::new()
        .route("/metrics", get(serve_metrics).layer(scrapes))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(HttpState { metrics, health })
        .layer(CompressionLayer::new())
        .layer(RequestBodyLimitLayer::new(BODY_MAX_BYTES))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::SERVICE_UNAVAILABLE,
            TIMEOUT,
        ))
}

async fn serve_metrics(State(state): State<HttpState>) -> Response {
    match state.metrics.encode() {
        Ok(text) => (
            [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

async fn healthz(State(state): State<HttpState>) -> (StatusCode, String) {
    match state.health.stuck_for() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(since) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("the event loop has not run for {} s\n", since.as_secs()),
        ),
    }
}

async fn readyz(State(state): State<HttpState>) -> (StatusCode, String) {
    let missing = state.health.missing();
    if missing.is_empty() {
        let warnings = state.health.warnings();
        let warnings = warnings.iter().map(|line| format!("warning: {line}\n"));
        let body = format!("ready\n{}", warnings.collect::<String>());
        return (StatusCode::OK, body);
    }
    let mut body = "not ready, waiting for:\n".to_owned();
    for line in missing {
        // Writing to a string does not fail.
        let _ok = writeln!(body, "{line}");
    }
    (StatusCode::SERVICE_UNAVAILABLE, body)
}
