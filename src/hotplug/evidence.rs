//! Evidence: a fact, its source and its time.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Timestamp;

/// The source of a piece of evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// libvirt's answer to a call.
    HypervisorCall,
    LiveXml,
    /// The guest's answer through ACPI (`ACPI_DEVICE_OST`).
    AcpiOst,
    /// QEMU's report that a device was removed or kept (`DEVICE_DELETED` and similar).
    DeviceEvent,
    GuestAgent,
    /// A vCPU's run time in the bulk statistics.
    VcpuTime,
    /// The amount that the guest's virtio-mem driver took.
    VirtioMem,
    /// The guest's total as its balloon driver reports it.
    BalloonStats,
    /// A reset, pause, resume or end of the domain.
    Lifecycle,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HypervisorCall => "hypervisor-call",
            Self::LiveXml => "live-xml",
            Self::AcpiOst => "acpi-ost",
            Self::DeviceEvent => "device-event",
            Self::GuestAgent => "guest-agent",
            Self::VcpuTime => "vcpu-time",
            Self::VirtioMem => "virtio-mem",
            Self::BalloonStats => "balloon-stats",
            Self::Lifecycle => "lifecycle",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
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
