//! Looks a node over, for `virtnode doctor` and for the daemon's metric: gathers what is seen of
//! the host, of libvirt and of its running domains. What it means is [`crate::doctor::checks`]'s.

pub mod checks;

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
use crate::doctor::checks::observed::{
    Daemon, LibvirtFailure, LibvirtStatus, Observed, ObservedDomain,
};
use crate::doctor::checks::{Check, DoctorReport, Severity, diagnose};
use crate::domain::MemoryDevice;
use crate::host;
use crate::hypervisor::{CallError, DomainBackend, DomainRef, NodeSource};
use crate::label::{FactSource, Policy, derive};
use crate::labeller::LatestProbe;
use crate::monitor::{Patience, Sight, look};
use crate::probe::{Prober, SourceFailure};
use crate::telemetry::Metrics;
use crate::telemetry::metrics::now_seconds;
use crate::units::Bytes;

/// How long one look at a domain may take. libvirt itself gives an agent 5 s.
const PATIENCE: Patience = Patience {
    libvirt: Duration::from_secs(5),
    agent: Duration::from_secs(7),
};
/// Domains looked at at a time: some that do not answer do not hold up the rest.
const AT_A_TIME: usize = 8;
/// All domains together. What has not been looked at by then is said.
const ALL_DOMAINS: Duration = Duration::from_secs(60);
/// All questions about what the node can run together.
const ALL_QUESTIONS: Duration = Duration::from_secs(60);
/// Memory that a guest is just taking is more after this time.
const STILL_AFTER: Duration = Duration::from_secs(3);

/// What is looked at, beside libvirt.
#[derive(Debug, Clone)]
pub struct DoctorScope {
    /// Where the host's file system begins.
    pub root: PathBuf,
    /// libvirt's URI.
    pub uri: String,
    /// What an operator decides about labels.
    pub policy: Policy,
}

/// Looks everything over once. Never fails: what could not be seen is said, and it ends within
/// about two minutes whatever does not answer.
pub async fn observe_node<H: NodeSource, C: DomainBackend>(
    scope: &DoctorScope,
    hypervisor: Arc<H>,
    control: &C,
    daemon: Daemon,
) -> Observed {
    let mut observed = Observed {
        host: host::survey(&scope.root, socket_of(&scope.uri)),
        libvirt: LibvirtStatus {
            uri: scope.uri.clone(),
            ..LibvirtStatus::default()
        },
        facts: Arc::new(NodeFacts::default()),
        rejected: Vec::new(),
        domains: Ok(Vec::new()),
        daemon,
    };
    // First by itself: if this is not answered, the others are not asked for minutes.
    if let Err(error) = hypervisor.versions().await {
        observed.libvirt.failure = Some(trouble(&error));
        observed.domains = Err("libvirt does not answer".to_owned());
        return observed;
    }
    let metrics = Arc::new(Metrics::new());
    let mut prober = Prober::new(hypervisor, metrics, scope.root.clone());
    let (reading, domains) = tokio::join!(
        timeout(ALL_QUESTIONS, prober.read()),
        look_at_domains(control)
    );
    match reading {
        Ok(reading) => {
            observed.rejected = derive(&reading.facts, &scope.policy).rejected;
            take_failures(&mut observed.libvirt, &reading.failures);
            observed.facts = Arc::new(reading.facts);
        }
        Err(_) => observed.libvirt.unanswered.push((
            "capabilities".to_owned(),
            format!("not all was answered within {ALL_QUESTIONS:?}"),
        )),
    }
    observed.domains = domains;
    observed
}

fn trouble(error: &CallError) -> LibvirtFailure {
    LibvirtFailure {
        code: error.code(),
        message: error.to_string(),
    }
}

/// What libvirt did not answer: the connection as a whole, or single questions by virsh's words.
fn take_failures(libvirt: &mut LibvirtStatus, failures: &[SourceFailure]) {
    // The baseline is called unavailable also where the document was that it rests on.
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
            let question = match failure.source {
                FactSource::Versions => "version",
                FactSource::DomainCapabilities | FactSource::CpuBaseline => "domcapabilities",
                FactSource::Domains => "list",
                FactSource::Capabilities | FactSource::Host => "capabilities",
            };
            (question.to_owned(), failure.message.clone())
        })
        .collect();
}

/// The path of the socket that a URI names.
fn socket_of(uri: &str) -> Option<&Path> {
    let (_, parameters) = uri.split_once('?')?;
    let socket = parameters
        .split('&')
        .find_map(|p| p.strip_prefix("socket="));
    socket.map(Path::new)
}

/// The running domains, each with a closer look, and a second one at those whose guests lack
/// memory, which they may just be taking.
async fn look_at_domains<C: DomainBackend>(control: &C) -> Result<Vec<ObservedDomain>, String> {
    let running = control.all_domain_stats().await;
    let running = running.map_err(|error| error.to_string())?;
    let mut seen: Vec<ObservedDomain> = running
        .into_iter()
        .map(|stats| ObservedDomain {
            name: stats.id.name,
            uuid: stats.id.uuid,
            state: stats.state,
            stats: stats.stats,
            details: Err(format!("there was no time left after {ALL_DOMAINS:?}")),
            earlier: BTreeMap::new(),
        })
        .collect();
    seen.sort_by(|a, b| a.name.cmp(&b.name));
    let all: Vec<usize> = (0..seen.len()).collect();
    look_at(control, &mut seen, all).await;
    let lacking: Vec<usize> = (0..seen.len()).filter(|at| lacks(&seen[*at])).collect();
    if !lacking.is_empty() {
        sleep(STILL_AFTER).await;
        for at in &lacking {
            seen[*at].earlier = taken(&seen[*at]);
        }
        look_at(control, &mut seen, lacking).await;
    }
    Ok(seen)
}

/// Looks at these domains, some at a time, until the time for all is over.
async fn look_at<C: DomainBackend>(control: &C, seen: &mut [ObservedDomain], which: Vec<usize>) {
    let ids = which.into_iter().map(|at| {
        let id = DomainRef::on_host(&*seen[at].name, &*seen[at].uuid);
        (at, id)
    });
    let looks = stream::iter(ids.collect::<Vec<_>>())
        .map(|(at, id)| async move { (at, look(control, &id, PATIENCE).await) })
        .buffer_unordered(AT_A_TIME)
        .take_until(sleep(ALL_DOMAINS));
    let mut looks = std::pin::pin!(looks);
    while let Some((at, look)) = looks.next().await {
        if let Some(domain) = seen.get_mut(at) {
            domain.details = look.map(Arc::new);
        }
    }
}

fn virtio_mem(seen: &ObservedDomain) -> impl Iterator<Item = &MemoryDevice> {
    let look = seen.details.as_ref().ok();
    look.into_iter()
        .flat_map(|look| look.domain.memory.virtio_mem())
}

/// Whether the guest has less of a virtio-mem device than it was asked to take.
fn lacks(seen: &ObservedDomain) -> bool {
    virtio_mem(seen).any(|device| device.plugged() < device.asked())
}

/// What the guest has of each virtio-mem device.
fn taken(seen: &ObservedDomain) -> BTreeMap<String, Bytes> {
    virtio_mem(seen)
        .filter_map(|device| Some((device.alias.clone()?, device.plugged())))
        .collect()
}

/// Shows in the daemon's metrics what there is to find, anew after each probe.
pub struct DoctorTask {
    scope: DoctorScope,
    interval: Duration,
    latest: watch::Receiver<Option<Arc<LatestProbe>>>,
    sight: watch::Receiver<Sight>,
    metrics: Arc<Metrics>,
    /// What guests had of virtio-mem devices, by domain, and since when it is that.
    memory: HashMap<String, (Instant, BTreeMap<String, Bytes>)>,
    /// The errors that were told.
    told: Vec<String>,
}

impl DoctorTask {
    /// From what the labeller reads and the monitor sees. `interval` is the time between probes.
    pub fn new(
        scope: DoctorScope,
        interval: Duration,
        latest: watch::Receiver<Option<Arc<LatestProbe>>>,
        sight: watch::Receiver<Sight>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            scope,
            interval,
            latest,
            sight,
            metrics,
            memory: HashMap::new(),
            told: Vec::new(),
        }
    }

    /// Works until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            while self.latest.changed().await.is_ok() {
                let latest = self.latest.borrow_and_update().clone();
                if let Some(latest) = latest {
                    let observed = self.observe(&latest);
                    let diagnosis = diagnose(&observed);
                    self.show(&diagnosis);
                }
            }
            // Its sender ends with the labeller, which is told apart.
            std::future::pending::<()>().await;
        })
        .await;
    }

    /// What is known already, and the host, which is files.
    fn observe(&mut self, latest: &LatestProbe) -> Observed {
        let mut libvirt = LibvirtStatus {
            uri: self.scope.uri.clone(),
            ..LibvirtStatus::default()
        };
        take_failures(&mut libvirt, &latest.failures);
        let sight = self.sight.borrow_and_update().clone();
        let domains = match sight {
            Some(Ok(domains)) => Ok(domains.to_vec()),
            Some(Err(why)) => Err(why),
            None => Err("not looked at yet".to_owned()),
        };
        let mut observed = Observed {
            host: host::survey(&self.scope.root, socket_of(&self.scope.uri)),
            libvirt,
            facts: Arc::clone(&latest.facts),
            rejected: latest.rejected.clone(),
            domains,
            daemon: match self.metrics.encode() {
                Ok(metrics) => Daemon::Runs {
                    metrics,
                    now: now_seconds(),
                    interval: self.interval,
                },
                Err(error) => Daemon::Unreadable(error.to_string()),
            },
        };
        self.remember(&mut observed);
        observed
    }

    /// Fills in what guests had before, for those that have had the same for a while.
    fn remember(&mut self, observed: &mut Observed) {
        let Ok(domains) = &mut observed.domains else {
            return;
        };
        let mut memory = HashMap::new();
        for seen in domains.iter_mut().filter(|seen| lacks(seen)) {
            let taken = taken(seen);
            let since = match self.memory.remove(&seen.uuid) {
                Some((since, before)) if before == taken => since,
                _ => Instant::now(),
            };
            if since.elapsed() >= STILL_AFTER {
                seen.earlier.clone_from(&taken);
            }
            memory.insert(seen.uuid.clone(), (since, taken));
        }
        self.memory = memory;
    }

    fn show(&mut self, diagnosis: &DoctorReport) {
        for check in Check::ALL {
            for severity in Severity::ALL {
                let count = diagnosis.count(*check, severity);
                self.metrics
                    .doctor_findings
                    .with_label_values(&[check.name(), severity.name()])
                    .set(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        let errors = diagnosis
            .findings
            .iter()
            .filter(|finding| finding.severity == Severity::Error)
            // The prober and the adapter have told of the connection.
            .filter(|finding| finding.check != Check::LibvirtConnection);
        let mut found = Vec::new();
        for finding in errors {
            let about = finding.domain.as_deref().unwrap_or_default();
            let line = format!("{} {about} {}", finding.check, finding.what);
            if !self.told.contains(&line) {
                warn!(
                    check = finding.check.name(),
                    domain = finding.domain,
                    "{}; virtnode doctor says what to do",
                    finding.what
                );
            }
            found.push(line);
        }
        self.told = found;
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
        }
    }

    #[test]
    fn a_document_that_is_late_is_no_lost_connection() {
        let mut libvirt = LibvirtStatus::default();
        let late = [
            failure(FactSource::DomainCapabilities, "timeout"),
            failure(FactSource::CpuBaseline, "unavailable"),
        ];
        take_failures(&mut libvirt, &late);
        assert_eq!(libvirt.failure, None);
        let expected = ("domcapabilities".to_owned(), "why".to_owned());
        assert_eq!(libvirt.unanswered, [expected]);
        take_failures(
            &mut libvirt,
            &[failure(FactSource::Versions, "unavailable")],
        );
        assert_eq!(
            libvirt.failure.map(|trouble| trouble.code),
            Some("unavailable")
        );
    }

    #[test]
    fn the_socket_is_the_uris() {
        let uri = "qemu+unix:///system?name=qemu:///session&socket=/run/x/libvirt-sock";
        assert_eq!(socket_of(uri), Some(Path::new("/run/x/libvirt-sock")));
        assert_eq!(socket_of("qemu:///system"), None);
    }
}
