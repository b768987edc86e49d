//! Operations: the order, the record and the identifiers that the executor, the journal, the local
//! API and the command line share. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::{ConnectionId, DomainRef};
use crate::hotplug::{Amount, Diagnosis, Evidence, HotplugRequest, Outcome, Require, Verdict};
use crate::units::{ParseError, Timestamp, bounded, string_conversions, words};

/// Maximum length of a domain's name in characters: libvirt names the domain's files after it, and
/// file names are limited to 255 bytes.
const MAX_NAME: usize = 255;

/// Maximum size of a record's message, error, cause and remedy in bytes of JSON. They may contain
/// messages of libvirt, QEMU or a guest. With the evidence a record stays below 16 KiB.
const MAX_TEXT: usize = 1200;

/// Length of an identifier: 12 hexadecimal digits of time and 8 random ones.
const ID_DIGITS: usize = 20;

/// Identifies an operation. Only lower-case digits and letters, so that it can be used in paths and
/// URLs. Later operations have greater identifiers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OperationId(String);

impl OperationId {
    /// Makes an identifier from the milliseconds since 1970 and a random number.
    pub fn new(millis: u64, random: u32) -> Self {
        Self(format!(
            "{:012x}{random:08x}",
            millis & 0x0000_ffff_ffff_ffff
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for OperationId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if text.len() != ID_DIGITS || !text.bytes().all(is_digit) {
            let what = "is not an operation's identifier: use 20 lower-case hexadecimal digits";
            return Err(ParseError::new(text, what));
        }
        Ok(Self(text.to_owned()))
    }
}

string_conversions!(OperationId);

/// A name or UUID that a client uses for a domain. Any text that libvirt accepts as a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    /// Writes the name with unprintable characters escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl FromStr for DomainName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for DomainName {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        let fits = (1..=MAX_NAME).contains(&text.chars().count());
        if !fits || text.contains(['\n', '\r', '\0']) {
            let what = "is not a domain's name: use 1 to 255 characters without line breaks and zero bytes";
            return Err(ParseError::new(&text, what));
        }
        Ok(Self(text))
    }
}

impl From<DomainName> for String {
    fn from(name: DomainName) -> Self {
        name.0
    }
}

/// A request for an operation, and its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    pub domain: DomainName,
    pub request: HotplugRequest,
    pub require: Require,
    /// True if the domain's definition is changed as well, so that the change outlives the domain.
    #[serde(default)]
    pub persistent: bool,
    /// Time from the request to the verdict.
    pub timeout: Duration,
    /// Requests with the same key are the same operation. Each origin has keys of its own.
    pub idempotency_key: Option<String>,
    pub asked_by: AskedBy,
}

/// The origin of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AskedBy {
    Local {
        uid: u32,
    },
    /// An object in the cluster.
    Object {
        /// The object's namespace and name.
        object: String,
        /// The user who created or changed the object, if known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
    },
}

impl fmt::Display for AskedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "uid {uid}"),
            Self::Object { object, user: None } => write!(f, "{object}"),
            Self::Object {
                object,
                user: Some(user),
            } => write!(f, "{object} by {user}"),
        }
    }
}

words! {
    /// The progress of an operation.
    #[derive(Hash, Deserialize)]
    #[serde(rename_all = "lowercase")]
    pub enum State {
        /// The operation waits for others on the same domain, or the domain is not found yet.
        Queued = "queued",
        Running = "running",
        /// The operation has a verdict. Some verdicts may still become `Verified`.
        Done = "done",
    }
}

/// The domain of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetDomain {
    #[serde(default, skip_serializing_if = "ConnectionId::is_host")]
    pub connection: ConnectionId,
    /// The domain's name; until the domain is found, the name or UUID of the request. Untrusted
    /// text.
    pub name: String,
    /// The domain's UUID once it is found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

impl TargetDomain {
    /// Returns the name for people: `namespace/name` for the domain of a launcher.
    pub fn display_name(&self) -> String {
        let domain = self.identity();
        domain.map_or_else(
            || self.name.clone(),
            |domain| domain.display_name().into_owned(),
        )
    }

    /// Returns the domain's identity once it is found.
    pub fn identity(&self) -> Option<DomainRef> {
        Some(DomainRef {
            connection: self.connection.clone(),
            uuid: self.uuid.clone()?,
            name: self.name.clone(),
        })
    }
}

impl From<&DomainRef> for TargetDomain {
    fn from(domain: &DomainRef) -> Self {
        Self {
            connection: domain.connection.clone(),
            name: domain.name.clone(),
            uuid: Some(domain.uuid.clone()),
        }
    }
}

/// The awaited thing of an operation without a verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaiting {
    /// In a few words, for people.
    pub what: String,
    pub since: Timestamp,
}

/// The public state of an operation: `--output json`, the API's objects, the audit log. Its shape
/// is a contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub id: OperationId,
    pub domain: TargetDomain,
    pub request: HotplugRequest,
    pub require: Require,
    /// True if the domain's definition is changed as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub persistent: bool,
    pub deadline: Timestamp,
    pub asked_by: AskedBy,
    pub state: State,
    pub created: Timestamp,
    /// The time when the operation left the queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// The time when the verdict became `Verified` because the guest followed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrected: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaiting: Option<Awaiting>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The reason of the verdict in one sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The amount before the first call, if the domain was observed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Amount>,
    pub requested: Amount,
    /// The amount at the last observation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Amount>,
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// The hypervisor's own error, even if a later call succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

impl Record {
    /// Makes the record of a new operation.
    pub fn new(id: OperationId, order: &Order, created: Timestamp) -> Self {
        Self {
            id,
            domain: TargetDomain {
                connection: ConnectionId::Host,
                name: order.domain.as_str().to_owned(),
                uuid: None,
            },
            request: order.request.clone(),
            require: order.require,
            persistent: order.persistent,
            deadline: created.after(order.timeout),
            asked_by: order.asked_by.clone(),
            state: State::Queued,
            created,
            started: None,
            finished: None,
            corrected: None,
            awaiting: None,
            verdict: None,
            message: None,
            before: None,
            requested: order.request.amount(),
            after: None,
            evidence: Vec::new(),
            hypervisor_error: None,
            diagnosis: None,
        }
    }

    /// Updates the awaited thing. Returns true if it changed.
    pub fn awaits(&mut self, what: &str, now: Timestamp) -> bool {
        let what = bounded(what, MAX_TEXT);
        let news = self.awaiting.as_ref().is_none_or(|last| last.what != what);
        if news {
            self.awaiting = Some(Awaiting { what, since: now });
        }
        news
    }

    /// Sets a verdict for which the domain was not observed or not changed.
    pub fn end(&mut self, verdict: Verdict, message: impl Into<String>, now: Timestamp) {
        self.state = State::Done;
        self.finished = Some(now);
        self.awaiting = None;
        self.verdict = Some(verdict);
        self.message = Some(bounded(&message.into(), MAX_TEXT));
    }

    /// Sets the outcome. A second outcome corrects the first.
    pub fn conclude(&mut self, outcome: Outcome, now: Timestamp) {
        match self.finished {
            None => self.finished = Some(now),
            Some(_) => self.corrected = Some(now),
        }
        self.state = State::Done;
        self.awaiting = None;
        self.verdict = Some(outcome.verdict);
        self.message = Some(bounded(&outcome.message, MAX_TEXT));
        self.before = Some(outcome.before);
        self.requested = outcome.requested;
        self.after = Some(outcome.after);
        self.evidence = outcome.evidence;
        let error = outcome.hypervisor_error.as_ref();
        self.hypervisor_error = error.map(|error| bounded(error, MAX_TEXT));
        self.diagnosis = outcome.diagnosis.map(|diagnosis| Diagnosis {
            code: diagnosis.code,
            seen: bounded(&diagnosis.seen, MAX_TEXT),
            remedy: bounded(&diagnosis.remedy, MAX_TEXT),
        });
    }

    /// True if there is a verdict.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }
}
