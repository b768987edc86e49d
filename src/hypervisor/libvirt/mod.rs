//! The hypervisor by way of libvirt.
//!
//! ```text
//! async: Libvirt ── a job ──▶ Lanes ──▶ Lane: one thread, one Session (a connection)
//!           ◀── its answer, or the deadline ──┘        │ opened, closed
//!                                              Link: watchers, metrics, log
//! event loop: keepalive, the close callback and events, one thread for the process
//! ```
//!
//! [`LibvirtDomains`] has connections of its own, apart by what can hold up what: [`Lanes`] for
//! events and for calls that wait for no domain, [`Lanes`] for the statistics of all domains, and
//! a [`Pool`] each for statistics, changes and guest agents, with one lane for each domain that
//! is just asked.

mod call;
mod control;
mod device;
mod domains;
mod event_loop;
mod failure;
mod lane;
mod lanes;
mod link;
mod notices;
mod pool;
mod session;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

pub use self::control::{ControlConfig, LibvirtDomains};
use self::lanes::Lanes;
use self::link::{Link, Role};
#[cfg(doc)]
use self::pool::Pool;
use self::session::Session;
use super::{CallError, Connection, DomainCapabilitiesQuery, NodeSource, RunningDomain, Versions};
use crate::compat::CpuComparison;
use crate::telemetry::Metrics;

/// How to reach libvirt, and how long to wait for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtConfig {
    /// A URI of libvirt, `qemu:///system`; empty: libvirt's own choice. For an unprivileged user
    /// libvirt starts a daemon for a `/session` URI if none runs, unless `LIBVIRT_AUTOSTART=0`.
    pub uri: String,
    /// How long a call may take. The first ones after an update of QEMU start the emulators to
    /// ask them, which takes some seconds for each.
    pub call_deadline: Duration,
    /// How long opening a connection may take before it is tried on another thread.
    pub open_deadline: Duration,
    /// When a silent libvirtd counts as gone.
    pub keepalive: Keepalive,
}

/// libvirt's keepalive messages (`virConnectSetKeepAlive`): the connection is closed when
/// `count` of them, one each `interval`, stayed without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Time between two messages, in whole seconds.
    pub interval: Duration,
    /// Number of messages without an answer.
    pub count: u32,
}

impl LibvirtConfig {
    /// The usual times for this URI: 30 s for a call, 10 s to open, keepalive 3 times each 5 s.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            call_deadline: Duration::from_secs(30),
            open_deadline: Duration::from_secs(10),
            keepalive: Keepalive {
                interval: Duration::from_secs(5),
                count: 3,
            },
        }
    }
}

/// A libvirt that is connected to, and connected to again, for as long as this lives.
pub struct Libvirt {
    link: Link,
    lanes: Lanes,
}

impl Libvirt {
    /// Begins to connect and returns at once; libvirt need not run yet. The first calls wait for
    /// the first connection; once it is known that there is none they are answered at once.
    ///
    /// Dropping this ends its threads as soon as libvirt lets them go; nobody waits for that. The
    /// thread of libvirt's event loop stays for the life of the process.
    pub fn start(config: LibvirtConfig, metrics: Arc<Metrics>) -> Self {
        let link = Link::new(config, metrics, Role::Main);
        Self {
            lanes: Lanes::new(link.clone()),
            link,
        }
    }

    async fn call<T, W>(&self, call: &'static str, work: W) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&mut Session) -> Result<T, CallError> + Send + 'static,
    {
        self.lanes.call(call, work).await
    }
}

impl NodeSource for Libvirt {
    async fn versions(&self) -> Result<Versions, CallError> {
        self.call("versions", |session| session.versions()).await
    }

    async fn capabilities(&self) -> Result<String, CallError> {
        self.call("capabilities", |session| session.capabilities())
            .await
    }

    async fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> Result<String, CallError> {
        self.call("domain-capabilities", move |session| {
            session.domain_capabilities(&query)
        })
        .await
    }

    async fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<String, CallError> {
        self.call("baseline-cpu", move |session| {
            session.baseline_cpu(&query, &cpu)
        })
        .await
    }

    async fn compare_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<CpuComparison, CallError> {
        self.call("compare-cpu", move |session| {
            session.compare_cpu(&query, &cpu)
        })
        .await
    }

    async fn native_arguments(&self, domain: String) -> Result<String, CallError> {
        self.call("native-arguments", move |session| {
            session.native_arguments(&domain)
        })
        .await
    }

    async fn running_domains(&self) -> Result<Vec<RunningDomain>, CallError> {
        self.call("running-domains", |session| session.running_domains())
            .await
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.link.subscribe()
    }
}
