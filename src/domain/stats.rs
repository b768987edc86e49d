//! A domain's statistics, by the names of `virConnectGetAllDomainStats`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, KiB, Timestamp};

/// Minimum age of a report that is overdue: guests are slow under load.
const MIN_OVERDUE: Duration = Duration::from_secs(5);

/// The statistics of a domain that matter for hotplug.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// The number of plugged vCPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u32>,
    /// By the vCPU's number.
    pub vcpus: BTreeMap<u32, VcpuStats>,
    pub balloon: BalloonStats,
}

/// `vcpu.<number>.…`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuStats {
    /// Execution time in nanoseconds. libvirt counts in ticks of 10 ms, so a new vCPU that the
    /// guest has not started stays at 0.
    pub time: Option<u64>,
    /// Number of exits from the guest (KVM only; libvirt 8.9).
    pub exits: Option<u64>,
}

/// `balloon.…`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BalloonStats {
    /// The amount of memory that the balloon leaves to the guest.
    pub current: Option<Bytes>,
    /// The guest's total memory: MemTotal in Linux.
    pub total: Option<Bytes>,
    /// The memory that the guest can use without swapping.
    pub usable: Option<Bytes>,
    /// Time of the guest's last report, in seconds since 1970 by the host's clock; 0 means never.
    pub updated: Option<u64>,
}

impl BalloonStats {
    /// Returns the age of the guest's last report; `None` if it never reported. Without a statistics
    /// period it may be as old as the guest: the driver reports once when it starts.
    pub fn age(&self, at: Timestamp) -> Option<Duration> {
        let updated = self.updated.filter(|updated| *updated > 0)?;
        let millis = i64::try_from(updated.saturating_mul(1000)).unwrap_or(i64::MAX);
        Some(at.since(Timestamp::from_millis(millis)))
    }

    /// True if the last report still describes the guest, which reports every `period` seconds.
    pub fn is_current(&self, at: Timestamp, period: Option<u32>) -> bool {
        let overdue = Duration::from_secs(3 * u64::from(period.unwrap_or(0))).max(MIN_OVERDUE);
        self.age(at).is_some_and(|age| age <= overdue)
    }
}

impl Stats {
    /// Takes libvirt's numeric parameters by name and ignores those that are not needed.
    pub fn from_parameters<'n>(parameters: impl IntoIterator<Item = (&'n str, u64)>) -> Self {
        let mut stats = Self::default();
        for (name, value) in parameters {
            let size = || KiB::new(value).map(Bytes::from);
            match name {
                "vcpu.current" => stats.vcpu_count = u32::try_from(value).ok(),
                "balloon.current" => stats.balloon.current = size(),
                "balloon.available" => stats.balloon.total = size(),
                "balloon.usable" => stats.balloon.usable = size(),
                "balloon.last-update" => stats.balloon.updated = Some(value),
                _ => stats.set_vcpu(name, value),
            }
        }
        stats
    }

    fn set_vcpu(&mut self, name: &str, value: u64) {
        let Some((id, field)) = name
            .strip_prefix("vcpu.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return;
        };
        let Ok(id) = id.parse() else {
            return;
        };
        match field {
            "time" => self.vcpus.entry(id).or_default().time = Some(value),
            "exits.sum" => self.vcpus.entry(id).or_default().exits = Some(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needed_parameters_are_taken_and_others_ignored() {
        let stats = Stats::from_parameters([
            ("state.state", 1),
            ("vcpu.current", 3),
            ("vcpu.0.time", 4_240_000_000),
            ("vcpu.1.time", 0),
            ("vcpu.1.wait", 7),
            ("vcpu.1.exits.sum", 12),
            ("vcpu.x.time", 1),
            ("balloon.available", 938_512),
            ("balloon.last-update", 1_795_260_166),
        ]);
        assert_eq!((stats.vcpu_count, stats.vcpus.len()), (Some(3), 2));
        assert_eq!(stats.vcpus[&1].time, Some(0));
        assert_eq!(stats.vcpus[&1].exits, Some(12));
        assert_eq!(stats.balloon.total, KiB::new(938_512).map(Bytes::from));
        assert_eq!(stats.balloon.updated, Some(1_795_260_166));
        assert_eq!(stats.balloon.current, None);
    }
}
