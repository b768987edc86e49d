//! The loop that keeps the published labels true: probe, derive, decide what stays, hand over.
//!
//! libvirt has no "capabilities changed" event. So there is a probe on a timer, one after each
//! new connection, and one when what capabilities depend on has changed on disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::capability::{CanonicalMachine, NodeFacts};
use crate::host;
use crate::hypervisor::{Connection, NodeSource};
use crate::label::{
    FAMILIES, FactSource, InvalidLabel, LabelChange, LabelSet, Policy, ProbeResult,
    PublishedLabels, RejectedLabel, RetentionReason, derive, family,
};
use crate::probe::{Prober, Reading, SourceFailure};
use crate::publish::file::{FilePublisher, LabelReport};
use crate::publish::virtualization::Snapshot;
use crate::telemetry::Metrics;
use crate::telemetry::metrics::now_seconds;

/// How often the files that capabilities depend on are looked at.
const LOOK_AT_FILES: Duration = Duration::from_secs(5);

/// After a probe with failures, the next one comes no later than this.
const AFTER_FAILURE: Duration = Duration::from_secs(10);

/// Where label sets are handed over.
#[derive(Default)]
pub struct Outputs {
    /// Files, written by this service itself.
    pub file: Option<FilePublisher>,
    /// The Node's publisher.
    pub node: Option<watch::Sender<Option<Arc<LabelSet>>>>,
    /// What the Node has of ours, as soon as that is known. Before that no set is handed to the
    /// Node's publisher: what it lacks would be removed without proof.
    pub existing_labels: Option<oneshot::Receiver<LabelSet>>,
    /// What labels cannot carry, for the `NodeVirtualization`'s publisher.
    pub snapshots: Option<watch::Sender<Option<Arc<Snapshot>>>>,
}

/// How far the labeller is, for readiness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabellerProgress {
    /// Whether one probe has read every source.
    pub probed: bool,
    /// Whether the files hold a label set; true as well where none are wanted.
    pub files_written: bool,
    /// What the last probe could not read.
    pub failures: Vec<SourceFailure>,
    /// Why the files could not be written.
    pub file_problem: Option<String>,
}

/// The last probe, for those who want to know more than labels.
#[derive(Debug, Clone, Default)]
pub struct LatestProbe {
    /// What it read.
    pub facts: Arc<NodeFacts>,
    /// What it could not read.
    pub failures: Vec<SourceFailure>,
    /// Labels that were left out.
    pub rejected: Vec<RejectedLabel>,
}

/// Keeps the published labels true.
pub struct Labeller<H> {
    prober: Prober<H>,
    connection: watch::Receiver<Connection>,
    policy: Policy,
    interval: Duration,
    root: PathBuf,
    outlets: Outputs,
    metrics: Arc<Metrics>,
    progress: watch::Sender<LabellerProgress>,
    latest: watch::Sender<Option<Arc<LatestProbe>>>,

    published: PublishedLabels,
    rejected: Vec<RejectedLabel>,
    /// The emulators that capabilities were read from.
    emulators: Vec<String>,
}

impl<H: NodeSource> Labeller<H> {
    /// Begins with what files say was published before. Nothing is asked before [`Self::run`].
    pub fn new(
        hypervisor: Arc<H>,
        policy: Policy,
        interval: Duration,
        root: PathBuf,
        outlets: Outputs,
        metrics: Arc<Metrics>,
    ) -> Self {
        let before = outlets.file.as_ref().map(FilePublisher::load);
        let before = before
            .unwrap_or_else(|| Ok(LabelSet::new()))
            .unwrap_or_else(|error| {
                warn!(%error, "what was published before is lost; beginning anew");
                LabelSet::new()
            });
        let progress = LabellerProgress {
            files_written: outlets.file.is_none(),
            ..LabellerProgress::default()
        };
        Self {
            connection: hypervisor.connection(),
            prober: Prober::new(hypervisor, Arc::clone(&metrics), root.clone()),
            policy,
            interval,
            root,
            outlets,
            metrics,
            progress: watch::Sender::new(progress),
            latest: watch::Sender::new(None),
            published: PublishedLabels::starting_from(before),
            rejected: Vec::new(),
            emulators: Vec::new(),
        }
    }

    /// How far it is, and every change of that.
    pub fn progress(&self) -> watch::Receiver<LabellerProgress> {
        self.progress.subscribe()
    }

    /// The last probe, and each that follows.
    pub fn latest(&self) -> watch::Receiver<Option<Arc<LatestProbe>>> {
        self.latest.subscribe()
    }

    /// Probes and publishes until `token` is cancelled. The labels stay then.
    pub async fn run(mut self, token: CancellationToken) {
        token.run_until_cancelled_owned(self.keep_true()).await;
    }

    async fn keep_true(&mut self) {
        let mut existing_labels = self.outlets.existing_labels.take();
        let mut may_write_node = existing_labels.is_none();
        let mut look = interval(LOOK_AT_FILES);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut fingerprint = host::fingerprint(&self.root, &self.emulators);
        let mut next = Instant::now();
        self.connection.mark_unchanged();
        loop {
            tokio::select! {
                () = sleep_until(next) => {}
                changed = self.connection.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if *self.connection.borrow_and_update() == Connection::Down {
                        continue;
                    }
                    self.prober.forget();
                }
                _ = look.tick() => {
                    let now = host::fingerprint(&self.root, &self.emulators);
                    if now == fingerprint {
                        continue;
                    }
                    info!("the emulator, /dev/kvm or the kvm module changed: probing");
                    self.prober.forget();
                }
                found = wait_for(&mut existing_labels) => {
                    may_write_node = true;
                    self.published.adopt(found);
                    self.hand_over_to_node();
                    continue;
                }
            }
            // Whatever woke this probe: a connection that came meanwhile is the one it reads from,
            // and no reason for another probe.
            if self.connection.has_changed().unwrap_or(false) {
                self.prober.forget();
            }
            let was_down = *self.connection.borrow_and_update() == Connection::Down;
            let reading = self.prober.read().await;
            if was_down && reading.failures.is_empty() {
                // This probe waited for the connection; its coming is no news any more.
                self.connection.mark_unchanged();
            }
            let wait = self.take(&reading);
            self.hand_over_to_files();
            if may_write_node {
                self.hand_over_to_node();
            }
            self.latest.send_replace(Some(Arc::new(LatestProbe {
                facts: Arc::new(reading.facts),
                failures: reading.failures,
                rejected: self.rejected.clone(),
            })));
            fingerprint = host::fingerprint(&self.root, &self.emulators);
            next = Instant::now() + wait;
        }
    }

    /// Decides what is published after this reading. Answers with the time to the next.
    fn take(&mut self, reading: &Reading) -> Duration {
        let derivation = derive(&reading.facts, &self.policy);
        let failed: Vec<FactSource> = reading
            .failures
            .iter()
            .map(|failure| failure.source)
            .collect();
        let probe = ProbeResult {
            labels: &derivation.labels,
            failed: &failed,
            in_use: &reading.in_use,
        };
        let changes = self.published.update(probe);
        self.rejected = derivation.rejected;
        self.tell_changes(&changes);
        self.tell_failures(&reading.failures);
        self.count(reading);
        if let Some(snapshots) = &self.outlets.snapshots {
            let retained = self.published.retained();
            let wanted = &self.policy.guest_architectures;
            let snapshot = Snapshot::new(reading, retained, wanted, Timestamp::now());
            snapshots.send_replace(Some(Arc::new(snapshot)));
        }
        let emulators = emulators(&reading.facts);
        if !emulators.is_empty() {
            self.emulators = emulators;
        }
        let most = self.interval;
        let usual = if failed.is_empty() {
            most
        } else {
            most.min(AFTER_FAILURE)
        };
        // A tenth to either side, so that the nodes of a cluster do not keep step.
        usual.mul_f64(0.9 + 0.2 * fastrand::f64())
    }

    fn hand_over_to_node(&self) {
        // An empty set would be no knowledge, and is never applied.
        if let Some(node) = &self.outlets.node
            && !self.published.labels().is_empty()
        {
            node.send_if_modified(|set| {
                let same = set.as_deref() == Some(self.published.labels());
                if !same {
                    *set = Some(Arc::new(self.published.labels().clone()));
                }
                !same
            });
        }
    }

    fn hand_over_to_files(&self) {
        let Some(file) = &self.outlets.file else {
            return;
        };
        if self.published.labels().is_empty() {
            return;
        }
        self.metrics.sync_attempts.inc();
        let report = LabelReport {
            labels: self.published.labels(),
            rejected: &self.rejected,
            retained: self.published.retained(),
        };
        let problem = match file.publish(&report) {
            Ok(written) => {
                self.metrics.sync_last_success.set(now_seconds());
                if written {
                    info!(path = %file.path().display(), labels = report.labels.len(), "labels written");
                }
                None
            }
            Err(error) => {
                self.metrics
                    .sync_failures
                    .with_label_values(&[error.code()])
                    .inc();
                Some(error.to_string())
            }
        };
        self.progress.send_if_modified(|progress| {
            if let Some(problem) = &problem
                && progress.file_problem.as_ref() != Some(problem)
            {
                error!(%problem, "labels not written");
            }
            let changed = progress.file_problem != problem || !progress.files_written;
            progress.files_written |= problem.is_none();
            progress.file_problem = problem;
            changed
        });
    }

    fn tell_changes(&self, changes: &[LabelChange]) {
        // With a Node its publisher counts, by what the API server really took.
        if self.outlets.node.is_none() {
            for change in changes {
                self.metrics
                    .label_changes
                    .with_label_values(&[change.action()])
                    .inc();
            }
        }
        let added = changes
            .iter()
            .filter(|change| matches!(change, LabelChange::Added(..)))
            .count();
        if added > 0 {
            info!(labels = added, "labels are new");
        }
        for change in changes {
            match change {
                LabelChange::Added(..) => {}
                LabelChange::Changed(label, from, to) => {
                    info!(%label, %from, %to, "a label changed")
                }
                LabelChange::Removed(label, value) => {
                    info!(%label, %value, "a label is gone after two probes without it");
                }
            }
        }
    }

    /// One line when the failures are others than before, not one each probe.
    fn tell_failures(&self, failures: &[SourceFailure]) {
        self.progress.send_if_modified(|progress| {
            let same = progress.failures == failures;
            if !same {
                for failure in failures
                    .iter()
                    .filter(|failure| !progress.failures.contains(failure))
                {
                    warn!(
                        source = failure.source.as_str(),
                        reason = failure.code,
                        "{}; labels stay as they are",
                        failure.message
                    );
                }
                if failures.is_empty() {
                    info!("every source can be read again");
                }
            }
            let probed = progress.probed || failures.is_empty();
            let changed = !same || probed != progress.probed;
            progress.failures = failures.to_vec();
            progress.probed = probed;
            changed
        });
    }

    fn count(&self, reading: &Reading) {
        let published = &self.published;
        for name in FAMILIES {
            let count = published
                .labels()
                .keys()
                .filter(|key| family(key) == name)
                .count();
            self.metrics
                .labels
                .with_label_values(&[name])
                .set(gauge(count));
        }
        for reason in InvalidLabel::ALL {
            let count = self.rejected.iter().filter(|r| r.reason == reason).count();
            self.metrics
                .labels_rejected
                .with_label_values(&[reason.code()])
                .set(gauge(count));
        }
        for reason in RetentionReason::ALL {
            let count = published
                .retained()
                .iter()
                .filter(|r| r.reason == reason)
                .count();
            self.metrics
                .labels_retained
                .with_label_values(&[reason.code()])
                .set(gauge(count));
        }
        let facts = &reading.facts;
        if let (Some(_), Some(arch)) = (&facts.capabilities, facts.native_arch()) {
            let machines = facts.machines(arch);
            let canonical = facts.canonical_machines(arch, &machines);
            let deprecated = canonical
                .iter()
                .filter(|machine| machine.deprecated)
                .count();
            let max = CanonicalMachine::largest_max(&canonical);
            self.metrics.machine_types.set(gauge(canonical.len()));
            self.metrics.machine_types_deprecated.set(gauge(deprecated));
            self.metrics.max_vcpus.set(max.number().unwrap_or(0).into());
        }
    }
}

/// Waits for the one value; forever once it has come, or cannot come any more.
async fn wait_for(receiver: &mut Option<oneshot::Receiver<LabelSet>>) -> LabelSet {
    if let Some(pending) = receiver {
        let outcome = pending.await;
        *receiver = None;
        if let Ok(labels) = outcome {
            return labels;
        }
    }
    std::future::pending().await
}

/// The native emulators, by path.
fn emulators(facts: &NodeFacts) -> Vec<String> {
    let mut paths: Vec<String> = facts
        .domain_capabilities
        .iter()
        .filter_map(|d| d.emulator.clone())
        .collect();
    if let (Some(capabilities), Some(arch)) = (&facts.capabilities, facts.native_arch()) {
        let native = capabilities
            .guests
            .iter()
            .filter(|guest| guest.arch == arch);
        paths.extend(native.filter_map(|guest| guest.emulator.clone()));
    }
    paths.sort_unstable();
    paths.dedup();
    paths
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
