//! /dev/kvm.

use super::accounts::{self, Account, KVM, permissions};
use super::finding::{Check, DoctorReport, Place, Remedy, Severity, quoted};
use super::libvirt::restart;
use super::observed::{DeviceNode, HostSurvey, Observed, OpenError};
use super::processor::{self, Extensions, extensions};
use crate::capability::Accelerator;

/// Major and minor number of KVM's device (`KVM_MINOR`, linux/miscdevice.h).
const KVM_DEVICE: (u64, u64) = (10, 232);

const CHECK: Check = Check::KvmDevice;

const EMULATED: &str = "Guests run in software emulation, which is far slower.";

pub(super) fn check(observed: &Observed, report: &mut DoctorReport) {
    let host = &observed.host;
    match &host.kvm.device {
        DeviceNode::Hidden(why) => {
            report.unseen(CHECK, format!("/dev/kvm cannot be inspected: {why}"), None);
        }
        DeviceNode::Missing if observed.facts.accelerator() == Some(Accelerator::Kvm) => report.ok(
            CHECK,
            "not visible here; libvirt offers KVM, so QEMU can open it",
        ),
        DeviceNode::Missing => check_missing(host, report),
        DeviceNode::NoDevice => report_wrong("is not a device", report),
        DeviceNode::Node { number, .. } if *number != KVM_DEVICE => {
            report_wrong(
                &format!("is device {}:{}, not KVM's", number.0, number.1),
                report,
            );
        }
        DeviceNode::Node {
            open: Err(OpenError::NoDriver),
            ..
        } => report_no_driver(host, report),
        DeviceNode::Node { mode, uid, gid, .. } => {
            check_permissions(observed, (*mode, *uid, *gid), report);
        }
    }
}

fn check_missing(host: &HostSurvey, report: &mut DoctorReport) {
    if host.in_container {
        return report.unseen(
            CHECK,
            "this container has no /dev/kvm; the host may have one",
            Some(Remedy::on_host(
                ["virtnode doctor"],
                "Run it on the host, or here with the host's root mounted: virtnode doctor --root \
                 /host.",
            )),
        );
    }
    if host.kvm.registered {
        return report.problem(
            CHECK,
            Severity::Error,
            "KVM is loaded, but /dev/kvm does not exist",
            EMULATED,
            Remedy::on_host(
                [format!("mknod /dev/kvm c 10 232 && {}", open_to_group())],
                "",
            ),
        );
    }
    match (extensions(host), processor::module(host)) {
        (Extensions::Absent(_), _) => {
            report.ok(CHECK, "none, since the CPU has no virtualization extensions");
        }
        (Extensions::Present(_), Some(module)) => report.problem(
            CHECK,
            Severity::Error,
            format!("/dev/kvm does not exist because {module} is not loaded"),
            EMULATED,
            processor::load(module),
        ),
        _ => report.problem(
            CHECK,
            Severity::Warning,
            "/dev/kvm does not exist",
            EMULATED,
            Remedy::words(
                Place::Outside,
                "The kernel was built without KVM, or was not started in a mode that can run guests \
                 (on Arm: EL2). Its log shows which: dmesg | grep -i kvm.",
            ),
        ),
    }
}

fn report_wrong(what: &str, report: &mut DoctorReport) {
    report.problem(
        CHECK,
        Severity::Error,
        format!("/dev/kvm {what}"),
        EMULATED,
        Remedy::on_host(
            [format!(
                "rm /dev/kvm && mknod /dev/kvm c 10 232 && {}",
                open_to_group()
            )],
            "",
        ),
    );
}

fn report_no_driver(host: &HostSurvey, report: &mut DoctorReport) {
    let remedy = match (extensions(host), processor::module(host)) {
        (Extensions::Present(_), Some(module)) => processor::load(module),
        _ => Remedy::words(
            Place::Outside,
            "The node was created by hand or passed to this container; the machine itself has no \
             KVM.",
        ),
    };
    report.problem(
        CHECK,
        Severity::Error,
        "/dev/kvm exists but has no driver",
        EMULATED,
        remedy,
    );
}

/// Returns the command that grants KVM's group access.
fn open_to_group() -> String {
    format!("chgrp {KVM} /dev/kvm && chmod 660 /dev/kvm")
}

fn check_permissions(
    observed: &Observed,
    (mode, uid, gid): (u32, u32, u32),
    report: &mut DoctorReport,
) {
    let host = &observed.host;
    let owners = format!(
        "{}:{}",
        host.accounts.user_name(uid),
        host.accounts.group_name(gid)
    );
    let seen = format!("/dev/kvm is c{} {owners}", permissions(mode));
    let Some(qemu) = accounts::qemu(observed) else {
        return report.unseen(
            CHECK,
            format!("{seen}; the user that libvirt runs QEMU as is unknown"),
            Some(Remedy::words(
                Place::Host,
                "libvirt reports that user while it is running (see libvirt-connection); otherwise \
                 root can read it in /etc/libvirt/qemu.conf.",
            )),
        );
    };
    if qemu.may_open(mode, uid, gid) && observed.facts.accelerator() == Some(Accelerator::Tcg) {
        return report.problem(
            CHECK,
            Severity::Warning,
            format!(
                "{seen}; QEMU's user {} can open it, but libvirt offers no KVM, and the label \
                 virtnode.io/accelerator is tcg",
                qemu.name
            ),
            EMULATED,
            Remedy::on_host(
                [restart(host)],
                "libvirt then asks QEMU again. If it still offers no KVM, QEMU's own error is in \
                 libvirt's log, or QEMU was built without KVM.",
            ),
        );
    }
    if qemu.may_open(mode, uid, gid) {
        return report.ok(
            CHECK,
            format!("{seen}; QEMU's user {} can open it", qemu.name),
        );
    }
    report.problem(
        CHECK,
        Severity::Error,
        format!("{seen}; QEMU's user {} cannot open it", qemu.name),
        "Guests get no KVM. libvirt also never considers its cache of QEMU's capabilities valid: for \
         each query it starts every QEMU binary again, which takes seconds each instead of \
         milliseconds.",
        grant_access(host, &qemu),
    );
}

fn grant_access(host: &HostSurvey, qemu: &Account) -> Remedy {
    let join = format!("usermod --append --groups {KVM} {}", quoted(&qemu.name));
    let mut commands = Vec::new();
    match host.accounts.group(KVM) {
        None => commands.extend([format!("groupadd --system {KVM}"), join]),
        Some(kvm) if !qemu.gids.contains(&kvm) => commands.push(join),
        Some(_) => {}
    }
    // Last, since libvirt reads the groups again when the device changes.
    commands.push(open_to_group());
    let mut text = "libvirt notices the change by itself.".to_owned();
    if host.udev {
        let rule = r#"KERNEL=="kvm", GROUP="kvm", MODE="0660""#;
        commands.push(format!("echo '{rule}' >/etc/udev/rules.d/65-kvm.rules"));
        text.push_str(" The last command makes it permanent.");
    }
    Remedy::on_host(commands, text)
}
