//! Evidence: what was seen, where, and when.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Timestamp;

/// Where a piece of evidence comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// What libvirt answered to the call.
    HypervisorCall,
    /// The domain's live XML.
    LiveXml,
    /// The guest's answer through ACPI (`ACPI_DEVICE_OST`).
    AcpiOst,
    /// QEMU's word that a device is gone or was not let go (`DEVICE_DELETED` and its like).
    DeviceEvent,
    /// The guest agent.
    GuestAgent,
    /// How long a vCPU has run, in the bulk statistics.
    VcpuTime,
    /// What the guest's virtio-mem driver took.
    VirtioMem,
    /// The guest's total, as its balloon driver tells.
    BalloonStats,
    /// The domain's life: it was reset, paused, ended.
    Lifecycle,
}

impl Source {
    /// The word.
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

/// One piece of evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Where it comes from.
    pub source: Source,
    /// What was seen, in a few words.
    pub detail: String,
    /// When it was seen.
    pub time: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_has_one_word() {
        let json = serde_json::to_string(&Source::AcpiOst).unwrap();
        assert_eq!(json, format!("\"{}\"", Source::AcpiOst));
    }
}
