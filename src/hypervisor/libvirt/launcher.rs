//! Connections to launchers: opened once, closed when asked, and few domains.
//!
//! ```text
//!  open: greeting (no thread) ──▶ opener thread ──▶ Up ── closed by the daemon, keepalive ──▶ Down
//!             │ no answer             │ late: OpenError::Late, and the thread is left        │
//!             ▼                       ▼                                                      ▼
//!          OpenError              used if it succeeds after all                     close: opener thread
//! ```
//!
//! Unlike the host's connection this one is not reopened: the launchers' scan decides when there is
//! something to connect to. Closing blocks as long as the daemon does, so it has a thread of the same
//! lane as opening, and its end is reported.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::warn;

use super::call::{Lost, Primary};
use super::connection::{LibvirtConnection, Shared};
use super::greeting::{self, OpenError};
use super::limits::Class;
use super::node::Definitions;
use super::session::Session;
use super::workers::{Permits, Workers};
use super::{DaemonKind, Libvirt, LibvirtConfig, MAX_LAUNCHER_DOMAINS};
use crate::files::pods::PodSocket;
use crate::hypervisor::{CallError, ConnectionState, DomainRef, DomainStats, HypervisorMetrics};

/// The number of the only generation of such a connection.
const GENERATION: u64 = 1;

impl Libvirt {
    /// Opens a connection to a launcher's libvirt on a socket that was opened with `O_PATH`: whatever
    /// has the socket's name by now is not used. `on_late` is called if opening takes longer than the
    /// deadline; the attempt goes on, since it cannot be cancelled.
    ///
    /// # Errors
    /// The launcher refuses, does not answer, or is gone.
    pub async fn open_launcher(
        socket: PodSocket,
        workers: Workers,
        opening: &Workers,
        metrics: Arc<HypervisorMetrics>,
        on_late: impl FnOnce() + Send,
    ) -> Result<Self, OpenError> {
        let path = socket.path().display().to_string();
        // The daemon receives qemu:///session, which that of a root launcher accepts too. As the path
        // of the URI it would have the client library start a daemon of this user if none listens.
        let config = LibvirtConfig::launcher(format!(
            "qemu+unix:///system?name=qemu:///session&socket={path}"
        ));
        let deadline = config.open_deadline;
        timeout(deadline, greeting::greet(&path))
            .await
            .unwrap_or(Err(OpenError::Silent))?;
        let permits = opening.acquire(Class::Control).await;
        let permits = permits.ok_or_else(|| OpenError::Gone("virtnode is stopping".into()))?;
        let connection = LibvirtConnection::start(config, workers, metrics, keep);
        let shared = Arc::clone(connection.shared());
        let job = move || {
            let opened = open(&shared);
            // Its descriptor is in the URI.
            drop(socket);
            opened
        };
        run(opening, permits, deadline, job, on_late).await?;
        Ok(Self {
            connection,
            definitions: Definitions::default(),
            taken: Mutex::default(),
        })
    }

    /// Closes the connection and waits until it is closed, however long its daemon takes. Calls in
    /// progress go on, and the last of them closes it then.
    pub async fn close(&self, opening: &Workers) {
        let shared = self.connection.shared();
        let reason = "it was closed".to_owned();
        shared.primary.send_replace(Primary::Down(reason));
        shared.health.send_replace(ConnectionState::Down);
        let handles = shared.take_handles();
        let Some(permits) = opening.acquire(Class::Control).await else {
            return;
        };
        let deadline = shared.config.open_deadline;
        let job = move || {
            drop(handles);
            Ok(())
        };
        // A job that closes does not fail.
        run(opening, permits, deadline, job, || ()).await.ok();
    }

    /// Returns the number of calls, except to guest agents, that have not returned by their deadline.
    pub fn late_calls(&self) -> usize {
        self.connection.shared().late_calls()
    }

    /// Returns the number of domains that are ignored, because the launcher has too many.
    pub fn ignored_domains(&self) -> usize {
        self.taken().1
    }

    /// Takes the first domains of a launcher, in the order of their UUIDs.
    pub(super) fn take(&self, mut domains: Vec<DomainStats>) -> Vec<DomainStats> {
        if self.connection.shared().config.daemon == DaemonKind::Host {
            return domains;
        }
        let ignored = domains.len().saturating_sub(MAX_LAUNCHER_DOMAINS);
        let mut taken = self.taken();
        if ignored > 0 {
            if taken.1 == 0 {
                let uri = &self.connection.shared().config.uri;
                warn!(
                    uri,
                    ignored, "a launcher has too many domains; ignoring some"
                );
            }
            domains.sort_by(|a, b| a.id.uuid.cmp(&b.id.uuid));
            domains.truncate(MAX_LAUNCHER_DOMAINS);
            taken.0 = domains.iter().map(|stats| stats.id.uuid.clone()).collect();
        } else {
            taken.0.clear();
        }
        taken.1 = ignored;
        domains
    }

    /// Returns the domain if it is not one that is ignored.
    pub(super) fn if_taken(&self, domain: DomainRef) -> Result<DomainRef, CallError> {
        let taken = self.taken();
        if taken.1 == 0 || taken.0.contains(&domain.uuid) {
            return Ok(domain);
        }
        Err(CallError::NotFound(format!(
            "{domain} is ignored: its launcher has more than {MAX_LAUNCHER_DOMAINS} domains"
        )))
    }

    fn taken(&self) -> MutexGuard<'_, (Vec<String>, usize)> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the session. Blocks.
fn open(shared: &Arc<Shared>) -> Result<(), OpenError> {
    let losses = shared.losses();
    let on_close = move |reason: crate::ffi::CloseReason| {
        let (generation, reason) = (GENERATION, reason.to_string());
        // The receiver ends with the connection.
        drop(losses.send(Lost { generation, reason }));
    };
    let began = std::time::Instant::now();
    let opened = Session::open(&shared.config, GENERATION, on_close);
    let opened = opened.and_then(|session| {
        if shared.config.events {
            session.listen(&shared.publisher)
        } else {
            Ok(session)
        }
    });
    shared.metrics.call_ended("open", began.elapsed(), &opened);
    let session = opened.map_err(|error| match error {
        error @ CallError::Denied { .. } => OpenError::Refused(error.to_string()),
        error => OpenError::Gone(error.to_string()),
    })?;
    shared.set_primary(GENERATION, session);
    shared.primary.send_replace(Primary::Up(GENERATION));
    shared.health.send_replace(ConnectionState::Up(GENERATION));
    Ok(())
}

/// Runs a job on a thread and waits for it. After the deadline the thread counts as late, which
/// releases its permits if not too many are.
async fn run(
    lane: &Workers,
    permits: Permits,
    deadline: std::time::Duration,
    job: impl FnOnce() -> Result<(), OpenError> + Send + 'static,
    on_late: impl FnOnce() + Send,
) -> Result<(), OpenError> {
    let (done, mut ended) = oneshot::channel();
    lane.start(move || drop(done.send(job())));
    let ended_thread = |_| Err(OpenError::Gone("the thread that opens it ended".to_owned()));
    if let Ok(result) = timeout(deadline, &mut ended).await {
        drop(permits);
        return result.unwrap_or_else(ended_thread);
    }
    on_late();
    let is_late = lane.add_late();
    let permits = Some(permits).filter(|_| !is_late);
    let result = ended.await.unwrap_or_else(ended_thread);
    if is_late {
        lane.remove_late();
    }
    drop(permits);
    result
}

/// Reports the end of the connection, once.
async fn keep(shared: Arc<Shared>, mut losses: mpsc::UnboundedReceiver<Lost>) {
    if let Some(lost) = losses.recv().await {
        shared.primary.send_replace(Primary::Down(lost.reason));
        shared.health.send_replace(ConnectionState::Down);
    }
}
