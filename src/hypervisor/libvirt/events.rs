//! Translates libvirt's events into hotplug's and publishes them.
//!
//! [`Publisher::publish`] is called by libvirt's event loop and never blocks: a subscriber that is
//! slow loses events and receives a gap instead.

use std::time::Instant;

use tokio::sync::broadcast;
use tracing::{debug, warn};
use virt::sys;

use super::DaemonKind;
use crate::ffi::{RawEvent, RawEventKind};
use crate::hotplug::Event;
use crate::hypervisor::{Change, DomainRef, Notice, Notices};
use crate::units::{Bytes, KiB};

/// Maximum number of events that a subscriber may be behind before it loses some: several bursts of
/// a node with hundreds of domains.
const BACKLOG: usize = 1024;

/// The same for a launcher, which has few domains: the memory is reserved, and there are hundreds.
const LAUNCHER_BACKLOG: usize = 32;

/// Returns a regular expression for the QEMU events to subscribe to.
pub(super) fn monitor_events() -> String {
    format!("^({})$", Event::MONITOR.join("|"))
}

/// Publishes events to all subscribers.
#[derive(Clone)]
pub(super) struct Publisher(broadcast::Sender<Notice>);

impl Publisher {
    pub(super) fn new(daemon: DaemonKind) -> Self {
        Self(broadcast::Sender::new(match daemon {
            DaemonKind::Host => BACKLOG,
            DaemonKind::Launcher => LAUNCHER_BACKLOG,
        }))
    }

    pub(super) fn subscribe(&self) -> Notices {
        Notices::new(self.0.subscribe())
    }

    /// Publishes a gap: events may have been lost.
    pub(super) fn gap(&self) {
        self.send(Notice::GAP);
    }

    /// Publishes an event of libvirt, if it concerns hotplug.
    pub(super) fn publish(&self, event: RawEvent) {
        let at = Instant::now();
        let RawEvent { name, uuid, what } = event;
        let Some(change) = change(what, &name) else {
            return;
        };
        let domain = DomainRef::on_host(name, uuid);
        self.send(Notice::Change { domain, at, change });
    }

    /// Logs an event that this libvirt does not have. Most have a substitute; QEMU's do not.
    pub(super) fn refused(&self, event: &str, reason: &str) {
        match event {
            "monitor" => warn!(
                reason,
                "libvirt does not forward QEMU's events: the guest's answers to hotplug stay unknown"
            ),
            _ => debug!(event, reason, "libvirt does not have this event"),
        }
    }

    fn send(&self, notice: Notice) {
        // An error means that there are no subscribers.
        drop(self.0.send(notice));
    }
}

fn change(what: RawEventKind, domain: &str) -> Option<Change> {
    Some(match what {
        RawEventKind::Monitor { name, details } => {
            match Event::from_monitor(&name, details.as_deref()) {
                Ok(event) => Change::Event(event?),
                Err(error) => {
                    warn!(domain, %error, "cannot parse an event of QEMU");
                    return None;
                }
            }
        }
        RawEventKind::Lifecycle { event, detail } => return lifecycle(event, detail),
        RawEventKind::Reboot => Change::Event(Event::Reset),
        RawEventKind::DeviceRemoved(alias) => removed(alias),
        // libvirt names a vCPU's device so (qemuDomainVcpuPrivate, `vcpu%zu`)
        RawEventKind::VcpuRemoved(vcpu) => removed(format!("vcpu{vcpu}")),
        RawEventKind::DeviceRemovalFailed(device) => Change::Event(Event::UnplugFailed { device }),
        RawEventKind::Agent(connected) => Change::Agent { connected },
        RawEventKind::MemorySize { alias, kib } => Change::Event(Event::MemorySize {
            device: alias,
            size: KiB::new(kib).map(Bytes::from)?,
        }),
    })
}

fn removed(alias: String) -> Change {
    Change::Event(Event::DeviceDeleted {
        device: Some(alias),
        path: String::new(),
    })
}

fn lifecycle(event: u32, detail: u32) -> Option<Change> {
    Some(match (event, detail) {
        (sys::VIR_DOMAIN_EVENT_DEFINED | sys::VIR_DOMAIN_EVENT_UNDEFINED, _) => Change::Defined,
        (sys::VIR_DOMAIN_EVENT_STARTED, sys::VIR_DOMAIN_EVENT_STARTED_WAKEUP)
        | (sys::VIR_DOMAIN_EVENT_RESUMED, _) => Change::Event(Event::Resumed),
        (
            sys::VIR_DOMAIN_EVENT_STARTED,
            sys::VIR_DOMAIN_EVENT_STARTED_MIGRATED
            | sys::VIR_DOMAIN_EVENT_STARTED_RESTORED
            | sys::VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT,
        ) => Change::Arrived,
        (sys::VIR_DOMAIN_EVENT_STARTED, _) => Change::Started,
        // A crashed guest stays paused until its on_crash action.
        (
            sys::VIR_DOMAIN_EVENT_SUSPENDED
            | sys::VIR_DOMAIN_EVENT_PMSUSPENDED
            | sys::VIR_DOMAIN_EVENT_CRASHED,
            _,
        ) => Change::Event(Event::Paused),
        (sys::VIR_DOMAIN_EVENT_STOPPED, detail) => {
            Change::Event(Event::Stopped(stopped(detail).to_owned()))
        }
        // A shutdown in progress: the end of the domain is an event of its own.
        _ => return None,
    })
}

/// Returns the reason for the end of a domain (`virDomainEventStoppedDetailType`).
fn stopped(detail: u32) -> &'static str {
    match detail {
        sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => "shut down",
        sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => "destroyed",
        sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => "crashed",
        sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => "migrated to another node",
        sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => "saved to a file",
        sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => "its emulator failed",
        sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => "replaced by a snapshot",
        sys::VIR_DOMAIN_EVENT_STOPPED_RECREATED => "recreated for its guest",
        _ => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(what: RawEventKind) -> RawEvent {
        RawEvent {
            name: "d".to_owned(),
            uuid: "u".to_owned(),
            what,
        }
    }

    #[tokio::test]
    async fn slow_subscriber_receives_gap() {
        let publisher = Publisher::new(DaemonKind::Host);
        let mut notices = publisher.subscribe();
        for _ in 0..=BACKLOG {
            publisher.publish(notification(RawEventKind::Reboot));
        }
        assert_eq!(notices.next().await, Some(Notice::GAP));
        let next = notices.next().await;
        let expected = Change::Event(Event::Reset);
        assert!(matches!(next, Some(Notice::Change { change, .. }) if change == expected));
        drop(publisher);
        while let Some(notice) = notices.next().await {
            assert_ne!(notice, Notice::GAP);
        }
    }

    #[test]
    fn libvirt_events_are_translated() {
        let removed = change(RawEventKind::VcpuRemoved(2), "d");
        let expected = Event::DeviceDeleted {
            device: Some("vcpu2".to_owned()),
            path: String::new(),
        };
        assert_eq!(removed, Some(Change::Event(expected)));
        let migrated = lifecycle(
            sys::VIR_DOMAIN_EVENT_STOPPED,
            sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED,
        );
        let expected = Event::Stopped("migrated to another node".to_owned());
        assert_eq!(migrated, Some(Change::Event(expected)));
        assert_eq!(lifecycle(sys::VIR_DOMAIN_EVENT_SHUTDOWN, 0), None);
        assert_eq!(lifecycle(u32::MAX, u32::MAX), None);
        let nonsense = RawEventKind::Monitor {
            name: "ACPI_DEVICE_OST".to_owned(),
            details: Some("{".to_owned()),
        };
        assert_eq!(change(nonsense, "d"), None);
        // Out of range.
        let size = RawEventKind::MemorySize {
            alias: "ua-mem0".to_owned(),
            kib: u64::MAX,
        };
        assert_eq!(change(size, "d"), None);
    }
}
