//! The set of hypervisor connections, which the services use as one [`DomainBackend`].
//!
//! ```text
//! executor, monitor, doctor ──▶ ConnectionSet ── DomainRef.connection ──▶ a connection's backend
//!                                    ▲ events, tagged with the connection (a task for each)
//!                                    │
//!                      add, remove ──┘ (launchers come and go while the daemon runs)
//! ```
//!
//! The set owns which connection a domain belongs to: backends need not know their own
//! [`ConnectionId`], so every domain and event that a backend returns is tagged here. Calls block
//! as long as the backend's. A connection that is down fails calls about its own domains only.
//!
//! **Names.** A launcher can give its domain any name. If two launchers have a domain of the same
//! name, the one whose socket is newer has the name; the domain of the other is hidden
//! from [`statistics`](DomainBackend::statistics) and [`find`](DomainBackend::find), and the launcher
//! counts as a conflict. UUIDs of two launchers may be equal, so a UUID that two domains have finds
//! neither.
//!
//! **Bounds.** A launcher has [`LAUNCHER_WAIT`] to answer a question to all connections; a slower one
//! counts as one that cannot be reached. `find` asks a launcher only if the domain may be there
//! according to its last statistics.

mod names;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::names::{Candidate, choose, libvirt_name};
use crate::domain::ConnectionId;
use crate::hotplug::Action;
use crate::hypervisor::{
    CallError, ConnectionState, DomainBackend, DomainRef, DomainStats, Notice, Notices,
    ObservationQuery, Seen,
};

/// Maximum number of events that a subscriber may be behind, as of a single connection.
const BACKLOG: usize = 1024;

/// Maximum number of a launcher's events in a [`FLOOD_WINDOW`]. Those of a guest that takes hundreds of
/// vCPUs are fewer; more would make other connections' subscribers lose events.
const MAX_EVENTS: u32 = 256;
const FLOOD_WINDOW: Duration = Duration::from_secs(1);

/// Timeout for a launcher's part of a question to all connections. A launcher answers within
/// milliseconds, also on a busy node.
const LAUNCHER_WAIT: Duration = Duration::from_secs(2);

/// Connections, each with its backend. They can be added and removed at any time.
pub struct ConnectionSet<B> {
    members: RwLock<BTreeMap<ConnectionId, Member<B>>>,
    events: broadcast::Sender<Notice>,
    summary: Arc<HealthSummary>,
    changes_launchers: bool,
}

struct Member<B> {
    backend: Arc<B>,
    /// Age rank: of two launchers with one name, the one with the greater number has it.
    rank: u64,
    /// The domains at the last statistics; `None` before the first.
    domains: Option<Vec<DomainRef>>,
    _tasks: DropGuard,
}

impl<B: DomainBackend> ConnectionSet<B> {
    /// Returns a set of these connections. Must be called within a tokio runtime.
    pub fn new(members: Vec<(ConnectionId, Arc<B>)>) -> Self {
        let set = Self {
            members: RwLock::default(),
            events: broadcast::Sender::new(BACKLOG),
            summary: Arc::default(),
            changes_launchers: false,
        };
        for (connection, backend) in members {
            set.add(connection, backend, 0);
        }
        set
    }

    /// Allows changes of launchers' domains. By default they fail with [`CallError::Denied`].
    pub fn with_launcher_changes(self, changes_launchers: bool) -> Self {
        Self {
            changes_launchers,
            ..self
        }
    }

    /// Adds a connection, or replaces its backend, and forwards its events from now on. Of two
    /// launchers whose domains have one name, the one with the greater `rank` has the name. Must be
    /// called within a tokio runtime.
    pub fn add(&self, connection: ConnectionId, backend: Arc<B>, rank: u64) {
        let stop = CancellationToken::new();
        let forward = forward(connection.clone(), backend.events(), self.events.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(forward));
        let summary = Arc::clone(&self.summary);
        let follow = follow_health(connection.clone(), backend.health(), summary);
        tokio::spawn(stop.clone().run_until_cancelled_owned(follow));
        let member = Member {
            backend,
            rank,
            domains: None,
            _tasks: stop.drop_guard(),
        };
        let replaced = self.write().insert(connection.clone(), member);
        self.set_removed(&connection, replaced);
        self.send_gap(connection);
    }

    /// Removes a connection. Calls in progress end by themselves.
    pub fn remove(&self, connection: &ConnectionId) -> Option<Arc<B>> {
        let removed = self.write().remove(connection)?;
        let backend = Arc::clone(&removed.backend);
        self.set_removed(connection, Some(removed));
        self.send_gap(connection.clone());
        Some(backend)
    }

    /// Returns the connections that are up, each with its backend.
    pub fn up(&self) -> Vec<(ConnectionId, Arc<B>)> {
        let members = self.read();
        let up = members
            .iter()
            .filter(|(_, member)| *member.backend.health().borrow() != ConnectionState::Down);
        up.map(|(connection, member)| (connection.clone(), Arc::clone(&member.backend)))
            .collect()
    }

    /// Returns the launchers with a domain whose name belongs to a newer launcher.
    pub fn conflicts(&self) -> HashSet<ConnectionId> {
        let members = self.read();
        let claims = || {
            let launchers = members.iter().filter(|(id, _)| id.is_launcher());
            launchers.flat_map(|(connection, member)| {
                let domains = member.domains.iter().flatten();
                domains.map(move |domain| (domain.name.as_str(), (member.rank, connection)))
            })
        };
        let mut newest = HashMap::new();
        for (name, claim) in claims() {
            let known = newest.entry(name).or_insert(claim);
            *known = claim.max(*known);
        }
        claims()
            .filter(|(name, claim)| newest.get(name) != Some(claim))
            .map(|(_, (_, connection))| connection.clone())
            .collect()
    }

    fn set_removed(&self, connection: &ConnectionId, removed: Option<Member<B>>) {
        if let Some(removed) = removed {
            // Ends the tasks first, so that none of them reports a state afterward.
            drop(removed);
            self.summary.set(connection, false);
        }
    }

    fn send_gap(&self, connection: ConnectionId) {
        let gap = Notice::Gap {
            connection: Some(connection),
        };
        // An error means that there are no subscribers.
        drop(self.events.send(gap));
    }

    fn backend(&self, connection: &ConnectionId) -> Result<Arc<B>, CallError> {
        let members = self.read();
        let member = members.get(connection);
        member
            .map(|member| Arc::clone(&member.backend))
            .ok_or_else(|| {
                CallError::Unavailable(format!("connection {connection} does not exist"))
            })
    }

    /// Records the domains of a connection's statistics, and returns those that are not hidden.
    fn record(&self, connection: &ConnectionId, domains: Vec<DomainStats>) -> Vec<DomainStats> {
        let domains = domains.into_iter().map(|stats| DomainStats {
            id: tagged(connection, stats.id),
            ..stats
        });
        let mut domains: Vec<DomainStats> = domains.collect();
        if !connection.is_launcher() {
            return domains;
        }
        let mut members = self.write();
        let Some(member) = members.get_mut(connection) else {
            return Vec::new();
        };
        member.domains = Some(domains.iter().map(|stats| stats.id.clone()).collect());
        let rank = member.rank;
        domains.retain(|stats| !is_hidden(&members, connection, rank, &stats.id.name));
        domains
    }

    /// Returns the members that a domain may belong to, each with the name to ask it for.
    ///
    /// The name of a domain in the last statistics of a launcher is enough: other launchers, whose
    /// domains may be unknown, are not asked. A UUID may be that of several.
    fn candidates(&self, name_or_uuid: &str) -> Vec<(ConnectionId, Arc<B>, u64, String)> {
        let members = self.read();
        let knows = |connection: &ConnectionId, member: &Member<B>, by_uuid: bool| {
            let name = libvirt_name(connection, name_or_uuid);
            let mut domains = member.domains.iter().flatten();
            domains.any(|domain| domain.name == *name || (by_uuid && domain.uuid == *name))
        };
        let any = |by_uuid| {
            let mut members = members.iter();
            members.any(|(connection, member)| knows(connection, member, by_uuid))
        };
        let is_name = any(false);
        let is_known = is_name || any(true);
        members
            .iter()
            .filter(|(connection, member)| {
                // Otherwise the domain may have started since the last statistics.
                !is_known
                    || !connection.is_launcher()
                    || knows(connection, member, true)
                    || (!is_name && member.domains.is_none())
            })
            .map(|(connection, member)| {
                let name = libvirt_name(connection, name_or_uuid).into_owned();
                (
                    connection.clone(),
                    Arc::clone(&member.backend),
                    member.rank,
                    name,
                )
            })
            .collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<ConnectionId, Member<B>>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<ConnectionId, Member<B>>> {
        self.members.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// True if a newer launcher has a domain of this name.
fn is_hidden<B>(
    members: &BTreeMap<ConnectionId, Member<B>>,
    connection: &ConnectionId,
    rank: u64,
    name: &str,
) -> bool {
    connection.is_launcher()
        && members.iter().any(|(other, member)| {
            other.is_launcher()
                && (member.rank, other) > (rank, connection)
                && member
                    .domains
                    .iter()
                    .flatten()
                    .any(|domain| domain.name == name)
        })
}

/// Waits for a connection's part of an answer.
async fn bounded<T>(
    connection: &ConnectionId,
    call: &'static str,
    answer: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    if !connection.is_launcher() {
        return answer.await;
    }
    let late = |_| {
        Err(CallError::Overdue {
            call: call.into(),
            after: LAUNCHER_WAIT,
        })
    };
    timeout(LAUNCHER_WAIT, answer).await.unwrap_or_else(late)
}

/// Returns the answers of those connections that answered, or an error if none did.
fn answers<T>(
    all: Vec<(ConnectionId, Result<T, CallError>)>,
) -> Result<Vec<(ConnectionId, T)>, CallError> {
    let mut answers = Vec::new();
    let mut failure = None;
    for (connection, answer) in all {
        match answer {
            Ok(answer) => answers.push((connection, answer)),
            // Any other error says more than that a connection has no such domain.
            Err(error) if matches!(failure, None | Some(CallError::NotFound(_))) => {
                failure = Some(error);
            }
            Err(_) => {}
        }
    }
    match failure {
        Some(error) if answers.is_empty() => Err(error),
        _ => Ok(answers),
    }
}

fn tagged(connection: &ConnectionId, domain: DomainRef) -> DomainRef {
    DomainRef {
        connection: connection.clone(),
        ..domain
    }
}

impl<B: DomainBackend> DomainBackend for ConnectionSet<B> {
    async fn find(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
        let candidates = self.candidates(name_or_uuid);
        let asked = candidates
            .into_iter()
            .map(|(connection, backend, rank, name)| async move {
                let found = bounded(&connection, "find-domain", backend.find(&name)).await;
                let found = found.map(|domain| Candidate {
                    domain: tagged(&connection, domain),
                    rank,
                });
                (connection, found)
            });
        let found = answers(join_all(asked).await)?;
        choose(
            name_or_uuid,
            found.into_iter().map(|(_, found)| found).collect(),
        )
    }

    async fn find_again(&self, domain: &DomainRef) -> Result<DomainRef, CallError> {
        let backend = self.backend(&domain.connection)?;
        let found = backend.find_again(domain).await?;
        Ok(tagged(&domain.connection, found))
    }

    async fn observe(&self, domain: &DomainRef, query: ObservationQuery) -> Seen {
        let connection = &domain.connection;
        let backend = match self.backend(connection) {
            Ok(backend) => backend,
            Err(error) => {
                return Seen::failed(error);
            }
        };
        let mut seen = backend.observe(domain, query).await;
        if let Ok(live) = &mut seen.live {
            live.id.connection.clone_from(connection);
        }
        if let Some(statistics) = &mut seen.statistics {
            statistics.id.connection.clone_from(connection);
        }
        seen
    }

    async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
        let asked = self.connections().into_iter().map(|connection| async move {
            let domains = self.statistics_of(&connection).await;
            (connection, domains)
        });
        let all = answers(join_all(asked).await)?;
        Ok(all.into_iter().flat_map(|(_, domains)| domains).collect())
    }

    fn connections(&self) -> Vec<ConnectionId> {
        self.read().keys().cloned().collect()
    }

    async fn statistics_of(
        &self,
        connection: &ConnectionId,
    ) -> Result<Vec<DomainStats>, CallError> {
        let backend = self.backend(connection)?;
        let answer = bounded(connection, "all-domain-stats", backend.statistics()).await?;
        Ok(self.record(connection, answer))
    }

    async fn apply(&self, domain: &DomainRef, action: &Action) -> Result<(), CallError> {
        if domain.connection.is_launcher() && !self.changes_launchers {
            return Err(CallError::Denied {
                call: "apply".into(),
                text: "launchers.hotplug is off in virtnode's configuration".to_owned(),
            });
        }
        let backend = self.backend(&domain.connection)?;
        backend.apply(domain, action).await
    }

    fn events(&self) -> Notices {
        Notices::new(self.events.subscribe())
    }

    /// Up if any connection is up, with another number after each change of one.
    fn health(&self) -> watch::Receiver<ConnectionState> {
        self.summary.state.subscribe()
    }

    fn health_of(&self, connection: &ConnectionId) -> watch::Receiver<ConnectionState> {
        let members = self.read();
        members.get(connection).map_or_else(
            || watch::channel(ConnectionState::Down).1,
            |member| member.backend.health(),
        )
    }
}

/// Forwards a connection's events. Of a launcher that sends too many, the rest becomes a gap.
async fn forward(connection: ConnectionId, mut from: Notices, to: broadcast::Sender<Notice>) {
    let (mut since, mut count) = (Instant::now(), 0);
    while let Some(notice) = from.next().await {
        if since.elapsed() >= FLOOD_WINDOW {
            (since, count) = (Instant::now(), 0);
        }
        count += 1;
        if count > MAX_EVENTS && connection.is_launcher() {
            // The backend keeps few events meanwhile, and then reports the gap.
            sleep_until(since + FLOOD_WINDOW).await;
        }
        let notice = match notice {
            Notice::Gap { .. } => Notice::Gap {
                connection: Some(connection.clone()),
            },
            Notice::Change { domain, at, change } => Notice::Change {
                domain: tagged(&connection, domain),
                at,
                change,
            },
        };
        // An error means that there are no subscribers.
        drop(to.send(notice));
    }
}

/// Adds a connection's changes of state to the summary.
async fn follow_health(
    connection: ConnectionId,
    mut health: watch::Receiver<ConnectionState>,
    summary: Arc<HealthSummary>,
) {
    loop {
        let is_up = *health.borrow_and_update() != ConnectionState::Down;
        summary.set(&connection, is_up);
        if health.changed().await.is_err() {
            return;
        }
    }
}

/// The connections that are up.
struct HealthSummary {
    up: Mutex<(HashSet<ConnectionId>, u64)>,
    state: watch::Sender<ConnectionState>,
}

impl Default for HealthSummary {
    fn default() -> Self {
        Self {
            up: Mutex::default(),
            state: watch::Sender::new(ConnectionState::Down),
        }
    }
}

impl HealthSummary {
    /// Publishes a state for all connections after a change of one.
    fn set(&self, connection: &ConnectionId, is_up: bool) {
        let mut up = self.lock();
        let (connections, generation) = &mut *up;
        if is_up {
            connections.insert(connection.clone());
        } else {
            connections.remove(connection);
        }
        *generation += 1;
        self.state.send_replace(if connections.is_empty() {
            ConnectionState::Down
        } else {
            ConnectionState::Up(*generation)
        });
    }

    fn lock(&self) -> MutexGuard<'_, (HashSet<ConnectionId>, u64)> {
        self.up.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod connections_tests;
