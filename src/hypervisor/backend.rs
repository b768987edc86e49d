//! [`DomainBackend`]: observing domains and changing them, typed both ways.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio::time::timeout;

use super::{CallError, ConnectionState};
use crate::domain::{
    AttachedDevice, ConnectionId, Domain, DomainRef, DomainState, Job, PauseReason, Stats,
};
use crate::hotplug::{Action, Event, GuestVcpus, Ost};

/// A domain as the hypervisor has it at present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDomain {
    pub id: DomainRef,
    /// The live definition; the persistent one if the domain does not run.
    pub domain: Domain,
    /// Reason for the pause of a paused domain.
    pub reason: Option<PauseReason>,
    /// True if the domain has a definition that outlives it.
    pub persistent: bool,
    /// A job on the domain, such as a migration.
    pub job: Option<Job>,
    /// The disks and interfaces of the live XML.
    pub attached: Vec<AttachedDevice>,
    /// Those of the definition; `None` if there is none or it was not queried.
    pub defined: Option<Vec<AttachedDevice>>,
}

/// The bulk statistics of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainStats {
    pub id: DomainRef,
    pub state: DomainState,
    /// During a job libvirt leaves out what it would have to wait for: most of the balloon.
    pub stats: Stats,
}

/// The parts of an observation. The live domain is always one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObservationQuery {
    /// Timeout for each part but the agent's, whose calls end by a deadline of their own.
    pub timeout: Duration,
    /// True for the domain's statistics. They do not wait for a job on the domain as the live domain
    /// does, so they show that a domain which cannot be read is merely busy.
    pub statistics: bool,
    /// Maximum wait until the guest agent can be asked, if it is to be asked at all: questions to
    /// agents have few places. It ends with [`CallError::Busy`]. A domain that is not running or
    /// has no connected agent is not asked.
    pub agent: Option<Duration>,
    /// True for an observation that must not keep the agents' places from operations.
    pub background: bool,
    /// True for QEMU's record of the guest's ACPI answers. The query *taints* the domain until it
    /// ends.
    pub answers: bool,
    /// True for the devices of the persistent definition.
    pub definition: bool,
}

/// An observation of a domain.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `Overdue` if a job on the domain, or a hang, exceeded the timeout.
    pub live: Result<LiveDomain, CallError>,
    pub statistics: Option<DomainStats>,
    /// `None` if the agent was not asked.
    pub agent: Option<Result<GuestVcpus, CallError>>,
    pub answers: Option<Vec<Ost>>,
    pub times: SeenTimes,
}

/// The times at which the parts of an observation were received, or given up.
#[derive(Debug, Clone, Copy)]
pub struct SeenTimes {
    pub live: Instant,
    pub statistics: Instant,
    pub agent: Option<Instant>,
}

impl Seen {
    /// Returns the observation of a domain that could not be asked anything.
    pub fn failed(error: CallError) -> Self {
        Self {
            live: Err(error),
            statistics: None,
            agent: None,
            answers: None,
            times: SeenTimes {
                live: now(),
                statistics: now(),
                agent: None,
            },
        }
    }
}

impl ObservationQuery {
    /// Observes by up to four calls: live domain and statistics side by side, then, if the domain
    /// can be read, agent and ACPI answers.
    pub async fn observe(
        self,
        live: impl Future<Output = Result<LiveDomain, CallError>>,
        statistics: impl Future<Output = Result<DomainStats, CallError>>,
        agent: impl Future<Output = Result<GuestVcpus, CallError>>,
        answers: impl Future<Output = Result<Vec<Ost>, CallError>>,
    ) -> Seen {
        let statistics = async {
            let answer = if self.statistics {
                within(self.timeout, "domain-stats", statistics).await.ok()
            } else {
                None
            };
            (answer, now())
        };
        let live = async {
            let answer = within(self.timeout, "domain", live).await;
            (answer, now())
        };
        let ((live, live_at), (statistics, statistics_at)) = tokio::join!(live, statistics);
        let mut seen = Seen {
            live,
            statistics,
            agent: None,
            answers: None,
            times: SeenTimes {
                live: live_at,
                statistics: statistics_at,
                agent: None,
            },
        };
        let Ok(live) = &seen.live else { return seen };
        if self.agent.is_some() && live.domain.agent.may_answer() && live.domain.state.runs() {
            seen.agent = Some(agent.await);
            seen.times.agent = Some(now());
        }
        if self.answers {
            seen.answers = within(self.timeout, "acpi-answers", answers).await.ok();
        }
        seen
    }
}

/// Returns the present time of tokio's clock, which tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn within<T>(
    after: Duration,
    call: &'static str,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    let overdue = || CallError::Overdue {
        call: call.into(),
        after,
    };
    timeout(after, work)
        .await
        .unwrap_or_else(|_| Err(overdue()))
}

/// An unsolicited notification from the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Notifications may have been lost: the connection is new or has ended, or the subscriber was
    /// too slow. Everything known of the connection must be observed again; of all connections if
    /// none is named.
    Gap { connection: Option<ConnectionId> },
    /// A change of a domain.
    Change {
        domain: DomainRef,
        /// Time of receipt.
        at: Instant,
        change: Change,
    },
}

impl Notice {
    /// A gap in the notifications of every connection.
    pub const GAP: Self = Self::Gap { connection: None };

    /// True for a gap in which notifications of this connection may have been lost.
    pub fn is_gap_of(&self, of: &ConnectionId) -> bool {
        match self {
            Self::Gap { connection } => connection.as_ref().is_none_or(|named| named == of),
            Self::Change { .. } => false,
        }
    }
}

/// A change of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// An event that hotplug depends on. Some arrive twice: from QEMU, and a moment later from
    /// libvirt, which then has the change in its live XML. libvirt's `DeviceDeleted` has no path.
    Event(Event),
    /// The domain was started: its guest boots.
    Started,
    /// The domain was migrated here or restored: its guest goes on.
    Arrived,
    /// Its definition was created, changed or removed.
    Defined,
    /// The guest agent connected or disconnected.
    Agent { connected: bool },
}

/// One subscriber's notifications, from the time of subscription.
#[derive(Debug)]
pub struct Notices(broadcast::Receiver<Notice>);

impl Notices {
    pub fn new(receiver: broadcast::Receiver<Notice>) -> Self {
        Self(receiver)
    }

    /// Returns the next notification; `None` when the backend ended. Safe to cancel.
    pub async fn next(&mut self) -> Option<Notice> {
        match self.0.recv().await {
            Ok(notice) => Some(notice),
            Err(broadcast::error::RecvError::Lagged(_)) => Some(Notice::GAP),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// A hypervisor whose domains can be observed and changed.
///
/// Every call ends by its own deadline. Dropping its future stops the wait, not a call that has
/// begun. No call taints a domain but an observation with [`ObservationQuery::answers`].
pub trait DomainBackend: Send + Sync + 'static {
    /// Finds a domain by UUID, or else by name.
    fn find(&self, name_or_uuid: &str)
    -> impl Future<Output = Result<DomainRef, CallError>> + Send;

    /// Finds a domain that was found before, on the same connection.
    fn find_again(
        &self,
        domain: &DomainRef,
    ) -> impl Future<Output = Result<DomainRef, CallError>> + Send {
        self.find(&domain.uuid)
    }

    /// Observes a domain. A part that fails does not fail the others.
    fn observe(
        &self,
        domain: &DomainRef,
        query: ObservationQuery,
    ) -> impl Future<Output = Seen> + Send;

    /// Returns the statistics of every running domain. Never waits for a job on a domain.
    fn statistics(&self) -> impl Future<Output = Result<Vec<DomainStats>, CallError>> + Send;

    /// Returns the present connections, whose statistics can be read one at a time.
    fn connections(&self) -> Vec<ConnectionId> {
        vec![ConnectionId::Host]
    }

    /// Returns the statistics of the running domains of one connection.
    fn statistics_of(
        &self,
        _connection: &ConnectionId,
    ) -> impl Future<Output = Result<Vec<DomainStats>, CallError>> + Send {
        self.statistics()
    }

    /// Applies an action to a domain. After an error part of it may have been carried out.
    fn apply(
        &self,
        domain: &DomainRef,
        action: &Action,
    ) -> impl Future<Output = Result<(), CallError>> + Send;

    /// Subscribes to the notifications of all domains.
    fn events(&self) -> Notices;

    /// Returns the state of the connection, with its changes.
    fn health(&self) -> watch::Receiver<ConnectionState>;

    /// Returns the state of one connection, with its changes.
    fn health_of(&self, _connection: &ConnectionId) -> watch::Receiver<ConnectionState> {
        self.health()
    }
}
