//! Causes and remedies for guests that do not follow a change of memory.

use crate::hotplug::outcome::Diagnosis;
use crate::units::Bytes;

/// The minimum block of memory that Linux takes on x86 (`MIN_MEMORY_BLOCK_SIZE`).
pub(super) const LINUX_BLOCK: Bytes = Bytes::new(128 << 20);

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

/// The guest has the memory, and its total did not grow.
pub(super) fn offline(short: Bytes) -> Diagnosis {
    Diagnosis::new(
        "memory-offline",
        format!(
            "the guest has the memory, and {short} are missing from its own total: the memory blocks \
             were not brought online"
        ),
        "write 'online' to /sys/devices/system/memory/auto_online_blocks in the guest, or boot it \
         with memhp_default_state=online; blocks that are there come online by writing 'online' to \
         /sys/devices/system/memory/memory*/state",
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
        "write 'online' to /sys/devices/system/memory/auto_online_blocks in the guest, or boot it \
         with memhp_default_state=online; if there are no new /sys/devices/system/memory/memory*, \
         the DIMM is not a multiple of the guest's block_size_bytes there: 128 MiB on most x86 \
         guests, up to 2 GiB on those that booted with 64 GiB or more",
    )
}

/// The guest has the memory, and the balloon has taken it away.
pub(super) fn ballooned(held: Bytes) -> Diagnosis {
    Diagnosis::new(
        "balloon",
        format!("the guest has the memory, and the balloon holds {held} of the guest's memory"),
        "raise the balloon's target to the new total (virsh setmem), since the memory that was \
         plugged went into the balloon",
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

/// The domain has no source of evidence.
pub(super) fn no_source() -> Diagnosis {
    Diagnosis::new(
        "no-source",
        "no source shows how much memory the guest sees: its balloon driver reports no statistics",
        "give the domain a <memballoon> with <stats period='5'/> and load virtio_balloon in the \
         guest",
    )
}
