//! libvirt's events as what they mean for hotplug.

use std::time::Instant;

use tokio::sync::broadcast;
use tracing::{debug, warn};
use virt::sys;

use crate::ffi::{Happening, Told};
use crate::hotplug::Event;
use crate::hypervisor::{Change, DomainRef, Notice, Notices};
use crate::units::{Bytes, KiB};

/// How many notices a slow listener can be behind before it is told of a gap instead.
const BACKLOG: usize = 1024;

/// The monitor events that are asked for, as a regular expression.
pub(super) fn monitor_events() -> String {
    format!("^({})$", Event::MONITOR.join("|"))
}

/// Tells notices to all who listen.
#[derive(Clone)]
pub(super) struct Announcer(broadcast::Sender<Notice>);

impl Announcer {
    pub(super) fn new() -> Self {
        Self(broadcast::Sender::new(BACKLOG))
    }

    pub(super) fn subscribe(&self) -> Notices {
        Notices::new(self.0.subscribe())
    }

    /// Tells of a gap.
    pub(super) fn gap(&self) {
        self.send(Notice::Gap);
    }

    /// Tells what libvirt told, if it means something here.
    pub(super) fn announce(&self, told: Told) {
        let at = Instant::now();
        let Told { name, uuid, what } = told;
        let Some(change) = change(what, &name) else {
            return;
        };
        let domain = DomainRef::on_host(name, uuid);
        self.send(Notice::Change { domain, at, change });
    }

    /// An event that libvirt does not tell. Each is told in another way too, but for a few, of
    /// which only QEMU tells.
    pub(super) fn refused(&self, event: &str, reason: &str) {
        match event {
            "monitor" => warn!(
                reason,
                "libvirt does not pass on QEMU's events: the guest's answers to hotplug stay unknown"
            ),
            _ => debug!(event, reason, "libvirt does not tell this event"),
        }
    }

    fn send(&self, notice: Notice) {
        // An error means that nobody listens.
        drop(self.0.send(notice));
    }
}

fn change(what: Happening, domain: &str) -> Option<Change> {
    Some(match what {
        Happening::Monitor { name, details } => {
            match Event::from_monitor(&name, details.as_deref()) {
                Ok(event) => Change::Event(event?),
                Err(error) => {
                    warn!(domain, %error, "an event of QEMU was not understood");
                    return None;
                }
            }
        }
        Happening::Lifecycle { event, detail } => return lifecycle(event, detail),
        Happening::Reboot => Change::Event(Event::Reset),
        Happening::DeviceRemoved(alias) => removed(alias),
        // libvirt names a vCPU's device so (qemuDomainVcpuPrivate, `vcpu%zu`)
        Happening::VcpuRemoved(vcpu) => removed(format!("vcpu{vcpu}")),
        Happening::DeviceRemovalFailed(device) => Change::Event(Event::UnplugFailed { device }),
        Happening::Agent(connected) => Change::Agent { connected },
        Happening::MemorySize { alias, kib } => Change::Event(Event::MemorySize {
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
        (sys::VIR_DOMAIN_EVENT_STARTED, _) => Change::Started,
        // A guest that crashed is held until it is decided what becomes of it.
        (
            sys::VIR_DOMAIN_EVENT_SUSPENDED
            | sys::VIR_DOMAIN_EVENT_PMSUSPENDED
            | sys::VIR_DOMAIN_EVENT_CRASHED,
            _,
        ) => Change::Event(Event::Paused),
        (sys::VIR_DOMAIN_EVENT_STOPPED, detail) => {
            Change::Event(Event::Stopped(stopped(detail).to_owned()))
        }
        // A shutdown that has begun is not one that is done.
        _ => return None,
    })
}

/// Why a domain ended (`virDomainEventStoppedDetailType`).
fn stopped(detail: u32) -> &'static str {
    match detail {
        sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => "shut down",
        sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => "destroyed",
        sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => "crashed",
        sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => "migrated to another node",
        sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => "saved to a file",
        sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => "its emulator failed",
        sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT => "replaced by a snapshot",
        sys::VIR_DOMAIN_EVENT_STOPPED_RECREATED => "started anew by its guest",
        _ => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(what: Happening) -> Told {
        Told {
            name: "d".to_owned(),
            uuid: "u".to_owned(),
            what,
        }
    }

    #[tokio::test]
    async fn who_is_too_slow_is_told_of_a_gap() {
        let announcer = Announcer::new();
        let mut notices = announcer.subscribe();
        for _ in 0..=BACKLOG {
            announcer.announce(told(Happening::Reboot));
        }
        assert_eq!(notices.next().await, Some(Notice::Gap));
        let next = notices.next().await;
        let expected = Change::Event(Event::Reset);
        assert!(matches!(next, Some(Notice::Change { change, .. }) if change == expected));
        drop(announcer);
        while let Some(notice) = notices.next().await {
            assert_ne!(notice, Notice::Gap);
        }
    }

    #[test]
    fn libvirts_word_is_put_into_ours() {
        let removed = change(Happening::VcpuRemoved(2), "d");
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
        let nonsense = Happening::Monitor {
            name: "ACPI_DEVICE_OST".to_owned(),
            details: Some("{".to_owned()),
        };
        assert_eq!(change(nonsense, "d"), None);
        // More than there can be.
        let size = Happening::MemorySize {
            alias: "ua-mem0".to_owned(),
            kib: u64::MAX,
        };
        assert_eq!(change(size, "d"), None);
    }
}
