//! Running domains: whether their guests have and use what they were given.

use std::collections::BTreeMap;

use super::finding::{Check, DoctorReport, Finding, Place, Remedy, Severity, counted, quoted};
use super::libvirt::virsh;
use super::observed::{AgentAnswer, DomainDetails, Observed, ObservedDomain};
use crate::domain::{AgentChannel, AliasedDevice, IdSet};

/// The domains that could be looked at closely.
fn looked(domains: &[ObservedDomain]) -> impl Iterator<Item = (&ObservedDomain, &DomainDetails)> {
    domains
        .iter()
        .filter_map(|seen| Some((seen, &**seen.details.as_ref().ok()?)))
}

/// What a command calls a domain: its name where no shell and no virsh reads that as anything
/// else, its UUID otherwise.
fn called(domain: &ObservedDomain) -> &str {
    let name = domain.name.as_str();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    // virsh takes a number for an ID.
    let is_plain = name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(plain);
    if is_plain { name } else { &domain.uuid }
}

fn warn(
    diagnosis: &mut DoctorReport,
    (check, severity): (Check, Severity),
    domain: &ObservedDomain,
    what: impl Into<String>,
    why: &str,
    remedy: Remedy,
) {
    diagnosis.findings.push(Finding {
        check,
        severity,
        domain: Some(domain.name.clone()),
        what: what.into(),
        why: Some(why.to_owned()),
        remedy: Some(remedy),
    });
}

pub(super) fn check(observed: &Observed, diagnosis: &mut DoctorReport) {
    const CHECKS: [Check; 5] = [
        Check::Domains,
        Check::GuestAgent,
        Check::VcpusOnline,
        Check::VirtioMem,
        Check::MachineTypes,
    ];
    let domains = match &observed.domains {
        Ok(domains) => domains,
        Err(why) => {
            for check in CHECKS {
                diagnosis.unseen(check, format!("the running domains: {why}"), None);
            }
            return;
        }
    };
    if domains.is_empty() {
        for check in CHECKS {
            diagnosis.ok(check, "no domain runs here");
        }
        return;
    }
    check_looks(observed, domains, diagnosis);
    check_agents(observed, domains, diagnosis);
    check_vcpus(domains, diagnosis);
    check_virtio_mem(domains, diagnosis);
    check_machine_types(observed, domains, diagnosis);
    let unlooked = domains.iter().filter(|seen| seen.details.is_err()).count();
    if unlooked > 0 {
        for check in CHECKS.into_iter().skip(1) {
            let what = format!(
                "{} that libvirt did not tell of: see domains",
                counted(unlooked, "domain")
            );
            diagnosis.unseen(check, what, None);
        }
    }
}

fn check_looks(observed: &Observed, domains: &[ObservedDomain], diagnosis: &mut DoctorReport) {
    let check = Check::Domains;
    let mut told = false;
    for seen in domains {
        if let Err(why) = &seen.details {
            told = true;
            warn(
                diagnosis,
                (check, Severity::Warning),
                seen,
                format!("libvirt does not tell of it: {why}"),
                "Something holds it: a job that does not end, or a QEMU that does not answer. It \
                 cannot be changed meanwhile, and may not be stopped in good order.",
                Remedy::on_host(
                    [format!("{} domjobinfo {}", virsh(observed), called(seen))],
                    "It shows a job that is under way, such as a migration or a backup. If there is \
                     none and this does not pass, look at QEMU's log in /var/log/libvirt/qemu.",
                ),
            );
        }
    }
    if !told {
        let what = format!("libvirt answers about {}", counted(domains.len(), "domain"));
        diagnosis.ok(check, what);
    }
}

fn check_agents(observed: &Observed, domains: &[ObservedDomain], diagnosis: &mut DoctorReport) {
    let check = Check::GuestAgent;
    let why = "Whether the guest uses what it is given can be told from outside only in part, and \
               vCPUs cannot be brought online for it.";
    let mut answering = 0;
    let mut told = false;
    for (seen, look) in looked(domains) {
        let (what, remedy) = match (&look.agent, look.domain.agent) {
            (AgentAnswer::Answered(_), _) => {
                answering += 1;
                continue;
            }
            // A domain that is held, or still boots its firmware, is none of this check's business.
            _ if !seen.state.runs() => continue,
            (_, AgentChannel::Absent) => (
                "it has no channel for a guest agent".to_owned(),
                attach_channel(observed, seen, look),
            ),
            // Of a channel that was plugged libvirt knows no state at first.
            (AgentAnswer::Silent(why), _) if why.contains("agent is not connected") => nobody(),
            (_, AgentChannel::Disconnected) => nobody(),
            (AgentAnswer::Silent(why), _) => (
                format!("its guest agent does not answer: {why}"),
                Remedy::in_guest(
                    ["systemctl restart qemu-guest-agent"],
                    "If the guest does not do even that, it hangs: look at its console.",
                ),
            ),
            (AgentAnswer::NotAsked, _) => continue,
        };
        told = true;
        warn(
            diagnosis,
            (check, Severity::Warning),
            seen,
            what,
            why,
            remedy,
        );
    }
    if !told {
        diagnosis.ok(
            check,
            match answering {
                0 => "no guest runs that could be asked".to_owned(),
                answering => format!("{} answering", counted(answering, "agent")),
            },
        );
    }
}

/// Nobody in the guest listens.
fn nobody() -> (String, Remedy) {
    (
        "nobody in the guest has opened the guest agent's channel".to_owned(),
        Remedy::in_guest(["systemctl enable --now qemu-guest-agent"], INSTALL),
    )
}

const INSTALL: &str = "The guest needs the package qemu-guest-agent (Windows: virtio-win's guest \
                       tools), and its service running.";

/// How a domain gets a channel: while it runs if it has a controller for it, since such a controller
/// cannot be plugged (libvirt 11.3: "no virtio-serial controllers are available"); else with its next
/// start, if it has a definition.
fn attach_channel(observed: &Observed, seen: &ObservedDomain, look: &DomainDetails) -> Remedy {
    let is_controller = |device: &AliasedDevice| device.alias.starts_with("virtio-serial");
    let now = look.domain.devices.iter().any(is_controller);
    let (flags, text) = match (now, look.persistent) {
        (true, true) => ("--live --config", INSTALL.to_owned()),
        (true, false) => ("--live", INSTALL.to_owned()),
        (false, true) => (
            "--config",
            format!(
                "It holds from the domain's next start, not from a reboot of the guest. {INSTALL}"
            ),
        ),
        (false, false) => {
            return Remedy::words(
                Place::Host,
                format!(
                    "Whoever makes this domain has to give it one: it has no definition of its own. {INSTALL}"
                ),
            );
        }
    };
    let command = format!(
        "echo \"<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/>\
         </channel>\" | {} attach-device {} /dev/stdin {flags}",
        virsh(observed),
        called(seen)
    );
    Remedy::on_host([command], text)
}

fn check_vcpus(domains: &[ObservedDomain], diagnosis: &mut DoctorReport) {
    let check = Check::VcpusOnline;
    let why = "It is charged and scheduled for vCPUs that its guest does not have.";
    let (mut fine, mut told) = (0_usize, false);
    for (seen, look) in looked(domains) {
        let plugged = look.domain.vcpus.plugged_ids();
        let count = plugged.len();
        let name = called(seen);
        let (what, remedy) = match &look.agent {
            AgentAnswer::Answered(guest) if guest.vcpus.len() < count => (
                format!(
                    "{count} vCPUs are plugged, and its guest has {}",
                    guest.vcpus.len()
                ),
                Remedy::in_guest(
                    [
                        "cat /proc/cmdline /sys/devices/system/cpu/possible; dmesg | grep -i 'nr_cpus\\|possible_cpus\\|Unable to map'",
                    ],
                    format!(
                        "Take nr_cpus= or possible_cpus= from the guest's kernel command line, or \
                         make them larger, and reboot it. Until then, to take back what it does not \
                         use, on the host: `virtnode hotplug vcpus {name} {}`",
                        guest.vcpus.len().max(look.domain.vcpus.fixed())
                    ),
                ),
            ),
            AgentAnswer::Answered(guest) if guest.online.len() < count => (
                format!(
                    "{count} vCPUs are plugged, and its guest uses {}",
                    guest.online.len()
                ),
                Remedy::on_host(
                    [format!("virtnode hotplug vcpus {name} {count} --online")],
                    "It brings them online through the guest agent and proves it. For those that \
                     come later the guest needs a udev rule: `SUBSYSTEM==\"cpu\", ACTION==\"add\", \
                     ATTR{online}=\"1\"`",
                ),
            ),
            AgentAnswer::Answered(_) => {
                fine += 1;
                continue;
            }
            AgentAnswer::Silent(_) | AgentAnswer::NotAsked => match never_ran(seen, &plugged) {
                idle if idle.is_empty() || !seen.state.runs() => continue,
                idle => (
                    format!("vCPUs {idle} are plugged and have never run"),
                    Remedy::in_guest(
                        ["cat /sys/devices/system/cpu/present /sys/devices/system/cpu/online"],
                        "They are offline (`echo 1 >/sys/devices/system/cpu/cpuN/online`), or the \
                         guest threw them away (nr_cpus= on its kernel command line). With its agent \
                         virtnode could tell.",
                    ),
                ),
            },
        };
        told = true;
        warn(
            diagnosis,
            (check, Severity::Warning),
            seen,
            what,
            why,
            remedy,
        );
    }
    if !told {
        diagnosis.ok(
            check,
            match fine {
                0 => "nothing speaks against it, and no agent for it".to_owned(),
                1 => "1 guest uses all it has, by its agent".to_owned(),
                fine => format!("{fine} guests use all they have, by their agents"),
            },
        );
    }
}

/// The plugged vCPUs that the statistics know and that have not run since they were plugged.
fn never_ran(seen: &ObservedDomain, plugged: &IdSet) -> IdSet {
    plugged
        .iter()
        .filter(|id| {
            let stats = seen.stats.vcpus.get(id);
            stats.is_some_and(|stats| stats.time == Some(0))
        })
        .collect()
}

fn check_virtio_mem(domains: &[ObservedDomain], diagnosis: &mut DoctorReport) {
    let check = Check::VirtioMem;
    let (mut devices, mut growing, mut told) = (0_usize, 0_usize, false);
    for (seen, look) in looked(domains) {
        for device in look.domain.memory.virtio_mem() {
            devices += 1;
            let (requested, current) = (device.asked(), device.plugged());
            let alias = device.alias.as_deref().unwrap_or_default();
            let is_still = seen.earlier.get(alias) == Some(&current);
            if current >= requested || !seen.state.runs() {
                continue;
            }
            if !is_still {
                growing += 1;
                continue;
            }
            told = true;
            let what =
                format!("{alias}: asked to take {requested}, has {current}, and takes no more");
            let remedy = match current.get() {
                0 => Remedy::in_guest(
                    ["modprobe virtio_mem"],
                    "The driver needs CONFIG_VIRTIO_MEM and a kernel of 5.8 or newer on x86, 5.16 on \
                     arm64. A guest that is still booting takes it later.",
                ),
                _ => Remedy::in_guest(
                    [
                        "dmesg | grep -i virtio_mem",
                        "echo online >/sys/devices/system/memory/auto_online_blocks",
                    ],
                    "Memory that is left offline, or a lack of memory to describe the new one with, \
                     makes it stop; it goes on by itself when it can.",
                ),
            };
            let why = "It has less memory than it was given, and may run short.";
            warn(
                diagnosis,
                (check, Severity::Warning),
                seen,
                what,
                why,
                remedy,
            );
        }
    }
    if !told {
        diagnosis.ok(
            check,
            match (devices, growing) {
                (0, _) => "no domain has such a device".to_owned(),
                (1, 0) => "1 device has given what was asked for".to_owned(),
                (devices, 0) => format!("{devices} devices have given what was asked for"),
                (_, growing) => format!("{} still taking memory", counted(growing, "device")),
            },
        );
    }
}

fn check_machine_types(
    observed: &Observed,
    domains: &[ObservedDomain],
    diagnosis: &mut DoctorReport,
) {
    let check = Check::MachineTypes;
    let facts = &observed.facts;
    if facts.capabilities.is_none() {
        return diagnosis.unseen(
            check,
            "which machine types there are, which only libvirt tells: see libvirt-connection",
            None,
        );
    }
    let mut told = false;
    for (seen, look) in looked(domains) {
        let (Some(arch), Some(machine)) = (&look.domain.arch, &look.domain.machine) else {
            continue;
        };
        let known = facts.machines(arch);
        // An architecture that libvirt does not list says nothing about its machines.
        if known.is_empty() {
            continue;
        }
        let aliases: BTreeMap<&str, &str> = known
            .iter()
            .filter_map(|m| Some((m.name.as_str(), m.canonical.as_deref()?)))
            .collect();
        let own = known.iter().find(|m| m.name == *machine);
        let (severity, what, why) = match own {
            Some(own) if !own.deprecated => continue,
            Some(_) => (
                Severity::Warning,
                format!("its machine type {machine} is deprecated"),
                "QEMU drops it in a coming release: from then on the domain cannot be started or \
                 migrated to a node that has it.",
            ),
            None => (
                Severity::Error,
                format!("this QEMU has no machine type {machine} any more"),
                "The domain runs on with the QEMU that it was started with, and cannot be started \
                 again here.",
            ),
        };
        told = true;
        let newest = family(machine).and_then(|family| aliases.get(family).copied());
        let remedy = match newest {
            Some(newest) if look.persistent && newest != machine => Remedy::on_host(
                [format!(
                    "{virsh} dumpxml --inactive {name} | sed {script} | {virsh} define /dev/stdin",
                    virsh = virsh(observed),
                    name = called(seen),
                    script = quoted(&format!("s/machine='{machine}'/machine='{newest}'/"))
                )],
                "It holds from the next time that the domain is started after having been shut off; a \
                 reboot of the guest is not enough. A guest may notice the new hardware (Windows may \
                 ask to be activated again).",
            ),
            _ => Remedy::words(
                Place::Host,
                "Whoever made the domain has to give it a newer machine type and start it anew.",
            ),
        };
        warn(diagnosis, (check, severity), seen, what, why, remedy);
    }
    if !told {
        diagnosis.ok(check, "all running domains have one with a future");
    }
}

/// The alias under which the newest of a machine type's kind is found.
fn family(machine: &str) -> Option<&'static str> {
    [
        ("pc-q35-", "q35"),
        ("pc-i440fx-", "pc"),
        ("virt-", "virt"),
        ("pseries-", "pseries"),
        ("s390-ccw-virtio-", "s390-ccw-virtio"),
    ]
    .into_iter()
    .find(|(prefix, _)| machine.starts_with(prefix))
    .map(|(_, alias)| alias)
}
