//! Options of an executor, and the listener for its operations.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::DomainRef;
use crate::hotplug::{LauncherRight, Patience};
use crate::operation::Record;
use crate::units::Bytes;

/// Returns the memory that the node can still hand out, or `None` if unknown. Called before
/// memory is added; it must return at once.
pub type AvailableMemory = Arc<dyn Fn() -> Option<Bytes> + Send + Sync>;

/// Returns the right to change a domain in a launcher. Called before the first change; it must return
/// at once.
pub type LauncherRights = Arc<dyn Fn(&DomainRef) -> LauncherRight + Send + Sync>;

/// Limits and timeouts of an executor. The program uses the defaults, tests use shorter ones.
#[derive(Clone)]
pub struct Options {
    /// Maximum number of operations without a verdict.
    pub max_open: usize,
    /// Timeout for each source of an observation.
    pub observe_timeout: Duration,
    /// Maximum wait within an observation until the guest agent can be asked.
    pub agent_timeout: Duration,
    /// Query QEMU for the guest's last ACPI answers, which taints domains.
    pub deep_verify: bool,
    /// Timeout for an unavailable hypervisor before the first call: long enough for a restart of
    /// libvirtd, short enough for a user who waits at a prompt.
    pub unavailable_timeout: Duration,
    /// Pause before the first observation after something happened.
    pub min_pause: Duration,
    /// Maximum pause; each pause is twice as long as the one before.
    pub max_pause: Duration,
    /// Time for which a domain is followed after a verdict that may change.
    pub follow: Duration,
    /// Maximum number of operations followed at a time.
    pub max_followed: usize,
    /// Grace periods for slow guests.
    pub patience: Patience,
    /// Memory that the node can hand out.
    pub available_memory: AvailableMemory,
    /// Rights on domains in launchers. Without any by default.
    pub launcher_rights: LauncherRights,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_open: 256,
            observe_timeout: Duration::from_secs(10),
            agent_timeout: Duration::from_secs(3),
            deep_verify: false,
            unavailable_timeout: Duration::from_secs(5),
            min_pause: Duration::from_millis(50),
            max_pause: Duration::from_secs(1),
            follow: Duration::from_secs(600),
            max_followed: 256,
            patience: Patience::default(),
            available_memory: Arc::new(|| None),
            launcher_rights: Arc::new(|_| LauncherRight::Off),
        }
    }
}

/// Receives changes of operations, for metrics and events. Its methods must return at once.
pub trait Listener: Send + Sync + 'static {
    /// An operation was accepted or started, or its verdict was reached or corrected.
    fn changed(&self, record: &Record);

    /// An operation reached its verdict, this long after the last event or observation.
    fn concluded_after(&self, elapsed: Duration);

    /// A journal write failed.
    fn journal_failed(&self);
}

/// Ignores every change.
impl Listener for () {
    fn changed(&self, _: &Record) {}

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {}
}
