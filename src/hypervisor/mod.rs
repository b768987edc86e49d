//! The hypervisor as the services see it: two traits, and their adapters.
//!
//! * [`NodeSource`]: the documents that describe what the node can run. Documents are text; their
//!   parsers are in [`crate::capability`].
//! * [`DomainBackend`]: the node's domains, typed both ways.
//!
//! Every call has a deadline of its own and ends with a result or a [`CallError`], whatever the
//! daemon behind the adapter does.

mod backend;
mod libvirt;
mod metrics;

use std::future::Future;
use std::path::PathBuf;

use thiserror::Error;
use tokio::sync::watch;

pub use self::backend::{
    Change, DomainBackend, DomainStats, LiveDomain, Notice, Notices, ObservationQuery, Seen,
    SeenTimes,
};
pub use self::libvirt::{
    DaemonKind, Keepalive, Libvirt, LibvirtConfig, MAX_LAUNCHER_DOMAINS, OpenError, Workers,
};
pub use self::metrics::{CALLS, HypervisorMetrics};
use crate::capability::Version;
use crate::compat::CpuComparison;
use crate::domain::NodeRequirements;
pub use crate::domain::{CallError, ConnectionId, DomainRef};

/// The versions behind a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Versions {
    /// The daemon's libvirt (`virConnectGetLibVersion`).
    pub libvirt: Version,
    /// The driver's hypervisor, QEMU's version for the QEMU driver (`virConnectGetVersion`);
    /// `None` if the driver has no version.
    pub hypervisor: Option<Version>,
}

/// A query for domain capabilities. libvirt chooses what is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct DomainCapabilitiesQuery {
    /// The guest architecture, `x86_64`.
    pub arch: Option<String>,
    /// The machine type or an alias of one.
    pub machine: Option<String>,
    /// The domain type: `kvm`, `qemu`, …
    pub virt_type: Option<String>,
    /// True for all CPU features of the host model, including those of its model
    /// (`VIR_CONNECT_GET_DOMAIN_CAPABILITIES_EXPAND_CPU_FEATURES`, libvirt 12.2).
    pub expand_features: bool,
    /// True for features that are supported and not on by default
    /// (`VIR_CONNECT_GET_DOMAIN_CAPABILITIES_SUPPORTED_CPU_FEATURES`, libvirt 12.5).
    pub supported_features: bool,
}

/// A running domain and the properties of the node that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningDomain {
    pub id: DomainRef,
    /// An unreadable domain may depend on anything.
    pub requirements: Result<NodeRequirements, UnreadableDomain>,
}

/// The running domains of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunningDomains {
    pub domains: Vec<RunningDomain>,
    /// Connections whose domains are unknown, with the reason: a text for people.
    pub unreachable: Vec<(ConnectionId, String)>,
}

/// Reason for a domain's definition being unknown.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnreadableDomain {
    #[error(transparent)]
    Call(#[from] CallError),
    /// The definition was read and cannot be parsed.
    #[error("{0}")]
    Malformed(String),
}

/// The state of the connection to a hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionState {
    /// The adapter reconnects by itself.
    Down,
    /// The configuration names no such hypervisor, so there is nothing to connect to.
    Absent,
    /// The number grows with each new connection, so that a reconnect is a change even for an
    /// observer that missed the time between.
    Up(u64),
}

/// A source of the documents that describe a node.
pub trait NodeSource: Send + Sync + 'static {
    /// Returns the versions; `None` if nothing that could answer runs at present.
    fn versions(&self) -> impl Future<Output = Result<Option<Versions>, CallError>> + Send;

    /// Returns the `<capabilities>` document (`virConnectGetCapabilities`).
    fn capabilities(&self) -> impl Future<Output = Result<String, CallError>> + Send;

    /// Returns a `<domainCapabilities>` document (`virConnectGetDomainCapabilities`). Flags that
    /// this libvirt does not have are left out.
    fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// Returns the `<cpu>` with every feature that this hypervisor can provide of a CPU definition
    /// (`virConnectBaselineHypervisorCPU` with `EXPAND_FEATURES`).
    fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// Compares a `<cpu>` with what this hypervisor can provide
    /// (`virConnectCompareHypervisorCPU`).
    fn compare_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> impl Future<Output = Result<CpuComparison, CallError>> + Send;

    /// Returns the arguments that libvirt would start a domain with, after its own additions and
    /// checks (`virConnectDomainXMLToNative("qemu-argv")`). Nothing is defined or started.
    fn native_arguments(
        &self,
        domain: String,
    ) -> impl Future<Output = Result<String, CallError>> + Send;

    /// Returns every running domain. A domain that ends meanwhile is left out.
    fn running_domains(&self) -> impl Future<Output = Result<RunningDomains, CallError>> + Send;

    /// Returns the files that the documents are read from: a change of one is a reason to read them
    /// again.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// True if documents are read from these files at present.
    fn reads_files(&self) -> bool {
        false
    }

    /// Returns the state of the connection, with its changes.
    fn connection(&self) -> watch::Receiver<ConnectionState>;
}
