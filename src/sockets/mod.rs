//! `virtnode sockets`: serves the sockets of launchers to a daemon that cannot enter the pods directory,
//! and forwards only what reads.
//!
//! ```text
//! scan of the pods directory, every 2 s
//!    └ a launcher's socket ──▶ <serve>/<pod uid>.sock ──▶ connection ──▶ relay (relay.rs)
//!                                                            requests ▶ filter ▶ daemon
//!                                                            client ◀ filter ◀ replies
//! ```
//! It holds a right that the daemon must not have, to enter every pod's volumes, and so it has nothing
//! else: no token, no configuration, no network, no parser but that of message headers and of a few
//! arguments ([`filter`]). Who may connect is decided by the mode of the directory with the served
//! sockets, which are open to everyone who can reach them.
//!
//! One thread. Each connection is a task that waits; its buffers exist only while bytes are on their
//! way. A peer that accepts nothing for 30 s ends its connection and delays no other. The number of
//! launchers and of connections is bounded; beyond it, launchers are not served and logged, and
//! connections are closed at once. A socket that the launcher's daemon replaced is served as a new one,
//! so that clients notice.

pub mod filter;
pub mod procedures;
mod relay;

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{debug, info, warn};

use crate::files::pods::{BROKER_SUFFIX, OddFile, PodSockets, SocketFile};
use crate::files::{create_directory, raise_descriptor_limit};
use relay::{Ended, relay};

/// Interval between scans. A migration's target exists for seconds before its domain runs.
const SCAN_INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of launchers: more than pods fit on a node.
const MAX_LAUNCHERS: usize = 512;
/// Maximum number of connections to one launcher: one of the daemon, and commands beside it.
const MAX_PER_LAUNCHER: usize = 8;
/// Maximum number of connections.
const MAX_CONNECTIONS: usize = 1024;
/// Timeout for connecting to a launcher's daemon.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Mode of a created directory: its user, and its group.
const DIRECTORY_MODE: u32 = 0o750;
/// Mode of a served socket: the directory decides who reaches it.
const SOCKET_MODE: u32 = 0o666;

/// Options of the broker.
#[derive(Debug, Clone)]
pub struct SocketsOptions {
    /// The kubelet's pods directory.
    pub directory: PathBuf,
    /// Directory for the served sockets.
    pub serve: PathBuf,
    pub volume: String,
    pub names: Vec<String>,
    pub allow_changes: bool,
}

/// Serves until SIGTERM or SIGINT, then removes the served sockets.
///
/// # Errors
/// The directory for the served sockets cannot be used.
pub async fn run(options: SocketsOptions) -> io::Result<()> {
    if let Err(error) = raise_descriptor_limit() {
        warn!(%error, "cannot raise the limit of open files");
    }
    create_directory(&options.serve, DIRECTORY_MODE)?;
    remove_sockets(&options.serve)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let broker = Broker {
        sockets: Rc::new(PodSockets::new(
            &options.directory,
            &options.volume,
            &options.names,
        )),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        served: HashMap::new(),
        refused: HashMap::new(),
        failed: false,
        omitted: 0,
        options,
    };
    info!(
        directory = %broker.options.directory.display(),
        serve = %broker.options.serve.display(),
        allow_changes = broker.options.allow_changes,
        "serving sockets of launchers"
    );
    let serve = broker.options.serve.clone();
    let local = LocalSet::new();
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    local
        .run_until(async {
            tokio::select! {
                () = stopped => {}
                () = broker.scan_forever() => {}
            }
        })
        .await;
    remove_sockets(&serve)
}

/// Removes the sockets of this or an earlier process.
fn remove_sockets(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let is_served = entry.file_name().to_string_lossy().ends_with(BROKER_SUFFIX);
        if is_served && entry.file_type()?.is_socket() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A launcher that is served. Dropping the tasks closes its socket and its connections.
struct Served {
    file: SocketFile,
    _tasks: JoinSet<()>,
}

struct Broker {
    options: SocketsOptions,
    sockets: Rc<PodSockets>,
    connections: Arc<Semaphore>,
    /// By pod UID.
    served: HashMap<String, Served>,
    /// Launchers that are not served, each logged once.
    refused: HashMap<String, String>,
    /// True if the last scan failed.
    failed: bool,
    /// Number of launchers beyond the maximum at the last scan.
    omitted: usize,
}

impl Broker {
    async fn scan_forever(mut self) {
        let mut scans = interval(SCAN_INTERVAL);
        scans.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            scans.tick().await;
            self.scan();
        }
    }

    /// Brings the served sockets in line with the launchers.
    fn scan(&mut self) {
        let scan = match self.sockets.scan(MAX_LAUNCHERS) {
            Ok(scan) => scan,
            // Launchers that are served stay so.
            Err(error) => {
                if !self.failed {
                    let directory = self.options.directory.display();
                    warn!(%directory, %error, "cannot read the directory of pods");
                }
                self.failed = true;
                return;
            }
        };
        self.failed = false;
        if scan.omitted != self.omitted {
            let (omitted, maximum) = (scan.omitted, MAX_LAUNCHERS);
            warn!(
                omitted,
                maximum, "launchers beyond the maximum are not served"
            );
            self.omitted = scan.omitted;
        }
        let found: HashMap<String, Result<SocketFile, OddFile>> =
            scan.sockets.into_iter().collect();
        self.refused.retain(|pod, _| found.contains_key(pod));
        let is_current = |pod: &String, served: &Served| {
            found.get(pod).is_some_and(|file| *file == Ok(served.file))
        };
        let old = self
            .served
            .extract_if(|pod, served| !is_current(pod, served));
        let old: Vec<String> = old.map(|(pod, _)| pod).collect();
        for pod in old {
            fs::remove_file(self.path(&pod)).ok();
            debug!(pod, "launcher's socket is gone or replaced");
        }
        for (pod, file) in found {
            if !self.served.contains_key(&pod) {
                self.add(pod, file);
            }
        }
    }

    fn path(&self, pod: &str) -> PathBuf {
        self.options.serve.join(format!("{pod}{BROKER_SUFFIX}"))
    }

    /// Starts to serve a launcher, or logs the reason against it.
    fn add(&mut self, pod: String, file: Result<SocketFile, OddFile>) {
        let outcome = file
            .map_err(|odd| odd.to_string())
            .and_then(|file| self.listen(&pod, file).map_err(|error| error.to_string()));
        match outcome {
            Ok(served) => {
                self.refused.remove(&pod);
                debug!(pod, "serving the socket of a launcher");
                self.served.insert(pod, served);
            }
            Err(reason) if self.refused.get(&pod) != Some(&reason) => {
                warn!(pod, reason, "cannot serve the socket of a launcher");
                self.refused.insert(pod, reason);
            }
            Err(_) => {}
        }
    }

    fn listen(&self, pod: &str, file: SocketFile) -> io::Result<Served> {
        let path = self.path(pod);
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(SOCKET_MODE))?;
        let launcher = Launcher {
            pod: pod.to_owned(),
            sockets: Rc::clone(&self.sockets),
            connections: Arc::clone(&self.connections),
            allow_changes: self.options.allow_changes,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn_local(launcher.serve(listener));
        Ok(Served {
            file,
            _tasks: tasks,
        })
    }
}

/// The connections to one launcher.
struct Launcher {
    pod: String,
    sockets: Rc<PodSockets>,
    connections: Arc<Semaphore>,
    allow_changes: bool,
}

impl Launcher {
    async fn serve(self, listener: UnixListener) {
        let this = Rc::new(self);
        let mut open = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = open.join_next() => continue,
            };
            let client = match accepted {
                Ok((client, _)) => client,
                // Out of descriptors, or the client left: other connections may end meanwhile.
                Err(error) => {
                    warn!(pod = this.pod, %error, "cannot accept a connection");
                    tokio::time::sleep(SCAN_INTERVAL).await;
                    continue;
                }
            };
            match Arc::clone(&this.connections).try_acquire_owned() {
                Ok(place) if open.len() < MAX_PER_LAUNCHER => {
                    let this = Rc::clone(&this);
                    open.spawn_local(async move {
                        this.forward(client).await;
                        drop(place);
                    });
                }
                _ => warn!(pod = this.pod, "too many connections, closing the new one"),
            }
        }
    }

    /// Forwards the messages of one client until either side ends.
    async fn forward(&self, client: UnixStream) {
        let pod = self.pod.as_str();
        let daemon = match timeout(CONNECT_TIMEOUT, self.connect()).await {
            Ok(Ok(daemon)) => daemon,
            Ok(Err(error)) => return debug!(pod, %error, "launcher's daemon cannot be reached"),
            Err(_) => return debug!(pod, "launcher's daemon accepts no connection"),
        };
        match relay(&client, &daemon, self.allow_changes).await {
            Ended::Closed => {}
            Ended::Stalled(side) => warn!(pod, side, "peer accepts no data, connection closed"),
            Ended::Refused(side, refusal) => {
                warn!(pod, side, reason = %refusal, "message refused, connection closed");
            }
        }
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let socket = self.sockets.open(&self.pod)?;
        UnixStream::connect(socket.path()).await
    }
}
