//! Evidence: what was seen, where, and when.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Moment;

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
    pub time: Moment,
}

/// More would be no help to a reader: the first and the last of them are kept.
const MOST: usize = 64;

/// Evidence as it is collected: in order, and each source only when it says something new.
#[derive(Debug, Default)]
pub(super) struct Trail(Vec<Evidence>);

impl Trail {
    /// Adds a piece, unless the source said just the same the last time.
    pub(super) fn add(&mut self, source: Source, time: Moment, detail: impl Into<String>) {
        let detail = detail.into();
        let last = self.0.iter().rev().find(|have| have.source == source);
        if last.is_none_or(|last| last.detail != detail) {
            self.0.push(Evidence {
                source,
                detail,
                time,
            });
        }
    }

    pub(super) fn finish(mut self) -> Vec<Evidence> {
        if self.0.len() > MOST {
            let tail = self.0.split_off(self.0.len() - MOST / 2);
            self.0.truncate(MOST / 2);
            self.0.extend(tail);
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_news_is_kept_and_not_without_end() {
        let mut trail = Trail::default();
        let at = Moment::from_millis;
        trail.add(Source::LiveXml, at(1), "1 vCPU");
        trail.add(Source::GuestAgent, at(2), "online 0");
        trail.add(Source::LiveXml, at(3), "1 vCPU");
        trail.add(Source::LiveXml, at(4), "3 vCPUs");
        let times: Vec<_> = trail.0.iter().map(|have| have.time.as_millis()).collect();
        assert_eq!(times, [1, 2, 4]);
        for n in 0..1000 {
            trail.add(Source::VcpuTime, at(n), format!("{n}"));
        }
        let evidence = trail.finish();
        assert_eq!(evidence.len(), MOST);
        assert_eq!(evidence[0].detail, "1 vCPU");
        assert_eq!(evidence[MOST - 1].detail, "999");
    }

    #[test]
    fn a_source_has_one_word() {
        let json = serde_json::to_string(&Source::AcpiOst).unwrap();
        assert_eq!(json, format!("\"{}\"", Source::AcpiOst));
    }
}
