//! Bounds on threads, connections and calls.

use std::time::Duration;

use super::LibvirtConfig;

/// Maximum number of calls that are inside libvirt at a time and not late, for all connections of
/// the process: libvirtd itself serves 20 for all its clients (`max_workers`), and other clients
/// must get some of them whatever happens to ours.
pub(super) const WORKERS: usize = 8;

/// Maximum number of those calls that may wait for a domain or its guest agent. The rest is left to
/// documents and statistics.
pub(super) const WAITING_WORKERS: usize = 7;

/// Maximum number of late calls of one connection whose workers are replaced. A late call beyond
/// that keeps its worker until libvirt returns.
pub(super) const LATE_CALLS: usize = 4;

/// Maximum number of late calls of the process whose workers are replaced: each is a thread.
pub(super) const LATE_WORKERS: usize = 8;

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
    /// Waits for the guest agent, 5 s if it is silent (`QEMU_AGENT_WAIT_TIME`, qemu_agent.c).
    Agent,
}

impl Class {
    pub(super) const ALL: [Self; 4] = [Self::Control, Self::Statistics, Self::Change, Self::Agent];

    /// Returns the maximum number of calls of this class at a time over one connection, late calls
    /// apart. Two unplugs and four silent agents leave room for another plug and for a document.
    pub(super) const fn limit(self) -> usize {
        match self {
            Self::Control | Self::Statistics => 2,
            Self::Change | Self::Agent => 4,
        }
    }

    /// True if a single domain can delay the call.
    pub(super) const fn waits_for_domain(self) -> bool {
        matches!(self, Self::Change | Self::Agent)
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
