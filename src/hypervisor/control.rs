//! Running domains: what there is to know of them, what happens to them, and changing them.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};

use super::{CallError, Connection};
use crate::domain::{BalloonStats, DomainRef, DomainState, IdSet, Job, PauseReason, Stats};
use crate::hotplug::{Event, GuestVcpus, Ost};
use crate::units::KiB;

/// A domain as libvirt has it at present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDomain {
    /// Which it is.
    pub id: DomainRef,
    /// Its state.
    pub state: DomainState,
    /// Why it does not run, if it does not.
    pub reason: Option<PauseReason>,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// The live XML, without secrets; that of the definition if it does not run.
    pub xml: String,
    /// What is being done to it in the background.
    pub job: Option<Job>,
}

/// The bulk statistics of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainStats {
    /// Which it is.
    pub id: DomainRef,
    /// Its state.
    pub state: DomainState,
    /// What tells something about hotplug. While something else is being done to the domain
    /// libvirt leaves out what it would have to wait for: most of the balloon.
    pub stats: Stats,
}

/// What a change is to hold for (`virDomainModificationImpact`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The domain as it runs.
    Live,
    /// That, and its definition, so that it is so after the next start too.
    LiveAndConfig,
}

impl Scope {
    /// The definition too, if there is one that outlives the domain.
    pub fn of(persistent: bool) -> Self {
        match persistent {
            true => Self::LiveAndConfig,
            false => Self::Live,
        }
    }
}

/// What is told without having been asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Things may have happened that were not told: the connection is new, or the listener was
    /// too slow. What was known is to be looked at again.
    Gap,
    /// Something happened to a domain.
    Change {
        /// The domain.
        domain: DomainRef,
        /// When it was heard.
        at: Instant,
        /// What happened.
        change: Change,
    },
}

/// Something that happened to a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Of what hotplug goes by. Some things come twice, from QEMU and a moment later from libvirt,
    /// which by then shows them in its live XML; libvirt's `DeviceDeleted` has no path.
    Event(Event),
    /// The domain was started, or came from another node.
    Started,
    /// Its definition was made, changed, or taken away.
    Defined,
    /// The guest agent is there (or not any more).
    Agent {
        /// Whether it is there.
        connected: bool,
    },
}

/// The notices from the moment of subscribing on, for one listener.
#[derive(Debug)]
pub struct Notices(broadcast::Receiver<Notice>);

impl Notices {
    /// Of this channel.
    pub fn new(receiver: broadcast::Receiver<Notice>) -> Self {
        Self(receiver)
    }

    /// The next one; `None` when the hypervisor's adapter is no more. Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<Notice> {
        match self.0.recv().await {
            Ok(notice) => Some(notice),
            Err(broadcast::error::RecvError::Lagged(_)) => Some(Notice::Gap),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// A hypervisor whose domains can be watched and changed.
///
/// Every call ends by its own deadline. Dropping the future of one gives up waiting for it; what
/// has begun goes on over there. No call taints the domain but [`DomainBackend::acpi_answers`].
pub trait DomainBackend: Send + Sync + 'static {
    /// Finds a domain by its UUID, or else by its name.
    fn find_domain(
        &self,
        name_or_uuid: &str,
    ) -> impl Future<Output = Result<DomainRef, CallError>> + Send;

    /// The domain as it is at present. Waits while something is being done to the domain, such as
    /// an unplug: until that is over only [`DomainBackend::domain_stats`] tells its state.
    fn domain(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<LiveDomain, CallError>> + Send;

    /// The bulk statistics of every running domain. Never waits for a domain.
    fn all_domain_stats(&self) -> impl Future<Output = Result<Vec<DomainStats>, CallError>> + Send;

    /// The bulk statistics of one domain. Does not wait for it.
    fn domain_stats(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<DomainStats, CallError>> + Send;

    /// What the balloon's driver tells. Waits while something is being done to the domain.
    fn memory_stats(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<BalloonStats, CallError>> + Send;

    /// What the guest agent says about the guest's CPUs.
    fn guest_vcpus(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<GuestVcpus, CallError>> + Send;

    /// The last answers that the guest gave through ACPI, as QEMU remembers them: one for each
    /// slot for which there is any. QEMU is asked past libvirt, which *taints* the domain, until
    /// it ends. Waits while something is being done to the domain.
    fn acpi_answers(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<Vec<Ost>, CallError>> + Send;

    /// Has the guest agent bring CPUs online, or take them offline.
    fn set_guest_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: &IdSet,
        online: bool,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// How long libvirt waits for the guest agent, in whole seconds and at least one. For all its
    /// clients, until the domain ends.
    fn set_agent_timeout(
        &self,
        domain: &DomainRef,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Plugs or unplugs vCPUs until there are `vcpus`. After an error some of them may have been.
    fn set_vcpus(
        &self,
        domain: &DomainRef,
        vcpus: u32,
        scope: Scope,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Has a virtio-mem device ask its guest for another size, live. Returns before the guest
    /// does anything.
    fn resize_virtio_mem(
        &self,
        domain: &DomainRef,
        alias: &str,
        requested: KiB,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Changes a device to what the XML says, which is to be the live one but for the change.
    fn update_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Plugs a device.
    fn attach_device(
        &self,
        domain: &DomainRef,
        xml: &str,
        scope: Scope,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Asks the guest to let a device go, and does not wait for that.
    fn detach_device(
        &self,
        domain: &DomainRef,
        alias: &str,
        scope: Scope,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// What happens to any domain, from now on. Begins with [`Notice::Gap`] when there is no
    /// connection yet.
    fn notices(&self) -> Notices;

    /// Whether notices come at present, and its changes.
    fn listening(&self) -> watch::Receiver<Connection>;
}
