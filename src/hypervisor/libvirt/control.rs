//! [`DomainBackend`] by way of libvirt.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::LibvirtConfig;
use super::lanes::Lanes;
use super::link::{Link, Role};
use super::notices::Announcer;
use super::pool::Pool;
use super::session::Session;
use crate::domain::{BalloonStats, IdSet};
use crate::hotplug::{GuestVcpus, Ost};
use crate::hypervisor::{
    CallError, Connection, DomainBackend, DomainRef, DomainStats, LiveDomain, Notices, Scope,
};
use crate::telemetry::Metrics;
use crate::units::KiB;

/// How to reach libvirt for its domains, and how long and how wide to wait for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlConfig {
    /// The connection. Its deadline is that of calls that wait for no domain.
    pub libvirt: LibvirtConfig,
    /// How long a call may take that waits while something else is being done to the domain.
    pub change_deadline: Duration,
    /// How many domains can be changed, or read, at the same time.
    pub change_lanes: usize,
    /// How long a call to a guest agent may take.
    pub agent_deadline: Duration,
    /// How many guest agents can be asked at the same time.
    pub agent_lanes: usize,
    /// How long a call for statistics may take.
    pub stats_deadline: Duration,
    /// For how many single domains statistics can be asked at the same time.
    pub stats_lanes: usize,
}

impl ControlConfig {
    /// The usual times and numbers for this URI.
    ///
    /// libvirt itself waits 30 s for what else is being done to a domain, then up to 10 s for an
    /// unplug, and 5 s for an agent that is not there (libvirt 11.3: virdomainjob.c,
    /// qemu_hotplug.c, qemu_agent.c); the deadlines let it say so. It serves 20 calls at a time
    /// (`max_workers`), of which a node's other users are to have some whatever happens to ours.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            libvirt: LibvirtConfig::new(uri),
            change_deadline: Duration::from_secs(45),
            change_lanes: 8,
            agent_deadline: Duration::from_secs(10),
            agent_lanes: 4,
            stats_deadline: Duration::from_secs(10),
            stats_lanes: 4,
        }
    }
}

/// The domains of a libvirt that is connected to, and connected to again, for as long as this
/// lives. For changes and agents it connects only when they are asked for.
pub struct LibvirtDomains {
    reads: Lanes,
    /// Statistics do not wait for what is being done to a domain, but an emulator that hangs
    /// holds them up all the same: those of all domains have a connection for themselves, and
    /// those of one have a lane as changes do.
    all_stats: Lanes,
    stats: Pool,
    /// What takes libvirt's lock on a domain and so waits for it. Reading the live XML does, too
    /// (measured: libvirt 11.3).
    changes: Pool,
    agents: Pool,
    announcer: Announcer,
    events: Link,
}

impl LibvirtDomains {
    /// Begins to connect and returns at once, as [`super::Libvirt::start`] does.
    pub fn start(config: ControlConfig, metrics: &Arc<Metrics>) -> Self {
        let link = |deadline, role| {
            let config = LibvirtConfig {
                call_deadline: deadline,
                ..config.libvirt.clone()
            };
            Link::new(config, Arc::clone(metrics), role)
        };
        let on_demand = |deadline| link(deadline, Role::OnDemand);
        let announcer = Announcer::new();
        let events = link(
            config.libvirt.call_deadline,
            Role::Events(announcer.clone()),
        );
        Self {
            reads: Lanes::new(events.clone()),
            all_stats: Lanes::new(on_demand(config.stats_deadline)),
            stats: Pool::new(on_demand(config.stats_deadline), config.stats_lanes),
            changes: Pool::new(on_demand(config.change_deadline), config.change_lanes),
            agents: Pool::new(on_demand(config.agent_deadline), config.agent_lanes),
            announcer,
            events,
        }
    }

    /// A call that the domain can hold up, on a lane of this pool.
    async fn on<T: Send + 'static>(
        &self,
        pool: &Pool,
        call: &'static str,
        domain: &DomainRef,
        work: impl FnOnce(&Session, &DomainRef) -> Result<T, CallError> + Send + 'static,
    ) -> Result<T, CallError> {
        let about = domain.clone();
        pool.call(call, domain, move |session| work(session, &about))
            .await
    }
}

impl DomainBackend for LibvirtDomains {
    async fn find_domain(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        let name_or_uuid = name_or_uuid.to_owned();
        self.reads
            .call("find-domain", move |session| {
                session.find_domain(&name_or_uuid)
            })
            .await
    }

    async fn domain(&self, domain: &DomainRef) -> Result<LiveDomain, CallError> {
        self.on(&self.changes, "domain", domain, Session::domain)
            .await
    }

    async fn all_domain_stats(&self) -> Result<Vec<DomainStats>, CallError> {
        self.all_stats
            .call("all-domain-stats", |session| session.all_domain_stats())
            .await
    }

    async fn domain_stats(&self, domain: &DomainRef) -> Result<DomainStats, CallError> {
        self.on(&self.stats, "domain-stats", domain, Session::domain_stats)
            .await
    }

    async fn memory_stats(&self, domain: &DomainRef) -> Result<BalloonStats, CallError> {
        let call = "memory-stats";
        self.on(&self.changes, call, domain, Session::memory_stats)
            .await
    }

    async fn guest_vcpus(&self, domain: &DomainRef) -> Result<GuestVcpus, CallError> {
        self.on(&self.agents, "guest-vcpus", domain, Session::guest_vcpus)
            .await
    }

    async fn acpi_answers(&self, domain: &DomainRef) -> Result<Vec<Ost>, CallError> {
        let call = "acpi-answers";
        self.on(&self.changes, call, domain, Session::acpi_answers)
            .await
    }

    async fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> Result<(), CallError> {
        let (call, vcpus) = ("set-guest-vcpus", vcpus.clone());
        self.on(&self.agents, call, domain, move |session, domain| {
            session.set_guest_vcpus(domain, &vcpus, online)
        })
        .await
    }

    async fn set_agent_timeout(
        &self,
        domain: &DomainRef,
        timeout: Duration,
    ) -> Result<(), CallError> {
        let call = "agent-timeout";
        self.on(&self.agents, call, domain, move |session, domain| {
            session.set_agent_timeout(domain, timeout)
        })
        .await
    }

    async fn set_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: u32,
        scope: Scope,
    ) -> Result<(), CallError> {
        let call = "set-vcpus";
        self.on(&self.changes, call, domain, move |session, domain| {
            session.set_vcpus(domain, vcpus, scope)
        })
        .await
    }

    async fn update_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let (call, xml) = ("update-device", xml.to_owned());
        self.on(&self.changes, call, domain, move |session, domain| {
            session.update_device(domain, &xml, scope)
        })
        .await
    }

    async fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
    ) -> Result<(), CallError> {
        let (call, alias) = ("update-device", alias.to_owned());
        self.on(&self.changes, call, domain, move |session, domain| {
            session.resize_virtio_mem(domain, &alias, requested)
        })
        .await
    }

    async fn attach_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let (call, xml) = ("attach-device", xml.to_owned());
        self.on(&self.changes, call, domain, move |session, domain| {
            session.attach_device(domain, &xml, scope)
        })
        .await
    }

    async fn detach_device(
        &self,
        domain: &DomainRef,
        alias: &str,
        scope: Scope,
    ) -> Result<(), CallError> {
        let (call, alias) = ("detach-device", alias.to_owned());
        self.on(&self.changes, call, domain, move |session, domain| {
            session.detach_device(domain, &alias, scope)
        })
        .await
    }

    fn notices(&self) -> Notices {
        self.announcer.subscribe()
    }

    fn listening(&self) -> watch::Receiver<Connection> {
        self.events.subscribe()
    }
}
