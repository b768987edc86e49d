//! The set of hypervisor connections, which the services use as one [`DomainBackend`].
//!
//! ```text
//! executor, monitor, doctor ──▶ ConnectionSet ── DomainRef.connection ──▶ a connection's backend
//!                                    ▲ events, tagged with the connection (a task for each)
//! ```
//!
//! The set owns which connection a domain belongs to: backends need not know their own
//! [`ConnectionId`], so every domain and event that a backend returns is tagged here. Calls block
//! as long as the backend's. A connection that is down fails calls about its own domains; `find`
//! and `statistics` fail only if no connection answers.

use std::sync::Arc;

use futures::future::{join_all, select_all};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::domain::ConnectionId;
use crate::hotplug::Action;
use crate::hypervisor::{
    CallError, ConnectionState, DomainBackend, DomainRef, DomainStats, Notice, Notices,
    ObservationQuery, Seen,
};

/// Maximum number of events that a subscriber may be behind, as of a single connection.
const BACKLOG: usize = 1024;

/// Connections, each with its backend.
pub struct ConnectionSet<B> {
    members: Vec<(ConnectionId, Arc<B>)>,
    events: broadcast::Sender<Notice>,
    health: watch::Sender<ConnectionState>,
    _forwarding: DropGuard,
}

impl<B: DomainBackend> ConnectionSet<B> {
    /// Returns a set of these connections, and forwards their events from now on. Must be called
    /// within a tokio runtime.
    pub fn new(members: Vec<(ConnectionId, Arc<B>)>) -> Self {
        let events = broadcast::Sender::new(BACKLOG);
        let health = watch::Sender::new(ConnectionState::Down);
        let stop = CancellationToken::new();
        for (connection, backend) in &members {
            let forward = forward(connection.clone(), backend.events(), events.clone());
            tokio::spawn(stop.clone().run_until_cancelled_owned(forward));
        }
        let states = members.iter().map(|(_, backend)| backend.health());
        let summarize = summarize(states.collect(), health.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(summarize));
        Self {
            members,
            events,
            health,
            _forwarding: stop.drop_guard(),
        }
    }

    fn backend(&self, domain: &DomainRef) -> Result<&B, CallError> {
        let member = self.members.iter().find(|(id, _)| *id == domain.connection);
        member.map(|(_, backend)| &**backend).ok_or_else(|| {
            CallError::Unavailable(format!("connection {} does not exist", domain.connection))
        })
    }
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
        let asked = self.members.iter().map(|(connection, backend)| async move {
            (connection.clone(), backend.find(name_or_uuid).await)
        });
        let mut found = answers(join_all(asked).await)?
            .into_iter()
            .map(|(connection, domain)| tagged(&connection, domain));
        let Some(first) = found.next() else {
            return Err(CallError::NotFound(format!(
                "no domain is {name_or_uuid:?}"
            )));
        };
        match found.next() {
            None => Ok(first),
            Some(second) => Err(CallError::Failed {
                call: "find-domain".into(),
                code: "ambiguous".to_owned(),
                text: format!(
                    "{name_or_uuid:?} is both {} ({:?}, {}) and {} ({:?}, {}): name one by its \
                     connection",
                    first.connection,
                    first.name,
                    first.uuid,
                    second.connection,
                    second.name,
                    second.uuid
                ),
            }),
        }
    }

    async fn observe(&self, domain: &DomainRef, query: ObservationQuery) -> Seen {
        let backend = match self.backend(domain) {
            Ok(backend) => backend,
            Err(error) => {
                return Seen::failed(error);
            }
        };
        let mut seen = backend.observe(domain, query).await;
        let connection = &domain.connection;
        if let Ok(live) = &mut seen.live {
            live.id.connection.clone_from(connection);
        }
        if let Some(statistics) = &mut seen.statistics {
            statistics.id.connection.clone_from(connection);
        }
        seen
    }

    async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
        let asked = self.members.iter().map(|(connection, backend)| async move {
            (connection.clone(), backend.statistics().await)
        });
        let mut all = Vec::new();
        for (connection, domains) in answers(join_all(asked).await)? {
            all.extend(domains.into_iter().map(|stats| DomainStats {
                id: tagged(&connection, stats.id),
                ..stats
            }));
        }
        Ok(all)
    }

    async fn apply(&self, domain: &DomainRef, action: &Action) -> Result<(), CallError> {
        self.backend(domain)?.apply(domain, action).await
    }

    fn events(&self) -> Notices {
        Notices::new(self.events.subscribe())
    }

    /// Up if any connection is up.
    fn health(&self) -> watch::Receiver<ConnectionState> {
        self.health.subscribe()
    }
}

/// Forwards a connection's events.
async fn forward(connection: ConnectionId, mut from: Notices, to: broadcast::Sender<Notice>) {
    while let Some(notice) = from.next().await {
        let notice = match notice {
            Notice::Gap => Notice::Gap,
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

/// Publishes a state for all connections: up if any is, with a new number at each change.
async fn summarize(
    mut states: Vec<watch::Receiver<ConnectionState>>,
    to: watch::Sender<ConnectionState>,
) {
    let mut generation = 0;
    loop {
        // Counted to the end: every state has to be marked as seen.
        let connected = states
            .iter_mut()
            .filter_map(|state| {
                let is_up = *state.borrow_and_update() != ConnectionState::Down;
                is_up.then_some(())
            })
            .count();
        generation += 1;
        to.send_replace(if connected > 0 {
            ConnectionState::Up(generation)
        } else {
            ConnectionState::Down
        });
        if states.is_empty() {
            return;
        }
        let changes = states.iter_mut().map(|state| Box::pin(state.changed()));
        let (changed, index, _) = select_all(changes).await;
        if changed.is_err() {
            drop(states.swap_remove(index));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hypervisor with one domain, or one that cannot be reached.
    struct OneDomain {
        domain: Option<DomainRef>,
        events: broadcast::Sender<Notice>,
        health: watch::Sender<ConnectionState>,
    }

    impl OneDomain {
        fn of(domain: Option<(&str, &str)>) -> Arc<Self> {
            let state = match domain {
                Some(_) => ConnectionState::Up(1),
                None => ConnectionState::Down,
            };
            Arc::new(Self {
                domain: domain.map(|(name, uuid)| DomainRef::on_host(name, uuid)),
                events: broadcast::Sender::new(8),
                health: watch::Sender::new(state),
            })
        }

        fn domain(&self) -> Result<DomainRef, CallError> {
            let dead = || CallError::Unavailable("dead".to_owned());
            self.domain.clone().ok_or_else(dead)
        }
    }

    impl DomainBackend for OneDomain {
        async fn find(&self, name_or_uuid: &str) -> Result<DomainRef, CallError> {
            let domain = self.domain()?;
            if domain.name == name_or_uuid || domain.uuid == name_or_uuid {
                Ok(domain)
            } else {
                Err(CallError::NotFound(name_or_uuid.to_owned()))
            }
        }

        async fn observe(&self, domain: &DomainRef, _: ObservationQuery) -> Seen {
            Seen::failed(CallError::NotFound(domain.name.clone()))
        }

        async fn statistics(&self) -> Result<Vec<DomainStats>, CallError> {
            Ok(vec![DomainStats {
                id: self.domain()?,
                state: crate::domain::DomainState::Running,
                stats: crate::domain::Stats::default(),
            }])
        }

        async fn apply(&self, domain: &DomainRef, _: &Action) -> Result<(), CallError> {
            if self.domain()?.uuid == domain.uuid {
                Ok(())
            } else {
                Err(CallError::NotFound(domain.name.clone()))
            }
        }

        fn events(&self) -> Notices {
            Notices::new(self.events.subscribe())
        }

        fn health(&self) -> watch::Receiver<ConnectionState> {
            self.health.subscribe()
        }
    }

    fn launcher(pod: &str) -> ConnectionId {
        ConnectionId::Launcher {
            pod: pod.to_owned(),
        }
    }

    fn set(domains: [Option<(&str, &str)>; 2]) -> ConnectionSet<OneDomain> {
        let [first, second] = domains.map(OneDomain::of);
        ConnectionSet::new(vec![(launcher("a"), first), (launcher("b"), second)])
    }

    #[tokio::test]
    async fn name_and_uuid_on_two_connections_are_rejected_with_both() {
        let set = set([Some(("web", "u")), Some(("web", "u"))]);
        for ambiguous in ["web", "u"] {
            let error = set.find(ambiguous).await.unwrap_err().to_string();
            assert!(error.contains("launcher:a"), "{error}");
            assert!(error.contains("launcher:b"), "{error}");
        }
        let all = set.statistics().await.unwrap();
        assert_ne!(all[0].id, all[1].id);
    }

    #[tokio::test]
    async fn dead_connection_hides_nothing_of_the_other() {
        let set = set([None, Some(("web", "u"))]);
        let domain = set.find("web").await.unwrap();
        assert_eq!(domain.connection, launcher("b"));
        assert_eq!(set.statistics().await.unwrap().len(), 1);
        let persist = false;
        let action = Action::SetVcpus { count: 1, persist };
        set.apply(&domain, &action).await.unwrap();
        let error = set.find("other").await.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        let dead = DomainRef {
            connection: launcher("a"),
            ..domain
        };
        assert!(set.apply(&dead, &action).await.is_err());
    }

    #[tokio::test]
    async fn events_carry_their_connection() {
        let set = set([Some(("web", "u")), Some(("web", "u"))]);
        let mut notices = set.events();
        let change = Notice::Change {
            domain: DomainRef::on_host("web", "u"),
            at: std::time::Instant::now(),
            change: crate::hypervisor::Change::Started,
        };
        set.members[1].1.events.send(change).unwrap();
        let Some(Notice::Change { domain, .. }) = notices.next().await else {
            panic!("no change");
        };
        assert_eq!(domain.connection, launcher("b"));
    }
}
