//! Running domains: whether libvirt and the agent answer, and whether guests use their resources.

use std::collections::BTreeMap;

use super::finding::{Check, DoctorReport, Place, Remedy, Severity, counted, quoted};
use super::libvirt::virsh;
use super::observed::{DomainDetails, Observed, ObservedDomain, Undetailed};
use crate::domain::{AgentChannel, AliasedDevice, IdSet};
use crate::hotplug::{AGENT_SETTINGS, Agent};

/// Returns the domains whose details could be queried.
fn detailed(domains: &[ObservedDomain]) -> impl Iterator<Item = (&ObservedDomain, &DomainDetails)> {
    domains
        .iter()
        .filter_map(|seen| Some((seen, &**seen.details.as_ref().ok()?)))
}

/// Returns the domain's name for use in commands, or its UUID if a shell or virsh would interpret
/// the name.
fn name_in_commands(domain: &ObservedDomain) -> &str {
    let name = domain.name.as_str();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    // virsh parses a number as an ID.
    let is_plain = name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(plain);
    if is_plain { name } else { &domain.uuid }
}

pub(super) fn check(observed: &Observed, report: &mut DoctorReport) {
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
                report.unseen(check, format!("the running domains: {why}"), None);
            }
            return;
        }
    };
    if domains.is_empty() {
        for check in CHECKS {
            report.ok(check, "no domain is running");
        }
        return;
    }
    check_queries(observed, domains, report);
    check_agents(observed, domains, report);
    check_vcpus(domains, report);
    check_virtio_mem(domains, report);
    check_machine_types(observed, domains, report);
    let undetailed = domains.iter().filter(|seen| seen.details.is_err()).count();
    if undetailed > 0 {
        for check in CHECKS.into_iter().skip(1) {
            let what = format!(
                "{} without details from libvirt: see domains",
                counted(undetailed, "domain")
            );
            report.unseen(check, what, None);
        }
    }
}

fn check_queries(observed: &Observed, domains: &[ObservedDomain], report: &mut DoctorReport) {
    let check = Check::Domains;
    for seen in domains {
        let (what, why, remedy) = match &seen.details {
            // A domain that just started or ended.
            Ok(_) | Err(Undetailed::NotYet(_)) => continue,
            Err(Undetailed::Unanswered(why)) => (
                format!("libvirt does not answer queries about it: {why}"),
                "The domain is locked, by a job that does not end or by a QEMU that does not answer. \
                 Until then it cannot be changed, and may not shut down cleanly.",
                Remedy::on_host(
                    [format!(
                        "{} domjobinfo {}",
                        virsh(observed),
                        name_in_commands(seen)
                    )],
                    "This shows a running job, such as a migration or a backup. If there is none and \
                     the problem persists, read QEMU's log in /var/log/libvirt/qemu.",
                ),
            ),
            Err(Undetailed::Unreadable(why)) => (
                format!("its definition cannot be read: {why}"),
                "It is unknown what the domain depends on, so labels of machine types, CPU models \
                 and CPU features are not removed from the node while it runs; and the domain \
                 cannot be hotplugged.",
                Remedy::on_host(
                    [format!(
                        "{} dumpxml {}",
                        virsh(observed),
                        name_in_commands(seen)
                    )],
                    "If this fails, the definition is larger than libvirt can send (4 MiB): whoever \
                     owns the domain must remove metadata from it. Otherwise correct the value that \
                     is named here.",
                ),
            ),
        };
        report.domain_problem((check, Severity::Warning), seen, what, why, remedy);
    }
    if !report.covers(check) {
        let what = format!("libvirt answers about {}", counted(domains.len(), "domain"));
        report.ok(check, what);
    }
}

fn check_agents(observed: &Observed, domains: &[ObservedDomain], report: &mut DoctorReport) {
    let check = Check::GuestAgent;
    let why = "Without the agent, virtnode can verify only in part that the guest uses its resources, \
               and cannot bring vCPUs online in the guest.";
    let mut answering = 0;
    let (mut unqueried, mut reason) = (0, None);
    for (seen, details) in detailed(domains) {
        let (what, remedy) = match (&details.agent, details.domain.agent) {
            (Agent::Answered(_), _) => {
                answering += 1;
                continue;
            }
            // A paused domain, or one that is still in its firmware, cannot answer.
            _ if !seen.state.runs() => continue,
            (_, AgentChannel::Absent) => (
                "it has no channel for a guest agent".to_owned(),
                attach_channel(observed, seen, details),
            ),
            (_, AgentChannel::Disconnected) => unopened(),
            (Agent::Silent(why), channel) => (
                format!("its guest agent does not answer: {why}"),
                Remedy::in_guest(
                    ["systemctl restart qemu-guest-agent"],
                    format!(
                        "{}If the guest does not respond to that either, it hangs: check \
                         its console.",
                        // libvirt does not know the state of a hot-plugged channel at first.
                        if channel == AgentChannel::Unknown {
                            INSTALL_FIRST
                        } else {
                            ""
                        }
                    ),
                ),
            ),
            (Agent::Refused(why), _) => (
                format!("its guest agent answers, and rejects guest-get-vcpus: {why}"),
                Remedy::in_guest(
                    ["grep -rs rpcs /etc/qemu /etc/sysconfig/qemu-ga; ps -o args -C qemu-ga"],
                    format!(
                        "Allow guest-get-vcpus and guest-set-vcpus: {AGENT_SETTINGS}. Then restart \
                         the agent: `systemctl restart qemu-guest-agent`. If nothing blocks the \
                         command, this version or system of the guest does not have it."
                    ),
                ),
            ),
            (Agent::NotQueried(why), _) => {
                unqueried += 1;
                reason.get_or_insert(why.as_str());
                continue;
            }
            (Agent::NotAsked, _) => continue,
        };
        report.domain_problem((check, Severity::Warning), seen, what, why, remedy);
    }
    if let Some(reason) = reason {
        let what = format!("{} not queried: {reason}", counted(unqueried, "agent"));
        report.unseen(check, what, None);
    }
    if !report.covers(check) {
        let what = match answering {
            0 => "no running guest could be queried".to_owned(),
            answering => format!("{} answering", counted(answering, "agent")),
        };
        report.ok(check, what);
    }
}

fn unopened() -> (String, Remedy) {
    (
        "the guest has not opened the guest agent's channel".to_owned(),
        Remedy::in_guest(["systemctl enable --now qemu-guest-agent"], INSTALL),
    )
}

const INSTALL: &str = "The guest needs the package qemu-guest-agent (Windows: virtio-win's guest \
                       tools) with its service running.";

const INSTALL_FIRST: &str = "The guest may lack the package qemu-guest-agent (Windows: virtio-win's \
                             guest tools), or its service does not run. ";

/// Returns the command that gives a domain a channel: at once if the domain has a virtio-serial
/// controller, which cannot be hot-plugged (libvirt 11.3: "no virtio-serial controllers are
/// available"); otherwise at its next start, if it has a persistent definition.
fn attach_channel(observed: &Observed, seen: &ObservedDomain, details: &DomainDetails) -> Remedy {
    let is_controller = |device: &AliasedDevice| device.alias.starts_with("virtio-serial");
    let has_controller = details.domain.devices.iter().any(is_controller);
    let (flags, text) = match (has_controller, details.persistent) {
        (true, true) => ("--live --config", INSTALL.to_owned()),
        (true, false) => ("--live", INSTALL.to_owned()),
        (false, true) => (
            "--config",
            format!(
                "This takes effect when the domain is next started; rebooting the guest is not \
                 enough. {INSTALL}"
            ),
        ),
        (false, false) => {
            return Remedy::words(
                Place::Host,
                format!(
                    "The domain has no persistent definition: whoever creates it must add the \
                     channel. {INSTALL}"
                ),
            );
        }
    };
    let command = format!(
        "echo \"<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/>\
         </channel>\" | {} attach-device {} /dev/stdin {flags}",
        virsh(observed),
        name_in_commands(seen)
    );
    Remedy::on_host([command], text)
}

fn check_vcpus(domains: &[ObservedDomain], report: &mut DoctorReport) {
    let check = Check::VcpusOnline;
    let why = "The domain is charged and scheduled for vCPUs that its guest does not use.";
    let mut fully_used = 0_usize;
    for (seen, details) in detailed(domains) {
        let plugged = details.domain.vcpus.plugged_ids();
        let count = plugged.len();
        let name = name_in_commands(seen);
        let (what, remedy) = match &details.agent {
            Agent::Answered(guest) if guest.vcpus.len() < count => (
                format!(
                    "libvirt counts {count} vCPUs, but its guest has {}",
                    guest.vcpus.len()
                ),
                Remedy::in_guest(
                    [
                        "cat /proc/cmdline /sys/devices/system/cpu/possible; dmesg | grep -i 'nr_cpus\\|possible_cpus\\|Unable to map'",
                    ],
                    format!(
                        "If the kernel has no room for more, remove or raise nr_cpus= or \
                         possible_cpus= on its command line, and reboot the guest. If it has, a client \
                         had a vCPU unplugged, and libvirt still counts it, as it does before 12.4. In \
                         both cases `virtnode hotplug vcpus {name} {}` on the host makes libvirt count \
                         what the guest has",
                        guest.vcpus.len().max(details.domain.vcpus.fixed())
                    ),
                ),
            ),
            Agent::Answered(guest) if guest.online.len() < count => (
                format!(
                    "{count} vCPUs are plugged, but its guest uses {}",
                    guest.online.len()
                ),
                Remedy::on_host(
                    [format!("virtnode hotplug vcpus {name} {count} --online")],
                    "This brings the vCPUs online through the guest agent and verifies it. For vCPUs \
                     plugged later, the guest needs a udev rule: `SUBSYSTEM==\"cpu\", \
                     ACTION==\"add\", ATTR{online}=\"1\"`",
                ),
            ),
            Agent::Answered(_) => {
                fully_used += 1;
                continue;
            }
            Agent::Silent(_) | Agent::Refused(_) | Agent::NotQueried(_) | Agent::NotAsked => {
                match never_ran(seen, &plugged) {
                    idle if idle.is_empty() || !seen.state.runs() => continue,
                    idle => (
                        format!(
                            "{} {} plugged but {} never run",
                            idle.named("vCPU"),
                            if idle.len() == 1 { "is" } else { "are" },
                            if idle.len() == 1 { "has" } else { "have" },
                        ),
                        Remedy::in_guest(
                            ["cat /sys/devices/system/cpu/present /sys/devices/system/cpu/online"],
                            "They are offline (`echo 1 >/sys/devices/system/cpu/cpuN/online`), or the \
                         guest rejected them (nr_cpus= on its kernel command line). The guest agent \
                         would show which.",
                        ),
                    ),
                }
            }
        };
        report.domain_problem((check, Severity::Warning), seen, what, why, remedy);
    }
    if !report.covers(check) {
        let what = match fully_used {
            0 => "no sign of unused vCPUs, but no agent to confirm it".to_owned(),
            1 => "1 guest uses all its vCPUs, according to its agent".to_owned(),
            count => format!("{count} guests use all their vCPUs, according to their agents"),
        };
        report.ok(check, what);
    }
}

/// Returns the plugged vCPUs whose statistics show no run time since they were plugged.
fn never_ran(seen: &ObservedDomain, plugged: &IdSet) -> IdSet {
    plugged
        .iter()
        .filter(|id| {
            let stats = seen.stats.vcpus.get(id);
            stats.is_some_and(|stats| stats.time == Some(0))
        })
        .collect()
}

fn check_virtio_mem(domains: &[ObservedDomain], report: &mut DoctorReport) {
    let check = Check::VirtioMem;
    let (mut devices, mut growing) = (0_usize, 0_usize);
    for (seen, details) in detailed(domains) {
        for device in details.domain.memory.virtio_mem() {
            devices += 1;
            let (requested, current) = (device.asked(), device.plugged());
            let alias = device.alias.as_deref().unwrap_or_default();
            if current >= requested || !seen.state.runs() {
                continue;
            }
            if seen.earlier.get(alias) != Some(&current) {
                growing += 1;
                continue;
            }
            let what =
                format!("{alias}: requested {requested}, plugged {current}, no longer growing");
            let remedy = match current.get() {
                0 => Remedy::in_guest(
                    ["modprobe virtio_mem"],
                    "The driver needs CONFIG_VIRTIO_MEM and Linux 5.8 or newer on x86, 5.16 on arm64. \
                     A guest that is still booting takes the memory later.",
                ),
                _ => Remedy::in_guest(
                    [
                        "dmesg | grep -i virtio_mem",
                        "echo online >/sys/devices/system/memory/auto_online_blocks",
                    ],
                    "The driver stops if memory stays offline, or if there is no memory left to \
                     describe the new memory; it resumes by itself.",
                ),
            };
            let why = "The guest has less memory than assigned, and may run out of memory.";
            report.domain_problem((check, Severity::Warning), seen, what, why, remedy);
        }
    }
    if !report.covers(check) {
        let what = match (devices, growing) {
            (0, _) => "no domain has such a device".to_owned(),
            (1, 0) => "1 device has its requested size".to_owned(),
            (devices, 0) => format!("{devices} devices have their requested size"),
            (_, growing) => format!("{} still growing", counted(growing, "device")),
        };
        report.ok(check, what);
    }
}

fn check_machine_types(observed: &Observed, domains: &[ObservedDomain], report: &mut DoctorReport) {
    let check = Check::MachineTypes;
    let facts = &observed.facts;
    if facts.capabilities.is_none() {
        return report.unseen(
            check,
            "only libvirt reports the machine types: see libvirt-connection",
            None,
        );
    }
    for (seen, details) in detailed(domains) {
        let (Some(arch), Some(machine)) = (&details.domain.arch, &details.domain.machine) else {
            continue;
        };
        let known = facts.machines(arch);
        // libvirt's capabilities do not list the machine types of every architecture.
        if known.is_empty() {
            continue;
        }
        let aliases: BTreeMap<&str, &str> = known
            .iter()
            .filter_map(|m| Some((m.name.as_str(), m.canonical.as_deref()?)))
            .collect();
        let (severity, what, why) = match known.iter().find(|m| m.name == *machine) {
            Some(own) if !own.deprecated => continue,
            Some(_) => (
                Severity::Warning,
                format!("its machine type {machine} is deprecated"),
                "A future QEMU release drops it; the domain can then neither be started nor migrated \
                 to a node with that release.",
            ),
            None => (
                Severity::Error,
                format!("this QEMU no longer has the machine type {machine}"),
                "The domain keeps running on the QEMU that it was started with, but cannot be \
                 started here again.",
            ),
        };
        let newest = family(machine).and_then(|family| aliases.get(family).copied());
        let remedy = match newest {
            Some(newest) if details.persistent && newest != machine => Remedy::on_host(
                [format!(
                    "{virsh} dumpxml --inactive {name} | sed {script} | {virsh} define /dev/stdin",
                    virsh = virsh(observed),
                    name = name_in_commands(seen),
                    script = quoted(&format!("s/machine='{machine}'/machine='{newest}'/"))
                )],
                "This takes effect when the domain is shut off and started again; rebooting the guest \
                 is not enough. The guest may detect new hardware (Windows may require activation).",
            ),
            _ => Remedy::words(
                Place::Host,
                "Whoever created the domain must give it a newer machine type and restart it.",
            ),
        };
        report.domain_problem((check, severity), seen, what, why, remedy);
    }
    if !report.covers(check) {
        report.ok(check, "no running domain has a deprecated one");
    }
}

/// Returns the alias that resolves to the newest machine type of the same family.
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
