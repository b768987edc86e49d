//! The hypervisor by way of libvirt.
//!
//! ```text
//! async: Libvirt ── a job ──▶ Lanes ──▶ Lane: one thread, one Session (a connection)
//!           ◀── its answer, or the deadline ──┘        │ opened, closed
//!                                              Link: watchers, metrics, log
//! event loop: keepalive and the close callback, one thread for the process
//! ```
//!
//! The async side never blocks, and nothing there waits longer than the deadline. A lane that is
//! late is left alone with its call and another one takes its place.

mod event_loop;
mod failure;
mod lane;
mod lanes;
mod link;
mod session;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use self::lane::Job;
use self::lanes::Lanes;
use self::link::Link;
use self::session::Session;
use super::{
    Connection, DomainCapabilitiesQuery, Hypervisor, HypervisorError, RunningDomain, Versions,
};
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
        let link = Link::new(config, metrics);
        Self {
            lanes: Lanes::new(link.clone()),
            link,
        }
    }

    /// Makes a call on a lane and waits for its answer, at most until the deadline.
    async fn call<T, W>(&self, call: &'static str, work: W) -> Result<T, HypervisorError>
    where
        T: Send + 'static,
        W: FnOnce(&mut Session) -> Result<T, HypervisorError> + Send + 'static,
    {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let run = Box::new(move |session: Result<&mut Session, HypervisorError>| {
            // The caller went away while this waited for its turn.
            if reply.is_closed() {
                return;
            }
            let started = Instant::now();
            let outcome = session.and_then(|session| unpanicked(call, || work(session)));
            // Nobody to take it: the caller was told of a timeout.
            drop(reply.send((outcome, started.elapsed())));
        });
        let deadline = self.link.config().call_deadline;
        let (outcome, took) = match self.lanes.submit(Job { id, run }) {
            Err(refused) => (Err(refused), Duration::ZERO),
            Ok(()) => match timeout(deadline, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => (Err(gone()), Duration::ZERO),
                Err(_) => (Err(self.lanes.give_up(id, call)), deadline),
            },
        };
        self.link.call_ended(call, took, &outcome);
        outcome
    }
}

/// A panic of the crate `virt` is an error of this call, not the end of the lane.
fn unpanicked<T>(
    call: &'static str,
    work: impl FnOnce() -> Result<T, HypervisorError>,
) -> Result<T, HypervisorError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(HypervisorError::Failed {
            call,
            number: virt::sys::VIR_ERR_INTERNAL_ERROR,
            message: "the call panicked".to_owned(),
        })
    })
}

fn gone() -> HypervisorError {
    HypervisorError::Unavailable("the thread that makes the calls ended".to_owned())
}

impl Hypervisor for Libvirt {
    async fn versions(&self) -> Result<Versions, HypervisorError> {
        self.call("versions", |session| session.versions()).await
    }

    async fn capabilities(&self) -> Result<String, HypervisorError> {
        self.call("capabilities", |session| session.capabilities())
            .await
    }

    async fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> Result<String, HypervisorError> {
        self.call("domain-capabilities", move |session| {
            session.domain_capabilities(&query)
        })
        .await
    }

    async fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<String, HypervisorError> {
        self.call("baseline-cpu", move |session| {
            session.baseline_cpu(&query, &cpu)
        })
        .await
    }

    async fn native_arguments(&self, domain: String) -> Result<String, HypervisorError> {
        self.call("native-arguments", move |session| {
            session.native_arguments(&domain)
        })
        .await
    }

    async fn running_domains(&self) -> Result<Vec<RunningDomain>, HypervisorError> {
        self.call("running-domains", |session| session.running_domains())
            .await
    }

    fn connection(&self) -> watch::Receiver<Connection> {
        self.link.subscribe()
    }
}
