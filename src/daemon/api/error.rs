//! Errors of the local API: `{code, message}`.

use axum::Json;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::executor::SubmitError;

/// Body of an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiProblem {
    /// One of a fixed set of words, for programs.
    pub code: String,
    /// For people: what is wrong and how to fix it.
    pub message: String,
}

#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    problem: ApiProblem,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            problem: ApiProblem {
                code: code.to_owned(),
                message: message.into(),
            },
        }
    }

    pub(super) fn bad_request(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(super) fn not_found(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.problem)).into_response()
    }
}

impl From<PathRejection> for ApiError {
    fn from(_: PathRejection) -> Self {
        Self::bad_request(
            "bad-path",
            "the path is not percent-encoded UTF-8: encode the name",
        )
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body-too-large",
                "the body is larger than 64 KiB",
            ),
            _ => Self::bad_request("bad-body", "cannot read the whole body"),
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let status = match error {
            SubmitError::KeyReused(_) => StatusCode::CONFLICT,
            SubmitError::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            SubmitError::Journal(_) | SubmitError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.code(), error.to_string())
    }
}
