//! Errors of calls to the API server.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use kube::core::Status;
use thiserror::Error;

use super::fault::AnswerFault;
use crate::label::ownership::FieldManager;
use crate::units::shortened;

/// Maximum characters of an API server's message: one about all labels of a Node has over 10,000.
const MESSAGE_MAX: usize = 600;

/// The object of a call to the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiObject {
    /// `Node`
    pub kind: &'static str,
    /// The resource as RBAC rules name it: `nodes`.
    pub resource: &'static str,
    pub name: String,
}

impl ApiObject {
    pub(super) fn node(name: &str) -> Self {
        Self {
            kind: "Node",
            resource: "nodes",
            name: name.to_owned(),
        }
    }
}

impl fmt::Display for ApiObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// A failed call. `Display` is for people, without a trailing period: object, cause and remedy.
/// [`ClusterError::code`] is the fixed metrics label.
#[derive(Debug, Error)]
pub enum ClusterError {
    #[error(
        "no usable Kubernetes client configuration: {0}; name a kubeconfig file (--kubeconfig), or run in a pod with a service account"
    )]
    // `Display` contains the cause, so it is not a source too: `{:#}` would print it twice.
    Configuration(Box<dyn Error + Send + Sync>),
    #[error(
        "{0:?} is not a valid Node name (a lower-case DNS name); configure the name that `kubectl get nodes` shows"
    )]
    NodeName(String),
    #[error(
        "cannot reach the API server: {reason}; check that it runs and that this node has a route to it"
    )]
    Unreachable {
        /// The innermost cause.
        reason: String,
    },
    /// The API server may have executed the call all the same.
    #[error("the API server did not answer ({verb} {}) within {after:?}", .object.kind)]
    Timeout {
        verb: &'static str,
        object: ApiObject,
        after: Duration,
    },
    #[error(
        "the API server rejected virtnode's credentials: {message}; the token or client certificate is missing, wrong or expired"
    )]
    Unauthorized { message: String },
    #[error(
        "virtnode may not {verb} {object}: {message}; grant its user or ServiceAccount the right `{verb}` on `{}` (manifests/base/rbac.yaml lists every right it needs)", .object.resource
    )]
    Forbidden {
        verb: &'static str,
        object: ApiObject,
        message: String,
    },
    /// Refused by an admission policy or webhook.
    #[error(
        "an admission policy of the cluster does not allow virtnode to {verb} {object}: {message}; the policy must allow virtnode's own labels on the Node that it runs on, and virtnode's own objects of that node"
    )]
    Denied {
        verb: &'static str,
        object: ApiObject,
        message: String,
    },
    #[error(
        "the cluster has no Node {node}; compare the configured name with `kubectl get nodes`, or wait until the kubelet has registered the Node (virtnode never creates one)"
    )]
    NodeNotFound { node: String },
    /// Either the object or the definition of its kind does not exist.
    #[error("the cluster has no {object}, or its definition is missing (manifests/base/crds.yaml)")]
    NotFound { object: ApiObject },
    /// Another field manager owns labels of the set with other values, or the Node changed after it
    /// was read.
    #[error("the labels of Node {node} changed owners during the apply: {message}")]
    Conflict {
        node: String,
        /// The conflicting labels; empty if the Node itself changed.
        conflicts: ApplyConflicts,
        message: String,
    },
    #[error(
        "the API server's answer ({verb} {object}) is longer than {} KiB, and was not read further", .max / 1024
    )]
    AnswerTooLarge {
        verb: &'static str,
        object: ApiObject,
        /// In bytes.
        max: usize,
    },
    /// Any other error status, or a response that cannot be parsed.
    #[error("the API server failed to {verb} {object}: {message}")]
    Rejected {
        verb: &'static str,
        object: ApiObject,
        message: String,
        /// The delay that the API server asked for (`Retry-After`).
        retry_after: Option<Duration>,
    },
}

/// The owners of the label keys for which the API server refused an apply.
pub type ApplyConflicts = BTreeMap<String, FieldManager>;

impl ClusterError {
    /// Returns the fixed metrics label, one of [`crate::publish::metrics::SYNC_FAILURES`].
    pub fn code(&self) -> &'static str {
        match self {
            Self::Configuration(_) | Self::Unreachable { .. } => "api-unreachable",
            Self::Timeout { .. } => "api-timeout",
            Self::Unauthorized { .. } | Self::Forbidden { .. } | Self::Denied { .. } => {
                "api-forbidden"
            }
            Self::NodeName(_) | Self::NodeNotFound { .. } => "api-node-not-found",
            Self::NotFound { .. } => "api-not-found",
            Self::Conflict { .. } => "api-conflict",
            Self::AnswerTooLarge { .. } | Self::Rejected { .. } => "api-rejected",
        }
    }

    /// True if the call cannot succeed before someone changes the cluster or the configuration.
    pub fn needs_people(&self) -> bool {
        matches!(
            self.code(),
            "api-forbidden" | "api-node-not-found" | "api-not-found"
        )
    }

    pub(super) fn from_call(
        verb: &'static str,
        object: ApiObject,
        deadline: Duration,
        error: kube::Error,
    ) -> Self {
        match AnswerFault::find(&error) {
            Some(&AnswerFault::TooLarge { max }) => {
                return Self::AnswerTooLarge { verb, object, max };
            }
            Some(&AnswerFault::Late { after }) => {
                return Self::Timeout {
                    verb,
                    object,
                    after,
                };
            }
            Some(fault) => return Self::rejected(verb, object, fault.to_string()),
            None => {}
        }
        match error {
            kube::Error::Api(status) => Self::from_status(verb, object, *status),
            kube::Error::Service(error) if error.is::<tower::timeout::error::Elapsed>() => {
                Self::Timeout {
                    verb,
                    object,
                    after: deadline,
                }
            }
            kube::Error::Auth(error) => Self::Unauthorized {
                message: error.to_string(),
            },
            kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) => {
                Self::rejected(verb, object, format!("cannot parse its response: {error}"))
            }
            error => Self::Unreachable {
                reason: innermost(&error),
            },
        }
    }

    pub(super) fn from_status(verb: &'static str, object: ApiObject, status: Status) -> Self {
        let retry_after = status
            .details
            .as_ref()
            .map_or(0, |details| details.retry_after_seconds);
        let conflicts = apply_conflicts(&status);
        let mut causes = status.details.iter().flat_map(|details| &details.causes);
        let is_other_node = causes.any(|cause| cause.field == "metadata.uid");
        let message = status.message.clone();
        // "uid mismatch: the provided object specified uid …, and no existing object was found"
        let is_deleted = status.is_conflict() && message.contains("no existing object was found");
        // A policy denies with status 422 from 1.30 on, a webhook with any status it likes.
        let is_denied =
            message.contains("denied the request") || message.contains("denied request");
        let message = shortened(&message, MESSAGE_MAX);
        match status {
            _ if is_denied => Self::Denied {
                verb,
                object,
                message,
            },
            status if status.code == 401 => Self::Unauthorized { message },
            status if status.is_forbidden() => Self::Forbidden {
                verb,
                object,
                message,
            },
            // For an unknown kind the API server answers in plain text.
            status if status.is_not_found() || status.code == 404 || is_deleted => {
                match object.kind {
                    "Node" => Self::NodeNotFound { node: object.name },
                    _ => Self::NotFound { object },
                }
            }
            status if status.is_conflict() || is_other_node => Self::Conflict {
                node: object.name,
                conflicts,
                message,
            },
            status => {
                let message = format!("{message} ({} {})", status.code, status.reason);
                let retry_after = Some(retry_after).filter(|seconds| *seconds > 0);
                let retry_after = retry_after.map(|after| Duration::from_secs(after.into()));
                Self::Rejected {
                    verb,
                    object,
                    message,
                    retry_after,
                }
            }
        }
    }

    fn rejected(verb: &'static str, object: ApiObject, message: String) -> Self {
        Self::Rejected {
            verb,
            object,
            message: shortened(&message, MESSAGE_MAX),
            retry_after: None,
        }
    }
}

/// Reads the causes of a refused server-side apply: reason `FieldManagerConflict`, field
/// `.metadata.labels.<key>`, message `conflict with "<manager>"`, with ` using <version>` appended
/// if the manager owns the key through an update.
fn apply_conflicts(status: &Status) -> ApplyConflicts {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let conflicts = causes.filter(|cause| cause.reason == "FieldManagerConflict");
    let owner = |message: &str| FieldManager {
        manager: message.split('"').nth(1).unwrap_or("unknown").to_owned(),
        applies: !message.contains(" using "),
    };
    conflicts
        .filter_map(|cause| {
            let key = cause.field.strip_prefix(".metadata.labels.")?;
            Some((key.to_owned(), owner(&cause.message)))
        })
        .collect()
}

fn innermost(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    shortened(&innermost.to_string(), MESSAGE_MAX)
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
