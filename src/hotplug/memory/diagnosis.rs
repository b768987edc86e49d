//! Causes and remedies for guests that do not follow a change of memory.

use std::time::Duration;

use super::evidence::{LINUX_BLOCK, Need};
use crate::hotplug::Observation;
use crate::hotplug::observation::MemoryReport;
use crate::hotplug::outcome::Diagnosis;
use crate::units::{Bytes, seconds};

/// virtio-mem: the guest took nothing.
pub(super) fn no_driver() -> Diagnosis {
    Diagnosis::new(
        "no-virtio-mem-driver",
        "the guest has taken nothing of its virtio-mem device: no driver works on it",
        "load the module virtio_mem in the guest (modprobe virtio_mem); its kernel must have \
         CONFIG_VIRTIO_MEM and be 5.8 or newer on x86, 5.16 or newer on arm64; or wait until it \
         has booted",
    )
}

/// virtio-mem: the guest took a part and stopped.
pub(super) fn stalled() -> Diagnosis {
    Diagnosis::new(
        "virtio-mem-stalled",
        "the guest took a part of what it was asked to take, and stopped",
        "check the guest's log for virtio_mem: the driver stops if memory stays offline or if it \
         lacks memory to describe the new memory; it continues by itself when it can",
    )
}

/// virtio-mem: the guest returned a part and stopped.
pub(super) fn unmovable(left: Bytes) -> Diagnosis {
    Diagnosis::new(
        "memory-in-use",
        format!("{left} of the memory to return hold data that the guest cannot move"),
        "free memory in the guest, or reboot it; for memory that can always be returned set \
         memhp_default_state=online_movable on its kernel's command line",
    )
}

/// virtio-mem: the guest returned nothing.
pub(super) fn nothing_returned() -> Diagnosis {
    Diagnosis::new(
        "memory-in-use",
        "the guest has returned nothing: all of it is in use or cannot be moved, or its driver \
         no longer runs",
        "free memory in the guest; the request stays pending, and the guest continues when it can",
    )
}

/// The commands that bring memory blocks online: those that are there, and later ones.
const BRING_ONLINE: &str = "in the guest, as root: grep -l offline \
     /sys/devices/system/memory/memory*/state | while read -r state; do echo online > $state; done; \
     for later memory: echo online > /sys/devices/system/memory/auto_online_blocks, or boot the guest \
     with memhp_default_state=online";

/// The guest has the memory, and its total did not grow.
pub(super) fn offline(missing: Bytes) -> Diagnosis {
    Diagnosis::new(
        "memory-offline",
        format!(
            "the guest has the memory, and {missing} are missing from its own total: the memory \
             blocks were not brought online"
        ),
        BRING_ONLINE,
    )
}

/// The guest has the memory, and what is missing may be offline or reserved.
pub(super) fn unclear() -> Diagnosis {
    Diagnosis::new(
        "unclear-total",
        "the guest's total alone does not show if its kernel reserved the missing memory at boot \
         (crashkernel=, firmware) or left memory blocks offline",
        "in the guest: grep -c offline /sys/devices/system/memory/memory*/state prints 1 for each \
         block that is offline; 'echo online' into such a file brings it online. Without such a \
         block the guest uses all of it",
    )
}

/// The guest has the DIMM, and its total did not grow.
pub(super) fn dimm_unused(alias: &str, size: Bytes, short: Bytes) -> Diagnosis {
    if !size.is_multiple_of(LINUX_BLOCK) {
        return Diagnosis::new(
            "dimm-not-in-blocks",
            format!(
                "the guest confirmed the DIMM through ACPI, and {short} are missing from its own total: \
                 {size} are not a multiple of {LINUX_BLOCK}, the minimum that Linux takes on x86, and \
                 it drops such a DIMM"
            ),
            format!(
                "detach the DIMM (alias {alias}), so that later DIMMs are aligned for Linux, and ask for a multiple of {LINUX_BLOCK}"
            ),
        );
    }
    Diagnosis::new(
        "memory-offline",
        format!(
            "the guest confirmed the DIMM through ACPI, and {short} are missing from its own total: \
             the memory blocks were not brought online, or its kernel dropped the DIMM"
        ),
        format!(
            "{BRING_ONLINE}; if no file there says offline, the DIMM is not a multiple of the guest's \
             memory block (/sys/devices/system/memory/block_size_bytes: 128 MiB on most x86 guests, up \
             to 2 GiB on those that booted with 64 GiB or more): detach it (alias {alias}) and ask \
             for a multiple"
        ),
    )
}

/// The guest has the memory, and the balloon has taken it away.
pub(super) fn ballooned(held: Bytes, seen: &Observation) -> Diagnosis {
    // libvirt counts the balloon's target without virtio-mem devices and adds them by itself.
    let memory = &seen.domain.memory;
    let target = memory
        .dimms()
        .fold(memory.boot, |sum, dimm| sum.saturating_add(dimm.size));
    let target = target.get() >> 10;
    Diagnosis::new(
        "balloon",
        format!("the guest has the memory, and the balloon holds {held} of the guest's memory"),
        format!(
            "give the guest what the balloon holds: virsh setmem {} {target} --live (KiB, \
             without virtio-mem devices, which libvirt adds)",
            seen.domain.name
        ),
    )
}

/// The guest rejected a DIMM.
pub(super) fn dimm_refused(status: &str) -> Diagnosis {
    Diagnosis::new(
        "dimm-refused",
        format!("the guest answered '{status}' through ACPI when the DIMM was plugged"),
        "ask for a multiple of the guest's memory block: 128 MiB on most x86 guests, up to 2 GiB on \
         those that booted with 64 GiB or more (/sys/devices/system/memory/block_size_bytes)",
    )
}

/// The guest did not react to a DIMM.
pub(super) fn dimm_ignored() -> Diagnosis {
    Diagnosis::new(
        "no-sign",
        "the DIMM is plugged, and the guest did not react",
        "check that the guest has booted, runs with ACPI (no acpi=off) and has a kernel with \
         CONFIG_ACPI_HOTPLUG_MEMORY; the guest finds the memory at its next boot",
    )
}

/// The domain has no balloon.
pub(super) fn no_balloon() -> Diagnosis {
    Diagnosis::new(
        "no-source",
        "no source shows how much memory the guest uses: the domain has no memory balloon, whose \
         driver would report it",
        "write <memballoon model='virtio'><stats period='5'/></memballoon> for <memballoon \
         model='none'/> in its definition, start it again, and load virtio_balloon in the guest; or \
         look in the guest itself (free, lsmem)",
    )
}

/// libvirt did not switch the statistics on.
pub(super) fn no_statistics() -> Diagnosis {
    Diagnosis::new(
        "no-source",
        "no source shows how much memory the guest uses: libvirt did not switch the balloon \
         statistics on",
        "switch them on and ask again: virsh dommemstat DOMAIN --period 1 --live; or add <stats \
         period='5'/> to <memballoon> of its definition and start it again",
    )
}

/// The guest's balloon driver never reported.
pub(super) fn no_balloon_driver() -> Diagnosis {
    Diagnosis::new(
        "no-source",
        "no source shows how much memory the guest uses: its balloon driver has never reported \
         statistics",
        "load the module virtio_balloon in the guest (modprobe virtio_balloon) and ask again; its \
         kernel must have CONFIG_VIRTIO_BALLOON; or look in the guest itself (free, lsmem)",
    )
}

/// The guest's last report is older than the change.
pub(super) fn no_report(period: Option<u32>, by_another: bool) -> Diagnosis {
    let period = match period {
        Some(period) => format!("every {period} s"),
        None => "only when the statistics are switched on".to_owned(),
    };
    Diagnosis::new(
        "no-report",
        format!("the guest reports its memory {period}, and no report came after the change"),
        if by_another {
            "switch the balloon statistics on (virsh dommemstat DOMAIN --period 5 --live, or <stats \
             period='5'/> in <memballoon>); if they are on, look at the guest's console, and if it \
             runs, load virtio_balloon again (modprobe -r virtio_balloon; modprobe virtio_balloon)"
        } else {
            "ask again with a longer --timeout; if it still does not report, look at the guest's \
             console, and if it runs, load virtio_balloon again (modprobe -r virtio_balloon; \
             modprobe virtio_balloon)"
        },
    )
}

/// The guest's kernel lacks the memory to describe the new memory.
pub(super) fn too_large_to_describe(need: &Need) -> Diagnosis {
    // A half of it remains for the guest.
    let step = Bytes::new(need.usable.get().saturating_mul(32)).round_down(LINUX_BLOCK);
    Diagnosis::new(
        "too-large-to-describe",
        format!(
            "to describe the new memory the guest's kernel needs {}, and {} of {} were available \
             ({} before): it may have run out of memory",
            need.need,
            need.usable,
            need.total,
            seconds(need.age)
        ),
        format!(
            "look at the guest's console, and reset a guest that hangs (virsh reset); then ask for \
             {} more at a time, each once the last is in use, or start the domain with more memory",
            step.max(LINUX_BLOCK)
        ),
    )
}

fn in_figures(figures: Option<(MemoryReport, Bytes)>) -> String {
    figures.map_or_else(String::new, |(report, used)| {
        let (total, age) = (report.total, seconds(report.age));
        format!("; it had used {used} of {total} (reported {age} before the change)")
    })
}

/// The guest was reset during the operation.
pub(super) fn was_reset(after: Duration, figures: Option<(MemoryReport, Bytes)>) -> Diagnosis {
    Diagnosis::new(
        "guest-reset",
        format!(
            "the guest was reset {} after the change: it may have run out of memory and crashed{}",
            seconds(after),
            in_figures(figures)
        ),
        "look for a panic or 'Out of memory' in the log of the guest's console; leave it more \
         memory than it uses",
    )
}

/// The domain ended while its guest was left with less than it uses.
pub(super) fn ended_below_use(figures: Option<(MemoryReport, Bytes)>) -> Diagnosis {
    Diagnosis::new(
        "ended-below-use",
        format!(
            "the guest was asked to return memory that it used{}",
            in_figures(figures)
        ),
        "start the domain again, and leave it more memory than it uses",
    )
}

/// The guest runs and no longer reports.
pub(super) fn not_reporting(age: Duration, figures: Option<(MemoryReport, Bytes)>) -> Diagnosis {
    Diagnosis::new(
        "guest-not-reporting",
        format!(
            "the guest's last report is {} old although it reports every second or two: it may have \
             crashed, or hang{}",
            seconds(age),
            in_figures(figures)
        ),
        "look at its console (virsh console, virsh screenshot); a guest that has crashed needs a \
         reset (virsh reset), and with a <panic> device libvirt notices a crash by itself",
    )
}

/// Another client changed the memory during the operation.
pub(super) fn changed_by_another(shown: Bytes) -> Diagnosis {
    Diagnosis::new(
        "changed-by-another-client",
        format!(
            "libvirt serves other clients too, and one of them set the domain's memory to {shown} \
             during the operation"
        ),
        "decide which amount is right, and ask again if it is this operation's",
    )
}
