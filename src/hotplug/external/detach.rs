//! The watch of a device that left the definition and not the running domain.
//!
//! libvirt reports such a detach as done once its request has waited five seconds for the guest, and
//! deletes the device from the definition. The guest still has it.

use super::change::{ChangeNumber, ChangedResource, ExternalAction, ExternalChange};
use super::clock::GraceClock;
use super::watch::FollowLooks;
use crate::domain::{AttachedDevice, AttachedKind, is_uuid};
use crate::hotplug::{Diagnosis, Evidence, Source, Verdict};
use crate::units::{Timestamp, bounded};

/// Maximum size of a device's name in bytes of JSON.
const MAX_DEVICE: usize = 128;

#[derive(Debug)]
pub(super) struct DetachWatch {
    pub(super) number: ChangeNumber,
    pub(super) change: ExternalChange,
    pub(super) device: AttachedDevice,
    pub(super) clock: GraceClock,
    follow: FollowLooks,
    evidence: Vec<Evidence>,
}

impl From<AttachedKind> for ChangedResource {
    fn from(kind: AttachedKind) -> Self {
        match kind {
            AttachedKind::Disk => Self::Disk,
            AttachedKind::Interface => Self::Interface,
        }
    }
}

/// Returns a device's name for people: `vda (ua-vol1)`.
fn title(device: &AttachedDevice) -> String {
    let title = match &device.alias {
        Some(alias) => format!("{} ({alias})", device.key),
        None => device.key.clone(),
    };
    bounded(&title, MAX_DEVICE)
}

impl DetachWatch {
    pub(super) fn new(
        number: ChangeNumber,
        device: AttachedDevice,
        noticed: Timestamp,
        clock: GraceClock,
        found: bool,
    ) -> Self {
        let (resource, action) = (device.kind.into(), ExternalAction::Detach);
        let mut change = ExternalChange::new(resource, action, noticed, found);
        change.device = Some(title(&device));
        let mut watch = Self {
            number,
            change,
            device,
            clock,
            follow: FollowLooks::start(noticed),
            evidence: Vec::new(),
        };
        let kind = watch.device.kind;
        let device = title(&watch.device);
        watch.change.awaiting = Some(format!("the guest to release {kind} {device}"));
        watch.add(
            noticed,
            format!("{kind} {device}: in the running domain, not in the definition"),
        );
        watch
    }

    fn add(&mut self, time: Timestamp, detail: String) {
        let source = Source::LiveXml;
        self.evidence.push(Evidence {
            source,
            detail,
            time,
        });
    }

    pub(super) fn is_open(&self) -> bool {
        self.change.verdict.is_none()
    }

    pub(super) fn next_look(&self, now: Timestamp) -> Timestamp {
        if self.is_open() {
            self.clock.next_look(now)
        } else {
            self.follow.next()
        }
    }

    /// The guest was reset: QEMU then completes the removal.
    pub(super) fn reset(&mut self, at: Timestamp) {
        self.clock.restart(at);
        self.follow = FollowLooks::start(at);
    }

    /// Records an observation in which the running domain still has the device. Returns true if the
    /// record changed.
    pub(super) fn still_there(&mut self, at: Timestamp, now: Timestamp, uuid: &str) -> bool {
        let is_last = self.clock.runs() && at >= self.clock.deadline(now);
        self.clock.looked(at);
        self.follow.looked(at);
        if !self.is_open() || !is_last {
            return false;
        }
        let message = format!(
            "the definition no longer has {} {}, and the guest has not released it: the running domain \
             still has it",
            self.device.kind,
            title(&self.device)
        );
        self.conclude(
            Verdict::GuestSilent,
            &message,
            Some(self.diagnosis(uuid)),
            now,
        );
        true
    }

    /// QEMU or libvirt reported that the guest does not release the device.
    pub(super) fn refused(&mut self, now: Timestamp, uuid: &str) -> bool {
        if !self.is_open() {
            return false;
        }
        self.evidence.push(Evidence {
            source: Source::DeviceEvent,
            detail: format!("{} was not released", title(&self.device)),
            time: now,
        });
        let message = format!(
            "the guest refused to release {} {}",
            self.device.kind,
            title(&self.device)
        );
        self.conclude(
            Verdict::GuestRefused,
            &message,
            Some(self.diagnosis(uuid)),
            now,
        );
        true
    }

    /// The running domain no longer has the device.
    pub(super) fn released(&mut self, now: Timestamp) {
        let device = title(&self.device);
        let kind = self.device.kind;
        self.add(
            now,
            format!("{kind} {device}: no longer in the running domain"),
        );
        self.conclude(
            Verdict::Verified,
            &format!("the guest released {kind} {device}"),
            None,
            now,
        );
    }

    /// The domain ended before the guest released the device.
    pub(super) fn ended(&mut self, now: Timestamp) {
        let message = "the domain ended before its guest released the device";
        self.conclude(Verdict::DomainNotRunning, message, None, now);
    }

    fn conclude(
        &mut self,
        verdict: Verdict,
        message: &str,
        diagnosis: Option<Diagnosis>,
        now: Timestamp,
    ) {
        let evidence = self.evidence.clone();
        self.change
            .conclude(verdict, message, evidence, diagnosis, now);
        self.follow = FollowLooks::start(now);
    }

    fn diagnosis(&self, uuid: &str) -> Diagnosis {
        let kind = self.device.kind;
        let alias = self.device.alias.as_deref().filter(|alias| is_word(alias));
        let again = match alias {
            // Neither can contain anything that a shell would interpret.
            Some(alias) if is_uuid(uuid) => {
                format!("virsh detach-device-alias {uuid} {alias} --live")
            }
            _ => "virsh detach-device --live".to_owned(),
        };
        Diagnosis::new(
            "detach-pending",
            format!(
                "the request waits for the guest. A client that asks again with the definition \
                 (--config, as KubeVirt does) fails with 'device not found', because only the running \
                 domain still has the {kind}"
            ),
            format!(
                "in the guest: it must have booted, and its kernel must handle the removal (pciehp for \
                 PCI Express root ports, acpiphp otherwise); unmount the disk or take the interface \
                 down if it is in use. Then ask again for the running domain only: {again}. A reset of \
                 the guest completes the removal as well"
            ),
        )
    }
}

/// True if a name has only characters that libvirt allows in an alias.
fn is_word(alias: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    !alias.is_empty() && !alias.starts_with('-') && alias.chars().all(allowed)
}
