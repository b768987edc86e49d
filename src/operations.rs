//! Operations as they are told and asked for: what the local API, the command line and the
//! journal's listing have in common.
//!
//! [`Operations`] is what the API needs of whoever carries them out.

use std::future::Future;
use std::time::Duration;

use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::hotplug::{Diagnosis, Evidence, Extent, HotplugRequest, Moment, Require, Verdict};

/// An operation as everybody outside sees it: the record of `--output json`, of the API and of
/// the listing. The shape is a contract (docs/openapi.json).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// The identifier.
    pub id: String,
    /// The domain's name: tenants' text.
    pub domain: String,
    /// What is to be.
    pub request: HotplugRequest,
    /// What must be proven.
    pub require: Require,
    /// Who asked: `uid 1000`, or an object and a user.
    pub caller: String,
    /// How far it is.
    pub phase: Phase,
    /// When it was asked for.
    pub submitted: Moment,
    /// When there is a verdict at the latest.
    pub deadline: Moment,
    /// When there was the first verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Moment>,
    /// What is waited for, until there is a verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaiting: Option<Awaiting>,
    /// The verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The verdict's reason, one sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What there was before, if the domain could be looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Extent>,
    /// What was asked for.
    pub requested: Extent,
    /// What there was when it was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Extent>,
    /// What was seen, in order.
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// The hypervisor's own error, whether or not it was the last word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    /// What is wrong with the guest, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

/// How far an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Another one for the same domain comes first.
    Queued,
    /// It is being done, or waits for the guest.
    Running,
    /// It has a verdict. Some verdicts may still become `Verified`.
    Finished,
}

impl Phase {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "Queued",
            Self::Running => "Running",
            Self::Finished => "Finished",
        }
    }
}

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaiting {
    /// In a few words.
    pub what: String,
    /// Since when.
    pub since: Moment,
}

/// What somebody asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The domain's name.
    pub domain: String,
    /// What is to be.
    pub request: HotplugRequest,
    /// What must be proven.
    pub require: Require,
    /// How long there may be no verdict.
    pub timeout: Duration,
    /// Who asks.
    pub caller: String,
    /// Asking again with the same key is asking for the same operation.
    pub idempotency_key: Option<String>,
}

/// Why an operation was not taken on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The key stands for another request.
    #[error(
        "the idempotency key is that of operation {0}, which asked for something else: use another \
         key"
    )]
    KeyReused(String),
    /// As many wait as may wait.
    #[error("too many operations wait already: ask again in a moment")]
    Full,
    /// Without a record nothing is done.
    #[error("the journal cannot be written, so nothing was done: {0}")]
    Journal(String),
    /// The daemon is about to end.
    #[error("the daemon is stopping: ask again when it is back")]
    Stopping,
}

impl Refusal {
    /// The bounded word for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::KeyReused(_) => "idempotency-key-reused",
            Self::Full => "too-many-operations",
            Self::Journal(_) => "journal-not-writable",
            Self::Stopping => "stopping",
        }
    }
}

/// Who carries operations out, one at a time for each domain.
pub trait Operations: Send + Sync + 'static {
    /// Takes one on: it is in the journal when this returns.
    fn submit(&self, ask: Ask) -> impl Future<Output = Result<Operation, Refusal>> + Send;

    /// One of them as it is now.
    fn operation(&self, id: &str) -> Option<Operation>;

    /// All that are known, the oldest first.
    fn operations(&self) -> Vec<Operation>;

    /// One of them as it is now and whenever it changes, until it has a verdict.
    fn watch(&self, id: &str) -> Option<BoxStream<'static, Operation>>;
}
