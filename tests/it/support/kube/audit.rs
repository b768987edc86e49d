//! What the API server was asked, as its audit log tells.

use serde::Deserialize;

/// Everything, without bodies, and nothing of a request before there is an answer.
pub(super) const POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
"#;

/// One request and its answer. A watch is told twice: when it begins and when it ends.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Logged")]
pub(crate) struct AuditEvent {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, …
    pub(crate) verb: String,
    /// Such as `system:serviceaccount:default:virtnode`.
    pub(crate) user: String,
    /// What the client calls itself.
    pub(crate) user_agent: String,
    /// Such as `virtnode.io`; empty for the core's.
    pub(crate) group: String,
    /// In the plural, such as `nodes`; empty for what is no resource, such as `/version`.
    pub(crate) resource: String,
    /// Such as `status`, or empty.
    pub(crate) subresource: String,
    /// The object's name, or empty for requests that name none.
    pub(crate) name: String,
    /// Path and query.
    pub(crate) uri: String,
    /// The HTTP status of the answer.
    pub(crate) code: u16,
    /// `ResponseStarted` (watches only), `ResponseComplete` or `Panic`.
    pub(crate) stage: String,
}

impl AuditEvent {
    /// Whether it asked for something to be changed, whatever the answer.
    pub(crate) fn is_write(&self) -> bool {
        matches!(
            self.verb.as_str(),
            "create" | "update" | "patch" | "delete" | "deletecollection"
        )
    }
}

/// Reads a log of one JSON document a line; a last line that is still being written is left
/// out.
pub(super) fn parse(log: &str) -> anyhow::Result<Vec<AuditEvent>> {
    let complete = log.rfind('\n').map_or("", |end| &log[..end]);
    complete
        .lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

/// The form in the log: `audit.k8s.io/v1`, `Event`.
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
