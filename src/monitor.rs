//! The monitor of running domains.
//!
//! ```text
//! every 15 s, or 100 ms after the first of some notifications, at most once a second
//!        │
//!        ▼
//! bulk statistics ──▶ which domains are stale? ──▶ observe those, four at a time
//!        │ new, changed, notified, incomplete, or not observed for 60 s
//!        ▼                                               │ agents.rs: which agents are due?
//! inventory (metrics) and observed domains (doctor) ◀────┴──▶ question them, beside the loop
//! ```
//!
//! Nothing in the loop waits for a guest: an agent's answer is added when it arrives, and until then
//! the domain's agent counts as not queried. A domain that cannot be observed keeps its statistics,
//! with the reason, and delays the others by [`TIMEOUT`] at most. If the hypervisor cannot be reached
//! the inventory keeps its last entries, each with its time, and the monitor tries again at the next
//! tick. Domains are keyed by [`DomainRef`]: two connections may have the same UUID.

mod agents;
mod inventory;

pub use self::inventory::{DomainFigures, Inventory, MemoryFigures, VcpuFigures, now};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::agents::Agents;
use crate::doctor::checks::observed::{DomainDetails, ObservedDomain, Undetailed};
use crate::hotplug::Agent;
use crate::hypervisor::{
    CallError, DomainBackend, DomainRef, DomainStats, Notice, Notices, ObservationQuery, Seen,
};

/// Interval between readings of the bulk statistics without notifications: a usual scrape interval.
const PERIOD: Duration = Duration::from_secs(15);
/// Maximum age of an observation: some changes, such as of the balloon, have no notification.
const MAX_AGE: Duration = Duration::from_secs(60);
/// Time from the first notification until the observation: a plug of several vCPUs sends many.
const GATHER: Duration = Duration::from_millis(100);
/// Minimum time between two readings, whatever notifies: guests cause notifications as they like.
const MIN_PERIOD: Duration = Duration::from_secs(1);
/// Maximum number of domains observed at a time: as many as calls of one class.
const AT_A_TIME: usize = 4;
/// Timeout for observing one domain. Short, since the other domains wait.
const TIMEOUT: Duration = Duration::from_secs(2);

/// The running domains, or the error of listing them; `None` before the first reading.
pub type ObservedDomains = Option<Result<Arc<[ObservedDomain]>, String>>;

/// A running domain at one reading.
#[derive(Debug, Clone)]
pub struct Sighting {
    pub stats: DomainStats,
    /// The last observation and its start.
    pub details: Option<(Instant, Arc<DomainDetails>)>,
}

/// The running domains, and the start of the reading.
pub type Sightings = Option<(Instant, Arc<[Sighting]>)>;

/// Keeps the inventory up to date.
pub struct Monitor<C> {
    backend: Arc<C>,
    inventory: Arc<Inventory>,
    /// The last statistics.
    running: Vec<DomainStats>,
    known: HashMap<DomainRef, KnownDomain>,
    /// Errors of the last observations that failed, with their times.
    errors: HashMap<DomainRef, (Undetailed, Instant)>,
    agents: Agents,
    observed: watch::Sender<ObservedDomains>,
    sightings: watch::Sender<Sightings>,
    /// Start of the last reading.
    read: Instant,
    failed: Option<&'static str>,
}

/// A domain's last observation.
struct KnownDomain {
    details: Arc<DomainDetails>,
    /// Start of the observation.
    at: Instant,
    /// True after a notification.
    stale: bool,
}

impl<C: DomainBackend> Monitor<C> {
    /// Returns a monitor that does nothing before [`Self::run`].
    pub fn new(backend: Arc<C>, inventory: Arc<Inventory>) -> Self {
        Self {
            backend,
            inventory,
            running: Vec::new(),
            known: HashMap::new(),
            errors: HashMap::new(),
            agents: Agents::default(),
            observed: watch::Sender::new(None),
            sightings: watch::Sender::new(None),
            read: Instant::now(),
            failed: None,
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
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_over = false;
        let mut earliest = Instant::now();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                notice = notices.next(), if !is_over => {
                    is_over = notice.is_none();
                    let until = earliest.max(Instant::now() + GATHER);
                    self.gather(notice, &mut notices, until).await;
                }
                (id, seen) = self.agents.next_answer() => {
                    self.add_answer(&id, seen);
                    self.question_agents();
                    continue;
                }
            }
            earliest = Instant::now() + MIN_PERIOD;
            match self.refresh().await {
                Ok(()) => {
                    self.failed = None;
                    self.question_agents();
                }
                // A driver without statistics has no domains of interest here.
                Err(error @ CallError::Unsupported { .. }) => {
                    self.inventory.replace(Vec::new());
                    self.report_failure(&error);
                }
                Err(error) => self.report_failure(&error),
            }
        }
    }

    /// Marks the domains that notifications until then are about.
    async fn gather(&mut self, first: Option<Notice>, notices: &mut Notices, until: Instant) {
        let mut next = first;
        while let Some(notice) = next.take() {
            match notice {
                gap @ Notice::Gap { .. } => {
                    for (domain, known) in &mut self.known {
                        known.stale |= gap.is_gap_of(&domain.connection);
                    }
                    self.errors
                        .retain(|domain, _| !gap.is_gap_of(&domain.connection));
                }
                Notice::Change { domain, .. } => {
                    if let Some(known) = self.known.get_mut(&domain) {
                        known.stale = true;
                    }
                    self.errors.remove(&domain);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            next = timeout(left, notices.next()).await.ok().flatten();
        }
    }

    /// Reads the statistics once and observes the stale domains, without their agents.
    ///
    /// # Errors
    /// The hypervisor's; the inventory stays as it was.
    pub async fn refresh(&mut self) -> Result<(), CallError> {
        let read = Instant::now();
        self.running = self.backend.statistics().await?;
        self.read = read;
        let ids: HashSet<&DomainRef> = self.running.iter().map(|stats| &stats.id).collect();
        self.known.retain(|id, _| ids.contains(id));
        self.errors.retain(|id, _| ids.contains(id));
        self.agents.retain(&ids);
        let stale: Vec<DomainRef> = self
            .running
            .iter()
            .filter(|stats| self.is_stale(stats))
            .map(|stats| stats.id.clone())
            .collect();
        let backend = &self.backend;
        let observations: Vec<_> = stream::iter(stale)
            .map(|id| async {
                let at = Instant::now();
                let details = observe_details(&**backend, &id, TIMEOUT, None).await;
                (id, at, details)
            })
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        for (id, at, details) in observations {
            self.add_details(id, at, details);
        }
        self.publish();
        Ok(())
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
                    stale: false,
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

    fn publish(&self) {
        let at = now();
        let figures = self.running.iter().filter_map(|stats| {
            let details = &self.known.get(&stats.id)?.details;
            let balloon = stats.stats.balloon;
            let is_current = balloon.is_current(at, details.domain.balloon.stats_period);
            let total = balloon.total.filter(|_| is_current);
            let figures = DomainFigures::of(&details.domain, details.online(), total, at);
            Some(DomainFigures {
                connection: stats.id.connection.clone(),
                state: stats.state,
                ..figures
            })
        });
        self.inventory.replace(figures.collect());
        let observed = self.running.iter();
        let observed = observed.map(|stats| self.observed_domain(stats.clone()));
        let observed: Arc<[ObservedDomain]> = observed.collect();
        self.observed.send_replace(Some(Ok(observed)));
        if self.sightings.receiver_count() > 0 {
            let sightings = self.running.iter().map(|stats| Sighting {
                stats: stats.clone(),
                details: self
                    .known
                    .get(&stats.id)
                    .map(|known| (known.at, Arc::clone(&known.details))),
            });
            let sightings = Some((self.read, sightings.collect()));
            self.sightings.send_replace(sightings);
        }
    }

    fn observed_domain(&self, stats: DomainStats) -> ObservedDomain {
        let details = match (self.errors.get(&stats.id), self.known.get(&stats.id)) {
            (None, Some(known)) => Ok(Arc::clone(&known.details)),
            (Some((error, _)), _) => Err(error.clone()),
            (None, None) => Err(Undetailed::NotYet("not observed yet".to_owned())),
        };
        ObservedDomain {
            name: stats.id.name,
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
            known.stale || lags || known.at.elapsed() >= MAX_AGE || plugged != counted
        })
    }

    /// Publishes a failure, and logs the first of several with the same code.
    fn report_failure(&mut self, error: &CallError) {
        self.observed.send_replace(Some(Err(error.to_string())));
        if self.failed.replace(error.code()) != Some(error.code()) {
            warn!(%error, "cannot read the running domains; retrying");
        }
    }
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
