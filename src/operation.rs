//! An operation as it is asked for, recorded and told: what the executor, the journal, the local
//! API and the command line have in common. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::{ConnectionId, DomainRef};
use crate::hotplug::{Amount, Diagnosis, Evidence, HotplugRequest, Outcome, Require, Verdict};
use crate::units::{ParseError, Timestamp};

/// The longest name that is taken, in bytes. libvirt keeps a domain's files by its name, and a
/// file's name has no more.
const LONGEST_NAME: usize = 255;

/// How long an identifier is: 12 digits of time and 8 that are random, in base 16.
const ID_DIGITS: usize = 20;

/// What names an operation: lower-case digits and letters only, so that it can stand in a path or
/// an address as it is. Later operations have greater ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OperationId(String);

impl OperationId {
    /// The identifier of an operation that was asked for at that millisecond since 1970.
    pub fn new(millis: u64, random: u32) -> Self {
        Self(format!(
            "{:012x}{random:08x}",
            millis & 0x0000_ffff_ffff_ffff
        ))
    }

    /// The text.
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

impl TryFrom<String> for OperationId {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<OperationId> for String {
    fn from(id: OperationId) -> Self {
        id.0
    }
}

/// A domain as somebody calls it: by its name or its UUID. Any text that could be a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    /// With what is not to be printed escaped.
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
        let fits = (1..=LONGEST_NAME).contains(&text.len());
        if !fits || text.contains(['\n', '\r', '\0']) {
            let what =
                "is not a domain's name: use 1 to 255 bytes without line breaks and zero bytes";
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

/// What is asked for, and by whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// The domain.
    pub domain: DomainName,
    /// What it is to have.
    pub request: HotplugRequest,
    /// What must be proven.
    pub require: Require,
    /// How long after being asked for there must be a verdict.
    pub timeout: Duration,
    /// Asking again with the same key is asking for the same operation. Each asker has keys of
    /// their own.
    pub idempotency_key: Option<String>,
    /// Who asks.
    pub asked_by: AskedBy,
}

/// Who asked for an operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AskedBy {
    /// A process on this node.
    Local {
        /// Its user's number.
        uid: u32,
    },
    /// An object of the cluster.
    Object {
        /// Its namespace and name.
        object: String,
        /// Who made or changed it, if that is known.
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

/// How far an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Others for the same domain come first, or the domain was not found yet.
    Queued,
    /// It is being done, or waits for the guest.
    Running,
    /// It has a verdict. Some verdicts may still become `Verified`.
    Done,
}

impl State {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
        }
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

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaiting {
    /// In a few words, for people.
    pub what: String,
    /// Since when.
    pub since: Timestamp,
}

/// An operation as it is told: `--output json`, the API's objects, the audit log. Its shape is a
/// contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// What names it.
    pub id: OperationId,
    /// Which domain it is about.
    pub domain: TargetDomain,
    /// What was asked for.
    pub request: HotplugRequest,
    /// What must be proven.
    pub require: Require,
    /// When there must be a verdict.
    pub deadline: Timestamp,
    /// Who asked.
    pub asked_by: AskedBy,
    /// How far it is.
    pub state: State,
    /// When it was asked for.
    pub created: Timestamp,
    /// When its turn came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    /// When it got its verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// When the verdict was put right because the guest followed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrected: Option<Timestamp>,
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
    pub before: Option<Amount>,
    /// What was asked for, in the same terms.
    pub requested: Amount,
    /// What there was when the domain was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Amount>,
    /// What was seen, in order.
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// The hypervisor's own error, if it had one, whether or not it was the last word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor_error: Option<String>,
    /// What is wrong with the guest, and what to do, if it is the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diagnosis: Option<Diagnosis>,
}

impl Record {
    /// Of an operation that has just been asked for.
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

    /// Notes what is waited for, and since when if that is news. Says whether it is.
    pub fn awaits(&mut self, what: &str, now: Timestamp) -> bool {
        let news = self.awaiting.as_ref().is_none_or(|last| last.what != what);
        if news {
            self.awaiting = Some(Awaiting {
                what: what.to_owned(),
                since: now,
            });
        }
        news
    }

    /// Notes a verdict for which the domain was not looked at, or not changed.
    pub fn end(&mut self, verdict: Verdict, message: impl Into<String>, now: Timestamp) {
        self.state = State::Done;
        self.finished = Some(now);
        self.awaiting = None;
        self.verdict = Some(verdict);
        self.message = Some(message.into());
    }

    /// Notes the outcome. A second one puts the first right.
    pub fn conclude(&mut self, outcome: Outcome, now: Timestamp) {
        match self.finished {
            None => self.finished = Some(now),
            Some(_) => self.corrected = Some(now),
        }
        self.state = State::Done;
        self.awaiting = None;
        self.verdict = Some(outcome.verdict);
        self.message = Some(outcome.message);
        self.before = Some(outcome.before);
        self.requested = outcome.requested;
        self.after = Some(outcome.after);
        self.evidence = outcome.evidence;
        self.hypervisor_error = outcome.hypervisor_error;
        self.diagnosis = outcome.diagnosis;
    }

    /// Whether there is a verdict.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }
}
