//! The changes by other clients as the local API shows them.

use std::sync::Arc;

use axum::Json;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use crate::external::{ChangeLog, ExternalRecord};

/// `GET /v1/external-changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalChangeList {
    /// The newest first.
    pub changes: Vec<ExternalRecord>,
}

/// Returns the list, or an error if the configuration disables it.
pub(super) fn list(log: Option<&Arc<ChangeLog>>) -> Result<Json<ExternalChangeList>, ApiError> {
    let off = "changes by other clients are not verified on this node: see externalChanges.enabled \
               in its configuration";
    let log =
        log.ok_or_else(|| ApiError::new(StatusCode::FORBIDDEN, "external-changes-disabled", off))?;
    let changes = log.records();
    Ok(Json(ExternalChangeList { changes }))
}
