//! What a call to the API server can end with instead of an answer.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use kube::core::Status;
use thiserror::Error;

use crate::label::ownership::FieldManager;

/// What a call was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its kind, `Node`.
    pub kind: &'static str,
    /// The resource that rights are for, `nodes`.
    pub resource: &'static str,
    /// Its name.
    pub name: String,
}

impl Object {
    pub(super) fn node(name: &str) -> Self {
        Self {
            kind: "Node",
            resource: "nodes",
            name: name.to_owned(),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// A call that failed. The texts say which object, what is missing and what to do about it;
/// [`ClusterError::code`] is the bounded word for metrics.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The configuration of the client is missing or of no use.
    #[error(
        "there is no usable configuration of a Kubernetes client: {0}; name a kubeconfig file (--kubeconfig), or run in a pod with a service account"
    )]
    Configuration(Box<dyn Error + Send + Sync>),
    /// No Node can have this name.
    #[error(
        "{0:?} cannot be the name of a Node, which is a DNS name in small letters; configure the name that `kubectl get nodes` shows"
    )]
    NodeName(String),
    /// Nobody answered.
    #[error(
        "the API server cannot be reached: {reason}; check that it runs and that this node has a way to it"
    )]
    Unreachable {
        /// The innermost cause.
        reason: String,
    },
    /// The answer did not come in time. What was asked may have been done.
    #[error("the API server did not answer ({verb} {}) within {after:?}", .object.kind)]
    Timeout {
        /// What was asked.
        verb: &'static str,
        /// Of which object.
        object: Object,
        /// How long was waited.
        after: Duration,
    },
    /// The API server does not know who asks.
    #[error(
        "the API server does not accept virtnode's credentials: {message}; the token or client certificate is missing, wrong or expired"
    )]
    Unauthorized {
        /// The API server's own text.
        message: String,
    },
    /// The right to do this is missing.
    #[error(
        "virtnode may not {verb} {object}: {message}; grant its user or ServiceAccount the right `{verb}` on `{}` (manifests/base/rbac.yaml has all it needs)", .object.resource
    )]
    Forbidden {
        /// The right that is missing.
        verb: &'static str,
        /// Of which object.
        object: Object,
        /// The API server's own text.
        message: String,
    },
    /// An admission policy or webhook said no.
    #[error(
        "an admission policy of the cluster does not let virtnode {verb} {object}: {message}; the policy must allow virtnode's own labels on the Node that it runs on, and its own objects of that node"
    )]
    Denied {
        /// What was asked.
        verb: &'static str,
        /// Of which object.
        object: Object,
        /// The API server's own text.
        message: String,
    },
    /// There is no such Node.
    #[error(
        "the cluster has no Node {node}; check the configured name against `kubectl get nodes`, or wait until kubelet has registered it (virtnode never creates one)"
    )]
    NodeNotFound {
        /// The Node.
        node: String,
    },
    /// There is no such object, or the cluster does not know its kind.
    #[error("the cluster has no {object}, or its definition is missing (manifests/base/crds.yaml)")]
    NotFound {
        /// The object.
        object: Object,
    },
    /// Others own labels of the set with other values, or the Node changed while it was looked at.
    #[error("the labels of Node {node} changed hands while they were applied: {message}")]
    Conflict {
        /// The Node.
        node: String,
        /// Whose labels they are; empty if the Node itself changed.
        refusal: ApplyConflicts,
        /// The API server's own text.
        message: String,
    },
    /// The API server answered with any other error, or with something that cannot be read.
    #[error("the API server failed to {verb} {object}: {message}")]
    Rejected {
        /// What was asked.
        verb: &'static str,
        /// Of which object.
        object: Object,
        /// The API server's own text.
        message: String,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
}

/// The label keys that an apply was refused for, and who owns them.
pub type ApplyConflicts = BTreeMap<String, FieldManager>;

impl ClusterError {
    /// The bounded word for this error, one of [`crate::telemetry::metrics::SYNC_FAILURES`].
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
            Self::Rejected { .. } => "api-rejected",
        }
    }

    /// Whether somebody has to do something before the call can succeed.
    pub fn needs_people(&self) -> bool {
        matches!(
            self.code(),
            "api-forbidden" | "api-node-not-found" | "api-not-found"
        )
    }

    pub(super) fn from_call(
        verb: &'static str,
        object: Object,
        deadline: Duration,
        error: kube::Error,
    ) -> Self {
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
                Self::rejected(verb, object, format!("its answer makes no sense: {error}"))
            }
            error => Self::Unreachable {
                reason: innermost(&error),
            },
        }
    }

    pub(super) fn from_status(verb: &'static str, object: Object, status: Status) -> Self {
        let retry_after = status
            .details
            .as_ref()
            .map_or(0, |details| details.retry_after_seconds);
        let owners = refusal(&status);
        let by_uid = status.details.iter().flat_map(|details| &details.causes);
        let is_other_node = by_uid
            .into_iter()
            .any(|cause| cause.field == "metadata.uid");
        let message = status.message.clone();
        // "uid mismatch: the provided object specified uid …, and no existing object was found"
        let is_gone = status.is_conflict() && message.contains("no existing object was found");
        // A policy's denial is a 422 from 1.30 on, a webhook's whatever the webhook says.
        let is_denied =
            message.contains("denied the request") || message.contains("denied request");
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
            // The answer for a kind that the server does not know is plain text.
            status if status.is_not_found() || status.code == 404 || is_gone => match object.kind {
                "Node" => Self::NodeNotFound { node: object.name },
                _ => Self::NotFound { object },
            },
            status if status.is_conflict() || is_other_node => Self::Conflict {
                node: object.name,
                refusal: owners,
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

    fn rejected(verb: &'static str, object: Object, message: String) -> Self {
        Self::Rejected {
            verb,
            object,
            message,
            retry_after: None,
        }
    }
}

/// The causes of a refused server-side apply: reason `FieldManagerConflict`, field
/// `.metadata.labels.<key>`, message `conflict with "<manager>"`, and ` using <version>` after
/// it if the manager owns the key by an update.
fn refusal(status: &Status) -> ApplyConflicts {
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
    innermost.to_string()
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
