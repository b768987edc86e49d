//! The labels that the labeller publishes over several probes of a source that changes and fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use virtnode::daemon::Metrics;
use virtnode::domain::NodeRequirements;
use virtnode::hypervisor::{CallError, DomainRef, RunningDomain};
use virtnode::label::{LabelSet, Policy, Schema};
use virtnode::labeller::{Labeller, LatestProbe, Outputs};

use crate::support::hypervisor::InMemory;
use crate::support::probes::published;

const INTERVAL: Duration = Duration::from_secs(60);
const OLD: &str = "machine.virtnode.io/pc-q35-5.0";

/// A running labeller in paused time, with an empty directory as the host's root.
struct RunningLabeller {
    hypervisor: Arc<InMemory>,
    metrics: Arc<Metrics>,
    latest: watch::Receiver<Option<Arc<LatestProbe>>>,
    node: watch::Receiver<Option<Arc<LabelSet>>>,
    _root: TempDir,
    _stop: tokio_util::sync::DropGuard,
}

impl RunningLabeller {
    fn start(existing_labels: Option<oneshot::Receiver<LabelSet>>) -> Self {
        let hypervisor = Arc::new(InMemory::debian_13());
        let metrics = Arc::new(Metrics::new());
        let root = tempfile::tempdir().unwrap();
        let (desired, node) = watch::channel(None);
        let outputs = Outputs {
            file: None,
            node: Some(desired),
            existing_labels,
            ..Outputs::default()
        };
        let service = Labeller::new(
            Arc::clone(&hypervisor),
            Policy {
                schema: Schema::Both,
                ..Policy::default()
            },
            INTERVAL,
            PathBuf::from(root.path()),
            outputs,
            Arc::clone(&metrics.labeller),
        );
        let latest = service.latest();
        let stop = CancellationToken::new();
        tokio::spawn(service.run(stop.clone()));
        Self {
            hypervisor,
            metrics,
            latest,
            node,
            _root: root,
            _stop: stop.drop_guard(),
        }
    }

    /// Waits until `count` more probes have been published.
    async fn probes(&self, count: u64) {
        published(&self.latest, count).await;
    }

    fn value(&self, key: &str) -> Option<String> {
        let set = self.node.borrow();
        Some(set.as_ref()?.get(&key.parse().unwrap())?.to_string())
    }

    fn retained(&self, reason: &str) -> i64 {
        self.metrics
            .labeller
            .retained
            .with_label_values(&[reason])
            .get()
    }
}

fn domain(machine: &str, model: &str) -> RunningDomain {
    RunningDomain {
        id: DomainRef::on_host("vm1", "5fc6a4ac-447f-479c-95b8-97395d1c380b"),
        requirements: Ok(NodeRequirements {
            machine: Some(machine.to_owned()),
            cpu_model: Some(model.to_owned()),
            ..NodeRequirements::default()
        }),
    }
}

#[tokio::test(start_paused = true)]
async fn machine_type_dropped_by_libvirt_is_removed_after_two_probes() {
    let labeller = RunningLabeller::start(None);
    labeller.probes(1).await;
    assert_eq!(labeller.value(OLD).as_deref(), Some("288"));
    labeller.hypervisor.drop_machine("pc-q35-5.0");
    labeller.probes(1).await;
    assert_eq!(labeller.value(OLD).as_deref(), Some("288"));
    assert!(labeller.retained("awaiting-second-probe") > 0);
    labeller.probes(1).await;
    assert_eq!(labeller.value(OLD), None);
    assert_eq!(
        labeller.value("machine-type.node.kubevirt.io/pc-q35-5.0"),
        None
    );
    assert_eq!(labeller.retained("awaiting-second-probe"), 0);
}

#[tokio::test(start_paused = true)]
async fn labels_in_use_by_running_domain_are_kept() {
    let labeller = RunningLabeller::start(None);
    labeller.probes(1).await;
    labeller.hypervisor.answers().domains = vec![domain("pc-q35-5.0", "486")];
    labeller.hypervisor.drop_machine("pc-q35-5.0");
    labeller.probes(5).await;
    assert_eq!(labeller.value(OLD).as_deref(), Some("288"));
    assert_eq!(
        labeller
            .value("machine-type.node.kubevirt.io/pc-q35-5.0")
            .as_deref(),
        Some("true")
    );
    assert_eq!(labeller.retained("domain-uses-it"), 2);
    labeller.hypervisor.answers().domains.clear();
    labeller.probes(2).await;
    assert_eq!(labeller.value(OLD), None);
}

#[tokio::test(start_paused = true)]
async fn failed_or_malformed_documents_change_no_label() {
    let labeller = RunningLabeller::start(None);
    labeller.probes(1).await;
    let before = labeller.node.borrow().clone();
    let timeout = CallError::Overdue {
        call: "x".into(),
        after: Duration::from_secs(1),
    };
    let good = labeller.hypervisor.answers().domain_capabilities.clone();
    let bad: [Result<String, CallError>; 4] = [
        Err(timeout.clone()),
        Ok(String::new()),
        Ok("<domainCapabilities><vcpu max='lots'/></domainCapabilities>".to_owned()),
        Ok("<domainCapabilities>".to_owned()),
    ];
    for answer in bad {
        labeller.hypervisor.answers().domain_capabilities = answer;
        labeller.probes(3).await;
        assert_eq!(*labeller.node.borrow(), before);
    }
    labeller.hypervisor.answers().domain_capabilities = good;
    labeller.hypervisor.answers().capabilities = Err(timeout);
    labeller.probes(3).await;
    assert_eq!(*labeller.node.borrow(), before);
    let malformed = labeller
        .metrics
        .labeller
        .probe
        .failures
        .with_label_values(&["domain-capabilities", "malformed"]);
    assert!(malformed.get() >= 9);
}

#[tokio::test(start_paused = true)]
async fn empty_documents_change_no_label() {
    let labeller = RunningLabeller::start(None);
    labeller.probes(1).await;
    let before = labeller.node.borrow().clone();
    labeller.hypervisor.answers().capabilities = Ok("<capabilities/>".to_owned());
    labeller.hypervisor.answers().domain_capabilities = Ok("<domainCapabilities/>".to_owned());
    labeller.probes(1).await;
    assert_eq!(*labeller.node.borrow(), before);
}

#[tokio::test(start_paused = true)]
async fn node_gets_no_labels_before_its_existing_ones_are_known() {
    let (existing, receiver) = oneshot::channel();
    let labeller = RunningLabeller::start(Some(receiver));
    labeller.probes(3).await;
    assert_eq!(*labeller.node.borrow(), None);
    let old: LabelSet = [(
        "cpu-model.virtnode.io/Gone".parse().unwrap(),
        "true".parse().unwrap(),
    )]
    .into();
    existing.send(old).unwrap();
    labeller.probes(1).await;
    assert_eq!(
        labeller.value("cpu-model.virtnode.io/Gone").as_deref(),
        Some("true")
    );
    assert_eq!(
        labeller.value("machine.virtnode.io/pc-q35-10.0").as_deref(),
        Some("1024")
    );
    labeller.probes(1).await;
    assert_eq!(labeller.value("cpu-model.virtnode.io/Gone"), None);
}
