//! The hypervisor by way of libvirt.
//!
//! ```text
//! probe, executor, monitor …  (async)
//!        │ NodeSource (node.rs), DomainBackend (backend.rs)
//!        ▼
//!   Libvirt ── owns ──▶ LibvirtConnection ◀── reopens ── reconnect.rs (one task)
//!                           │            ◀── opened once: launcher.rs, after greeting.rs
//!                           │ queues, limits, virConnect handles (connection.rs)
//!                           ▼
//!                       Workers: at most 9 threads for all connections (workers.rs)
//!                           │ session.rs, domains.rs: blocking calls over one handle
//!                           ▼
//!                        libvirtd ── events, keepalive, close ──▶ event loop (one thread)
//! ```
//!
//! * **Ownership.** A [`Libvirt`] owns its connection and shares the workers. The event loop's
//!   thread belongs to the process: libvirt cannot stop it. Idle, there is one virConnect and no
//!   worker. More virConnects are opened while more than four calls are in progress.
//! * **Blocking.** Only workers and the event loop call libvirt. An async caller waits for its
//!   queue, its class of calls ([`limits::Class`]), a worker and the result, and for all together
//!   no longer than the deadline of the call.
//! * **Failure.** Every call ends with a result or a [`CallError`](super::CallError). A libvirtd
//!   that is absent, killed or frozen turns the connection down until it can be reopened
//!   (reconnect.rs draws the states); calls are answered at once meanwhile. A domain that hangs
//!   delays its own calls only. Threads that never return from libvirt are bounded
//!   ([`limits::LATE_CALLS`]).
//! * libvirt's numbers, texts and XML end in this directory. Errors are classified in failure.rs,
//!   never by their text.

mod backend;
mod call;
mod connection;
mod domains;
mod event_loop;
mod events;
mod failure;
mod greeting;
mod launcher;
mod limits;
mod node;
mod reconnect;
mod session;
mod workers;
mod xml;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::connection::LibvirtConnection;
pub use self::greeting::OpenError;
use self::node::Definitions;
pub use self::workers::Workers;
use crate::hypervisor::HypervisorMetrics;

/// Maximum number of domains taken of one launcher: it normally has one.
pub const MAX_LAUNCHER_DOMAINS: usize = 4;

/// Timeout for a launcher's statistics, which take milliseconds.
const LAUNCHER_STATISTICS: Duration = Duration::from_secs(2);

/// Address of a libvirtd and timeouts of calls to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtConfig {
    /// A URI of libvirt, `qemu:///system`; empty: libvirt's own choice. For an unprivileged user
    /// libvirt starts a daemon for a `/session` URI if none runs, unless `LIBVIRT_AUTOSTART=0`.
    pub uri: String,
    /// Timeout for calls that wait for no domain. The first ones after an update of QEMU start the
    /// emulators to probe them, some seconds for each.
    pub call_deadline: Duration,
    /// Timeout for opening a connection, after which it is tried again on another thread.
    pub open_deadline: Duration,
    /// Timeout for statistics.
    pub statistics_deadline: Duration,
    /// Timeout for calls that wait for a domain. libvirt itself waits 30 s for its lock on the
    /// domain, then up to 10 s for an unplug (libvirt 11.3: virdomainjob.c, qemu_hotplug.c); the
    /// timeout is longer, so that libvirt reports which of them it was.
    pub change_deadline: Duration,
    /// Timeout for calls to a guest agent, from the time when the call is made. Longer than what an
    /// agent has for its answers ([`limits::AGENT_ANSWER`], twice: libvirt synchronizes with it
    /// first), so a call that is late waits for another client's question to the agent.
    pub agent_deadline: Duration,
    pub keepalive: Keepalive,
    /// True if events are subscribed to.
    pub events: bool,
    pub daemon: DaemonKind,
}

/// The owner of a libvirtd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonKind {
    /// The node's own.
    Host,
    /// That of a KubeVirt launcher, which a tenant may control. It gets one handle, one call of each
    /// class at a time, no further call while one is late, and at most [`MAX_LAUNCHER_DOMAINS`] of
    /// its domains are taken.
    Launcher,
}

/// libvirt's keepalive messages (`virConnectSetKeepAlive`): the connection is closed after `count`
/// of them without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Interval between messages, in whole seconds.
    pub interval: Duration,
    pub count: u32,
}

impl LibvirtConfig {
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            call_deadline: Duration::from_secs(30),
            open_deadline: Duration::from_secs(10),
            statistics_deadline: Duration::from_secs(10),
            change_deadline: Duration::from_secs(45),
            agent_deadline: Duration::from_secs(10),
            keepalive: Keepalive {
                interval: Duration::from_secs(5),
                count: 3,
            },
            events: true,
            daemon: DaemonKind::Host,
        }
    }

    /// Returns the configuration for a launcher's libvirt.
    pub fn launcher(uri: impl Into<String>) -> Self {
        Self {
            statistics_deadline: LAUNCHER_STATISTICS,
            keepalive: Keepalive {
                interval: Duration::from_secs(15),
                count: 3,
            },
            daemon: DaemonKind::Launcher,
            ..Self::new(uri)
        }
    }
}

/// A libvirtd: its node's documents and its domains.
pub struct Libvirt {
    connection: LibvirtConnection,
    definitions: Definitions,
    /// The domains taken of a launcher that has too many, by UUID, and the number of the others.
    taken: Mutex<(Vec<String>, usize)>,
}

impl Libvirt {
    /// Begins to connect and returns at once; libvirtd need not run yet. The first calls wait for
    /// the first connection. Must be called within a tokio runtime.
    ///
    /// Dropping this closes the connection in the background. Workers that are inside libvirt end
    /// when libvirt returns.
    pub fn start(config: LibvirtConfig, metrics: Arc<HypervisorMetrics>) -> Self {
        Self::start_on(Workers::new(), config, metrics)
    }

    /// Does the same with workers that other connections use too.
    pub fn start_on(
        workers: Workers,
        config: LibvirtConfig,
        metrics: Arc<HypervisorMetrics>,
    ) -> Self {
        Self {
            connection: LibvirtConnection::start(config, workers, metrics, reconnect::keep),
            definitions: Definitions::default(),
            taken: Mutex::default(),
        }
    }
}
