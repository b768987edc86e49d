//! The running domains as last seen: what the local API lists and the metrics show.
//!
//! Each scrape writes out what is here at that time, so the series of a domain end with it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Gauge, LabelPair, Metric, MetricFamily, MetricType};
use serde::{Deserialize, Serialize};

use crate::domain::{Domain, DomainState};
use crate::units::Bytes;
use crate::units::Timestamp;

/// What there is to know of a running domain at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainFigures {
    /// The name: tenants' text.
    pub name: String,
    /// The UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// The state.
    pub state: DomainState,
    /// The vCPUs.
    pub vcpus: VcpuFigures,
    /// The memory.
    pub memory: MemoryFigures,
    /// When it was looked at.
    pub as_of: Timestamp,
}

/// How many vCPUs there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuFigures {
    /// The most that can be plugged while it runs.
    pub maximum: u32,
    /// Plugged. That says nothing about the guest.
    pub plugged: u32,
    /// Used by the guest, where its agent tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub online: Option<u32>,
}

/// How much memory there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryFigures {
    /// The most that it can have while it runs.
    pub maximum: Bytes,
    /// What it is meant to have.
    pub requested: Bytes,
    /// What it booted with and what the guest took.
    pub plugged: Bytes,
    /// What the guest sees in all, where its balloon driver tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_total: Option<Bytes>,
}

impl DomainFigures {
    /// From a domain's facts, what its agent said and what its balloon driver told.
    pub fn of(
        domain: &Domain,
        online: Option<u32>,
        guest_total: Option<Bytes>,
        as_of: Timestamp,
    ) -> Self {
        let memory = &domain.memory;
        Self {
            name: domain.name.clone(),
            uuid: domain.uuid.clone(),
            state: domain.state,
            vcpus: VcpuFigures {
                maximum: domain.vcpus.maximum,
                plugged: domain.vcpus.plugged(),
                online,
            },
            memory: MemoryFigures {
                maximum: memory.maximum.unwrap_or(memory.boot),
                requested: memory.asked(),
                plugged: memory.plugged(),
                guest_total,
            },
            as_of,
        }
    }
}

/// The running domains as last seen. One writes, many read.
#[derive(Debug, Default)]
pub struct Inventory(RwLock<Option<Arc<[DomainFigures]>>>);

impl Inventory {
    /// The domains as they are from now on, in the order of their names.
    pub fn replace(&self, mut domains: Vec<DomainFigures>) {
        domains.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(domains.into());
    }

    /// The domains in the order of their names.
    pub fn domains(&self) -> Arc<[DomainFigures]> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.clone().unwrap_or_default()
    }

    /// Whether there was a first look.
    pub fn is_known(&self) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.is_some()
    }
}

/// The time by the wall clock.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = since.map_or(0, |since| since.as_millis());
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

/// Writes the inventory out at a scrape.
pub(super) struct InventoryCollector {
    inventory: Arc<Inventory>,
    vcpus: Desc,
    memory: Desc,
    domains: Desc,
}

const VCPUS: (&str, &str) = (
    "virtnode_domain_vcpus",
    "The vCPUs of a running domain: how many there can be, are plugged, and are used by the guest.",
);
const MEMORY: (&str, &str) = (
    "virtnode_domain_memory_bytes",
    "The memory of a running domain: how much there can be, is asked for, was taken, and is seen \
     by the guest.",
);
const DOMAINS: (&str, &str) = (
    "virtnode_domains",
    "Domains that are not shut off, by state.",
);

/// Every state of a domain that is not shut off, with its word in the metrics.
const STATES: [(DomainState, &str); 7] = [
    (DomainState::Running, "running"),
    (DomainState::Blocked, "blocked"),
    (DomainState::Paused, "paused"),
    (DomainState::ShuttingDown, "shutting-down"),
    (DomainState::Crashed, "crashed"),
    (DomainState::Suspended, "suspended"),
    (DomainState::Unknown, "unknown"),
];

impl InventoryCollector {
    pub(super) fn new(inventory: Arc<Inventory>) -> Result<Self, prometheus::Error> {
        let desc = |(name, help): (&str, &str), labels: &[&str]| {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(name.to_owned(), help.to_owned(), labels, Default::default())
        };
        Ok(Self {
            inventory,
            vcpus: desc(VCPUS, &["domain", "state"])?,
            memory: desc(MEMORY, &["domain", "state"])?,
            domains: desc(DOMAINS, &["state"])?,
        })
    }
}

impl Collector for InventoryCollector {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.vcpus, &self.memory, &self.domains]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let domains = self.inventory.domains();
        let mut vcpus = Vec::with_capacity(domains.len() * 3);
        let mut memory = Vec::with_capacity(domains.len() * 4);
        for domain in domains.iter() {
            let name = &domain.name;
            let mut counted = |state, count: u32| {
                vcpus.push(series(&[("domain", name), ("state", state)], count.into()));
            };
            counted("maximum", domain.vcpus.maximum);
            counted("plugged", domain.vcpus.plugged);
            if let Some(online) = domain.vcpus.online {
                counted("online", online);
            }
            let mut sized = |state, size: Bytes| {
                memory.push(series(&[("domain", name), ("state", state)], float(size)));
            };
            sized("maximum", domain.memory.maximum);
            sized("requested", domain.memory.requested);
            sized("plugged", domain.memory.plugged);
            if let Some(total) = domain.memory.guest_total {
                sized("guest_total", total);
            }
        }
        let states = STATES.map(|(state, word)| {
            let count = domains.iter().filter(|domain| domain.state == state);
            let count = u32::try_from(count.count()).unwrap_or(u32::MAX);
            series(&[("state", word)], count.into())
        });
        let mut families = vec![family(DOMAINS, states.into())];
        // A family without series is malformed to the encoder.
        if !domains.is_empty() {
            families.push(family(VCPUS, vcpus));
            families.push(family(MEMORY, memory));
        }
        families
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus counts in floats; no machine has 8 PiB"
)]
fn float(size: Bytes) -> f64 {
    size.get() as f64
}

fn series(labels: &[(&str, &str)], value: f64) -> Metric {
    let labels = labels.iter().map(|(name, value)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value((*value).to_owned());
        label
    });
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels.collect());
    metric.set_gauge(gauge);
    metric
}

fn family((name, help): (&str, &str), series: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::GAUGE);
    family.set_metric(series);
    family
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;

    fn figures(name: &str, online: Option<u32>) -> DomainFigures {
        DomainFigures {
            name: name.to_owned(),
            uuid: None,
            state: DomainState::Running,
            vcpus: VcpuFigures {
                maximum: 8,
                plugged: 2,
                online,
            },
            memory: MemoryFigures {
                maximum: Bytes::new(4 << 30),
                requested: Bytes::new(2 << 30),
                plugged: Bytes::new(1 << 30),
                guest_total: None,
            },
            as_of: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn series_come_and_go_with_the_domain() {
        let metrics = Metrics::new();
        let text = metrics.encode().unwrap();
        assert!(text.contains("virtnode_domains{state=\"paused\"} 0\n"));
        assert!(!text.contains("virtnode_domain_vcpus"));

        metrics
            .inventory
            .replace(vec![figures("b", Some(1)), figures("a", None)]);
        let text = metrics.encode().unwrap();
        for line in [
            "virtnode_domains{state=\"running\"} 2",
            "virtnode_domain_vcpus{domain=\"a\",state=\"plugged\"} 2",
            "virtnode_domain_vcpus{domain=\"b\",state=\"online\"} 1",
            "virtnode_domain_memory_bytes{domain=\"a\",state=\"maximum\"} 4294967296",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
        assert!(!text.contains("domain=\"a\",state=\"online\""));

        metrics.inventory.replace(vec![figures("a", None)]);
        assert!(!metrics.encode().unwrap().contains("domain=\"b\""));
    }

    #[test]
    fn a_name_cannot_break_out_of_its_label() {
        let metrics = Metrics::new();
        let name = "a\"} 1\nevil{x=\"\\";
        metrics.inventory.replace(vec![figures(name, None)]);
        let text = metrics.encode().unwrap();
        let wanted = r#"virtnode_domain_vcpus{domain="a\"} 1\nevil{x=\"\\",state="plugged"} 2"#;
        assert!(text.lines().any(|line| line == wanted), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("evil")));
    }

    #[test]
    fn five_hundred_domains_are_written_from_memory() {
        let metrics = Metrics::new();
        let domains = (0..500).map(|n| figures(&format!("vm-{n}"), Some(2)));
        metrics.inventory.replace(domains.collect());
        let text = metrics.encode().unwrap();
        let series = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
        assert_eq!(series("virtnode_domain_vcpus{"), 1500);
        assert_eq!(series("virtnode_domain_memory_bytes{"), 1500);
        // Nothing here could call libvirt, and nothing did.
        let calls = text
            .lines()
            .filter(|line| line.starts_with("virtnode_hypervisor_call_duration_seconds_count"));
        assert!(calls.clone().count() > 0);
        assert!(calls.into_iter().all(|line| line.ends_with(" 0")));
    }
}
