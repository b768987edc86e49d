//! Evidence: a fact, its source and its time.

use serde::{Deserialize, Serialize};

use crate::units::{Timestamp, words};

words! {
    /// The source of a piece of evidence.
    #[derive(PartialOrd, Ord, Hash, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    pub enum Source {
        /// libvirt's answer to a call.
        HypervisorCall = "hypervisor-call",
        LiveXml = "live-xml",
        /// The guest's answer through ACPI (`ACPI_DEVICE_OST`).
        AcpiOst = "acpi-ost",
        /// QEMU's report that a device was removed or kept (`DEVICE_DELETED` and similar).
        DeviceEvent = "device-event",
        GuestAgent = "guest-agent",
        /// A vCPU's run time in the bulk statistics.
        VcpuTime = "vcpu-time",
        /// The amount that the guest's virtio-mem driver took.
        VirtioMem = "virtio-mem",
        /// The guest's total as its balloon driver reports it.
        BalloonStats = "balloon-stats",
        /// A reset, pause, resume or end of the domain.
        Lifecycle = "lifecycle",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    pub source: Source,
    /// The fact in a few words.
    pub detail: String,
    pub time: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_has_one_word() {
        let json = serde_json::to_string(&Source::AcpiOst).unwrap();
        assert_eq!(json, format!("\"{}\"", Source::AcpiOst));
    }
}
