//! Collects the observations behind `virtnode doctor` and the metric `virtnode_doctor_findings`;
//! [`checks`] turns them into findings.
//!
//! The command queries the host, libvirt and every running domain once ([`observe_node`]). The daemon
//! queries nothing: [`DoctorTask`] reuses the latest results of the labeller and the monitor, and reads
//! only the host's files. Neither fails: an observation that could not be made is reported as such.

pub mod checks;
mod documents;
mod metrics;

pub use self::metrics::DoctorMetrics;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::capability::NodeFacts;
use crate::config::LabelOrigin;
use crate::doctor::checks::observed::{
    Daemon, HostSurvey, LibvirtFailure, LibvirtStatus, Observed, ObservedDocuments, ObservedDomain,
    Undetailed,
};
use crate::doctor::checks::{Check, DoctorReport, Severity, diagnose};
use crate::domain::{ConnectionId, MemoryDevice};
use crate::host;
use crate::hotplug::Agent;
use crate::hypervisor::{DomainBackend, DomainRef, NodeSource};
use crate::label::{FactSource, Policy, derive};
use crate::labeller::LatestProbe;
use crate::monitor::{ObservedDomains, observe_details};
use crate::probe::{ProbeMetrics, Prober, SourceFailure};
use crate::telemetry::{MetricRegistry, now_seconds};
use crate::units::Bytes;

/// Timeout for one domain.
const DOMAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait until a guest agent can be asked: silent agents have few places.
const AGENT_WAIT: Duration = Duration::from_secs(30);
/// Maximum number of domains queried concurrently, so that a few unresponsive ones do not delay the
/// others.
const CONCURRENT_DOMAINS: usize = 8;
/// Timeout for all domains together. A domain not reached by then is reported as such.
const ALL_DOMAINS_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for reading all facts about the node.
const FACTS_TIMEOUT: Duration = Duration::from_secs(60);
/// Time between the two readings of a guest that lacks memory or CPUs: a guest that is still plugging
/// virtio-mem blocks has more after this time.
const RECHECK: Duration = Duration::from_secs(3);

/// Settings shared by the command and the daemon's task.
#[derive(Debug, Clone)]
pub struct DoctorScope {
    /// Root of the host's file system.
    pub root: PathBuf,
    /// `None` if this machine has no libvirt of its own.
    pub uri: Option<String>,
    pub policy: Policy,
    pub label_origin: LabelOrigin,
    /// Directory of KubeVirt's documents.
    pub documents: PathBuf,
}

impl DoctorScope {
    fn survey(&self) -> HostSurvey {
        host::survey(&self.root, self.uri.as_deref().and_then(socket_of))
    }

    /// Returns the status of a libvirt that was not asked yet.
    fn libvirt(&self) -> LibvirtStatus {
        LibvirtStatus {
            uri: self.uri.clone().unwrap_or_default(),
            is_absent: self.uri.is_none(),
            ..LibvirtStatus::default()
        }
    }
}

/// Observes host, libvirt and running domains once. Never fails, and returns within about two
/// minutes even if libvirt, a domain or an agent does not answer.
pub async fn observe_node<H: NodeSource, C: DomainBackend>(
    scope: &DoctorScope,
    hypervisor: Arc<H>,
    control: &C,
    daemon: Daemon,
) -> Observed {
    let mut observed = Observed {
        host: scope.survey(),
        libvirt: scope.libvirt(),
        facts: Arc::new(NodeFacts::default()),
        documents: documents::read_documents(scope).await,
        rejected: Vec::new(),
        domains: Ok(Vec::new()),
        daemon,
    };
    if observed.libvirt.is_absent {
        observed.domains = Err("only the daemon knows the domains of launchers".to_owned());
        if let Some(facts) = &observed.documents.facts {
            observed.rejected = derive(facts, &scope.policy).rejected;
        }
        return observed;
    }
    // Queried first and alone: if this fails, the remaining queries would each wait for their timeout.
    if let Err(error) = hypervisor.versions().await {
        observed.libvirt.failure = Some(LibvirtFailure {
            code: error.code(),
            message: error.to_string(),
        });
        observed.domains = Err("libvirt does not answer".to_owned());
        return observed;
    }
    let metrics = Arc::new(ProbeMetrics::register(&MetricRegistry::new()));
    let mut prober = Prober::new(hypervisor, metrics, scope.root.clone());
    let (reading, domains) = tokio::join!(
        timeout(FACTS_TIMEOUT, prober.read()),
        observe_domains(control)
    );
    match reading {
        Ok(reading) => {
            observed.rejected = derive(&reading.facts, &scope.policy).rejected;
            record_failures(&mut observed.libvirt, &reading.failures);
            observed.facts = Arc::new(reading.facts);
        }
        Err(_) => observed.libvirt.unanswered.push((
            "capabilities".to_owned(),
            format!("not all queries were answered within {FACTS_TIMEOUT:?}"),
        )),
    }
    observed.domains = domains;
    observed
}

/// Records the prober's failures: the connection as a whole, or the unanswered queries by the name
/// of virsh's command.
fn record_failures(libvirt: &mut LibvirtStatus, failures: &[SourceFailure]) {
    if libvirt.is_absent {
        return;
    }
    // The CPU baseline is also unavailable if the document that it depends on is.
    let lost = |failure: &&SourceFailure| {
        failure.code == "unavailable" && failure.source != FactSource::CpuBaseline
    };
    if let Some(failure) = failures.iter().find(lost) {
        libvirt.failure = Some(LibvirtFailure {
            code: failure.code,
            message: failure.message.clone(),
        });
        return;
    }
    libvirt.unanswered = failures
        .iter()
        .filter(|failure| failure.code != "unavailable")
        .map(|failure| {
            let query = match failure.source {
                FactSource::Versions => "version",
                FactSource::DomainCapabilities | FactSource::CpuBaseline => "domcapabilities",
                FactSource::Domains => "list",
                FactSource::Capabilities | FactSource::Host => "capabilities",
            };
            (query.to_owned(), failure.message.clone())
        })
        .collect();
}

/// Returns the path of the socket that a URI names.
pub fn socket_of(uri: &str) -> Option<&Path> {
    let (_, parameters) = uri.split_once('?')?;
    let socket = parameters
        .split('&')
        .find_map(|p| p.strip_prefix("socket="));
    socket.map(Path::new)
}

/// Observes the running domains, and once more those whose guests lack memory or CPUs that they may
/// just be plugging, or another client unplugging.
async fn observe_domains<C: DomainBackend>(control: &C) -> Result<Vec<ObservedDomain>, String> {
    let running = control.statistics().await;
    let running = running.map_err(|error| error.to_string())?;
    let mut seen: Vec<ObservedDomain> = running
        .into_iter()
        .map(|stats| ObservedDomain {
            name: stats.id.display_name().into_owned(),
            connection: stats.id.connection,
            uuid: stats.id.uuid,
            state: stats.state,
            stats: stats.stats,
            details: Err(Undetailed::Unanswered(format!(
                "not queried within {ALL_DOMAINS_TIMEOUT:?}"
            ))),
            earlier: BTreeMap::new(),
        })
        .collect();
    seen.sort_by(|a, b| a.name.cmp(&b.name));
    let all: Vec<usize> = (0..seen.len()).collect();
    query_details(control, &mut seen, all).await;
    let lacking: Vec<usize> = (0..seen.len())
        .filter(|at| lacks_memory(&seen[*at]) || lacks_vcpus(&seen[*at]))
        .collect();
    if !lacking.is_empty() {
        sleep(RECHECK).await;
        for at in &lacking {
            seen[*at].earlier = plugged_memory(&seen[*at]);
        }
        query_details(control, &mut seen, lacking).await;
    }
    Ok(seen)
}

/// Queries the details of some domains until [`ALL_DOMAINS_TIMEOUT`].
async fn query_details<C: DomainBackend>(
    control: &C,
    seen: &mut [ObservedDomain],
    which: Vec<usize>,
) {
    let ids = which.into_iter().map(|at| {
        let id = DomainRef::on_host(&*seen[at].name, &*seen[at].uuid);
        (at, id)
    });
    let queries = stream::iter(ids.collect::<Vec<_>>())
        .map(|(at, id)| async move {
            let wait = Some(AGENT_WAIT);
            let details = observe_details(control, &id, DOMAIN_TIMEOUT, wait).await;
            (at, details)
        })
        .buffer_unordered(CONCURRENT_DOMAINS)
        .take_until(sleep(ALL_DOMAINS_TIMEOUT));
    let mut queries = std::pin::pin!(queries);
    while let Some((at, details)) = queries.next().await {
        if let Some(domain) = seen.get_mut(at) {
            domain.details = details.map(Arc::new);
        }
    }
}

fn virtio_mem(seen: &ObservedDomain) -> impl Iterator<Item = &MemoryDevice> {
    let details = seen.details.as_ref().ok();
    details
        .into_iter()
        .flat_map(|details| details.domain.memory.virtio_mem())
}

/// True if the guest has plugged less of a virtio-mem device than requested.
fn lacks_memory(seen: &ObservedDomain) -> bool {
    virtio_mem(seen).any(|device| device.plugged() < device.asked())
}

/// True if the guest has fewer CPUs than libvirt counts: another client may be changing them.
fn lacks_vcpus(seen: &ObservedDomain) -> bool {
    seen.details.as_ref().is_ok_and(|details| {
        let plugged = details.domain.vcpus.plugged();
        matches!(&details.agent, Agent::Answered(guest) if guest.vcpus.len() < plugged)
    })
}

/// Returns the plugged size of each virtio-mem device, by alias.
fn plugged_memory(seen: &ObservedDomain) -> BTreeMap<String, Bytes> {
    virtio_mem(seen)
        .filter_map(|device| Some((device.alias.clone()?, device.plugged())))
        .collect()
}

/// The daemon's task: updates `virtnode_doctor_findings` after each probe and logs new errors.
pub struct DoctorTask {
    scope: DoctorScope,
    interval: Duration,
    latest: watch::Receiver<Option<Arc<LatestProbe>>>,
    sight: watch::Receiver<ObservedDomains>,
    metrics: Arc<DoctorMetrics>,
    /// Plugged virtio-mem sizes of guests that lack memory, with the time of the last change.
    memory: HashMap<(ConnectionId, String), (Instant, BTreeMap<String, Bytes>)>,
    /// Errors already logged.
    logged: Vec<String>,
}

impl DoctorTask {
    /// `interval` is the time between probes.
    pub fn new(
        scope: DoctorScope,
        interval: Duration,
        latest: watch::Receiver<Option<Arc<LatestProbe>>>,
        sight: watch::Receiver<ObservedDomains>,
        metrics: Arc<DoctorMetrics>,
    ) -> Self {
        Self {
            scope,
            interval,
            latest,
            sight,
            metrics,
            memory: HashMap::new(),
            logged: Vec::new(),
        }
    }

    /// Runs until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            while self.latest.changed().await.is_ok() {
                let latest = self.latest.borrow_and_update().clone();
                if let Some(latest) = latest {
                    let observed = self.observe(&latest);
                    let diagnosis = diagnose(&observed);
                    self.publish(&diagnosis);
                }
            }
            // The labeller has ended, which the daemon's supervision handles.
            std::future::pending::<()>().await;
        })
        .await;
    }

    /// Combines the latest readings of labeller and monitor with a survey of the host's files.
    fn observe(&mut self, latest: &LatestProbe) -> Observed {
        let mut libvirt = self.scope.libvirt();
        if !latest.from_files {
            record_failures(&mut libvirt, &latest.failures);
        }
        let sight = self.sight.borrow_and_update().clone();
        let domains = match sight {
            Some(Ok(domains)) => Ok(domains.to_vec()),
            Some(Err(why)) => Err(why),
            None => Err("not observed yet".to_owned()),
        };
        let mut observed = Observed {
            host: self.scope.survey(),
            libvirt,
            facts: Arc::clone(&latest.facts),
            documents: self.documents(latest),
            rejected: latest.rejected.clone(),
            domains,
            daemon: match self.metrics.registry.encode() {
                Ok(metrics) => Daemon::Runs {
                    metrics,
                    now: now_seconds(),
                    interval: self.interval,
                },
                Err(error) => Daemon::Unreadable(error.to_string()),
            },
        };
        self.add_earlier_memory(&mut observed);
        observed
    }

    /// Returns the documents as the latest probe read them. It does not read those that it does not use.
    fn documents(&self, latest: &LatestProbe) -> ObservedDocuments {
        let failures = latest.failures.iter();
        let failures = failures.filter(|failure| {
            use FactSource::{Capabilities, CpuBaseline, DomainCapabilities};
            let is_document = [Capabilities, DomainCapabilities, CpuBaseline];
            is_document.contains(&failure.source)
        });
        ObservedDocuments {
            directory: self.scope.documents.display().to_string(),
            exist: latest.from_files,
            used: latest.from_files,
            problems: failures.map(|failure| failure.message.clone()).collect(),
            facts: None,
        }
    }

    /// Sets `earlier` of the guests whose plugged memory has not changed for [`RECHECK`].
    fn add_earlier_memory(&mut self, observed: &mut Observed) {
        let Ok(domains) = &mut observed.domains else {
            return;
        };
        let mut memory = HashMap::new();
        for seen in domains.iter_mut().filter(|seen| lacks_memory(seen)) {
            let plugged = plugged_memory(seen);
            let key = (seen.connection.clone(), seen.uuid.clone());
            let since = match self.memory.remove(&key) {
                Some((since, before)) if before == plugged => since,
                _ => Instant::now(),
            };
            if since.elapsed() >= RECHECK {
                seen.earlier.clone_from(&plugged);
            }
            memory.insert(key, (since, plugged));
        }
        self.memory = memory;
    }

    fn publish(&mut self, diagnosis: &DoctorReport) {
        for check in Check::ALL {
            for severity in Severity::ALL {
                let count = diagnosis.count(check, severity);
                self.metrics
                    .findings
                    .with_label_values(&[check.as_str(), severity.as_str()])
                    .set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        let errors = diagnosis
            .findings
            .iter()
            .filter(|finding| finding.severity == Severity::Error)
            // The prober and the adapter log the state of the connection.
            .filter(|finding| finding.check != Check::LibvirtConnection);
        let mut lines = Vec::new();
        for finding in errors {
            let domain = finding.domain.as_deref().unwrap_or_default();
            let line = format!("{} {domain} {}", finding.check, finding.what);
            if !self.logged.contains(&line) {
                warn!(
                    check = finding.check.as_str(),
                    domain = finding.domain,
                    "{}; run virtnode doctor for the remedy",
                    finding.what
                );
            }
            lines.push(line);
        }
        self.logged = lines;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(source: FactSource, code: &'static str) -> SourceFailure {
        SourceFailure {
            source,
            code,
            message: "why".to_owned(),
            is_partial: false,
        }
    }

    #[test]
    fn late_document_is_not_a_lost_connection() {
        let mut libvirt = LibvirtStatus::default();
        let late = [
            failure(FactSource::DomainCapabilities, "timeout"),
            failure(FactSource::CpuBaseline, "unavailable"),
        ];
        record_failures(&mut libvirt, &late);
        assert_eq!(libvirt.failure, None);
        let expected = ("domcapabilities".to_owned(), "why".to_owned());
        assert_eq!(libvirt.unanswered, [expected]);
        record_failures(
            &mut libvirt,
            &[failure(FactSource::Versions, "unavailable")],
        );
        assert_eq!(
            libvirt.failure.map(|failure| failure.code),
            Some("unavailable")
        );
    }

    #[test]
    fn socket_is_taken_from_the_uri() {
        let uri = "qemu+unix:///system?name=qemu:///session&socket=/run/x/libvirt-sock";
        assert_eq!(socket_of(uri), Some(Path::new("/run/x/libvirt-sock")));
        assert_eq!(socket_of("qemu:///system"), None);
    }
}
