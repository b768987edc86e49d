//! The hypervisor as the services see it: its traits, their errors, and its adapters.
//!
//! * [`NodeSource`]: what the node can run;
//! * [`DomainBackend`]: its domains, what happens to them, and changing them.
//!
//! Documents come as text; reading them is [`crate::capability`]'s. Every call has a deadline of
//! its own and ends with an answer or a [`CallError`], whatever the daemon behind it does.

mod control;
mod libvirt;

use std::future::Future;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;

pub use self::control::{
    Change, DomainBackend, DomainRef, DomainStats, LiveDomain, Notice, Notices, Scope,
};
pub use self::libvirt::{ControlConfig, Keepalive, Libvirt, LibvirtConfig, LibvirtDomains};
use crate::capability::Version;
use crate::compat::CpuComparison;

/// What a call to the hypervisor can end with instead of an answer.
///
/// The texts are whole sentences' cores for people; [`CallError::code`] is the bounded word for metrics.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CallError {
    /// There is no connection: libvirt is not running, went away, or could not be reached.
    #[error("no connection to libvirt: {0}")]
    Unavailable(String),
    /// The call was sent and no answer came in time. It may still be running over there.
    #[error("libvirt did not answer {call} within {after:?}")]
    Timeout {
        /// The name of the call, as in the metrics.
        call: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The driver or this libvirt does not know the call (`VIR_ERR_NO_SUPPORT`), its flags, or
    /// it cannot be done for this architecture.
    #[error("{call} is not supported here: {message}")]
    Unsupported {
        /// The name of the call.
        call: &'static str,
        /// libvirt's own text.
        message: String,
    },
    /// libvirt's access control said no.
    #[error("libvirt denied {call}: {message}")]
    Denied {
        /// The name of the call.
        call: &'static str,
        /// libvirt's own text.
        message: String,
    },
    /// There is no such domain, or not any more (`VIR_ERR_NO_DOMAIN`).
    #[error("libvirt knows no such domain: {0}")]
    DomainNotFound(String),
    /// The domain does not run (`VIR_ERR_OPERATION_INVALID`, and libvirt says it is not active).
    #[error("the domain does not run: {0}")]
    DomainNotRunning(String),
    /// The guest agent did not answer, is not connected, has no channel, or said no
    /// (`VIR_ERR_AGENT_UNRESPONSIVE`, `_UNSYNCED`, `_COMMAND_TIMEOUT`, `_COMMAND_FAILED`).
    #[error("the guest agent did not do {call}: {message}")]
    AgentUnavailable {
        /// The name of the call.
        call: &'static str,
        /// libvirt's own text.
        message: String,
    },
    /// libvirt asked for an unplug and stopped waiting for it. The request stays; what came of it
    /// only QEMU and the guest can tell.
    #[error("libvirt stopped waiting for the unplug of {call}: {message}")]
    UnplugPending {
        /// The name of the call.
        call: &'static str,
        /// libvirt's own text.
        message: String,
    },
    /// Something else is being done to the domain and did not end in time: libvirt's lock on it
    /// was not to be had, or an earlier call of ours has not come back.
    #[error("{call} could not begin: {message}")]
    Busy {
        /// The name of the call.
        call: &'static str,
        /// What it waited for.
        message: String,
    },
    /// libvirt answered with any other error.
    #[error("libvirt failed {call}: {message} (error {number})")]
    Failed {
        /// The name of the call.
        call: &'static str,
        /// libvirt's error number (`virErrorNumber`).
        number: u32,
        /// libvirt's own text.
        message: String,
    },
}

impl CallError {
    /// The codes that every call can end with, for metrics that begin at zero.
    pub const CODES: [&'static str; 5] =
        ["unavailable", "timeout", "unsupported", "denied", "failed"];

    /// The codes that only calls about one domain can end with, beside those.
    pub const DOMAIN_CODES: [&'static str; 5] = [
        "domain-not-found",
        "domain-not-running",
        "agent-unavailable",
        "unplug-pending",
        "busy",
    ];

    /// The bounded word for this error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Timeout { .. } => "timeout",
            Self::Unsupported { .. } => "unsupported",
            Self::Denied { .. } => "denied",
            Self::DomainNotFound(_) => "domain-not-found",
            Self::DomainNotRunning(_) => "domain-not-running",
            Self::AgentUnavailable { .. } => "agent-unavailable",
            Self::UnplugPending { .. } => "unplug-pending",
            Self::Busy { .. } => "busy",
            Self::Failed { .. } => "failed",
        }
    }
}

/// The versions behind a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The daemon's libvirt (`virConnectGetLibVersion`).
    pub libvirt: Version,
    /// The driver's hypervisor, QEMU's version for the QEMU driver (`virConnectGetVersion`);
    /// `None` where the driver does not say.
    pub hypervisor: Option<Version>,
}

/// Which domain capabilities are asked for. What is `None` libvirt chooses itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct DomainCapabilitiesQuery {
    /// The guest architecture, `x86_64`.
    pub arch: Option<String>,
    /// The machine type or an alias of one.
    pub machine: Option<String>,
    /// The domain type: `kvm`, `qemu`, …
    pub virt_type: Option<String>,
    /// Ask for all CPU features of the host model, not only those beside the model
    /// (`VIR_CONNECT_GET_DOMAIN_CAPABILITIES_EXPAND_CPU_FEATURES`, libvirt 12.2).
    pub expand_features: bool,
    /// Ask also for features that are supported and not on by default
    /// (`VIR_CONNECT_GET_DOMAIN_CAPABILITIES_SUPPORTED_CPU_FEATURES`, libvirt 12.5).
    pub supported_features: bool,
}

/// A running domain's live definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningDomain {
    /// The domain's name: tenants' text.
    pub name: String,
    /// The domain's UUID in its usual spelling.
    pub uuid: String,
    /// The live XML, without secrets.
    pub xml: String,
}

/// Whether there is a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    /// There is none at present; the adapter tries again by itself.
    Down,
    /// There is one. The number grows with each new connection, so that a reconnect is a change
    /// even for one who missed the time without.
    Up(u64),
}

/// A hypervisor that can be asked.
pub trait NodeSource: Send + Sync + 'static {
    /// The versions of libvirt and its hypervisor.
    fn versions(&self) -> impl Future<Output = Result<Versions, CallError>> + Send;

    /// `virConnectGetCapabilities`: the `<capabilities>` document.
    fn capabilities(&self) -> impl Future<Output = Result<String, CallError>> + Send;

    /// `virConnectGetDomainCapabilities`: one `<domainCapabilities>` document. Flags that this
    /// libvirt does not know are left out.
    fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// `virConnectBaselineHypervisorCPU` with `EXPAND_FEATURES` for one CPU definition: the
    /// `<cpu>` with every feature that this hypervisor can give.
    fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// `virConnectCompareHypervisorCPU`: whether this hypervisor can give the CPU of a `<cpu>`.
    fn compare_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> impl Future<Output = Result<CpuComparison, CallError>> + Send;

    /// `virConnectDomainXMLToNative("qemu-argv")`: the arguments that libvirt would start this
    /// domain with, after its own additions and checks. Nothing is defined or started.
    fn native_arguments(
        &self,
        domain: String,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// Every running domain with its live definition. A domain that ends while they are being
    /// read is left out.
    fn running_domains(&self)
    -> impl Future<Output = Result<Vec<RunningDomain>, CallError>> + Send;

    /// The state of the connection, and its changes.
    fn connection(&self) -> watch::Receiver<Connection>;
}
