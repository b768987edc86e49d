//! Bounds on threads, connections and calls.

use std::time::Duration;

use super::{DaemonKind, LibvirtConfig};

/// Bounds on the calls of one kind of connection that are inside libvirt at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneLimits {
    /// Maximum number of calls that are not late.
    pub(super) workers: usize,
    /// Maximum number of those that may wait for a domain or its guest agent. The rest is left to
    /// documents and statistics.
    pub(super) waiting: usize,
    /// Maximum number of those that read statistics.
    pub(super) statistics: usize,
    /// Maximum number of late calls whose workers are replaced: each is a thread.
    pub(super) late: usize,
}

impl LaneLimits {
    /// libvirtd itself serves 20 calls for all its clients (`max_workers`), and other clients must get
    /// some of them whatever happens to ours. As many may wait for domains as the two classes of
    /// such calls have at most over one connection, so that neither takes the workers of the other.
    pub(super) const HOST: Self = Self {
        workers: 9,
        waiting: 8,
        statistics: 9,
        late: 8,
    };

    /// Each launcher has at most one late call at a time, so this many hung ones delay no other.
    /// Storage that hangs takes many of a node's emulators along.
    pub(super) const LAUNCHERS: Self = Self {
        workers: 6,
        waiting: 5,
        statistics: 3,
        late: 16,
    };

    /// A daemon that hangs is detected before a thread is used for it (greeting.rs), so only one that
    /// hangs between two messages occupies a thread.
    pub(super) const OPENING: Self = Self {
        workers: 4,
        waiting: 0,
        statistics: 0,
        late: 8,
    };
}

/// Maximum number of late calls of one connection whose workers are replaced. A late call beyond
/// that keeps its worker until libvirt returns.
pub(super) const LATE_CALLS: usize = 4;

/// Maximum number of late calls to guest agents over one connection that release their place. They
/// are not counted in [`LATE_CALLS`]: no guest costs the places of changes.
pub(super) const LATE_AGENT_CALLS: usize = 2;

/// Maximum number of calls at a time over one virConnect. libvirtd reads nothing more from a client
/// with five calls in progress (`max_client_requests`, virNetServerClientDispatchRead), not even
/// keepalive messages, so that the connection would be closed while the calls wait.
pub(super) const CALLS_PER_HANDLE: usize = 4;

/// Time after which an additional virConnect that has no calls is closed: longer than the monitor's
/// period, so that a busy node does not open one each time.
pub(super) const HANDLE_IDLE: Duration = Duration::from_secs(60);

/// Time after which a worker that has no calls ends.
pub(super) const WORKER_IDLE: Duration = Duration::from_secs(10);

/// Interval between attempts to connect: short, so that a restarted libvirtd is used at once. It
/// doubles up to the maximum, and jitter keeps several daemons from connecting together.
pub(super) const FIRST_RETRY: Duration = Duration::from_millis(200);
pub(super) const MAX_RETRY: Duration = Duration::from_secs(1);

/// Resources that a call may wait for inside libvirt, and that it may therefore delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Class {
    /// Waits for nothing but libvirtd and the emulators it starts to probe them. A late call of
    /// this class means that libvirtd hangs.
    Control,
    /// Bulk statistics. They do not wait for libvirt's lock on a domain (`NOWAIT`), but for an
    /// emulator that hangs without holding the lock.
    Statistics,
    /// Waits for libvirt's lock on the domain, or for its guest to release a device. Reading the
    /// live XML takes the lock too.
    Change,
    /// Waits for the guest agent, which is the guest's to delay: see [`AgentPlace`].
    Agent,
}

/// The part of the class [`Class::Agent`] that a call belongs to. Each part has a maximum, and all
/// together have [`Class::limit`], so that at least one place is for operations on domains whose
/// agents answer.
///
/// ```text
/// operation on a domain whose agent answers, or was never asked ──▶ any of 4
/// the monitor's question to such an agent ─────────────────────────▶ 1 of them
/// an agent that was slow within SLOW_AGENT_FOR, a change by agent ─▶ 2 of them
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum AgentPlace {
    /// A question of the monitor, which can wait.
    Background,
    /// A question to an agent that was slow or silent, or a change, for which libvirt asks the agent
    /// several times.
    Slow,
}

impl AgentPlace {
    pub(super) const ALL: [Self; 2] = [Self::Background, Self::Slow];

    pub(super) const fn limit(self) -> usize {
        match self {
            Self::Background => 1,
            Self::Slow => 2,
        }
    }
}

/// Time that an agent has for each command, set at libvirt for the time of the call: by itself
/// libvirt waits without a limit. A healthy agent answers within milliseconds, and within a second on a
/// busy host in software emulation.
pub(super) const AGENT_ANSWER: Duration = Duration::from_secs(3);

/// Time for a command that brings CPUs online: a guest needs up to 0.1 s for each in software
/// emulation.
pub(super) const AGENT_CHANGE: Duration = Duration::from_secs(8);

/// An agent whose call takes longer than this is slow.
pub(super) const SLOW_AGENT: Duration = Duration::from_millis(1500);

/// Time for which a slow agent counts as slow. The list of them needs no bound of its own: each entry
/// costs [`SLOW_AGENT`] of one of few places.
pub(super) const SLOW_AGENT_FOR: Duration = Duration::from_secs(600);

impl Class {
    pub(super) const ALL: [Self; 4] = [Self::Control, Self::Statistics, Self::Change, Self::Agent];

    /// Returns the maximum number of calls of this class at a time over one connection, late calls
    /// apart. Two unplugs and three silent agents leave room for another plug, a question to an
    /// agent that answers, and a document.
    ///
    /// A launcher has few domains and one handle, on which one call of each class has room.
    pub(super) const fn limit(self, daemon: DaemonKind) -> usize {
        match (daemon, self) {
            (DaemonKind::Launcher, _) => 1,
            (DaemonKind::Host, Self::Control | Self::Statistics) => 2,
            (DaemonKind::Host, Self::Change | Self::Agent) => 4,
        }
    }

    pub(super) const fn deadline(self, config: &LibvirtConfig) -> Duration {
        match self {
            Self::Control => config.call_deadline,
            Self::Statistics => config.statistics_deadline,
            Self::Change => config.change_deadline,
            Self::Agent => config.agent_deadline,
        }
    }
}
