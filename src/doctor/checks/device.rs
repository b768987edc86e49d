//! /dev/kvm.

use super::accounts::{self, Account, KVM, permissions};
use super::finding::{Check, DoctorReport, Place, Remedy, Severity, quoted};
use super::observed::{DeviceNode, HostSurvey, Observed, OpenError};
use super::processor::{self, Extensions, extensions};

/// KVM's numbers (`KVM_MINOR`, linux/miscdevice.h).
const KVM_DEVICE: (u64, u64) = (10, 232);

const CHECK: Check = Check::KvmDevice;

pub(super) fn check(observed: &Observed, diagnosis: &mut DoctorReport) {
    let host = &observed.host;
    match &host.kvm.device {
        DeviceNode::Hidden(why) => {
            diagnosis.unseen(CHECK, format!("/dev/kvm cannot be looked at: {why}"), None);
        }
        DeviceNode::Missing => missing(host, diagnosis),
        DeviceNode::NoDevice => wrong("is no device", diagnosis),
        DeviceNode::Node { number, .. } if *number != KVM_DEVICE => {
            wrong(
                &format!("is device {}:{}, not KVM's", number.0, number.1),
                diagnosis,
            );
        }
        DeviceNode::Node {
            open: Err(OpenError::NoDriver),
            ..
        } => no_driver(host, diagnosis),
        DeviceNode::Node { mode, uid, gid, .. } => {
            rights(observed, (*mode, *uid, *gid), diagnosis);
        }
    }
}

const EMULATED: &str = "Guests run in software emulation, which is far slower.";

fn missing(host: &HostSurvey, diagnosis: &mut DoctorReport) {
    let module = processor::module(host);
    if host.in_container {
        return diagnosis.unseen(
            CHECK,
            "this container has no /dev/kvm; the host may have it",
            Some(Remedy::on_host(
                ["virtnode doctor"],
                "Run it on the host, or here with the host's root mounted: virtnode doctor --root \
                 /host.",
            )),
        );
    }
    if host.kvm.registered {
        return diagnosis.trouble(
            CHECK,
            Severity::Error,
            "KVM is loaded, and /dev/kvm is not there",
            EMULATED,
            Remedy::on_host([format!("mknod /dev/kvm c 10 232 && {}", open_to(KVM))], ""),
        );
    }
    match (extensions(host), module) {
        (Extensions::NotShown(_), _) => {
            diagnosis.ok(CHECK, "none, as the CPU shows no extensions");
        }
        (Extensions::Shown(_), Some(module)) => diagnosis.trouble(
            CHECK,
            Severity::Error,
            format!("/dev/kvm is not there, since {module} is not loaded"),
            EMULATED,
            processor::load(module),
        ),
        _ => diagnosis.trouble(
            CHECK,
            Severity::Warning,
            "there is no /dev/kvm",
            EMULATED,
            Remedy::words(
                Place::Outside,
                "The kernel was not started where it can run guests (on Arm: at EL2), or was built \
                 without KVM: its log says which (dmesg | grep -i kvm).",
            ),
        ),
    }
}

fn wrong(what: &str, diagnosis: &mut DoctorReport) {
    diagnosis.trouble(
        CHECK,
        Severity::Error,
        format!("/dev/kvm {what}"),
        EMULATED,
        Remedy::on_host(
            [format!(
                "rm /dev/kvm && mknod /dev/kvm c 10 232 && {}",
                open_to(KVM)
            )],
            "",
        ),
    );
}

fn no_driver(host: &HostSurvey, diagnosis: &mut DoctorReport) {
    let remedy = match (extensions(host), processor::module(host)) {
        (Extensions::Shown(_), Some(module)) => processor::load(module),
        _ => Remedy::words(
            Place::Outside,
            "The node was made by hand or given to this container; the machine itself has no KVM.",
        ),
    };
    diagnosis.trouble(
        CHECK,
        Severity::Error,
        "/dev/kvm is there, and no driver is behind it",
        EMULATED,
        remedy,
    );
}

/// The cure that lets KVM's group in.
fn open_to(group: &str) -> String {
    format!("chgrp {group} /dev/kvm && chmod 660 /dev/kvm")
}

fn rights(observed: &Observed, (mode, uid, gid): (u32, u32, u32), diagnosis: &mut DoctorReport) {
    let host = &observed.host;
    let owners = format!(
        "{}:{}",
        host.accounts.user_name(uid),
        host.accounts.group_name(gid)
    );
    let seen = format!("/dev/kvm is c{} {owners}", permissions(mode));
    let Some(qemu) = accounts::qemu(observed) else {
        return diagnosis.unseen(
            CHECK,
            format!("{seen}; which user libvirt runs QEMU as is not known"),
            Some(Remedy::words(
                Place::Host,
                "libvirt tells it when it runs (libvirt-connection); else root can read it in \
                 /etc/libvirt/qemu.conf.",
            )),
        );
    };
    if qemu.may_open(mode, uid, gid) {
        return diagnosis.ok(
            CHECK,
            format!("{seen}; {}, whom QEMU runs as, may open it", qemu.name),
        );
    }
    diagnosis.trouble(
        CHECK,
        Severity::Error,
        format!("{seen}; {}, whom libvirt runs QEMU as, may not open it", qemu.name),
        "Guests get no KVM. And libvirt's cache of what QEMU can do is never valid: it starts every \
         QEMU binary again at each question, some seconds for each, instead of answering within \
         milliseconds.",
        cure(host, &qemu),
    );
}

fn cure(host: &HostSurvey, qemu: &Account) -> Remedy {
    let user = quoted(&qemu.name);
    let mut commands = Vec::new();
    match host.accounts.group(KVM) {
        None => {
            commands.push(format!("groupadd --system {KVM}"));
            commands.push(format!("usermod --append --groups {KVM} {user}"));
        }
        Some(kvm) if !qemu.gids.contains(&kvm) => {
            commands.push(format!("usermod --append --groups {KVM} {user}"));
        }
        Some(_) => {}
    }
    // Last, since it is the device's change that makes libvirt look again.
    commands.push(open_to(KVM));
    let mut text = "libvirt notices by itself.".to_owned();
    if host.udev {
        let rule = r#"KERNEL=="kvm", GROUP="kvm", MODE="0660""#;
        commands.push(format!("echo '{rule}' >/etc/udev/rules.d/65-kvm.rules"));
        text.push_str(" The last keeps it so after a reboot.");
    }
    Remedy::on_host(commands, text)
}
