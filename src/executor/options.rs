//! What an executor is started with.

use std::sync::Arc;
use std::time::Duration;

use crate::hotplug::Patience;
use crate::operation::Record;
use crate::units::Bytes;

/// Tells how much memory the node can still give out; `None` if that is not known. Asked before
/// memory is added; it must not take long.
pub type AvailableMemory = Arc<dyn Fn() -> Option<Bytes> + Send + Sync>;

/// How an executor works. The default is for everybody; tests have their own.
#[derive(Clone)]
pub struct Options {
    /// How many operations there may be without a verdict.
    pub most_open: usize,
    /// How long a look at a domain may take.
    pub look_deadline: Duration,
    /// How long the guest agent may take within a look.
    pub agent_deadline: Duration,
    /// Whether QEMU is asked what it remembers of the guest's answers, which taints domains.
    pub deep_verify: bool,
    /// How long the hypervisor may be away before an operation that has not begun is given up: long
    /// enough for libvirtd to be restarted, short enough for who waits for an answer.
    pub reach: Duration,
    /// How long after something happened the domain is looked at again.
    pub shortest_pause: Duration,
    /// Each pause is twice as long as the one before, up to this.
    pub longest_pause: Duration,
    /// How long after a verdict that may change the domain is watched.
    pub follow: Duration,
    /// How many operations are watched after their verdict.
    pub most_followed: usize,
    /// How long to wait for a guest that is slow.
    pub patience: Patience,
    /// How much memory the node can give out.
    pub available_memory: AvailableMemory,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            most_open: 256,
            look_deadline: Duration::from_secs(10),
            agent_deadline: Duration::from_secs(3),
            deep_verify: false,
            reach: Duration::from_secs(5),
            shortest_pause: Duration::from_millis(50),
            longest_pause: Duration::from_secs(1),
            follow: Duration::from_secs(600),
            most_followed: 256,
            patience: Patience::default(),
            available_memory: Arc::new(|| None),
        }
    }
}

/// Is told what happens to operations: for metrics and events. Must not take long.
pub trait Listener: Send + Sync + 'static {
    /// An operation was asked for, began, got its verdict, or had it put right.
    fn changed(&self, record: &Record);

    /// An operation got its verdict so long after the last event or look that it needed.
    fn concluded_after(&self, span: Duration);

    /// The journal could not be written.
    fn journal_failed(&self);
}

/// Nobody is told.
impl Listener for () {
    fn changed(&self, _: &Record) {}

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {}
}
