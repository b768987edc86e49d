//! The service that verifies changes by other clients of libvirt, such as KubeVirt, Nova or virsh.
//!
//! ```text
//!  events ────────────┐
//!  the monitor's ─────┼─▶ DomainChanges (one for each domain) ──▶ looks, few at a time
//!  readings           │        │ ▲                                        │
//!  own operations ────┘        │ └──── observation, or why there is none ─┘
//!                              ▼
//!                          ChangeLog ──▶ local API, metrics, NodeVirtualization, Events
//! ```
//!
//! [`crate::hotplug::external`] makes every decision. One task owns the state of all domains.
//!
//! **Cost.** Without a change there is one look at each domain when it is first seen, and one after some
//! events. The statistics and definitions are those that the monitor reads anyway. Disabled, the service
//! does not exist.
//!
//! **Blocking.** A look waits for libvirt, in a place of its connection that is in the background, and
//! ends after a few seconds. At most [`LOOKS`] are in progress, [`LOOKS_OF_CONNECTION`] over one
//! connection, and [`SILENT_LOOKS`] at guests whose agents do not answer.
//!
//! **Failure.** A gap in the events leads to one comparison with the monitor's next reading. Nothing is
//! stored: after a restart, what a guest lacks is judged as found when the domain is first seen.

mod log;
mod metrics;
mod own;

pub use self::log::{ChangeLog, ExternalRecord, NotTaken};
pub use self::metrics::ExternalMetrics;
pub use self::own::OwnOperations;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::domain::DomainRef;
use crate::executor::{Clock, observation};
use crate::hotplug::external::{DomainChanges, ExternalChange, ExternalOptions, LookResult};
use crate::hotplug::{Contact, Event, Patience};
use crate::hypervisor::{Change, DomainBackend, Notice, Notices, ObservationQuery};
use crate::monitor::Sightings;
use crate::units::Timestamp;

/// Maximum number of looks in progress.
const LOOKS: usize = 8;
/// Maximum number of looks in progress over one connection, which has four places for such calls.
const LOOKS_OF_CONNECTION: usize = 2;
/// Maximum number of looks in progress at guests whose agents do not answer: each takes seconds.
const SILENT_LOOKS: usize = 2;
/// Timeout for the parts of a look but the agent's.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum wait until the guest agent can be asked.
const AGENT_WAIT: Duration = Duration::from_secs(2);
/// Maximum number of domains.
const MAX_DOMAINS: usize = 2048;
/// Maximum number of changes without a verdict: each keeps up to 17 observations.
const MAX_OPEN: usize = 64;
/// Longest sleep without anything due.
const IDLE: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy)]
pub struct ServiceOptions {
    /// Time for a guest to follow a change.
    pub grace: Duration,
    pub patience: Patience,
}

/// Verifies the changes of all domains.
pub struct ExternalChanges<C> {
    backend: Arc<C>,
    options: ServiceOptions,
    sightings: watch::Receiver<Sightings>,
    own: Arc<OwnOperations>,
    metrics: Arc<ExternalMetrics>,
    clock: Clock,
    domains: HashMap<DomainRef, TrackedDomain>,
    looks: FuturesUnordered<BoxFuture<'static, Look>>,
    listener: Option<ChangeListener>,
    is_full: bool,
}

/// Receives each change with a verdict, and its correction. Must return at once.
pub type ChangeListener = Box<dyn Fn(&DomainRef, &ExternalChange) + Send + Sync>;

struct TrackedDomain {
    /// The domain with its present name.
    id: DomainRef,
    changes: DomainChanges,
    is_looked_at: bool,
    is_missing: bool,
    /// Start of the last compared reading, and of its observation.
    compared: Option<(Instant, Option<Instant>)>,
}

type Look = (DomainRef, Result<LookResult, Contact>);

impl<C: DomainBackend> ExternalChanges<C> {
    /// Returns a service that does nothing before [`Self::run`].
    pub fn new(
        backend: Arc<C>,
        options: ServiceOptions,
        sightings: watch::Receiver<Sightings>,
        own: Arc<OwnOperations>,
        metrics: Arc<ExternalMetrics>,
    ) -> Self {
        Self {
            backend,
            options,
            sightings,
            own,
            metrics,
            clock: Clock::start(),
            domains: HashMap::new(),
            looks: FuturesUnordered::new(),
            listener: None,
            is_full: false,
        }
    }

    /// Passes every verdict on.
    #[must_use]
    pub fn with_listener(self, listener: Option<ChangeListener>) -> Self {
        Self { listener, ..self }
    }

    /// Runs until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep()).await;
    }

    async fn keep(&mut self) {
        let mut notices = Some(self.backend.events());
        let own = Arc::clone(&self.own);
        self.sightings.mark_changed();
        loop {
            let due = self.start_looks();
            tokio::select! {
                notice = next_notice(&mut notices) => match notice {
                    Some(notice) => self.noticed(notice),
                    None => notices = None,
                },
                changed = self.sightings.changed() => {
                    // The monitor ended, which stops the daemon.
                    if changed.is_err() {
                        return std::future::pending().await;
                    }
                    self.compare();
                }
                Some((id, result)) = self.looks.next() => self.looked(&id, result),
                () = own.changed() => self.own_changed(),
                () = sleep_until(due) => {}
            }
        }
    }

    /// Starts the looks that are due, and returns the time of the next one.
    fn start_looks(&mut self) -> Instant {
        let now = self.clock.now();
        let mut due: Vec<(Timestamp, DomainRef)> = Vec::new();
        let mut next: Option<Timestamp> = None;
        for tracked in self.domains.values() {
            match tracked
                .changes
                .next_look(now)
                .filter(|_| !tracked.is_looked_at)
            {
                Some(at) if at <= now => due.push((at, tracked.id.clone())),
                Some(at) => next = Some(next.map_or(at, |next| next.min(at))),
                None => {}
            }
        }
        due.sort_unstable_by_key(|(at, _)| *at);
        for (_, id) in due {
            self.start_look(&id, now);
        }
        next.map_or(Instant::now() + IDLE, |next| self.clock.instant(next))
    }

    /// Starts a look if there is room. Otherwise the end of another look leads here again.
    fn start_look(&mut self, id: &DomainRef, now: Timestamp) {
        let looked_at = || self.domains.values().filter(|tracked| tracked.is_looked_at);
        let of_connection = looked_at().filter(|tracked| tracked.id.connection == id.connection);
        let silent = looked_at().filter(|tracked| tracked.changes.has_silent_agent());
        let Some(tracked) = self.domains.get(id) else {
            return;
        };
        let asks_agent = tracked.changes.asks_agent(now);
        let is_silent = asks_agent && tracked.changes.has_silent_agent();
        if self.looks.len() >= LOOKS
            || of_connection.count() >= LOOKS_OF_CONNECTION
            || is_silent && silent.count() >= SILENT_LOOKS
        {
            return;
        }
        let query = ObservationQuery {
            timeout: LOOK_TIMEOUT,
            statistics: true,
            agent: asks_agent.then_some(AGENT_WAIT),
            background: true,
            answers: false,
            definition: tracked.changes.asks_definition(),
        };
        let (backend, clock, domain) = (Arc::clone(&self.backend), self.clock, id.clone());
        let look = async move {
            let at = clock.now();
            let mut seen = backend.observe(&domain, query).await;
            let devices = seen
                .live
                .as_mut()
                .map(|live| (std::mem::take(&mut live.attached), live.defined.take()));
            let (attached, defined) = devices.unwrap_or_default();
            let result = observation(clock, at, seen).map(|seen| LookResult {
                seen,
                attached,
                defined,
            });
            (domain, result)
        };
        self.looks.push(look.boxed());
        if let Some(tracked) = self.domains.get_mut(id) {
            tracked.is_looked_at = true;
        }
    }

    fn looked(&mut self, id: &DomainRef, result: Result<LookResult, Contact>) {
        let (now, own) = (self.clock.now(), self.own.of(id));
        let Some(tracked) = self.domains.get_mut(id) else {
            return;
        };
        tracked.is_looked_at = false;
        tracked.changes.own(now, &own);
        match result {
            Ok(look) => {
                if look.seen.domain.name != tracked.id.name {
                    tracked.id.name.clone_from(&look.seen.domain.name);
                }
                tracked.changes.observed(now, look, &own);
            }
            Err(Contact::Unreachable(_))
                if !self.backend.connections().contains(&id.connection) =>
            {
                tracked.changes.unobserved(now, &Contact::Absent);
            }
            Err(contact) => tracked.changes.unobserved(now, &contact),
        }
        self.report(id);
    }

    /// Takes an event of the backend.
    fn noticed(&mut self, notice: Notice) {
        let now = self.clock.now();
        let (domain, at, change) = match notice {
            Notice::Change { domain, at, change } => (domain, self.clock.received(at), change),
            gap @ Notice::Gap { .. } => {
                for tracked in self.domains.values_mut() {
                    if gap.is_gap_of(&tracked.id.connection) {
                        tracked.changes.missed_events(now);
                    }
                }
                return;
            }
        };
        let own = self.own.of(&domain);
        let is_end = matches!(change, Change::Event(Event::Stopped(_)));
        let is_known = self.domains.contains_key(&domain);
        // A change of a definition may be that of a domain that does not run.
        if !is_known && (is_end || matches!(change, Change::Defined) || !self.track(&domain, now)) {
            return;
        }
        let Some(tracked) = self.domains.get_mut(&domain) else {
            return;
        };
        tracked.changes.own(now, &own);
        match change {
            Change::Event(event) => tracked.changes.happened(now, at, event, &own),
            Change::Started => tracked.changes.started(now, true),
            Change::Arrived => tracked.changes.started(now, false),
            Change::Defined => tracked.changes.redefined(now),
            Change::Agent { connected } => tracked.changes.agent_changed(now, connected),
        }
        self.report(&domain);
    }

    /// Starts with a domain. Returns false if there are too many.
    fn track(&mut self, domain: &DomainRef, now: Timestamp) -> bool {
        if self.domains.len() >= MAX_DOMAINS {
            if !std::mem::replace(&mut self.is_full, true) {
                warn!(
                    most = MAX_DOMAINS,
                    "changes by other clients are verified on so many domains only"
                );
            }
            return false;
        }
        let options = ExternalOptions {
            grace: self.options.grace,
            patience: self.options.patience,
            defines_devices: domain.connection.is_launcher(),
        };
        let tracked = TrackedDomain {
            id: domain.clone(),
            changes: DomainChanges::new(options, now),
            is_looked_at: false,
            is_missing: false,
            compared: None,
        };
        self.domains.insert(domain.clone(), tracked);
        true
    }

    /// Compares every domain with the monitor's last reading.
    fn compare(&mut self) {
        let Some(sightings) = self.sightings.borrow_and_update().clone() else {
            return;
        };
        let now = self.clock.now();
        for sighting in sightings.iter() {
            let stats = &sighting.stats;
            if !self.domains.contains_key(&stats.id) && !self.track(&stats.id, now) {
                continue;
            }
            let Some(tracked) = self.domains.get_mut(&stats.id) else {
                continue;
            };
            tracked.is_missing = false;
            // Each connection is read at its own time, so most domains were compared before.
            let version = (sighting.read, sighting.details.as_ref().map(|(at, _)| *at));
            if tracked.compared.replace(version) == Some(version) {
                continue;
            }
            let read = self.clock.received(sighting.read.into_std());
            let details = sighting.details.as_ref().map(|(at, details)| {
                let at = self.clock.received(at.into_std());
                (at, &details.domain, &details.agent)
            });
            let reading = (read, &stats.stats, stats.state);
            tracked.changes.compared(now, reading, details);
        }
        let present: HashSet<&DomainRef> = sightings.iter().map(|seen| &seen.stats.id).collect();
        for tracked in self.domains.values_mut() {
            if !present.contains(&tracked.id) && !std::mem::replace(&mut tracked.is_missing, true) {
                tracked.changes.missing(now);
            }
        }
    }

    fn own_changed(&mut self) {
        let now = self.clock.now();
        for (domain, own) in self.own.domains(now) {
            if let Some(tracked) = self.domains.get_mut(&domain) {
                tracked.changes.own(now, &own);
                self.report(&domain);
            }
        }
    }

    /// Passes the news of a domain on, and forgets a domain that ended.
    fn report(&mut self, id: &DomainRef) {
        let open = self.domains.values().map(|tracked| tracked.changes.open());
        let mut open: usize = open.sum();
        let now = self.clock.now();
        let Some(tracked) = self.domains.get_mut(id) else {
            return;
        };
        if open > MAX_OPEN {
            open -= tracked.changes.open();
            tracked.changes.overload(now);
        }
        self.metrics.set_in_progress(open);
        let id = &tracked.id;
        for (number, change) in tracked.changes.news() {
            if let Some(change) = &change {
                self.metrics.count(change);
                log_verdict(id, change);
                if let Some(listener) = self.listener.as_ref().filter(|_| change.verdict.is_some())
                {
                    listener(id, change);
                }
            }
            self.metrics.log.update(id, number, change);
        }
        let not_taken = tracked.changes.not_taken().filter_map(|(_, change)| {
            Some(NotTaken {
                domain: id.clone(),
                resource: change.resource,
                action: change.action,
                device: change.device.clone(),
                verdict: change.verdict?,
                message: change.message.clone().unwrap_or_default(),
                since: change.finished.unwrap_or(change.noticed),
            })
        });
        self.metrics.log.set_not_taken(id, not_taken.collect());
        if tracked.changes.has_ended() {
            let id = id.clone();
            self.metrics.log.close(&id);
            self.domains.remove(&id);
            self.is_full = false;
        }
    }
}

fn log_verdict(domain: &DomainRef, change: &ExternalChange) {
    let Some(verdict) = change.verdict else {
        return;
    };
    info!(
        domain = domain.name,
        connection = %domain.connection,
        resource = change.resource.as_str(),
        action = change.action.as_str(),
        verdict = verdict.as_str(),
        because = change.message,
        corrected = change.corrected.is_some(),
        "change by another client judged"
    );
}

/// Returns the next notice; waits forever when there are no more.
async fn next_notice(notices: &mut Option<Notices>) -> Option<Notice> {
    match notices {
        Some(notices) => notices.next().await,
        None => std::future::pending().await,
    }
}
