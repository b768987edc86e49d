//! libvirt: connection, permissions, daemons, and features missing from its version.

use super::accounts::permissions;
use super::finding::{Check, DoctorReport, Place, Remedy, Severity, quoted};
use super::observed::{HostSurvey, Observed, SocketState};
use crate::capability::{Eim, Version, is_x86};

/// Monolithic and modular libvirt: daemon and socket.
const DAEMONS: [(&str, &str); 2] = [
    ("libvirtd", "libvirt-sock"),
    ("virtqemud", "virtqemud-sock"),
];

/// Finding about a libvirt that the configuration says does not exist.
const ABSENT: &str = "this node has no libvirt of its own (connect: none)";

const LOG_SOCKET: &str = "virtlogd-sock";

/// Returns the daemon that serves QEMU's domains here: the one that answers, else the one whose
/// socket unit exists, else the one that is installed.
fn daemon(host: &HostSurvey) -> &'static str {
    let find = |is_candidate: &dyn Fn(&str, &str) -> bool| {
        DAEMONS
            .iter()
            .find(|(daemon, socket)| is_candidate(daemon, socket))
            .map(|(daemon, _)| *daemon)
    };
    find(&|_, socket| listens(host, socket))
        .or_else(|| find(&|daemon, _| host.units.contains(&format!("{daemon}.socket"))))
        .or_else(|| find(&|daemon, _| host.daemons.contains(daemon)))
        .unwrap_or("libvirtd")
}

/// True if the connection is to this machine's system QEMU.
fn is_system(uri: &str) -> bool {
    uri == "qemu:///system"
}

/// Returns the virsh command that connects to the same libvirt.
pub(super) fn virsh(observed: &Observed) -> String {
    format!("virsh -c {}", quoted(&observed.libvirt.uri))
}

/// Returns the command that restarts libvirt.
pub(super) fn restart(host: &HostSurvey) -> String {
    let daemon = daemon(host);
    if host.systemd {
        format!("systemctl restart {daemon}.service")
    } else {
        format!("kill $(cat /run/{daemon}.pid) && {daemon} -d")
    }
}

pub(super) fn check_connection(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::LibvirtConnection;
    let libvirt = &observed.libvirt;
    if libvirt.is_absent {
        return report.ok(check, ABSENT);
    }
    let Some(failure) = &libvirt.failure else {
        for (query, why) in &libvirt.unanswered {
            report.problem(
                check,
                Severity::Warning,
                format!("libvirt answers, but not to {query}: {why}"),
                "Labels derived from this query keep their last values and do not follow changes.",
                Remedy::on_host(
                    [format!("{} {query}", virsh(observed))],
                    "If this hangs as well, see the findings about /dev/kvm and domains, and \
                     libvirt's own log.",
                ),
            );
        }
        if libvirt.unanswered.is_empty() {
            report.ok(check, format!("{} answers", libvirt.uri));
        }
        return;
    };
    report.problem(
        check,
        Severity::Error,
        format!("{}: {}", libvirt.uri, failure.message),
        "Without libvirt, domains and capabilities cannot be read and nothing can be changed; \
         published labels keep their values.",
        reconnect(observed, failure.code, &failure.message),
    );
}

fn reconnect(observed: &Observed, code: &str, message: &str) -> Remedy {
    let host = &observed.host;
    let is_denied = code == "denied" || message.contains("Permission denied");
    if is_denied || message.contains("authentication") || message.contains("polkit") {
        return grant_permission(host, message);
    }
    if code == "timeout" {
        return Remedy::on_host(
            [restart(host)],
            "libvirt is running but does not answer. Domains keep running while it restarts.",
        );
    }
    if host.in_container {
        return Remedy::words(
            Place::Outside,
            "This is a container: mount the directory of libvirt's socket (/run/libvirt), not the \
             socket itself, which becomes stale when libvirt restarts.",
        );
    }
    if !is_system(&observed.libvirt.uri) {
        return Remedy::words(
            Place::Host,
            "Check that the URI is correct (--connect, VIRTNODE_CONNECT, connect: in the \
             configuration) and that its libvirt is running.",
        );
    }
    start(host)
}

fn start(host: &HostSurvey) -> Remedy {
    let daemon = daemon(host);
    if !host.daemons.contains(daemon) {
        return install(host);
    }
    if host.systemd {
        return Remedy::on_host(
            [format!("systemctl enable --now {daemon}.socket")],
            format!("If it exits again: journalctl -u {daemon} -n 50"),
        );
    }
    let needs_log_daemon = host.daemons.contains("virtlogd") && !listens(host, LOG_SOCKET);
    let log_daemon = if needs_log_daemon {
        "virtlogd -d && "
    } else {
        ""
    };
    Remedy::on_host(
        [format!("{log_daemon}{daemon} -d")],
        "This machine does not run systemd, so start libvirt by hand.",
    )
}

fn install(host: &HostSurvey) -> Remedy {
    const COMMANDS: [(&[&str], &str); 4] = [
        (
            &["debian", "ubuntu"],
            "apt-get install libvirt-daemon-system qemu-system",
        ),
        (
            &["fedora", "rhel", "centos"],
            "dnf install libvirt-daemon-kvm",
        ),
        (
            &["suse", "opensuse", "sles"],
            "zypper install libvirt-daemon-qemu",
        ),
        (&["arch"], "pacman -S libvirt qemu-base"),
    ];
    let is_one_of = |names: &[&str]| {
        host.distribution
            .iter()
            .any(|id| names.contains(&id.as_str()))
    };
    let command = COMMANDS.iter().find(|(names, _)| is_one_of(names));
    Remedy::on_host(
        command.map(|(_, command)| *command),
        "libvirt is not installed.",
    )
}

/// Returns the remedy for a user who is not allowed to use libvirt.
fn grant_permission(host: &HostSurvey, message: &str) -> Remedy {
    if host.in_container {
        return Remedy::words(
            Place::Outside,
            "polkit and libvirt's group refer to the host's users. If the socket has a group, run \
             the container with that group's number as a supplemental group; otherwise run it as uid \
             0 without any capability.",
        );
    }
    if message.contains("polkit") && !host.polkit {
        return Remedy::words(
            Place::Host,
            "libvirt delegates the decision to polkit, which is not installed: install it, or run \
             virtnode as root.",
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
        "This takes effect at the user's next login; restart a service. Or run virtnode as root.",
    )
}

pub(super) fn check_daemons(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::LibvirtDaemons;
    let host = &observed.host;
    if observed.libvirt.is_absent {
        return report.ok(check, ABSENT);
    }
    if !is_system(&observed.libvirt.uri) {
        let uri = &observed.libvirt.uri;
        return report.ok(
            check,
            format!("{uri} starts its own daemons, or is on another machine"),
        );
    }
    let serving: Vec<&str> = DAEMONS
        .iter()
        .filter(|(_, socket)| listens(host, socket))
        .map(|(daemon, _)| *daemon)
        .collect();
    if serving.len() > 1 {
        return report.problem(
            check,
            Severity::Error,
            "libvirtd and virtqemud both answer",
            "Both manage the same domains without coordinating; libvirt supports only one of them \
             per driver.",
            Remedy::on_host(
                [
                    "systemctl disable --now libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket \
                     libvirtd.service",
                    "systemctl restart virtqemud.service",
                ],
                "This keeps the modular virtqemud, which libvirt recommends; running domains are not \
                 affected.",
            ),
        );
    }
    let mut states = host.sockets.values().map(|socket| socket.state);
    if host.in_container || states.any(|state| state == SocketState::Unknown) {
        return report.unseen(
            check,
            "this process cannot determine which daemons of libvirt listen",
            Some(Remedy::on_host(["virtnode doctor"], "Run it on the host.")),
        );
    }
    if serving.is_empty() {
        return report.unseen(
            check,
            "neither libvirtd nor virtqemud answers at its socket: see libvirt-connection",
            None,
        );
    }
    if listens(host, LOG_SOCKET) || host.logs_to_file == Some(true) {
        return report.ok(
            check,
            format!(
                "{} and the daemons that it needs answer",
                serving.join(", ")
            ),
        );
    }
    let what = match host.sockets.get(LOG_SOCKET) {
        Some(socket) if socket.state == SocketState::NotAllowed => {
            let mode = permissions(socket.mode);
            return report.unseen(
                check,
                format!(
                    "this user is not allowed to use virtlogd's socket ({mode} {}:{})",
                    socket.uid, socket.gid
                ),
                Some(Remedy::on_host(["sudo virtnode doctor"], "")),
            );
        }
        Some(_) => "no process listens on virtlogd's socket",
        None => "virtlogd's socket does not exist",
    };
    let command = if host.systemd {
        "systemctl enable --now virtlogd.socket"
    } else {
        "virtlogd -d"
    };
    report.problem(
        check,
        Severity::Error,
        what,
        "No domain can be started, unless qemu.conf has stdio_handler = \"file\".",
        Remedy::on_host([command], ""),
    );
}

fn listens(host: &HostSurvey, socket: &str) -> bool {
    host.sockets
        .get(socket)
        .is_some_and(|socket| socket.state == SocketState::Listens)
}

/// First versions of libvirt and QEMU with virtio-mem on x86 (libvirt's news; QEMU's changelog).
const VIRTIO_MEM: (Version, Version) = (Version::new(7, 9, 0), Version::new(5, 1, 0));

pub(super) fn check_versions(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::Versions;
    let facts = &observed.facts;
    let Some(libvirt) = facts.libvirt_version else {
        return report.unseen(
            check,
            "only libvirt reports its version and QEMU's: see libvirt-connection",
            None,
        );
    };
    let Some(qemu) = facts.qemu_version() else {
        return report.ok(
            check,
            format!("libvirt {libvirt}, with a driver other than QEMU's"),
        );
    };
    let both = format!("libvirt {libvirt} with QEMU {qemu}");
    let on_x86 = facts.native_arch().is_some_and(is_x86);
    let eim = facts.eim();
    let missing_eim = match eim {
        Some(Eim::Explicit) => Some((
            format!("{both} allows more than 255 vCPUs only with additional XML"),
            "libvirt 11.0 and later adds the IOMMU by itself (10.10: if the domain has no <iommu>). \
             With an older one, add this to a q35 domain that needs it: <features><ioapic \
             driver='qemu'/></features> and <devices><iommu model='intel'><driver intremap='on' \
             eim='on'/></iommu></devices>.",
        )),
        Some(Eim::None) => Some((
            format!("{both} does not allow more than 255 vCPUs"),
            "Install newer versions of both; libvirt 11.0 and later adds the IOMMU by itself.",
        )),
        Some(Eim::Auto) | None => None,
    };
    if let Some((what, remedy)) = missing_eim.filter(|_| on_x86) {
        report.problem(
            check,
            Severity::Warning,
            what,
            "Above 255 vCPUs an x86 domain needs an IOMMU with extended interrupt mode (EIM). The \
             domain's maximum counts, not its current number, so this affects domains that are \
             meant to grow.",
            Remedy::words(Place::Host, remedy),
        );
    }
    if on_x86 && (libvirt < VIRTIO_MEM.0 || qemu < VIRTIO_MEM.1) {
        report.problem(
            check,
            Severity::Warning,
            format!("{both} has no virtio-mem"),
            "The memory of a running domain can only grow, by DIMMs, and cannot be reduced.",
            Remedy::words(Place::Host, "Install libvirt 7.9 and QEMU 5.1, or newer."),
        );
    }
    if !report.covers(check) {
        let suffix = if eim == Some(Eim::Auto) {
            "; more than 255 vCPUs need no additional XML"
        } else {
            ""
        };
        report.ok(check, format!("{both}{suffix}"));
    }
}
