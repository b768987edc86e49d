//! Connections to the libvirt of each KubeVirt launcher pod on this node.
//!
//! ```text
//!  every scanSeconds: files::pods (blocking thread) ──▶ Table ── due ──▶ open: Libvirt::open_launcher
//!                                                        ▲  │                      │
//!                     opened, late, lost, closed ────────┘  └── close ◀────────────┤
//!                                                                                  ▼
//!                                      ConnectionSet ◀── add, remove ──── Arc<Libvirt>
//! ```
//!
//! **Ownership.** One task, [`LauncherScan::run`], owns the [`Table`] of states and every connection.
//! [`Launchers`] is what other services see of it. A launcher that is lost stays in the
//! [`ConnectionSet`], so that what is known of its domains is kept until its pod is gone.
//!
//! **Blocking.** The scan runs on a thread of the runtime's pool, at most one at a time, and opening a
//! socket takes a few system calls. All attempts greet at once, without a thread, and then wait for one of
//! the few threads that open and close connections.
//!
//! **Failure.** A scan that fails or hangs changes nothing and is visible by its age. A launcher that
//! refuses, hangs or lies delays its own connection only; the states are drawn in table.rs.

mod metrics;
mod table;

pub use self::metrics::LauncherMetrics;
pub use self::table::{LauncherState, OpenFailure};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::metrics::{CONFLICT, OPENED, SURPLUS};
use self::table::{NextStep, Table, sightings};
use crate::config::LauncherConfig;
use crate::connections::ConnectionSet;
use crate::domain::ConnectionId;
use crate::files::pods::{PodSockets, Scan, SocketFile};
use crate::hypervisor::{
    ConnectionState, DomainBackend, HypervisorMetrics, Libvirt, OpenError, Workers,
};
use crate::telemetry::now_seconds;

/// Maximum number of launchers that a scan lists. Those beyond `launchers.most` are counted.
const MAX_LISTED: usize = 16_384;

/// Time from a change of a state until it is published: many change at once.
const GATHER: Duration = Duration::from_millis(50);

/// Age of a scan in progress after which it is reported as hung.
const SLOW_SCAN: Duration = Duration::from_secs(30);

/// The launchers at one time, for services that ask each of them.
#[derive(Default)]
pub struct Census {
    /// True once the directory was scanned; until then nothing is known.
    pub scanned: bool,
    pub up: Vec<(ConnectionId, Arc<Libvirt>)>,
    /// Launchers whose libvirt cannot be asked, so that their domains are unknown.
    pub unreachable: Vec<ConnectionId>,
}

/// The launchers of this node, as other services see them.
#[derive(Default)]
pub struct Launchers {
    present: Mutex<PresentLaunchers>,
    /// The number of changes of the census.
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct PresentLaunchers {
    scanned: bool,
    states: BTreeMap<String, LauncherState>,
    connections: BTreeMap<String, Arc<Libvirt>>,
    surplus: Vec<String>,
}

impl Launchers {
    pub fn census(&self) -> Census {
        let present = self.lock();
        let mut census = Census {
            scanned: present.scanned,
            ..Census::default()
        };
        for (pod, state) in &present.states {
            match (state, present.connections.get(pod)) {
                (LauncherState::Up, Some(libvirt)) => {
                    let connection = ConnectionId::launcher(pod);
                    census.up.push((connection, Arc::clone(libvirt)));
                }
                (LauncherState::Gone, _) => {}
                _ => census.unreachable.push(ConnectionId::launcher(pod)),
            }
        }
        let surplus = present.surplus.iter();
        census
            .unreachable
            .extend(surplus.map(ConnectionId::launcher));
        census
    }

    /// True once the directory was scanned.
    pub fn is_scanned(&self) -> bool {
        self.lock().scanned
    }

    /// Returns the number of changes of the census, with its changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, PresentLaunchers> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of something that was in progress.
enum ScanEvent {
    Opened(String, SocketFile, Result<Libvirt, OpenError>),
    /// The file in the place of the socket changed since the scan.
    NotOpened(String, io::Error),
    Lost(String),
    Closed(String),
}

/// The task that keeps the connections.
pub struct LauncherScan {
    config: LauncherConfig,
    sockets: Arc<PodSockets>,
    workers: Workers,
    opening: Workers,
    set: Arc<ConnectionSet<Libvirt>>,
    calls: Arc<HypervisorMetrics>,
    metrics: Arc<LauncherMetrics>,
    launchers: Arc<Launchers>,
    table: Table,
    connections: BTreeMap<String, Arc<Libvirt>>,
    in_progress: FuturesUnordered<BoxFuture<'static, ScanEvent>>,
    late: mpsc::UnboundedSender<String>,
    late_pods: mpsc::UnboundedReceiver<String>,
    /// Time at which states are published that changed since.
    publish_at: Option<Instant>,
    /// Errors of scans that the log has.
    logged: Option<io::ErrorKind>,
}

impl LauncherScan {
    /// Returns a task that does nothing before [`Self::run`]. The connections use threads of `workers`.
    pub fn new(
        config: LauncherConfig,
        workers: &Workers,
        set: Arc<ConnectionSet<Libvirt>>,
        calls: Arc<HypervisorMetrics>,
        metrics: Arc<LauncherMetrics>,
    ) -> Self {
        let sockets = PodSockets::new(&config.directory, &config.volume, &config.sockets);
        let (late, late_pods) = mpsc::unbounded_channel();
        Self {
            sockets: Arc::new(sockets),
            workers: workers.for_launchers(),
            opening: workers.for_opening(),
            set,
            calls,
            metrics,
            launchers: Arc::default(),
            table: Table::new(config.most),
            connections: BTreeMap::new(),
            in_progress: FuturesUnordered::new(),
            late,
            late_pods,
            publish_at: None,
            logged: None,
            config,
        }
    }

    /// Returns the launchers, for other services.
    pub fn launchers(&self) -> Arc<Launchers> {
        Arc::clone(&self.launchers)
    }

    /// Runs until stopped. The connections stay open.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep()).await;
    }

    async fn keep(&mut self) {
        let mut tick = interval(self.config.scan_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut scan = None;
        loop {
            let due = self.table.next_due();
            tokio::select! {
                _ = tick.tick() => match &scan {
                    None => {
                        let sockets = Arc::clone(&self.sockets);
                        let work = spawn_blocking(move || sockets.scan(MAX_LISTED));
                        scan = Some((Instant::now(), work));
                    }
                    Some((began, _)) => self.report_slow(*began),
                },
                scanned = finished(&mut scan) => {
                    scan = None;
                    self.scanned(scanned);
                }
                Some(event) = self.in_progress.next(), if !self.in_progress.is_empty() => {
                    self.handle(event);
                }
                Some(pod) = self.late_pods.recv() => self.table.late(&pod),
                () = wait_until(due) => {}
                () = wait_until(self.publish_at) => {
                    self.publish_at = None;
                    self.publish();
                    continue;
                }
            }
            self.open_due();
            self.publish_at.get_or_insert(Instant::now() + GATHER);
        }
    }

    fn scanned(&mut self, scan: Result<io::Result<Scan>, JoinError>) {
        let scan = match scan {
            Ok(Ok(scan)) => scan,
            Ok(Err(error)) => return self.report_failed(&error),
            Err(_) => return,
        };
        if self.logged.take().is_some() {
            info!(directory = %self.config.directory.display(), "launchers are listed again");
        }
        self.metrics.scanned.set(now_seconds());
        for pod in self.table.scanned(&sightings(scan), Instant::now()) {
            self.close(pod);
        }
        // A pod that is gone takes along what is known of its domains.
        let is_gone = |pod: &str| {
            let state = self.table.state(pod);
            state.is_none_or(|state| state == LauncherState::Gone)
        };
        let gone: Vec<String> = self.known_connections(is_gone);
        for pod in gone {
            self.set.remove(&ConnectionId::launcher(&pod));
        }
    }

    /// Returns the pods of the launchers in the set for which `select` is true.
    fn known_connections(&self, select: impl Fn(&str) -> bool) -> Vec<String> {
        let connections = self.set.connections().into_iter();
        connections
            .filter_map(|connection| match connection {
                ConnectionId::Launcher { pod } => Some(pod),
                ConnectionId::Host | ConnectionId::Qmp { .. } => None,
            })
            .filter(|pod| select(pod))
            .collect()
    }

    fn report_failed(&mut self, error: &io::Error) {
        let directory = self.config.directory.display();
        if self.logged.replace(error.kind()) != Some(error.kind()) {
            warn!(%directory, %error, "cannot list the launchers; retrying");
        }
    }

    fn report_slow(&mut self, began: Instant) {
        let is_logged = self.logged == Some(io::ErrorKind::TimedOut);
        if began.elapsed() >= SLOW_SCAN && !is_logged {
            self.logged = Some(io::ErrorKind::TimedOut);
            let directory = self.config.directory.display();
            warn!(%directory, "listing the launchers does not end");
        }
    }

    /// Starts the attempts that are due.
    fn open_due(&mut self) {
        while let Some(pod) = self.table.open_next(Instant::now()) {
            let socket = match self.sockets.open(&pod) {
                Ok(socket) => socket,
                Err(error) => {
                    let event = std::future::ready(ScanEvent::NotOpened(pod, error));
                    self.in_progress.push(event.boxed());
                    continue;
                }
            };
            let file = socket.file;
            let (workers, opening) = (self.workers.clone(), self.opening.clone());
            let (calls, late) = (Arc::clone(&self.calls), self.late.clone());
            let attempt = async move {
                let is_late = || drop(late.send(pod.clone()));
                let opened =
                    Libvirt::open_launcher(socket, workers, &opening, calls, is_late).await;
                ScanEvent::Opened(pod, file, opened)
            };
            self.in_progress.push(attempt.boxed());
        }
    }

    fn handle(&mut self, event: ScanEvent) {
        let now = Instant::now();
        match event {
            ScanEvent::Opened(pod, file, Ok(libvirt)) => {
                self.count(OPENED);
                let libvirt = Arc::new(libvirt);
                let next = self.table.opened(&pod, Ok(file), now);
                self.connections.insert(pod.clone(), Arc::clone(&libvirt));
                if next == NextStep::Use {
                    info!(pod, "connected to a launcher");
                    self.add(pod, libvirt, file.age_rank());
                } else {
                    self.close(pod);
                }
            }
            ScanEvent::Opened(pod, _, Err(error)) => {
                let failure = match &error {
                    OpenError::Refused(_) => OpenFailure::Refused,
                    OpenError::Silent => OpenFailure::Silent,
                    OpenError::Gone(_) => OpenFailure::Gone,
                };
                self.failed(&pod, failure, &error.to_string());
            }
            ScanEvent::NotOpened(pod, error) => {
                let failure = match error.kind() {
                    io::ErrorKind::InvalidInput => OpenFailure::Odd,
                    io::ErrorKind::PermissionDenied => OpenFailure::Refused,
                    _ => OpenFailure::Gone,
                };
                self.failed(&pod, failure, &error.to_string());
            }
            ScanEvent::Lost(pod) => {
                if self.table.lost(&pod, now) {
                    info!(pod, "connection to a launcher ended");
                    self.close(pod);
                }
            }
            ScanEvent::Closed(pod) => self.table.closed(&pod, now),
        }
    }

    fn failed(&mut self, pod: &str, failure: OpenFailure, error: &str) {
        self.count(failure.as_str());
        let is_new = self.table.opened(pod, Err(failure), Instant::now()) == NextStep::Report;
        if is_new {
            warn!(pod, error, "cannot connect to a launcher; retrying");
        } else {
            debug!(pod, error, "cannot connect to a launcher");
        }
    }

    fn count(&self, result: &str) {
        self.metrics.opens.with_label_values(&[result]).inc();
    }

    /// Adds an open connection to the set, and waits for its end.
    fn add(&mut self, pod: String, libvirt: Arc<Libvirt>, rank: u64) {
        let mut health = libvirt.health();
        self.set.add(ConnectionId::launcher(&pod), libvirt, rank);
        let end = async move {
            // An error means that the connection was dropped.
            health
                .wait_for(|state| *state == ConnectionState::Down)
                .await
                .ok();
            ScanEvent::Lost(pod)
        };
        self.in_progress.push(end.boxed());
    }

    /// Closes the connection of a launcher, which the table counts as busy until then.
    fn close(&mut self, pod: String) {
        let connection = self.connections.remove(&pod);
        let opening = self.opening.clone();
        let close = async move {
            if let Some(connection) = connection {
                connection.close(&opening).await;
            }
            ScanEvent::Closed(pod)
        };
        self.in_progress.push(close.boxed());
    }

    /// Publishes states and connections to metrics and other services.
    fn publish(&self) {
        let conflicts = self.set.conflicts();
        let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
        let mut states = BTreeMap::new();
        let mut ignored = 0;
        for (pod, state) in self.table.states() {
            let libvirt = self.connections.get(pod);
            let is_up = state == LauncherState::Up;
            let is_late = is_up && libvirt.is_some_and(|libvirt| libvirt.late_calls() > 0);
            let state = if is_late {
                LauncherState::Unresponsive
            } else {
                state
            };
            let is_conflict = is_up && conflicts.contains(&ConnectionId::launcher(pod));
            let word = if is_conflict {
                CONFLICT
            } else {
                state.as_str()
            };
            *counts.entry(word).or_default() += 1;
            ignored += libvirt.map_or(0, |libvirt| libvirt.ignored_domains());
            states.insert(pod.to_owned(), state);
        }
        let surplus = self.table.surplus();
        counts.insert(SURPLUS, i64::try_from(surplus.len()).unwrap_or(i64::MAX));
        let words = LauncherState::ALL.map(LauncherState::as_str);
        for word in words.into_iter().chain([CONFLICT, SURPLUS]) {
            let count = counts.get(word).copied().unwrap_or(0);
            self.metrics.launchers.with_label_values(&[word]).set(count);
        }
        let ignored = i64::try_from(ignored).unwrap_or(i64::MAX);
        self.metrics.ignored_domains.set(ignored);

        let mut present = self.launchers.lock();
        // A daemon that restarts is up again at once, with another connection.
        let is_same = present.states == states
            && holds_same(&present.connections, &self.connections)
            && present.scanned == self.table.is_scanned()
            && present.surplus == surplus;
        if !is_same {
            *present = PresentLaunchers {
                scanned: self.table.is_scanned(),
                states,
                connections: self.connections.clone(),
                surplus: surplus.to_vec(),
            };
            drop(present);
            self.launchers.changes.send_modify(|changes| *changes += 1);
        }
    }
}

/// True if both have the same connections of the same pods.
fn holds_same(
    before: &BTreeMap<String, Arc<Libvirt>>,
    now: &BTreeMap<String, Arc<Libvirt>>,
) -> bool {
    let mut both = before.iter().zip(now);
    before.len() == now.len()
        && both.all(|((pod, had), (other, has))| pod == other && Arc::ptr_eq(had, has))
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of a scan, if there is one. Safe to cancel.
async fn finished<T>(
    scan: &mut Option<(Instant, tokio::task::JoinHandle<T>)>,
) -> Result<T, JoinError> {
    match scan {
        Some((_, work)) => work.await,
        None => std::future::pending().await,
    }
}
