//! The monitor of running domains.
//!
//! ```text
//! every 15 s, or 100 ms after the first of some notifications
//!        │
//!        ▼
//! bulk statistics ──▶ which domains are stale? ──▶ observe those, four at a time
//!        │ new, changed, notified, incomplete, or not observed for 60 s
//!        ▼
//! inventory (metrics) and observed domains (doctor)
//! ```
//!
//! Nothing blocks for longer than [`TIMEOUTS`] per domain. If the hypervisor cannot be reached the
//! inventory keeps its last entries, each with its time, and the monitor tries again at the next
//! tick. Domains are keyed by [`DomainRef`]: two connections may have the same UUID.

mod inventory;

pub use self::inventory::{DomainFigures, Inventory, MemoryFigures, VcpuFigures, now};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::doctor::checks::observed::{AgentAnswer, DomainDetails, ObservedDomain};
use crate::hypervisor::{
    CallError, DomainBackend, DomainRef, DomainStats, Notice, Notices, ObservationQuery,
};

/// Interval between readings of the bulk statistics without notifications: a usual scrape interval.
const PERIOD: Duration = Duration::from_secs(15);
/// Maximum age of an observation: some changes, such as of the balloon, have no notification.
const MAX_AGE: Duration = Duration::from_secs(60);
/// Time from the first notification until the observation: a plug of several vCPUs sends many.
const GATHER: Duration = Duration::from_millis(100);
/// Maximum number of domains observed at a time: as many as calls of one class.
const AT_A_TIME: usize = 4;
/// Short, since the other domains wait.
const TIMEOUTS: ObserveTimeouts = ObserveTimeouts {
    libvirt: Duration::from_secs(2),
    agent: Duration::from_secs(3),
};

/// Timeouts for the observation of one domain.
#[derive(Debug, Clone, Copy)]
pub struct ObserveTimeouts {
    pub libvirt: Duration,
    pub agent: Duration,
}

/// The running domains, or the error of listing them; `None` before the first reading.
pub type ObservedDomains = Option<Result<Arc<[ObservedDomain]>, String>>;

/// Keeps the inventory up to date.
pub struct Monitor<C> {
    backend: Arc<C>,
    inventory: Arc<Inventory>,
    known: HashMap<DomainRef, KnownDomain>,
    /// Errors of the last observations that failed.
    errors: HashMap<DomainRef, String>,
    observed: watch::Sender<ObservedDomains>,
    failed: Option<&'static str>,
}

/// A domain's last observation.
struct KnownDomain {
    details: Arc<DomainDetails>,
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
            known: HashMap::new(),
            errors: HashMap::new(),
            observed: watch::Sender::new(None),
            failed: None,
        }
    }

    pub fn observed(&self) -> watch::Receiver<ObservedDomains> {
        self.observed.subscribe()
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
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                notice = notices.next(), if !is_over => {
                    is_over = notice.is_none();
                    self.gather(notice, &mut notices).await;
                }
            }
            match self.refresh().await {
                Ok(()) => self.failed = None,
                // A driver without statistics has no domains of interest here.
                Err(error @ CallError::Unsupported { .. }) => {
                    self.inventory.replace(Vec::new());
                    self.report_failure(&error);
                }
                Err(error) => self.report_failure(&error),
            }
        }
    }

    /// Marks the domains that notifications of the next moment are about.
    async fn gather(&mut self, first: Option<Notice>, notices: &mut Notices) {
        let until = Instant::now() + GATHER;
        let mut next = first;
        while let Some(notice) = next.take() {
            match notice {
                Notice::Gap => self.known.values_mut().for_each(|known| known.stale = true),
                Notice::Change { domain, .. } => {
                    if let Some(known) = self.known.get_mut(&domain) {
                        known.stale = true;
                    }
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            next = timeout(left, notices.next()).await.ok().flatten();
        }
    }

    /// Reads the statistics once and observes the stale domains.
    ///
    /// # Errors
    /// The hypervisor's; the inventory stays as it was.
    pub async fn refresh(&mut self) -> Result<(), CallError> {
        let running = self.backend.statistics().await?;
        let ids: HashSet<&DomainRef> = running.iter().map(|stats| &stats.id).collect();
        self.known.retain(|id, _| ids.contains(id));
        self.errors.retain(|id, _| ids.contains(id));
        let stale: Vec<DomainRef> = running
            .iter()
            .filter(|stats| self.is_stale(stats))
            .map(|stats| stats.id.clone())
            .collect();
        let backend = &self.backend;
        let observations: Vec<_> = stream::iter(stale)
            .map(|id| async {
                let details = observe_details(&**backend, &id, TIMEOUTS).await;
                (id, details)
            })
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        for (id, details) in observations {
            match details {
                Ok(details) => {
                    self.errors.remove(&id);
                    let known = KnownDomain {
                        details: Arc::new(details),
                        at: Instant::now(),
                        stale: false,
                    };
                    self.known.insert(id, known);
                }
                Err(error) => {
                    debug!(domain = id.name, error, "cannot observe a domain");
                    self.errors.insert(id, error);
                }
            }
        }
        let at = now();
        let figures = running.iter().filter_map(|stats| {
            let details = &self.known.get(&stats.id)?.details;
            let balloon = stats.stats.balloon;
            let is_reported = balloon.updated.is_some_and(|updated| updated > 0);
            let total = balloon.total.filter(|_| is_reported);
            let figures = DomainFigures::of(&details.domain, details.online(), total, at);
            Some(DomainFigures {
                connection: stats.id.connection.clone(),
                state: stats.state,
                ..figures
            })
        });
        self.inventory.replace(figures.collect());
        let observed = running.into_iter().map(|stats| self.observed_domain(stats));
        let observed: Arc<[ObservedDomain]> = observed.collect();
        self.observed.send_replace(Some(Ok(observed)));
        Ok(())
    }

    fn observed_domain(&self, stats: DomainStats) -> ObservedDomain {
        let details = match (self.errors.get(&stats.id), self.known.get(&stats.id)) {
            (None, Some(known)) => Ok(Arc::clone(&known.details)),
            (Some(error), _) => Err(error.clone()),
            (None, None) => Err("not observed yet".to_owned()),
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

/// Observes one domain.
///
/// # Errors
/// A sentence with the reason; the domain may have ended.
pub async fn observe_details<C: DomainBackend>(
    backend: &C,
    id: &DomainRef,
    timeouts: ObserveTimeouts,
) -> Result<DomainDetails, String> {
    let query = ObservationQuery {
        timeout: timeouts.libvirt,
        statistics: false,
        agent: Some(timeouts.agent),
        answers: false,
    };
    let seen = backend.observe(id, query).await;
    let live = seen.live.map_err(|error| match error {
        CallError::Overdue { after, .. } => {
            format!("no answer within {after:?}; something is being done to it")
        }
        error => error.to_string(),
    })?;
    let agent = match seen.agent {
        Some(Ok(vcpus)) => AgentAnswer::Answered(vcpus),
        Some(Err(CallError::Overdue { after, .. })) => {
            AgentAnswer::Silent(format!("no answer within {after:?}"))
        }
        Some(Err(error)) => AgentAnswer::Silent(error.to_string()),
        None => AgentAnswer::NotAsked,
    };
    Ok(DomainDetails {
        domain: live.domain,
        persistent: live.persistent,
        agent,
    })
}
