//! The hypervisor as the services see it: its traits, their errors, and its adapters.
//!
//! * [`NodeSource`]: what the node can run;
//! * [`DomainBackend`]: its domains, what happens to them, and changing them.
//!
//! Documents come as text; reading them is [`crate::capability`]'s. Every call has a deadline of
//! its own and ends with an answer or a [`CallError`], whatever the daemon behind it does.

mod control;
mod libvirt;
mod metrics;

use std::future::Future;

use tokio::sync::watch;

pub use self::control::{Change, DomainBackend, DomainStats, LiveDomain, Notice, Notices, Scope};
pub use self::libvirt::{Keepalive, Libvirt, LibvirtConfig, Workers};
pub use self::metrics::{CALLS, DOMAIN_CALLS, HypervisorMetrics};
use crate::capability::Version;
use crate::compat::CpuComparison;
pub use crate::domain::{CallError, DomainRef};

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
