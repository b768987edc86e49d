//! The running domains at the last reading, for the local API and the metrics.
//!
//! A scrape writes out the present inventory, so a domain's series end with the domain.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts};
use serde::{Deserialize, Serialize};

use crate::domain::{ConnectionId, Domain, DomainRef, DomainState};
use crate::telemetry::MetricRegistry;
use crate::units::{Bytes, Timestamp};

/// Summary of a running domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainFigures {
    #[serde(default, skip_serializing_if = "ConnectionId::is_host")]
    pub connection: ConnectionId,
    /// The domain's name: untrusted text.
    pub name: String,
    /// Namespace of the VirtualMachineInstance, as a launcher's domain claims it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Name of the VirtualMachineInstance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_machine_instance: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    pub state: DomainState,
    pub vcpus: VcpuFigures,
    pub memory: MemoryFigures,
    /// Time of the observation.
    pub as_of: Timestamp,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuFigures {
    /// Maximum that can be plugged while the domain runs.
    pub maximum: u32,
    /// Plugged vCPUs, which the guest may or may not use.
    pub plugged: u32,
    /// vCPUs that the guest uses, according to its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub online: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryFigures {
    /// Maximum while the domain runs.
    pub maximum: Bytes,
    /// Boot memory and the requested size of its devices.
    pub requested: Bytes,
    /// Boot memory and the part of its devices that the guest accepted.
    pub plugged: Bytes,
    /// Total memory in the guest, according to its balloon driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_total: Option<Bytes>,
}

impl DomainFigures {
    /// Combines a domain's facts with the reports of its agent and its balloon driver.
    pub fn of(
        domain: &Domain,
        online: Option<u32>,
        guest_total: Option<Bytes>,
        as_of: Timestamp,
    ) -> Self {
        let memory = &domain.memory;
        Self {
            connection: ConnectionId::Host,
            name: domain.name.clone(),
            namespace: None,
            virtual_machine_instance: None,
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

    /// Returns these figures for a domain of this identity.
    pub fn on(self, id: &DomainRef, state: DomainState) -> Self {
        let names = id.namespace_and_name();
        Self {
            connection: id.connection.clone(),
            namespace: names.map(|(namespace, _)| namespace.to_owned()),
            virtual_machine_instance: names.map(|(_, name)| name.to_owned()),
            state,
            ..self
        }
    }

    /// Returns the name for people: `namespace/name` for the domain of a launcher.
    pub fn display_name(&self) -> String {
        let instance = self.virtual_machine_instance.as_ref();
        match self.namespace.as_ref().zip(instance) {
            Some((namespace, name)) => format!("{namespace}/{name}"),
            None => self.name.clone(),
        }
    }

    /// True if the domain has this name, UUID, or name in the form `namespace/name`.
    pub fn is_called(&self, text: &str) -> bool {
        let parts = self
            .namespace
            .as_ref()
            .zip(self.virtual_machine_instance.as_ref());
        self.name == text
            || self.uuid.as_deref() == Some(text)
            || parts
                .is_some_and(|(namespace, name)| text.split_once('/') == Some((namespace, name)))
    }
}

/// The running domains at the last reading.
#[derive(Debug, Default)]
pub struct Inventory(RwLock<Option<Arc<[DomainFigures]>>>);

impl Inventory {
    /// Registers an empty inventory and its metrics.
    pub fn register(registry: &MetricRegistry) -> Arc<Self> {
        let inventory = Arc::new(Self::default());
        registry.collect(InventoryCollector::new(Arc::clone(&inventory)));
        inventory
    }

    /// Replaces the domains.
    pub fn replace(&self, mut domains: Vec<DomainFigures>) {
        domains.sort_by(|a, b| (&a.name, &a.connection).cmp(&(&b.name, &b.connection)));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(domains.into());
    }

    /// Returns the domains in the order of their names.
    pub fn domains(&self) -> Arc<[DomainFigures]> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.clone().unwrap_or_default()
    }

    /// True once a reading has succeeded.
    pub fn is_known(&self) -> bool {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.is_some()
    }
}

/// Returns the time of the wall clock.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = since.map_or(0, |since| since.as_millis());
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

/// Exports the inventory at a scrape. The series of domains exist only that long.
struct InventoryCollector {
    inventory: Arc<Inventory>,
    vcpus: IntGaugeVec,
    memory: IntGaugeVec,
    /// The same two for domains of launchers, which have more labels.
    in_launchers: [IntGaugeVec; 2],
    domains: IntGaugeVec,
    scrape: Mutex<()>,
}

const DOMAIN_LABELS: [&str; 3] = ["connection", "domain", "state"];
/// The connection is always `launcher`: a pod's UID would make other series after each migration.
const LAUNCHER_LABELS: [&str; 5] = ["connection", "domain", "name", "namespace", "state"];
const VCPUS: (&str, &str) = (
    "virtnode_domain_vcpus",
    "vCPUs of a running domain: maximum, plugged, and used by the guest.",
);
const MEMORY: (&str, &str) = (
    "virtnode_domain_memory_bytes",
    "Memory of a running domain: maximum, requested, accepted by the guest, and total in the guest.",
);

/// Every state of a domain that is not shut off: values of the label `state`.
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
    #[expect(clippy::expect_used, reason = "names and labels are constants")]
    fn new(inventory: Arc<Inventory>) -> Self {
        let gauges = |(name, help), labels: &[&str]| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), labels);
            gauges.expect("the name and labels are valid")
        };
        Self {
            inventory,
            vcpus: gauges(VCPUS, &DOMAIN_LABELS),
            memory: gauges(MEMORY, &DOMAIN_LABELS),
            in_launchers: [VCPUS, MEMORY].map(|metric| gauges(metric, &LAUNCHER_LABELS)),
            domains: gauges(
                (
                    "virtnode_domains",
                    "Domains that are not shut off, by state.",
                ),
                &["state"],
            ),
            scrape: Mutex::default(),
        }
    }
}

impl Collector for InventoryCollector {
    fn desc(&self) -> Vec<&Desc> {
        let all = [&self.vcpus, &self.memory, &self.domains];
        all.into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let _alone = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let domains = self.inventory.domains();
        for domain in domains.iter() {
            let is_host = !domain.connection.is_launcher();
            let connection = if is_host {
                domain.connection.to_string()
            } else {
                domain.connection.kind().to_owned()
            };
            let name = domain.name.as_str();
            let set = |gauges: &IntGaugeVec, state, value: Option<u64>| {
                let Some(value) = value else { return };
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                let gauge = if is_host {
                    gauges.with_label_values(&[connection.as_str(), name, state])
                } else {
                    let part = |part: &'_ Option<String>| part.clone().unwrap_or_default();
                    let instance = part(&domain.virtual_machine_instance);
                    let namespace = part(&domain.namespace);
                    let labels = [&connection, name, &instance, &namespace, state];
                    gauges.with_label_values(&labels)
                };
                gauge.set(value);
            };
            let [vcpu_gauges, memory_gauges] = if is_host {
                [&self.vcpus, &self.memory]
            } else {
                self.in_launchers.each_ref()
            };
            let (vcpus, memory) = (domain.vcpus, domain.memory);
            set(vcpu_gauges, "maximum", Some(vcpus.maximum.into()));
            set(vcpu_gauges, "plugged", Some(vcpus.plugged.into()));
            set(vcpu_gauges, "online", vcpus.online.map(u64::from));
            set(memory_gauges, "maximum", Some(memory.maximum.get()));
            set(memory_gauges, "requested", Some(memory.requested.get()));
            set(memory_gauges, "plugged", Some(memory.plugged.get()));
            set(
                memory_gauges,
                "guest_total",
                memory.guest_total.map(Bytes::get),
            );
        }
        for (state, word) in STATES {
            let count = domains
                .iter()
                .filter(|domain| domain.state == state)
                .count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.domains.with_label_values(&[word]).set(count);
        }
        let mut families = self.domains.collect();
        for (host, launchers) in [&self.vcpus, &self.memory]
            .into_iter()
            .zip(&self.in_launchers)
        {
            families.extend(merged(host.collect(), launchers.collect()));
            host.reset();
            launchers.reset();
        }
        families
    }
}

/// Returns the families with the series of two collectors of one metric.
fn merged(mut one: Vec<MetricFamily>, other: Vec<MetricFamily>) -> Vec<MetricFamily> {
    for mut family in other {
        let known = one.iter_mut().find(|known| known.name() == family.name());
        match known {
            Some(known) => known.mut_metric().append(&mut family.take_metric()),
            None => one.push(family),
        }
    }
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_domain_has_namespace_and_name_and_no_pod() {
        let registry = MetricRegistry::new();
        let inventory = Inventory::register(&registry);
        let id = DomainRef {
            connection: ConnectionId::launcher("0a1b"),
            ..DomainRef::on_host("tenant-a_web", "u")
        };
        let in_launcher = figures("tenant-a_web", None).on(&id, DomainState::Running);
        assert!(in_launcher.is_called("tenant-a/web") && in_launcher.is_called("tenant-a_web"));
        assert!(!in_launcher.is_called("web") && !in_launcher.is_called("tenant-a"));
        inventory.replace(vec![figures("tenant-a_web", None), in_launcher]);
        let text = registry.encode().unwrap();
        for line in [
            "virtnode_domain_vcpus{connection=\"host\",domain=\"tenant-a_web\",state=\"plugged\"} 2",
            "virtnode_domain_vcpus{connection=\"launcher\",domain=\"tenant-a_web\",name=\"web\",namespace=\"tenant-a\",state=\"plugged\"} 2",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
        assert_eq!(text.matches("# TYPE virtnode_domain_vcpus ").count(), 1);
        assert!(!text.contains("0a1b"));
        inventory.replace(Vec::new());
        assert!(!registry.encode().unwrap().contains("tenant-a"));
    }

    fn figures(name: &str, online: Option<u32>) -> DomainFigures {
        DomainFigures {
            connection: ConnectionId::Host,
            name: name.to_owned(),
            namespace: None,
            virtual_machine_instance: None,
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
    fn series_exist_while_the_domain_does() {
        let registry = MetricRegistry::new();
        let inventory = Inventory::register(&registry);
        let text = registry.encode().unwrap();
        assert!(text.contains("virtnode_domains{state=\"paused\"} 0\n"));
        assert!(!text.contains("virtnode_domain_vcpus"));

        inventory.replace(vec![figures("b", Some(1)), figures("a", None)]);
        let text = registry.encode().unwrap();
        for line in [
            "virtnode_domains{state=\"running\"} 2",
            "virtnode_domain_vcpus{connection=\"host\",domain=\"a\",state=\"plugged\"} 2",
            "virtnode_domain_vcpus{connection=\"host\",domain=\"b\",state=\"online\"} 1",
            "virtnode_domain_memory_bytes{connection=\"host\",domain=\"a\",state=\"maximum\"} 4294967296",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
        assert!(!text.contains("domain=\"a\",state=\"online\""));

        inventory.replace(vec![figures("a", None)]);
        assert!(!registry.encode().unwrap().contains("domain=\"b\""));
    }

    #[test]
    fn name_with_quotes_stays_within_its_label() {
        let registry = MetricRegistry::new();
        let inventory = Inventory::register(&registry);
        let name = "a\"} 1\nevil{x=\"\\";
        inventory.replace(vec![figures(name, None)]);
        let text = registry.encode().unwrap();
        let wanted = r#"virtnode_domain_vcpus{connection="host",domain="a\"} 1\nevil{x=\"\\",state="plugged"} 2"#;
        assert!(text.lines().any(|line| line == wanted), "{text}");
        assert!(!text.lines().any(|line| line.starts_with("evil")));
    }

    #[test]
    fn five_hundred_domains_yield_six_series_each() {
        let registry = MetricRegistry::new();
        let inventory = Inventory::register(&registry);
        let domains = (0..500).map(|n| figures(&format!("vm-{n}"), Some(2)));
        inventory.replace(domains.collect());
        let text = registry.encode().unwrap();
        let series = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
        assert_eq!(series("virtnode_domain_vcpus{"), 1500);
        assert_eq!(series("virtnode_domain_memory_bytes{"), 1500);
    }
}
