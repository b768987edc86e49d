//! The monitor of running domains.
//!
//! ```text
//! for each connection: every 15 s, or 100 ms after the first of some notifications, at most once a second
//!        │
//!        ▼
//! bulk statistics ──▶ which domains are stale? ──▶ observe those, four at a time
//!        │ new, changed, notified, incomplete, or not observed for long
//!        ▼                                               │ agents.rs: which agents are due?
//! inventory (metrics) and observed domains (doctor) ◀────┴──▶ question them, beside the loop
//! ```
//!
//! Connections are read side by side, so a slow one delays no other, and a few launchers at a time,
//! spread over the period. Nothing in the loop waits for a guest: an agent's answer is added when it
//! arrives, and until then the domain's agent counts as not queried. A domain that cannot be observed
//! keeps its statistics, with the reason, and delays the others of its connection by [`TIMEOUT`] at
//! most. If a connection cannot be reached, the inventory keeps the last entries of its domains, each
//! with its time, until the connection is removed; the monitor tries again at the next reading. Domains
//! are keyed by [`DomainRef`]: two connections may have the same UUID.

mod agents;
mod inventory;
mod sources;

pub use self::inventory::{DomainFigures, Inventory, MemoryFigures, VcpuFigures, now};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::agents::Agents;
use self::sources::Sources;
use crate::doctor::checks::observed::{DomainDetails, ObservedDomain, Undetailed};
use crate::domain::ConnectionId;
use crate::hotplug::Agent;
use crate::hypervisor::{
    CallError, DomainBackend, DomainRef, DomainStats, Notice, ObservationQuery, Seen,
};

/// Maximum age of an observation: some changes, such as of the balloon, have no notification.
const MAX_AGE: Duration = Duration::from_secs(60);
/// Maximum number of domains observed at a time: as many as calls of one class.
const AT_A_TIME: usize = 4;
/// Timeout for observing one domain. Short, since the other domains wait.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum time from a reading until it is published while others are in progress, for each connection.
const PUBLISH_WAIT: Duration = Duration::from_millis(4);

/// The running domains, or the error of listing them; `None` before the first reading.
pub type ObservedDomains = Option<Result<Arc<[ObservedDomain]>, String>>;

/// A running domain at the last reading of its connection.
#[derive(Debug, Clone)]
pub struct Sighting {
    /// Start of the reading.
    pub read: Instant,
    pub stats: DomainStats,
    /// The last observation and its start.
    pub details: Option<(Instant, Arc<DomainDetails>)>,
}

/// The running domains; `None` before the first reading.
pub type Sightings = Option<Arc<[Sighting]>>;

/// Keeps the inventory up to date.
pub struct Monitor<C> {
    backend: Arc<C>,
    inventory: Arc<Inventory>,
    sources: Sources,
    known: HashMap<DomainRef, KnownDomain>,
    /// Times of the last notifications since the last observation.
    notified: HashMap<DomainRef, Instant>,
    /// Errors of the last observations that failed, with their times.
    errors: HashMap<DomainRef, (Undetailed, Instant)>,
    agents: Agents,
    observed: watch::Sender<ObservedDomains>,
    sightings: watch::Sender<Sightings>,
    readings: FuturesUnordered<BoxFuture<'static, ReadingStep>>,
    publish_at: Option<Instant>,
}

/// A domain's last observation.
struct KnownDomain {
    details: Arc<DomainDetails>,
    /// Start of the observation.
    at: Instant,
}

/// The domains, each with the start of its observation.
type Observations = Vec<(DomainRef, Instant, Result<DomainDetails, Undetailed>)>;

/// A step of reading a connection. Statistics have the time of their start.
enum ReadingStep {
    Statistics(ConnectionId, Instant, Result<Vec<DomainStats>, CallError>),
    Observations(ConnectionId, Observations),
}

impl<C: DomainBackend> Monitor<C> {
    /// Returns a monitor that does nothing before [`Self::run`].
    pub fn new(backend: Arc<C>, inventory: Arc<Inventory>) -> Self {
        Self {
            backend,
            inventory,
            sources: Sources::default(),
            known: HashMap::new(),
            notified: HashMap::new(),
            errors: HashMap::new(),
            agents: Agents::default(),
            observed: watch::Sender::new(None),
            sightings: watch::Sender::new(None),
            readings: FuturesUnordered::new(),
            publish_at: None,
        }
    }

    pub fn observed(&self) -> watch::Receiver<ObservedDomains> {
        self.observed.subscribe()
    }

    /// Returns the readings, for a service that compares them. Costs nothing without a receiver.
    pub fn sightings(&self) -> watch::Receiver<Sightings> {
        self.sightings.subscribe()
    }

    /// Runs until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep()).await;
    }

    async fn keep(&mut self) {
        let mut notices = self.backend.events();
        let mut is_over = false;
        self.update_sources();
        if self.sources.is_empty() {
            self.publish();
        }
        loop {
            self.start_readings();
            self.question_agents();
            let due = self.sources.next_due(Instant::now());
            tokio::select! {
                () = wait_until(due) => {}
                () = wait_until(self.publish_at) => self.publish(),
                notice = notices.next(), if !is_over => match notice {
                    Some(notice) => self.noticed(&notice),
                    None => is_over = true,
                },
                Some(reading) = self.readings.next(), if !self.readings.is_empty() => {
                    self.advance(reading);
                }
                (id, seen) = self.agents.next_answer() => self.add_answer(&id, seen),
            }
        }
    }

    /// Takes over the present connections. Those that are gone take their domains along.
    fn update_sources(&mut self) {
        let connections = self.backend.connections();
        for gone in self.sources.update(&connections, Instant::now()) {
            self.known.retain(|id, _| id.connection != gone);
            self.errors.retain(|id, _| id.connection != gone);
            self.notified.retain(|id, _| id.connection != gone);
            self.publish_soon();
        }
    }

    /// Marks the domains that a notification is about, and their connection as due.
    fn noticed(&mut self, notice: &Notice) {
        let now = Instant::now();
        match notice {
            gap @ Notice::Gap { .. } => {
                self.update_sources();
                let known = self.known.keys();
                let of_gap = known.filter(|id| gap.is_gap_of(&id.connection));
                self.notified.extend(of_gap.map(|id| (id.clone(), now)));
                self.errors.retain(|id, _| !gap.is_gap_of(&id.connection));
                self.sources
                    .notify(|connection| gap.is_gap_of(connection), now);
            }
            Notice::Change { domain, .. } => {
                if self.known.contains_key(domain) {
                    self.notified.insert(domain.clone(), now);
                }
                self.errors.remove(domain);
                self.sources
                    .notify(|connection| *connection == domain.connection, now);
            }
        }
    }

    /// Starts the readings that are due.
    fn start_readings(&mut self) {
        while let Some(connection) = self.sources.start_next(Instant::now()) {
            let backend = Arc::clone(&self.backend);
            let began = Instant::now();
            let reading = async move {
                let running = backend.statistics_of(&connection).await;
                ReadingStep::Statistics(connection, began, running)
            };
            self.readings.push(reading.boxed());
        }
    }

    fn advance(&mut self, reading: ReadingStep) {
        let connection = match reading {
            ReadingStep::Statistics(connection, began, Ok(running)) => {
                let stale = self.take_statistics(&connection, began, running);
                if !stale.is_empty() {
                    let backend = Arc::clone(&self.backend);
                    let reading = async move {
                        let observations = observe_all(&*backend, stale).await;
                        ReadingStep::Observations(connection, observations)
                    };
                    return self.readings.push(reading.boxed());
                }
                connection
            }
            ReadingStep::Statistics(connection, began, Err(error)) => {
                self.take_failure(&connection, began, &error);
                return self.sources.end(&connection, Instant::now());
            }
            ReadingStep::Observations(connection, observations) => {
                self.take_observations(observations);
                connection
            }
        };
        self.sources.end(&connection, Instant::now());
        if self.readings.is_empty() {
            self.publish();
        } else {
            self.publish_soon();
        }
    }

    /// Takes the statistics of a connection. Returns the domains to observe.
    fn take_statistics(
        &mut self,
        connection: &ConnectionId,
        began: Instant,
        running: Vec<DomainStats>,
    ) -> Vec<DomainRef> {
        let ids: HashSet<&DomainRef> = running.iter().map(|stats| &stats.id).collect();
        let stays = |id: &DomainRef| id.connection != *connection || ids.contains(id);
        self.known.retain(|id, _| stays(id));
        self.errors.retain(|id, _| stays(id));
        self.notified.retain(|id, _| stays(id));
        let stale = running.iter().filter(|stats| self.is_stale(stats));
        let stale = stale.map(|stats| stats.id.clone()).collect();
        self.sources.set_running(connection, began, running);
        stale
    }

    fn take_failure(&mut self, connection: &ConnectionId, began: Instant, error: &CallError) {
        // A driver without statistics has no domains of interest here.
        if matches!(error, CallError::Unsupported { .. }) {
            drop(self.take_statistics(connection, began, Vec::new()));
            let running = self.sources.running().count();
            if running == 0 {
                self.inventory.replace(Vec::new());
            }
        }
        if let Some(all_failed) = self.sources.fail(connection, error) {
            self.observed.send_replace(Some(Err(all_failed)));
        }
    }

    fn take_observations(&mut self, observations: Observations) {
        for (id, began, details) in observations {
            if self.notified.get(&id).is_some_and(|at| *at <= began) {
                self.notified.remove(&id);
            }
            self.add_details(id, began, details);
        }
    }

    /// Reads every connection once and observes the stale domains, without their agents.
    ///
    /// # Errors
    /// The first of the hypervisor's, if no connection answers; the inventory stays as it was.
    pub async fn refresh(&mut self) -> Result<(), CallError> {
        self.update_sources();
        let mut failure = None;
        let mut is_any = false;
        for connection in self.backend.connections() {
            let began = Instant::now();
            match self.backend.statistics_of(&connection).await {
                Ok(running) => {
                    let stale = self.take_statistics(&connection, began, running);
                    let observations = observe_all(&*self.backend, stale).await;
                    self.take_observations(observations);
                    is_any = true;
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            Some(error) if !is_any => Err(error),
            _ => {
                self.publish();
                Ok(())
            }
        }
    }

    fn add_details(
        &mut self,
        id: DomainRef,
        at: Instant,
        details: Result<DomainDetails, Undetailed>,
    ) {
        match details {
            Ok(mut details) => {
                self.errors.remove(&id);
                let has_agent = details.domain.agent.may_answer() && details.domain.state.runs();
                details.agent = self.agents.observed(&id, details.domain.id, has_agent);
                let known = KnownDomain {
                    details: Arc::new(details),
                    at,
                };
                self.known.insert(id, known);
            }
            Err(error) => {
                debug!(domain = id.name, %error, "cannot observe a domain");
                self.errors.insert(id, (error, Instant::now()));
            }
        }
    }

    /// Starts the next questions to agents.
    fn question_agents(&mut self) {
        while let Some((id, wait)) = self.agents.next_due() {
            let backend = Arc::clone(&self.backend);
            let question = async move {
                let query = ObservationQuery {
                    timeout: TIMEOUT,
                    statistics: false,
                    agent: Some(wait),
                    background: true,
                    answers: false,
                    definition: false,
                };
                let seen = backend.observe(&id, query).await;
                (id, seen)
            };
            self.agents.asked(question.boxed());
        }
    }

    /// Adds an agent's answer to what is known of its domain.
    fn add_answer(&mut self, id: &DomainRef, seen: Seen) {
        let agent = seen.agent.map(Agent::from_call);
        let agent = self.agents.answered(id, agent);
        if let (Some(agent), Some(known)) = (agent, self.known.get_mut(id)) {
            Arc::make_mut(&mut known.details).agent = agent;
            self.publish();
        }
    }

    fn publish_soon(&mut self) {
        let wait = PUBLISH_WAIT.saturating_mul(self.sources.len());
        self.publish_at.get_or_insert(Instant::now() + wait);
    }

    fn publish(&mut self) {
        self.publish_at = None;
        let running = || self.sources.running().map(|(_, stats)| stats);
        self.agents
            .retain(&running().map(|stats| &stats.id).collect());
        let at = now();
        let figures = running().filter_map(|stats| {
            let details = &self.known.get(&stats.id)?.details;
            let balloon = stats.stats.balloon;
            let is_current = balloon.is_current(at, details.domain.balloon.stats_period);
            let total = balloon.total.filter(|_| is_current);
            let figures = DomainFigures::of(&details.domain, details.online(), total, at);
            Some(figures.on(&stats.id, stats.state))
        });
        self.inventory.replace(figures.collect());
        let observed = running().map(|stats| self.observed_domain(stats.clone()));
        let observed: Arc<[ObservedDomain]> = observed.collect();
        self.observed.send_replace(Some(Ok(observed)));
        if self.sightings.receiver_count() > 0 {
            let sightings = self.sources.running().map(|(read, stats)| {
                let known = self.known.get(&stats.id);
                Sighting {
                    read,
                    stats: stats.clone(),
                    details: known.map(|known| (known.at, Arc::clone(&known.details))),
                }
            });
            self.sightings.send_replace(Some(sightings.collect()));
        }
    }

    fn observed_domain(&self, stats: DomainStats) -> ObservedDomain {
        let details = match (self.errors.get(&stats.id), self.known.get(&stats.id)) {
            (None, Some(known)) => Ok(Arc::clone(&known.details)),
            (Some((error, _)), _) => Err(error.clone()),
            (None, None) => Err(Undetailed::NotYet("not observed yet".to_owned())),
        };
        ObservedDomain {
            name: stats.id.display_name().into_owned(),
            connection: stats.id.connection,
            uuid: stats.id.uuid,
            state: stats.state,
            stats: stats.stats,
            details,
            earlier: BTreeMap::new(),
        }
    }

    fn is_stale(&self, stats: &DomainStats) -> bool {
        // A domain that cannot be read is not read again at each tick.
        if let Some((Undetailed::Unreadable(_), at)) = self.errors.get(&stats.id)
            && at.elapsed() < MAX_AGE
        {
            return false;
        }
        self.known.get(&stats.id).is_none_or(|known| {
            let counted = u32::try_from(stats.stats.vcpus.len()).unwrap_or(u32::MAX);
            // A guest that brings a vCPU online causes no notification.
            let plugged = known.details.domain.vcpus.plugged();
            let online = known.details.online();
            let lags = online.is_some_and(|online| online < plugged);
            let is_notified = self.notified.contains_key(&stats.id);
            is_notified || lags || known.at.elapsed() >= MAX_AGE || plugged != counted
        })
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Observes domains, without their agents.
async fn observe_all<C: DomainBackend>(backend: &C, stale: Vec<DomainRef>) -> Observations {
    stream::iter(stale)
        .map(|id| async {
            let began = Instant::now();
            let details = observe_details(backend, &id, TIMEOUT, None).await;
            (id, began, details)
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await
}

/// Observes one domain, and asks its agent if there is a time to wait for that.
///
/// # Errors
/// The reason; the domain may have ended.
pub async fn observe_details<C: DomainBackend>(
    backend: &C,
    id: &DomainRef,
    timeout: Duration,
    agent: Option<Duration>,
) -> Result<DomainDetails, Undetailed> {
    let query = ObservationQuery {
        timeout,
        statistics: false,
        agent,
        background: false,
        answers: false,
        definition: false,
    };
    let seen = backend.observe(id, query).await;
    let live = seen.live.map_err(|error| match error {
        CallError::Overdue { after, .. } => Undetailed::Unanswered(format!(
            "no answer within {after:?}; something is being done to it"
        )),
        error @ (CallError::Busy { .. } | CallError::Unavailable(_) | CallError::Lost(_)) => {
            Undetailed::Unanswered(error.to_string())
        }
        error @ (CallError::NotFound(_) | CallError::NotRunning(_)) => {
            Undetailed::NotYet(error.to_string())
        }
        error => Undetailed::Unreadable(error.to_string()),
    })?;
    Ok(DomainDetails {
        domain: live.domain,
        persistent: live.persistent,
        agent: seen.agent.map_or(Agent::NotAsked, Agent::from_call),
    })
}
