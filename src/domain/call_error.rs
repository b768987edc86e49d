//! The result of a hypervisor call that did not succeed.
//!
//! Each adapter classifies its protocol's errors once, into a variant. Everything above the
//! adapters, including a journal that is read after a restart, decides by the variant. The texts
//! are for people: they may be translated, so nothing may depend on them.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A failed call to a hypervisor.
///
/// `Display` is for people, without a trailing period; [`CallError::code`] is the fixed metrics
/// label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Error)]
#[serde(rename_all = "kebab-case")]
pub enum CallError {
    /// There is no connection: libvirt is not running, went away, or cannot be reached.
    #[error("no connection to libvirt: {0}")]
    Unavailable(String),
    /// The call was sent and did not return in time. The hypervisor may still carry it out.
    #[error("libvirt did not answer {call} within {after:?}")]
    Overdue {
        /// The call's name, as in the metrics.
        call: Cow<'static, str>,
        after: Duration,
    },
    /// The connection or this program ended before the answer arrived. Only observing the domain
    /// shows if the call was carried out.
    #[error("the answer was lost: {0}")]
    Lost(String),
    /// The domain does not exist (`VIR_ERR_NO_DOMAIN`).
    #[error("libvirt has no such domain: {0}")]
    NotFound(String),
    /// Several domains have the name or UUID.
    #[error("{0}")]
    Ambiguous(String),
    /// The domain is not running (`VIR_ERR_OPERATION_INVALID` of a domain that is not active).
    #[error("the domain is not running: {0}")]
    NotRunning(String),
    /// Another job or an earlier call of ours kept the domain locked until the call's timeout.
    /// Nothing was changed.
    #[error("{call} could not start: {text}")]
    Busy {
        call: Cow<'static, str>,
        text: String,
    },
    /// libvirt requested an unplug and stopped waiting for the guest. The request stands.
    #[error("libvirt stopped waiting for the unplug of {call}: {text}")]
    UnplugPending {
        call: Cow<'static, str>,
        text: String,
    },
    /// The guest agent did not answer, is not connected, or has no channel
    /// (`VIR_ERR_AGENT_UNRESPONSIVE`, `_UNSYNCED`, `_COMMAND_TIMEOUT`).
    #[error("the guest agent did not do {call}: {text}")]
    AgentSilent {
        call: Cow<'static, str>,
        text: String,
    },
    /// The guest agent answered with an error, or with something that libvirt cannot use: the
    /// command is blocked, unknown to this agent, or failed (`VIR_ERR_AGENT_COMMAND_FAILED`; before
    /// libvirt 11.2 `VIR_ERR_INTERNAL_ERROR`).
    #[error("the guest agent rejected {call}: {text}")]
    AgentRefused {
        call: Cow<'static, str>,
        text: String,
    },
    /// The hypervisor's access control rejected the call.
    #[error("libvirt denied {call}: {text}")]
    Denied {
        call: Cow<'static, str>,
        text: String,
    },
    /// The driver or this version does not support the call (`VIR_ERR_NO_SUPPORT`), its flags, or
    /// the architecture.
    #[error("{call} is not supported here: {text}")]
    Unsupported {
        call: Cow<'static, str>,
        text: String,
    },
    /// A document on disk cannot be used.
    #[error("{document}: {text}")]
    Unreadable { document: String, text: String },
    /// Any other error.
    #[error("libvirt failed {call}: {text} (error {code})")]
    Failed {
        call: Cow<'static, str>,
        /// The protocol's own code: libvirt's error number (`virErrorNumber`) in decimal, or a
        /// QMP error class.
        code: String,
        text: String,
    },
}

impl CallError {
    /// Codes of errors that any call can end with. Their metrics start at zero.
    pub const CODES: [&'static str; 5] =
        ["unavailable", "timeout", "unsupported", "denied", "failed"];

    /// Codes of errors that only calls about one domain can end with.
    pub const DOMAIN_CODES: [&'static str; 6] = [
        "domain-not-found",
        "domain-not-running",
        "agent-unavailable",
        "agent-refused",
        "unplug-pending",
        "busy",
    ];

    /// Returns the metrics label.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) | Self::Lost(_) => "unavailable",
            Self::Overdue { .. } => "timeout",
            Self::Unsupported { .. } => "unsupported",
            Self::Denied { .. } => "denied",
            Self::NotFound(_) => "domain-not-found",
            Self::Ambiguous(_) => "domain-ambiguous",
            Self::NotRunning(_) => "domain-not-running",
            Self::AgentSilent { .. } => "agent-unavailable",
            Self::AgentRefused { .. } => "agent-refused",
            Self::UnplugPending { .. } => "unplug-pending",
            Self::Busy { .. } => "busy",
            Self::Unreadable { .. } => "unreadable",
            Self::Failed { .. } => "failed",
        }
    }

    /// Returns the hypervisor's own text; `None` if there was no answer.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Unavailable(_) | Self::Overdue { .. } | Self::Lost(_) => None,
            Self::NotFound(text)
            | Self::Ambiguous(text)
            | Self::NotRunning(text)
            | Self::Busy { text, .. }
            | Self::UnplugPending { text, .. }
            | Self::AgentSilent { text, .. }
            | Self::AgentRefused { text, .. }
            | Self::Denied { text, .. }
            | Self::Unsupported { text, .. }
            | Self::Unreadable { text, .. }
            | Self::Failed { text, .. } => Some(text),
        }
    }

    /// True if the call may or may not have been carried out and will never return.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Lost(_))
    }
}
