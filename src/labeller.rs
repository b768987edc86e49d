//! The labeller: keeps the published labels up to date.
//!
//! ```text
//! timer ────────────────────────────────┐
//! new connection of the source ─────────┤      ┌───────┐ derive   ┌─────────────────┐
//! emulator, /dev/kvm, module, document ──┴────▶ │ probe │ ───────▶ │ PublishedLabels │
//!                                              └───────┘          └─────────────────┘
//! labels already on the Node (once) ─────────────────────────────────▶ adopt │
//!                        ┌──────────────────────┬───────────────────────────┤
//!                        ▼                      ▼                           ▼
//!                  file, written here     Node publisher      NodeVirtualization publisher
//! ```
//!
//! libvirt has no event for changed capabilities, hence the timer and the fingerprint of files.
//!
//! The labeller owns the published set and is the only one to change it. The publishers own their
//! API calls; they receive the latest set through `watch` channels and never delay the labeller.
//! [`Labeller::run`] waits for the probe, whose calls have deadlines. It blocks only for the
//! fingerprint (about twenty system calls) and for replacing the label file.
//!
//! A domain that cannot be read is logged once, counted in `virtnode_domains_unreadable`, and keeps
//! labels from being removed; it does not delay readiness. Neither does a launcher that cannot be
//! reached: as part of the source `domains` it is a failure, which the usual interval suffices for.
//!
//! A failed source leaves labels as they are and brings the next probe forward to
//! [`RETRY_AFTER_FAILURE`]. A failure to write the file is reported in [`LabellerProgress`] and
//! retried with the next probe. An empty set is never published.

mod metrics;

pub use self::metrics::LabellerMetrics;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use prometheus::IntGaugeVec;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::capability::{CanonicalMachine, NodeFacts};
use crate::domain::DomainRef;
use crate::host;
use crate::hypervisor::{ConnectionState, NodeSource};
use crate::label::{
    FAMILIES, FactSource, InvalidLabel, LabelChange, LabelSet, Policy, ProbeResult,
    PublishedLabels, RejectedLabel, RetentionReason, derive, family,
};
use crate::probe::{Prober, Reading, SourceFailure, UnreadDomain};
use crate::publish::file::{FilePublisher, LabelReport};
use crate::publish::virtualization::Snapshot;
use crate::telemetry::now_seconds;

/// Interval between fingerprints of the files that capabilities depend on.
const FINGERPRINT_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum time to the next probe after one with failures: shorter than the usual minute, long
/// enough not to load a libvirt in trouble.
const RETRY_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// The consumers of labels and facts.
#[derive(Default)]
pub struct Outputs {
    pub file: Option<FilePublisher>,
    /// Label sets for the Node's publisher.
    pub node: Option<watch::Sender<Option<Arc<LabelSet>>>>,
    /// Delivers the labels of ours that the Node already has. Until then the Node's publisher gets
    /// no set: it would remove existing labels that the set lacks, without proof.
    pub existing_labels: Option<oneshot::Receiver<LabelSet>>,
    /// Facts for the `NodeVirtualization` publisher.
    pub snapshots: Option<watch::Sender<Option<Arc<Snapshot>>>>,
}

/// The labeller's contribution to readiness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabellerProgress {
    /// True after a probe without failures.
    pub probed: bool,
    /// True if the file contains a label set, or no file is configured.
    pub files_written: bool,
    /// Failures of the last probe.
    pub failures: Vec<SourceFailure>,
    /// The last error of writing the file, until a write succeeds.
    pub file_problem: Option<String>,
}

/// The last probe, for the doctor.
#[derive(Debug, Clone, Default)]
pub struct LatestProbe {
    pub facts: Arc<NodeFacts>,
    pub failures: Vec<SourceFailure>,
    pub rejected: Vec<RejectedLabel>,
    /// True if documents were read from files and not from libvirt.
    pub from_files: bool,
}

pub struct Labeller<S> {
    prober: Prober<S>,
    connection: watch::Receiver<ConnectionState>,
    policy: Policy,
    interval: Duration,
    root: PathBuf,
    outputs: Outputs,
    metrics: Arc<LabellerMetrics>,
    progress: watch::Sender<LabellerProgress>,
    latest: watch::Sender<Option<Arc<LatestProbe>>>,

    published: PublishedLabels,
    rejected: Vec<RejectedLabel>,
    /// Paths of the emulators that the capabilities describe.
    emulators: Vec<String>,
    /// The files that the source reads its documents from.
    documents: Vec<PathBuf>,
    /// The domains that could not be read by the last probe.
    unreadable: BTreeMap<DomainRef, UnreadDomain>,
}

impl<S: NodeSource> Labeller<S> {
    /// Loads the labels that a previous run wrote to the file. The source is first called by
    /// [`Self::run`].
    pub fn new(
        node_source: Arc<S>,
        policy: Policy,
        interval: Duration,
        root: PathBuf,
        outputs: Outputs,
        metrics: Arc<LabellerMetrics>,
    ) -> Self {
        let loaded = outputs.file.as_ref().map(FilePublisher::load);
        let loaded = loaded.transpose().unwrap_or_else(|error| {
            warn!(%error, "cannot load the labels of the previous run; starting without them");
            None
        });
        let progress = LabellerProgress {
            files_written: outputs.file.is_none(),
            ..LabellerProgress::default()
        };
        Self {
            connection: node_source.connection(),
            documents: node_source.files(),
            prober: Prober::new(node_source, Arc::clone(&metrics.probe), root.clone()),
            policy,
            interval,
            root,
            outputs,
            metrics,
            progress: watch::Sender::new(progress),
            latest: watch::Sender::new(None),
            published: PublishedLabels::starting_from(loaded.unwrap_or_default()),
            rejected: Vec::new(),
            emulators: Vec::new(),
            unreadable: BTreeMap::new(),
        }
    }

    pub fn progress(&self) -> watch::Receiver<LabellerProgress> {
        self.progress.subscribe()
    }

    pub fn latest(&self) -> watch::Receiver<Option<Arc<LatestProbe>>> {
        self.latest.subscribe()
    }

    /// Probes and publishes until `token` is cancelled. Published labels remain.
    pub async fn run(mut self, token: CancellationToken) {
        token
            .run_until_cancelled_owned(self.probe_repeatedly())
            .await;
    }

    async fn probe_repeatedly(&mut self) {
        let mut existing_labels = self.outputs.existing_labels.take();
        let mut may_write_node = existing_labels.is_none();
        let mut check_files = interval(FINGERPRINT_INTERVAL);
        check_files.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut fingerprint = self.fingerprint();
        let mut next = Instant::now();
        self.connection.mark_unchanged();
        loop {
            tokio::select! {
                () = sleep_until(next) => {}
                changed = self.connection.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if *self.connection.borrow_and_update() == ConnectionState::Down {
                        continue;
                    }
                    self.prober.invalidate();
                }
                _ = check_files.tick() => {
                    if self.fingerprint() == fingerprint {
                        continue;
                    }
                    info!("emulator, document, /dev/kvm or kvm module changed, probing");
                    self.prober.invalidate();
                }
                existing = receive_once(&mut existing_labels) => {
                    may_write_node = true;
                    self.published.adopt(existing);
                    self.send_to_node();
                    continue;
                }
            }
            // The probe below uses the newest connection, so that connection needs no other probe.
            if self.connection.has_changed().unwrap_or(false) {
                self.prober.invalidate();
            }
            let was_down = *self.connection.borrow_and_update() == ConnectionState::Down;
            // A file that changes during the probe is a reason for another one.
            let (_, documents) = self.fingerprint();
            let reading = self.prober.read().await;
            if was_down && reading.failures.is_empty() {
                // The probe waited for the connection and used it.
                self.connection.mark_unchanged();
            }
            let wait = self.apply(&reading);
            self.write_file();
            if may_write_node {
                self.send_to_node();
            }
            self.latest.send_replace(Some(Arc::new(LatestProbe {
                facts: Arc::new(reading.facts),
                failures: reading.failures,
                rejected: self.rejected.clone(),
                from_files: reading.from_files,
            })));
            fingerprint = (self.fingerprint().0, documents);
            next = Instant::now() + wait;
        }
    }

    fn fingerprint(&self) -> (host::Fingerprint, host::Fingerprint) {
        // Unlike emulators, documents are not below the root that a container mounts.
        let documents = host::fingerprint(Path::new("/"), &self.documents);
        (host::fingerprint(&self.root, &self.emulators), documents)
    }

    /// Updates the published set, and returns the time to the next probe.
    fn apply(&mut self, reading: &Reading) -> Duration {
        let derivation = derive(&reading.facts, &self.policy);
        let failed: Vec<FactSource> = reading.failures.iter().map(|f| f.source).collect();
        let changes = self.published.update(ProbeResult {
            labels: &derivation.labels,
            failed: &failed,
            unread: &reading.unread,
            in_use: &reading.in_use,
        });
        self.rejected = derivation.rejected;
        self.report_changes(&changes);
        self.report_failures(&reading.failures);
        self.report_unreadable(reading);
        self.update_gauges(reading);
        if let Some(snapshots) = &self.outputs.snapshots {
            let retained = self.published.retained();
            let wanted = &self.policy.guest_architectures;
            let snapshot = Snapshot::new(reading, retained, wanted, Timestamp::now());
            snapshots.send_replace(Some(Arc::new(snapshot)));
        }
        let emulators = emulators(&reading.facts);
        if !emulators.is_empty() {
            self.emulators = emulators;
        }
        let is_whole = reading.failures.iter().all(|failure| failure.is_partial);
        let wait = if is_whole {
            self.interval
        } else {
            self.interval.min(RETRY_AFTER_FAILURE)
        };
        // Up to 10 % earlier or later, so that the nodes of a cluster do not synchronize.
        wait.mul_f64(0.9 + 0.2 * fastrand::f64())
    }

    fn send_to_node(&self) {
        if let Some(node) = &self.outputs.node
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

    fn write_file(&self) {
        let Some(file) = &self.outputs.file else {
            return;
        };
        if self.published.labels().is_empty() {
            return;
        }
        self.metrics.sync.attempts.inc();
        let report = LabelReport {
            labels: self.published.labels(),
            rejected: &self.rejected,
            retained: self.published.retained(),
            notes: &[],
        };
        let problem = match file.publish(&report) {
            Ok(written) => {
                self.metrics.sync.last_success.set(now_seconds());
                if written {
                    info!(path = %file.path().display(), labels = report.labels.len(), "labels written");
                }
                None
            }
            Err(error) => {
                self.metrics
                    .sync
                    .failures
                    .with_label_values(&[error.code()])
                    .inc();
                Some(error.to_string())
            }
        };
        self.progress.send_if_modified(|progress| {
            if let Some(problem) = &problem
                && progress.file_problem.as_ref() != Some(problem)
            {
                error!(%problem, "cannot write the label file");
            }
            let changed = progress.file_problem != problem || !progress.files_written;
            progress.files_written |= problem.is_none();
            progress.file_problem = problem;
            changed
        });
    }

    fn report_changes(&self, changes: &[LabelChange]) {
        // The Node publisher counts the changes that the API server accepted.
        if self.outputs.node.is_none() {
            for change in changes {
                self.metrics
                    .sync
                    .changes
                    .with_label_values(&[change.action()])
                    .inc();
            }
        }
        let added = changes
            .iter()
            .filter(|change| matches!(change, LabelChange::Added(..)))
            .count();
        if added > 0 {
            info!(labels = added, "labels added");
        }
        for change in changes {
            match change {
                LabelChange::Added(..) => {}
                LabelChange::Changed(label, from, to) => {
                    info!(%label, %from, %to, "label changed")
                }
                LabelChange::Removed(label, value) => {
                    info!(%label, %value, "label removed after two probes without it");
                }
            }
        }
    }

    /// Logs failures that the previous probe did not have.
    fn report_failures(&self, failures: &[SourceFailure]) {
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
                        "probe source failed, labels stay unchanged: {}",
                        failure.message
                    );
                }
                if failures.is_empty() {
                    info!("all probe sources succeed again");
                }
            }
            let probed = progress.probed || failures.iter().all(|failure| failure.is_partial);
            let changed = !same || probed != progress.probed;
            progress.failures = failures.to_vec();
            progress.probed = probed;
            changed
        });
    }

    /// Logs each domain once that cannot be read.
    fn report_unreadable(&mut self, reading: &Reading) {
        if reading.running_domains.is_none() {
            return;
        }
        let unreadable = reading.unreadable.iter();
        let unreadable: BTreeMap<_, _> = unreadable
            .map(|domain| (domain.id.clone(), domain.clone()))
            .collect();
        for (id, domain) in &unreadable {
            if !self.unreadable.contains_key(id) {
                warn!(
                    domain = %id.display_name(),
                    uuid = id.uuid,
                    connection = %id.connection,
                    reason = domain.code,
                    "cannot read the definition of a running domain, so no label of a machine \
                     type, CPU model or CPU feature is removed while it runs: {}",
                    domain.message
                );
            }
        }
        for id in self.unreadable.keys() {
            if !unreadable.contains_key(id) {
                info!(
                    domain = %id.display_name(),
                    uuid = id.uuid,
                    connection = %id.connection,
                    "domain was read again, or ended"
                );
            }
        }
        self.metrics.unreadable.set(gauge(unreadable.len()));
        self.unreadable = unreadable;
    }

    fn update_gauges(&self, reading: &Reading) {
        let (labels, retained) = (self.published.labels(), self.published.retained());
        let set = |gauges: &IntGaugeVec, label: &str, count: usize| {
            gauges.with_label_values(&[label]).set(gauge(count));
        };
        for name in FAMILIES {
            let count = labels.keys().filter(|key| family(key) == name).count();
            set(&self.metrics.labels, name, count);
        }
        for reason in InvalidLabel::ALL {
            let count = self.rejected.iter().filter(|r| r.reason == reason).count();
            set(&self.metrics.rejected, reason.code(), count);
        }
        for reason in RetentionReason::ALL {
            let count = retained.iter().filter(|r| r.reason == reason).count();
            set(&self.metrics.retained, reason.as_str(), count);
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

/// Waits for the value. Once it has been received or the sender is gone, waits forever.
async fn receive_once(receiver: &mut Option<oneshot::Receiver<LabelSet>>) -> LabelSet {
    if let Some(pending) = receiver {
        let outcome = pending.await;
        *receiver = None;
        if let Ok(labels) = outcome {
            return labels;
        }
    }
    std::future::pending().await
}

/// Returns the paths of the native emulators.
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
