//! The source of a node's labels: the libvirt of the host, or the documents of KubeVirt's
//! node-labeller; and the running domains of every connection.
//!
//! ```text
//!                 libvirt of the host        documents on disk
//! documents       its own                    the three files
//! versions, EIM   its own                    a launcher that fits them, or not read
//! domains         ──── the host's, if it has a libvirt, and those of all launchers ────
//! ```
//!
//! VMs of KubeVirt run with the QEMU of the virt-launcher image, which the documents describe and
//! the host's libvirt does not. So with `auto` the documents are used as soon as they exist, and
//! then until the daemon ends: a directory that is empty for a moment must not turn the labels into
//! those of another QEMU.
//!
//! The set of launchers is taken anew for each probe; no launcher is kept alive. A connection whose
//! domains cannot be read is reported with the domains of the others, so that no label is removed
//! that an unknown domain may depend on.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::launcher_versions::LauncherVersions;
use crate::capability::{Capabilities, NodeFacts};
use crate::compat::CpuComparison;
use crate::config::LabelOrigin;
use crate::documents::{DocumentDirectory, DocumentFile, FileStates};
use crate::domain::ConnectionId;
use crate::hypervisor::{
    CallError, ConnectionState, DomainCapabilitiesQuery, Libvirt, NodeSource, RunningDomains,
    Versions,
};
use crate::label::FactSource;
use crate::launchers::Census;

/// Timeout for the running domains of all launchers.
const DOMAINS_TIMEOUT: Duration = Duration::from_secs(20);
/// Maximum number of launchers whose domains are read at the same time.
const LAUNCHERS_AT_A_TIME: usize = 4;
/// Maximum wait, once, for the first scan for launchers and for the connections to them.
const SCAN_WAIT: Duration = Duration::from_secs(5);
/// Interval between observations during that wait.
const SCAN_POLL: Duration = Duration::from_millis(100);
/// Timeout for the dry run in a launcher.
const DRY_RUN_TIMEOUT: Duration = Duration::from_secs(5);

/// The launchers of the node at one time.
pub struct LaunchersSeen<H> {
    /// False before the first scan: then nothing is known about launchers.
    pub scanned: bool,
    pub up: Vec<(ConnectionId, Arc<H>)>,
    pub unreachable: Vec<ConnectionId>,
}

impl From<Census> for LaunchersSeen<Libvirt> {
    fn from(census: Census) -> Self {
        Self {
            scanned: census.scanned,
            up: census.up,
            unreachable: census.unreachable,
        }
    }
}

/// Returns the present launchers.
pub type ObserveLaunchers<H> = Box<dyn Fn() -> LaunchersSeen<H> + Send + Sync>;

/// The source of documents, versions and running domains of a node.
pub struct LabelSource<H> {
    origin: LabelOrigin,
    /// The libvirt of the host; `None` if the node has none.
    host: Option<Arc<H>>,
    documents: DocumentDirectory,
    /// `None` if launchers are not connected.
    launchers: Option<ObserveLaunchers<H>>,
    /// True once launchers have been waited for.
    waited: AtomicBool,
    /// True once the documents have been used.
    uses_documents: AtomicBool,
    /// The usual machine type of the documents, with the state of the files.
    usual_machine: Mutex<Option<(FileStates, Option<String>)>>,
    versions: AsyncMutex<LauncherVersions>,
    /// The launcher whose versions were returned last.
    fitting: Mutex<Weak<H>>,
    /// The state of a node without a libvirt.
    no_connection: watch::Sender<ConnectionState>,
}

impl<H: NodeSource> LabelSource<H> {
    pub fn new(
        origin: LabelOrigin,
        documents: DocumentDirectory,
        host: Option<Arc<H>>,
        launchers: Option<ObserveLaunchers<H>>,
    ) -> Self {
        Self {
            origin,
            host,
            documents,
            launchers,
            waited: AtomicBool::new(false),
            uses_documents: AtomicBool::new(origin == LabelOrigin::Files),
            usual_machine: Mutex::new(None),
            versions: AsyncMutex::new(LauncherVersions::default()),
            fitting: Mutex::new(Weak::new()),
            no_connection: watch::Sender::new(ConnectionState::Absent),
        }
    }

    /// True if labels are derived from the documents. Does not change during a probe.
    fn uses_documents(&self) -> bool {
        self.uses_documents.load(Ordering::Relaxed)
    }

    fn host(&self) -> Result<&H, CallError> {
        self.host.as_deref().ok_or_else(|| {
            CallError::Unavailable(format!(
                "this node has none (connect: none), and {} has no documents of KubeVirt",
                self.documents.path().display()
            ))
        })
    }

    /// Returns the present launchers. The first probe waits until they are connected, so that it does not
    /// miss those that the daemon has just begun to connect to.
    async fn observe_launchers(&self) -> Option<LaunchersSeen<H>> {
        let observe = self.launchers.as_ref()?;
        let until = Instant::now() + SCAN_WAIT;
        while !self.waited.load(Ordering::Relaxed) {
            let seen = observe();
            if seen.scanned && seen.unreachable.is_empty() || Instant::now() >= until {
                self.waited.store(true, Ordering::Relaxed);
            } else {
                drop(seen);
                sleep(SCAN_POLL).await;
            }
        }
        Some(observe())
    }

    /// Returns the canonical name of the documents' usual machine type.
    async fn usual_machine(&self) -> Option<String> {
        let states = self.documents.states();
        if let Some((of, machine)) = &*lock(&self.usual_machine)
            && *of == states
        {
            return machine.clone();
        }
        let text = self.documents.read(DocumentFile::Capabilities).await.ok()?;
        let name = FactSource::Capabilities.as_str();
        let facts = NodeFacts {
            capabilities: Some(Capabilities::parse(name, text.as_bytes()).ok()?),
            ..NodeFacts::default()
        };
        let machine = facts
            .usual_machine()
            .map(|machine| machine.canonical_name().to_owned());
        *lock(&self.usual_machine) = Some((states, machine.clone()));
        machine
    }

    async fn launcher_versions(&self) -> Option<Versions> {
        let launchers = self.observe_launchers().await?;
        let machine = self.usual_machine().await?;
        let mut versions = self.versions.lock().await;
        let found = versions.find(&launchers.up, &machine).await;
        let (versions, fitting) =
            found.map(|(versions, launcher)| (versions, Arc::downgrade(&launcher)))?;
        *lock(&self.fitting) = fitting;
        Some(versions)
    }

    /// Adds the running domains of the launchers.
    async fn read_launchers(&self, running: &mut RunningDomains) {
        let Some(seen) = self.observe_launchers().await else {
            return;
        };
        if !seen.scanned {
            let reason = "is unknown: the directory of the pods has not been read".to_owned();
            running.unreachable.push((every_launcher(), reason));
        }
        let until = Instant::now() + DOMAINS_TIMEOUT;
        let answers = stream::iter(seen.up)
            .map(|(id, launcher)| async move {
                let answer = timeout_at(until, launcher.running_domains()).await;
                (id, answer)
            })
            .buffer_unordered(LAUNCHERS_AT_A_TIME);
        let mut answers = std::pin::pin!(answers);
        while let Some((id, answer)) = answers.next().await {
            let reason = match answer {
                Ok(Ok(of)) => {
                    for mut domain in of.domains {
                        domain.id.connection = id.clone();
                        running.domains.push(domain);
                    }
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("did not answer within {DOMAINS_TIMEOUT:?}"),
            };
            running.unreachable.push((id, reason));
        }
        let unreachable = seen.unreachable.into_iter();
        let unreachable = unreachable.map(|id| (id, "is not connected".to_owned()));
        running.unreachable.extend(unreachable);
    }
}

/// Returns the connection that stands for launchers of which nothing is known.
fn every_launcher() -> ConnectionId {
    ConnectionId::Launcher {
        pod: "*".to_owned(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<H: NodeSource> NodeSource for LabelSource<H> {
    /// Also decides where this probe reads the documents.
    async fn versions(&self) -> Result<Option<Versions>, CallError> {
        if self.origin == LabelOrigin::Auto && self.documents.has_files() {
            self.uses_documents.store(true, Ordering::Relaxed);
        }
        if self.uses_documents() {
            return Ok(self.launcher_versions().await);
        }
        self.host()?.versions().await
    }

    async fn capabilities(&self) -> Result<String, CallError> {
        if self.uses_documents() {
            return self.documents.read(DocumentFile::Capabilities).await;
        }
        self.host()?.capabilities().await
    }

    /// Returns the only one of the documents, whatever the query: it is for the machine type and domain
    /// type that the node-labeller chose.
    async fn domain_capabilities(
        &self,
        query: DomainCapabilitiesQuery,
    ) -> Result<String, CallError> {
        if self.uses_documents() {
            return self.documents.read(DocumentFile::DomainCapabilities).await;
        }
        self.host()?.domain_capabilities(query).await
    }

    async fn baseline_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<String, CallError> {
        if !self.uses_documents() {
            return self.host()?.baseline_cpu(query, cpu).await;
        }
        // The node-labeller asks for it on these architectures only.
        if matches!(query.arch.as_deref(), Some("x86_64" | "s390x")) {
            return self.documents.read(DocumentFile::SupportedFeatures).await;
        }
        Err(CallError::Unsupported {
            call: "baseline-cpu".into(),
            text: "KubeVirt's node-labeller has no such document on this architecture".to_owned(),
        })
    }

    async fn compare_cpu(
        &self,
        query: DomainCapabilitiesQuery,
        cpu: String,
    ) -> Result<CpuComparison, CallError> {
        if self.uses_documents() {
            return Err(CallError::Unsupported {
                call: "compare-cpu".into(),
                text: "documents compare nothing".to_owned(),
            });
        }
        self.host()?.compare_cpu(query, cpu).await
    }

    async fn native_arguments(&self, domain: String) -> Result<String, CallError> {
        if !self.uses_documents() {
            return self.host()?.native_arguments(domain).await;
        }
        let fitting = lock(&self.fitting).upgrade();
        let Some(launcher) = fitting else {
            let text = "the launcher that fits the documents has ended".to_owned();
            return Err(CallError::Unavailable(text));
        };
        let until = Instant::now() + DRY_RUN_TIMEOUT;
        let answer = timeout_at(until, launcher.native_arguments(domain)).await;
        answer.unwrap_or(Err(CallError::Overdue {
            call: "native-arguments".into(),
            after: DRY_RUN_TIMEOUT,
        }))
    }

    async fn running_domains(&self) -> Result<RunningDomains, CallError> {
        let mut running = match &self.host {
            None => RunningDomains::default(),
            Some(host) => match host.running_domains().await {
                // The documents are known without this libvirt.
                Err(error) if self.uses_documents() => RunningDomains {
                    unreachable: vec![(ConnectionId::Host, error.to_string())],
                    ..RunningDomains::default()
                },
                answer => answer?,
            },
        };
        if self.host.is_none() && self.launchers.is_none() {
            let reason = "is not connected (launchers.enabled, by the daemon only)".to_owned();
            running.unreachable.push((every_launcher(), reason));
        }
        self.read_launchers(&mut running).await;
        Ok(running)
    }

    fn connection(&self) -> watch::Receiver<ConnectionState> {
        match &self.host {
            Some(host) => host.connection(),
            None => self.no_connection.subscribe(),
        }
    }

    fn reads_files(&self) -> bool {
        self.uses_documents()
    }

    fn files(&self) -> Vec<PathBuf> {
        match self.origin {
            LabelOrigin::Libvirt => Vec::new(),
            LabelOrigin::Auto | LabelOrigin::Files => DocumentFile::ALL
                .map(|file| self.documents.file(file))
                .into(),
        }
    }
}
