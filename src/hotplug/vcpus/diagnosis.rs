//! Causes and remedies for guests that do not follow a change of vCPUs.

use crate::domain::IdSet;
use crate::hotplug::lifecycle::RECOUNT_REMEDY;
use crate::hotplug::outcome::Diagnosis;
use crate::units::counted;

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

/// The guest rejected a plug.
pub(super) fn not_added(ids: &IdSet, status: &str) -> Diagnosis {
    Diagnosis::new(
        "plug-refused",
        format!("the guest answered '{status}' through ACPI for vCPUs {ids}"),
        "check the guest's log for ACPI errors; on Linux, \
         /sys/firmware/acpi/hotplug/processor/enabled must be 1",
    )
}

/// The guest has the CPUs and, as its agent reports, does not use them.
pub(super) fn offline(offline: &IdSet) -> Diagnosis {
    Diagnosis::new(
        "cpus-offline",
        format!("the guest has CPUs {offline} and leaves them offline"),
        "ask again with online, so that they are brought online through the guest agent; or add \
         a udev rule to the guest: SUBSYSTEM==\"cpu\", ACTION==\"add\", ATTR{online}=\"1\"",
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
            "the guest has CPUs {offline}, and they stayed offline when asked to come online{answer}"
        ),
        "check the guest's log; a guest that was ever live-migrated may need a reboot before \
         it can use CPUs that were plugged, and one without the guest agent's right to write \
         /sys/devices/system/cpu cannot be helped from outside",
    )
}

/// There is no agent; the guest confirmed the CPUs, and they never ran.
pub(super) fn never_ran(idle: &IdSet) -> Diagnosis {
    Diagnosis::new(
        "cpus-never-ran",
        format!(
            "the guest confirmed the CPUs through ACPI, but vCPUs {idle} have not been running: \
             they are offline, or its kernel dropped them (nr_cpus); only its agent can \
             distinguish the two"
        ),
        "bring them online in the guest (a udev rule does it for all that come), check nr_cpus \
         on its kernel's command line, and install the guest agent, which reports it",
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
        format!("the guest answered '{status}' when asked to release vCPUs {ids}"),
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

/// The guest has fewer CPUs than were plugged before, and this operation called nothing.
pub(super) fn fewer_than_counted() -> Diagnosis {
    Diagnosis::new(
        "fewer-than-counted",
        "the vCPUs were plugged before, and the guest has fewer: it dropped some (nr_cpus), or \
         released some that libvirt, as 9.0 does, still counts",
        "check nr_cpus= and possible_cpus= on the guest's kernel command line; if they leave room, \
         restart libvirt's daemon (systemctl restart libvirtd, or virtqemud: domains keep running), \
         which then counts what QEMU has, and ask again",
    )
}

/// The domain has no source of evidence.
pub(super) fn no_source(tried: &str) -> Diagnosis {
    Diagnosis::new(
        "no-source",
        format!("no source shows if the guest uses the CPUs ({tried})"),
        "give the domain a channel for the guest agent (org.qemu.guest_agent.0) and install \
         qemu-guest-agent in the guest",
    )
}
