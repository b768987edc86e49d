//! The requests in the API server's audit log.

use serde::Deserialize;

/// Audit policy: all requests without bodies, logged after their answer.
pub(super) const POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"#;

/// One request with its answer. A watch has two events: its start and its end.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Logged")]
pub(crate) struct AuditEvent {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, …
    pub(crate) verb: String,
    /// For example `system:serviceaccount:default:virtnode`.
    pub(crate) user: String,
    /// The user agent.
    pub(crate) user_agent: String,
    /// For example `virtnode.io`; empty for the core group.
    pub(crate) group: String,
    /// Plural, for example `nodes`; empty for non-resource requests such as `/version`.
    pub(crate) resource: String,
    /// For example `status`, or empty.
    pub(crate) subresource: String,
    /// The object's name, or empty for requests without one.
    pub(crate) name: String,
    /// Path and query.
    pub(crate) uri: String,
    /// The HTTP status of the answer.
    pub(crate) code: u16,
    /// `ResponseStarted` (watches only), `ResponseComplete` or `Panic`.
    pub(crate) stage: String,
}

impl AuditEvent {
    /// True for a request to change something, independent of the answer.
    pub(crate) fn is_write(&self) -> bool {
        matches!(
            self.verb.as_str(),
            "create" | "update" | "patch" | "delete" | "deletecollection"
        )
    }
}

/// Parses a log of one JSON document per line, without an incomplete last line.
pub(super) fn parse(log: &str) -> anyhow::Result<Vec<AuditEvent>> {
    let complete = log.rfind('\n').map_or("", |end| &log[..end]);
    complete
        .lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

/// `audit.k8s.io/v1`, `Event`
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Logged {
    stage: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    verb: String,
    user: User,
    #[serde(default)]
    user_agent: String,
    #[serde(default)]
    object_ref: ObjectRef,
    #[serde(default)]
    response_status: ResponseStatus,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ObjectRef {
    #[serde(rename = "apiGroup")]
    group: String,
    resource: String,
    subresource: String,
    name: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ResponseStatus {
    code: u16,
}

impl From<Logged> for AuditEvent {
    fn from(logged: Logged) -> Self {
        Self {
            verb: logged.verb,
            user: logged.user.username,
            user_agent: logged.user_agent,
            group: logged.object_ref.group,
            resource: logged.object_ref.resource,
            subresource: logged.object_ref.subresource,
            name: logged.object_ref.name,
            uri: logged.request_uri,
            code: logged.response_status.code,
            stage: logged.stage,
        }
    }
}
