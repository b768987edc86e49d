//! Metrics of changes by other clients.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGauge, IntGaugeVec, Opts};

use super::log::ChangeLog;
use crate::hotplug::Verdict;
use crate::hotplug::external::{ChangedResource, ExternalChange};
use crate::telemetry::MetricRegistry;

/// Verdicts of changes that nothing was called for.
const VERDICTS: [Verdict; 8] = [
    Verdict::Verified,
    Verdict::PartiallyApplied,
    Verdict::GuestOffline,
    Verdict::GuestRefused,
    Verdict::GuestSilent,
    Verdict::Unverifiable,
    Verdict::Pending,
    Verdict::DomainNotRunning,
];

pub struct ExternalMetrics {
    pub log: Arc<ChangeLog>,
    changes: IntCounterVec,
    in_progress: IntGauge,
}

impl ExternalMetrics {
    pub fn register(registry: &MetricRegistry) -> Self {
        let log = Arc::<ChangeLog>::default();
        registry.collect(NotTakenCollector::new(Arc::clone(&log)));
        let changes = registry.counters(
            "virtnode_external_changes_total",
            "Changes of running domains that other clients of libvirt made and whose verdict was \
             reached, by their first verdict: a correction is not counted. The action is `plug` or \
             `unplug` for vCPUs and memory, `detach` for disks and interfaces.",
            &[("resource", &[]), ("action", &[]), ("verdict", &[])],
        );
        for resource in ChangedResource::ALL {
            for action in resource.actions() {
                for verdict in VERDICTS {
                    let labels = [resource.as_str(), action.as_str(), verdict.as_str()];
                    drop(changes.with_label_values(&labels));
                }
            }
        }
        Self {
            log,
            changes,
            in_progress: registry.gauge(
                "virtnode_external_changes_in_progress",
                "Changes by other clients that have no verdict yet.",
            ),
        }
    }

    /// Counts the first verdict of a change, unless it was found when the domain was first seen.
    pub(super) fn count(&self, change: &ExternalChange) {
        if let Some(verdict) = change.verdict.filter(|_| change.corrected.is_none())
            && !change.found
        {
            let (resource, action) = (change.resource.as_str(), change.action.as_str());
            self.changes
                .with_label_values(&[resource, action, verdict.as_str()])
                .inc();
        }
    }

    pub(super) fn set_in_progress(&self, open: usize) {
        self.in_progress
            .set(i64::try_from(open).unwrap_or(i64::MAX));
    }
}

/// Exports what guests have not taken at a scrape. The series exist only that long.
struct NotTakenCollector {
    log: Arc<ChangeLog>,
    gauge: IntGaugeVec,
    scrape: Mutex<()>,
}

impl NotTakenCollector {
    #[expect(clippy::expect_used, reason = "name and labels are constants")]
    fn new(log: Arc<ChangeLog>) -> Self {
        let options = Opts::new(
            "virtnode_domain_change_not_taken",
            "1 while the guest of a running domain has not taken a change that another client made, \
             or that was found when the domain was first seen. The domain has namespace and name if \
             it is a virtual machine of KubeVirt.",
        );
        let labels = ["namespace", "name", "domain", "resource"];
        let gauge = IntGaugeVec::new(options, &labels);
        Self {
            log,
            gauge: gauge.expect("the metric's name and labels are valid"),
            scrape: Mutex::default(),
        }
    }
}

impl Collector for NotTakenCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.gauge.reset();
        for change in self.log.not_taken().borrow().iter() {
            let domain = &change.domain;
            let (namespace, name) = domain
                .namespace_and_name()
                .unwrap_or(("", domain.name.as_str()));
            let labels = [namespace, name, &domain.name, change.resource.as_str()];
            self.gauge.with_label_values(&labels).set(1);
        }
        self.gauge.collect()
    }
}
