//! What the labeller publishes over several probes, with a hypervisor that changes and fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use virtnode::hypervisor::{CallError, RunningDomain};
use virtnode::label::{LabelSet, Policy, Schema};
use virtnode::labeller::{Labeller, Outputs};
use virtnode::telemetry::Metrics;

use crate::support::hypervisor::InMemory;

const INTERVAL: Duration = Duration::from_secs(60);
const OLD: &str = "machine.virtnode.io/pc-q35-5.0";

/// A labeller that runs in paused time, a root directory without any host facts, and what it
/// hands over for the Node.
struct Running {
    hypervisor: Arc<InMemory>,
    metrics: Arc<Metrics>,
    node: watch::Receiver<Option<Arc<LabelSet>>>,
    _root: TempDir,
    _stop: tokio_util::sync::DropGuard,
}

impl Running {
    fn start(existing_labels: Option<oneshot::Receiver<LabelSet>>) -> Self {
        let hypervisor = Arc::new(InMemory::debian_13());
        let metrics = Arc::new(Metrics::new());
        let root = tempfile::tempdir().unwrap();
        let (desired, node) = watch::channel(None);
        let outlets = Outputs {
            file: None,
            node: Some(desired),
            existing_labels,
            ..Outputs::default()
        };
        let labeller = Labeller::new(
            Arc::clone(&hypervisor),
            Policy {
                schema: Schema::Both,
                ..Policy::default()
            },
            INTERVAL,
            PathBuf::from(root.path()),
            outlets,
            Arc::clone(&metrics),
        );
        let stop = CancellationToken::new();
        tokio::spawn(labeller.run(stop.clone()));
        Self {
            hypervisor,
            metrics,
            node,
            _root: root,
            _stop: stop.drop_guard(),
        }
    }

    fn attempts(&self) -> u64 {
        self.metrics
            .probe_attempts
            .with_label_values(&["domain-capabilities"])
            .get()
    }

    /// Waits until `count` more probes are over.
    async fn probes(&self, count: u64) {
        let until = self.attempts() + count;
        while self.attempts() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // The attempt is counted in the middle of a probe; its labels come with the end of it.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    fn value(&self, key: &str) -> Option<String> {
        let set = self.node.borrow();
        Some(set.as_ref()?.get(&key.parse().unwrap())?.to_string())
    }

    fn retained(&self, reason: &str) -> i64 {
        self.metrics
            .labels_retained
            .with_label_values(&[reason])
            .get()
    }
}

fn domain(machine: &str, model: &str) -> RunningDomain {
    RunningDomain {
        name: "vm1".to_owned(),
        uuid: "5fc6a4ac-447f-479c-95b8-97395d1c380b".to_owned(),
        xml: format!(
            "<domain><os><type machine='{machine}'>hvm</type></os>\
             <cpu><model>{model}</model></cpu></domain>"
        ),
    }
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_libvirt_drops_goes_after_two_probes() {
    let running = Running::start(None);
    running.probes(1).await;
    assert_eq!(running.value(OLD).as_deref(), Some("288"));
    running.hypervisor.drop_machine("pc-q35-5.0");
    running.probes(1).await;
    assert_eq!(running.value(OLD).as_deref(), Some("288"));
    assert!(running.retained("awaiting-second-probe") > 0);
    running.probes(1).await;
    assert_eq!(running.value(OLD), None);
    assert_eq!(
        running.value("machine-type.node.kubevirt.io/pc-q35-5.0"),
        None
    );
    assert_eq!(running.retained("awaiting-second-probe"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_running_domain_stands_on_stays() {
    let running = Running::start(None);
    running.probes(1).await;
    running.hypervisor.answers().domains = vec![domain("pc-q35-5.0", "486")];
    running.hypervisor.drop_machine("pc-q35-5.0");
    running.probes(5).await;
    assert_eq!(running.value(OLD).as_deref(), Some("288"));
    assert_eq!(
        running
            .value("machine-type.node.kubevirt.io/pc-q35-5.0")
            .as_deref(),
        Some("true")
    );
    assert_eq!(running.retained("domain-uses-it"), 2);
    running.hypervisor.answers().domains.clear();
    running.probes(2).await;
    assert_eq!(running.value(OLD), None);
}

#[tokio::test(start_paused = true)]
async fn failed_and_malformed_answers_take_nothing_away_and_change_nothing() {
    let running = Running::start(None);
    running.probes(1).await;
    let before = running.node.borrow().clone();
    let timeout = CallError::Overdue {
        call: "x".into(),
        after: Duration::from_secs(1),
    };
    let good = running.hypervisor.answers().domain_capabilities.clone();
    let bad: [Result<String, CallError>; 4] = [
        Err(timeout.clone()),
        Ok(String::new()),
        Ok("<domainCapabilities><vcpu max='lots'/></domainCapabilities>".to_owned()),
        Ok("<domainCapabilities>".to_owned()),
    ];
    for answer in bad {
        running.hypervisor.answers().domain_capabilities = answer;
        running.probes(3).await;
        assert_eq!(*running.node.borrow(), before);
    }
    running.hypervisor.answers().domain_capabilities = good;
    running.hypervisor.answers().capabilities = Err(timeout);
    running.probes(3).await;
    assert_eq!(*running.node.borrow(), before);
    let malformed = running
        .metrics
        .probe_failures
        .with_label_values(&["domain-capabilities", "malformed"]);
    assert!(malformed.get() >= 9);
}

#[tokio::test(start_paused = true)]
async fn an_empty_host_is_no_answer() {
    let running = Running::start(None);
    running.probes(1).await;
    let before = running.node.borrow().clone();
    running.hypervisor.answers().capabilities = Ok("<capabilities/>".to_owned());
    running.hypervisor.answers().domain_capabilities = Ok("<domainCapabilities/>".to_owned());
    running.probes(1).await;
    assert_eq!(*running.node.borrow(), before);
}

#[tokio::test(start_paused = true)]
async fn the_node_gets_no_set_before_it_is_known_what_it_has() {
    let (found, receiver) = oneshot::channel();
    let running = Running::start(Some(receiver));
    running.probes(3).await;
    assert_eq!(*running.node.borrow(), None);
    let old: LabelSet = [(
        "cpu-model.virtnode.io/Gone".parse().unwrap(),
        "true".parse().unwrap(),
    )]
    .into();
    found.send(old).unwrap();
    running.probes(1).await;
    assert_eq!(
        running.value("cpu-model.virtnode.io/Gone").as_deref(),
        Some("true")
    );
    assert_eq!(
        running.value("machine.virtnode.io/pc-q35-10.0").as_deref(),
        Some("1024")
    );
    running.probes(1).await;
    assert_eq!(running.value("cpu-model.virtnode.io/Gone"), None);
}
