//! Causes and remedies for guests that do not follow a change of vCPUs.

use crate::domain::IdSet;
use crate::hotplug::Agent;
use crate::hotplug::lifecycle::RECOUNT_REMEDY;
use crate::hotplug::outcome::AGENT_SETTINGS;
use crate::hotplug::outcome::Diagnosis;
use crate::units::counted;

fn them(ids: &IdSet) -> &'static str {
    if ids.len() == 1 { "it" } else { "them" }
}

/// The agent's command that reports the guest's CPUs.
pub(super) const GET_VCPUS: &str = "guest-get-vcpus";

/// Returns the remedy for an agent that does not report the guest's CPUs.
fn agent_remedy(agent: &Agent) -> String {
    match agent {
        Agent::Refused(why) => format!(
            "allow the guest agent the command {GET_VCPUS}, which it rejects ({why}): \
             {AGENT_SETTINGS}, and restart it"
        ),
        _ => "install the guest agent, which reports it".to_owned(),
    }
}

/// The agent could not be asked.
pub(super) fn not_queried(why: &str) -> Diagnosis {
    Diagnosis::new(
        "agent-not-queried",
        format!("the guest agent was not queried, so nothing is known about the guest: {why}"),
        "repeat the request; virtnode doctor lists the agents that do not answer",
    )
}

/// The guest confirmed CPUs that it does not have.
pub(super) fn dropped(has: u32, target: u32) -> Diagnosis {
    Diagnosis::new(
        "nr-cpus",
        format!(
            "the guest confirmed the CPUs through ACPI, but its agent sees {} of {target}: \
             its kernel has no room for more",
            counted(has, "CPU")
        ),
        "boot the guest without nr_cpus= and possible_cpus= or with larger ones, with a kernel \
         whose NR_CPUS is large enough. Its log says 'NR_CPUS/possible_cpus limit', 'Unable to map \
         lapic to logical cpu number' or, of a recent Linux (6.12, not 6.1), 'plus 0 hotplug CPUs': \
         that makes room only where it recognises its hypervisor, which it does not under QEMU's \
         plain software emulation (TCG)",
    )
}

/// Another client changed the number of vCPUs during the operation.
pub(super) fn changed_by_another(count: u32) -> Diagnosis {
    Diagnosis::new(
        "changed-by-another-client",
        format!(
            "libvirt serves other clients too, and one of them set the domain's vCPUs to {count} during \
             the operation"
        ),
        DECIDE,
    )
}

const DECIDE: &str = "decide which number is right, and ask again if it is this operation's";

/// Another client had vCPUs unplugged, and libvirt did not notice that the guest released them.
pub(super) fn released_for_another(gone: &str) -> Diagnosis {
    Diagnosis::new(
        "changed-by-another-client",
        format!(
            "libvirt serves other clients too, and one of them had {gone} unplugged during the \
             operation; before 12.4 libvirt counts a released vCPU until it is asked again"
        ),
        DECIDE,
    )
}

/// The agent reports CPUs that never ran.
pub(super) fn contradicted(idle: &IdSet) -> Diagnosis {
    Diagnosis::new(
        "agent-contradicted",
        format!(
            "the guest agent reports all CPUs online, and {} never ran: both cannot be true",
            idle.named("vCPU")
        ),
        "check /sys/devices/system/cpu/online and nr_cpus= in the guest; an agent that reports what \
         is not there is broken, or the guest misleads its host",
    )
}

/// The guest rejected a plug.
pub(super) fn not_added(ids: &IdSet, status: &str) -> Diagnosis {
    Diagnosis::new(
        "plug-refused",
        format!(
            "the guest answered '{status}' through ACPI for {}",
            ids.named("vCPU")
        ),
        "check the guest's log for ACPI errors; on Linux, \
         /sys/firmware/acpi/hotplug/processor/enabled must be 1",
    )
}

/// The guest has the CPUs and, as its agent reports, does not use them.
pub(super) fn offline(offline: &IdSet, by_another: bool) -> Diagnosis {
    const RULE: &str = "SUBSYSTEM==\"cpu\", ACTION==\"add\", ATTR{online}=\"1\"";
    Diagnosis::new(
        "cpus-offline",
        format!(
            "the guest has {} and leaves {} offline",
            offline.named("CPU"),
            them(offline)
        ),
        if by_another {
            format!(
                "in the guest, as root: echo 1 > /sys/devices/system/cpu/cpuN/online for each of \
                 them; for later CPUs add a udev rule to the guest: {RULE}"
            )
        } else {
            format!(
                "ask again with online, so that they are brought online through the guest agent; \
                 or add a udev rule to the guest: {RULE}"
            )
        },
    )
}

/// The agent could not bring the CPUs online.
pub(super) fn cannot_be_onlined(offline: &IdSet, error: Option<&str>) -> Diagnosis {
    let answer = error.map_or_else(String::new, |error| {
        format!("; the agent reported: {error}")
    });
    Diagnosis::new(
        "cpus-cannot-be-onlined",
        format!(
            "the guest has {}, and {} stayed offline when its agent was asked to bring {} \
             online{answer}",
            offline.named("CPU"),
            if offline.len() == 1 { "it" } else { "they" },
            them(offline)
        ),
        "check the guest's log; a guest that was ever live-migrated may need a reboot before \
         it can use CPUs that were plugged, and one without the guest agent's right to write \
         /sys/devices/system/cpu cannot be helped from outside",
    )
}

/// There is no agent; the guest confirmed the CPUs, and they never ran.
pub(super) fn never_ran(idle: &IdSet, agent: &Agent) -> Diagnosis {
    Diagnosis::new(
        "cpus-never-ran",
        format!(
            "the guest confirmed the CPUs through ACPI, but {} never ran: offline in the guest, or \
             dropped by its kernel (nr_cpus); only its agent can distinguish the two",
            idle.named("vCPU")
        ),
        format!(
            "bring them online in the guest (a udev rule does it for all that come), check \
             nr_cpus on its kernel's command line, and {}",
            agent_remedy(agent)
        ),
    )
}

/// The guest did not react. `emulated` is true without an accelerator.
pub(super) fn silent_plug(tried: &str, emulated: bool) -> Diagnosis {
    // tianocore/edk2 issue 9298; measured with 5.2, and with 7.2.22, which has the fix.
    let broken = if emulated {
        "; QEMU 5.1 to 7.1 notifies no guest of new vCPUs in software emulation (domain type \
             qemu): use a newer one"
    } else {
        ""
    };
    Diagnosis::new(
        "no-sign",
        format!("the vCPUs are plugged, and the guest did not react ({tried})"),
        format!(
            "check that the guest has booted, runs with ACPI (no acpi=off) and has a kernel with \
             CONFIG_ACPI_HOTPLUG_CPU; the guest finds the CPUs at its next boot{broken}"
        ),
    )
}

/// The guest keeps a CPU that it was asked to release.
pub(super) fn kept(ids: &IdSet, status: &str) -> Diagnosis {
    Diagnosis::new(
        "cpu-in-use",
        format!(
            "the guest answered '{status}' when asked to release {}",
            ids.named("vCPU")
        ),
        "something in the guest needs the CPU: deadline tasks that have reserved it, a task or \
         an interrupt that is bound to it, or a driver; its log says 'Offline failed'",
    )
}

/// libvirt counts vCPUs that QEMU no longer has.
pub(super) fn miscounted(words: &str) -> Diagnosis {
    Diagnosis::new(
        "libvirt-miscounts",
        format!(
            "the guest and QEMU have released a vCPU, and libvirt did not notice; the repeated \
             call failed with: {words}"
        ),
        RECOUNT_REMEDY,
    )
}

/// The guest had fewer CPUs than libvirt counts when the operation started, and lost none since.
pub(super) fn fewer_than_counted(by_another: bool) -> Diagnosis {
    if by_another {
        return Diagnosis::new(
            "fewer-than-counted",
            "the guest has fewer CPUs than libvirt counts: it dropped some (nr_cpus), or released \
             some that libvirt still counts, as it does before 12.4",
            "check nr_cpus= and possible_cpus= on the guest's kernel command line; if they leave \
             room, boot the guest again, which then finds the CPUs that QEMU has",
        );
    }
    Diagnosis::new(
        "fewer-than-counted",
        "the guest had fewer CPUs than libvirt counts before this operation: it dropped some \
         (nr_cpus), or released some that libvirt still counts, as it does before 12.4",
        "check nr_cpus= and possible_cpus= on the guest's kernel command line; if they leave room, \
         restart libvirt's daemon (systemctl restart libvirtd, or virtqemud: domains keep running), \
         which then counts what QEMU has, and ask again",
    )
}

/// The domain has no source of evidence.
pub(super) fn no_source(tried: &str, agent: &Agent) -> Diagnosis {
    let remedy = match agent {
        Agent::Refused(_) => agent_remedy(agent),
        _ => "give the domain a channel for the guest agent (org.qemu.guest_agent.0) and install \
              qemu-guest-agent in the guest"
            .to_owned(),
    };
    Diagnosis::new(
        "no-source",
        format!("no source shows if the guest uses the CPUs ({tried})"),
        remedy,
    )
}
