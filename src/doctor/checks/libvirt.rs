//! libvirt: whether it answers, who may ask, its daemons, and what versions lack.

use super::accounts::permissions;
use super::finding::{Check, DoctorReport, Place, Remedy, Severity, quoted};
use super::observed::{HostSurvey, Observed, Socket, SocketState};
use crate::capability::{Eim, Version, is_x86};

/// The sockets of the two ways to run libvirt, by daemon.
const DAEMONS: [(&str, &str); 2] = [
    ("libvirtd", "libvirt-sock"),
    ("virtqemud", "virtqemud-sock"),
];

const LOGS: &str = "virtlogd-sock";

/// The daemon that serves QEMU's domains here: the one that answers, else the one whose socket
/// systemd knows, else the one that is installed.
pub(super) fn daemon(host: &HostSurvey) -> &'static str {
    let listens = |socket: &str| {
        let socket = host.sockets.get(socket);
        socket.is_some_and(|socket| socket.state == SocketState::Listens)
    };
    let by = |wanted: &dyn Fn(&str, &str) -> bool| {
        DAEMONS
            .iter()
            .find(|(daemon, socket)| wanted(daemon, socket))
            .map(|(daemon, _)| *daemon)
    };
    by(&|_, socket| listens(socket))
        .or_else(|| by(&|daemon, _| host.units.contains(&format!("{daemon}.socket"))))
        .or_else(|| by(&|daemon, _| host.daemons.contains(daemon)))
        .unwrap_or("libvirtd")
}

/// Whether the connection is to QEMU of this machine, as a whole.
fn is_system(uri: &str) -> bool {
    uri == "qemu:///system"
}

/// What virsh is to be called with, so that it asks the same libvirt.
pub(super) fn virsh(observed: &Observed) -> String {
    format!("virsh -c {}", quoted(&observed.libvirt.uri))
}

pub(super) fn check_connection(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::LibvirtConnection;
    let libvirt = &observed.libvirt;
    let Some(trouble) = &libvirt.failure else {
        for (question, why) in &libvirt.unanswered {
            diagnosis.trouble(
                check,
                Severity::Warning,
                format!("libvirt answers, but not to {question}: {why}"),
                "Labels that rest on it stay as they were; what changed since does not show.",
                Remedy::on_host(
                    [format!("{} {question}", virsh(observed))],
                    "If this hangs as well, look at the findings about /dev/kvm and domains, and at \
                     libvirt's own log.",
                ),
            );
        }
        if libvirt.unanswered.is_empty() {
            diagnosis.ok(check, format!("{} answers", libvirt.uri));
        }
        return;
    };
    diagnosis.trouble(
        check,
        Severity::Error,
        format!("{}: {}", libvirt.uri, trouble.message),
        "Without libvirt nothing can be read of domains and capabilities, and nothing changed; \
         published labels stay as they are.",
        connection_cure(observed, trouble.code, &trouble.message),
    );
}

fn connection_cure(observed: &Observed, code: &str, message: &str) -> Remedy {
    let host = &observed.host;
    let denied = code == "denied" || message.contains("Permission denied");
    if denied || message.contains("authentication") || message.contains("polkit") {
        return rights(host, message);
    }
    if code == "timeout" {
        return Remedy::on_host(
            [match host.systemd {
                true => format!("systemctl restart {}.service", daemon(host)),
                false => super::passthrough::restart(host),
            }],
            "It is there and does not answer. Domains go on running while it is started anew.",
        );
    }
    if host.in_container {
        return Remedy::words(
            Place::Outside,
            "This is a container: mount the directory of libvirt's socket (/run/libvirt) into it, not \
             the socket itself, which goes stale when libvirt is started anew.",
        );
    }
    if !is_system(&observed.libvirt.uri) {
        return Remedy::words(
            Place::Host,
            "DomainDetails whether the connection is right (--connect, VIRTNODE_CONNECT, connect: in the \
             configuration) and its libvirt runs.",
        );
    }
    start(host)
}

/// How libvirt is started, or installed.
fn start(host: &HostSurvey) -> Remedy {
    let daemon = daemon(host);
    if !host.daemons.contains(daemon) {
        return install(host);
    }
    if host.systemd {
        return Remedy::on_host(
            [format!("systemctl enable --now {daemon}.socket")],
            format!("If it does not stay: journalctl -u {daemon} -n 50"),
        );
    }
    let logs = match host.daemons.contains("virtlogd") && !listens(host, LOGS) {
        true => "virtlogd -d && ",
        false => "",
    };
    Remedy::on_host(
        [format!("{logs}{daemon} -d")],
        "systemd does not run here, so it is started by hand.",
    )
}

fn install(host: &HostSurvey) -> Remedy {
    let is = |names: &[&str]| {
        host.distribution
            .iter()
            .any(|id| names.contains(&id.as_str()))
    };
    let command = if is(&["debian", "ubuntu"]) {
        Some("apt-get install libvirt-daemon-system qemu-system")
    } else if is(&["fedora", "rhel", "centos"]) {
        Some("dnf install libvirt-daemon-kvm")
    } else if is(&["suse", "opensuse", "sles"]) {
        Some("zypper install libvirt-daemon-qemu")
    } else if is(&["arch"]) {
        Some("pacman -S libvirt qemu-base")
    } else {
        None
    };
    Remedy::on_host(command, "libvirt is not installed.")
}

/// How who looked gets the right to use libvirt.
fn rights(host: &HostSurvey, message: &str) -> Remedy {
    if host.in_container {
        return Remedy::words(
            Place::Outside,
            "polkit and libvirt's group know only the host's users: run the container with the \
             number of libvirt's group as a supplemental group where the socket has one, else as \
             uid 0 (without any capability).",
        );
    }
    if message.contains("polkit") && !host.polkit {
        return Remedy::words(
            Place::Host,
            "libvirt leaves it to polkit, which is not installed here: install it, or run this as \
             root.",
        );
    }
    let user = host.accounts.user_name(host.accounts.own_uid);
    let group = host
        .sockets
        .values()
        .find(|socket| socket.gid != 0)
        .map_or_else(|| "libvirt".to_owned(), |s| host.accounts.group_name(s.gid));
    Remedy::on_host(
        [format!(
            "usermod --append --groups {} {}",
            quoted(&group),
            quoted(&user)
        )],
        "It holds from the user's next login on; a service is to be restarted. Or run this as root.",
    )
}

pub(super) fn check_daemons(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::LibvirtDaemons;
    let host = &observed.host;
    if !is_system(&observed.libvirt.uri) {
        let uri = &observed.libvirt.uri;
        return diagnosis.ok(
            check,
            format!("{uri} starts what it needs, or is not of this machine"),
        );
    }
    let serving: Vec<&str> = DAEMONS
        .iter()
        .filter(|(_, socket)| listens(host, socket))
        .map(|(daemon, _)| *daemon)
        .collect();
    if serving.len() > 1 {
        return diagnosis.trouble(
            check,
            Severity::Error,
            "libvirtd and virtqemud both answer",
            "Both would manage the same domains without knowing of each other; libvirt allows one \
             of them for a driver.",
            Remedy::on_host(
                [
                    "systemctl disable --now libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket \
                     libvirtd.service",
                    "systemctl restart virtqemud.service",
                ],
                "This keeps the modular virtqemud, which libvirt recommends; running domains go on.",
            ),
        );
    }
    let unknown = |socket: &Socket| socket.state == SocketState::Unknown;
    if host.in_container || host.sockets.values().any(unknown) {
        return diagnosis.unseen(
            check,
            "which of libvirt's daemons listen does not show in here",
            Some(Remedy::on_host(["virtnode doctor"], "Run it on the host.")),
        );
    }
    if serving.is_empty() {
        return diagnosis.unseen(
            check,
            "neither libvirtd nor virtqemud answers at its socket: see libvirt-connection",
            None,
        );
    }
    if !listens(host, LOGS) && host.logs_to_file != Some(true) {
        let what = match host.sockets.get(LOGS) {
            Some(socket) if socket.state == SocketState::NotAllowed => {
                return diagnosis.unseen(
                    check,
                    format!(
                        "virtlogd's socket may not be used by this user ({})",
                        shown(socket)
                    ),
                    Some(Remedy::on_host(["sudo virtnode doctor"], "")),
                );
            }
            Some(_) => "nobody answers at virtlogd's socket",
            None => "virtlogd has no socket",
        };
        return diagnosis.trouble(
            check,
            Severity::Error,
            what,
            "No domain can be started, unless qemu.conf has stdio_handler = \"file\".",
            Remedy::on_host(
                [match host.systemd {
                    true => "systemctl enable --now virtlogd.socket",
                    false => "virtlogd -d",
                }],
                "",
            ),
        );
    }
    diagnosis.ok(
        check,
        format!("{} and what it needs answer", serving.join(", ")),
    );
}

fn shown(socket: &Socket) -> String {
    format!("{} {}:{}", permissions(socket.mode), socket.uid, socket.gid)
}

fn listens(host: &HostSurvey, socket: &str) -> bool {
    host.sockets
        .get(socket)
        .is_some_and(|socket| socket.state == SocketState::Listens)
}

/// virtio-mem came with these (libvirt's news; QEMU's changelog), on x86.
const VIRTIO_MEM: (Version, Version) = (Version::new(7, 9, 0), Version::new(5, 1, 0));

pub(super) fn check_versions(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Versions;
    let facts = &observed.facts;
    let Some(libvirt) = facts.libvirt_version else {
        return diagnosis.unseen(
            check,
            "libvirt's and QEMU's versions, which only libvirt tells: see libvirt-connection",
            None,
        );
    };
    let Some(qemu) = facts.qemu_version() else {
        return diagnosis.ok(
            check,
            format!("libvirt {libvirt}, with another driver than QEMU's"),
        );
    };
    let both = format!("libvirt {libvirt} with QEMU {qemu}");
    let on_x86 = facts.native_arch().is_some_and(is_x86);
    let mut told = false;
    if on_x86 && let Some(eim @ (Eim::Explicit | Eim::None)) = facts.eim() {
        told = true;
        diagnosis.trouble(
            check,
            Severity::Warning,
            match eim {
                Eim::Explicit => format!("{both} gives a domain more than 255 vCPUs only if its XML says how"),
                _ => format!("{both} gives no domain more than 255 vCPUs"),
            },
            "Above 255 an x86 domain needs an IOMMU with extended interrupt mode (EIM). The maximum \
             counts, not the current number, so it concerns domains that are to grow.",
            Remedy::words(
                Place::Host,
                match eim {
                    Eim::Explicit => {
                        "From libvirt 11.0 on it is added by itself (10.10: if there is no <iommu>). \
                         Until then put into a q35 domain that needs it: <features><ioapic \
                         driver='qemu'/></features> and <devices><iommu model='intel'><driver \
                         intremap='on' eim='on'/></iommu></devices>."
                    }
                    _ => "It takes a newer QEMU and libvirt; from libvirt 11.0 on it is added by itself.",
                },
            ),
        );
    }
    if on_x86 && (libvirt < VIRTIO_MEM.0 || qemu < VIRTIO_MEM.1) {
        told = true;
        diagnosis.trouble(
            check,
            Severity::Warning,
            format!("{both} has no virtio-mem"),
            "Memory of a running domain can only grow, by DIMMs, and cannot be taken back.",
            Remedy::words(Place::Host, "It takes libvirt 7.9 and QEMU 5.1 or newer."),
        );
    }
    if !told {
        let eim = match facts.eim() {
            Some(Eim::Auto) => "; more than 255 vCPUs need nothing in the XML",
            _ => "",
        };
        diagnosis.ok(check, format!("{both}{eim}"));
    }
}
