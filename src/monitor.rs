//! Keeps the inventory of running domains up to date: bulk statistics on a timer and when
//! something happens, and a closer look at those domains that something happened to.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::domain::Domain;
use crate::hypervisor::{DomainControl, DomainId, DomainStats, HypervisorError, Notice, Notices};
use crate::telemetry::{DomainFigures, Inventory, now};

/// Between two readings of the bulk statistics when nothing happens.
const PERIOD: Duration = Duration::from_secs(15);
/// A domain is looked at this often even if nothing is heard of it.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// What happens within this time of the first is looked at together.
const GATHER: Duration = Duration::from_millis(100);
/// Domains looked at at a time.
const AT_A_TIME: usize = 4;
/// How long libvirt may take to tell of one domain; the others wait for that.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);
/// How long a guest agent may take to tell.
const AGENT_DEADLINE: Duration = Duration::from_secs(3);

/// Keeps the inventory up to date.
pub struct Monitor<C> {
    control: Arc<C>,
    inventory: Arc<Inventory>,
    known: HashMap<String, Known>,
    failed: Option<&'static str>,
}

/// A domain as last looked at.
struct Known {
    domain: Domain,
    online: Option<u32>,
    looked: Instant,
    /// Something happened to it since.
    stale: bool,
}

impl<C: DomainControl> Monitor<C> {
    /// Of this hypervisor's domains. Nothing is asked before [`Self::run`].
    pub fn new(control: Arc<C>, inventory: Arc<Inventory>) -> Self {
        Self {
            control,
            inventory,
            known: HashMap::new(),
            failed: None,
        }
    }

    /// Works until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep()).await;
    }

    async fn keep(&mut self) {
        let mut notices = self.control.notices();
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
                Err(error @ HypervisorError::Unsupported { .. }) => {
                    self.inventory.replace(Vec::new());
                    self.failed(&error);
                }
                Err(error) => self.failed(&error),
            }
        }
    }

    /// Notes which domains are to be looked at again: those that something happened to.
    async fn gather(&mut self, first: Option<Notice>, notices: &mut Notices) {
        let until = Instant::now() + GATHER;
        let mut next = first;
        while let Some(notice) = next.take() {
            match notice {
                Notice::Gap => self.known.values_mut().for_each(|known| known.stale = true),
                Notice::Change { domain, .. } => {
                    if let Some(known) = self.known.get_mut(&domain.uuid) {
                        known.stale = true;
                    }
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            next = timeout(left, notices.next()).await.ok().flatten();
        }
    }

    /// One reading: of the statistics, and of the domains that something happened to.
    ///
    /// # Errors
    /// The hypervisor's; the inventory stays as it was.
    pub async fn refresh(&mut self) -> Result<(), HypervisorError> {
        let running = self.control.all_domain_stats().await?;
        let there: HashSet<&str> = running.iter().map(|stats| stats.id.uuid.as_str()).collect();
        self.known.retain(|uuid, _| there.contains(uuid.as_str()));
        let stale: Vec<DomainId> = running
            .iter()
            .filter(|stats| self.is_stale(stats))
            .map(|stats| stats.id.clone())
            .collect();
        let control = &self.control;
        let looks: Vec<_> = stream::iter(stale)
            .map(|id| look(control, id))
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        for (id, domain, online) in looks.into_iter().flatten() {
            let known = Known {
                domain,
                online,
                looked: Instant::now(),
                stale: false,
            };
            self.known.insert(id.uuid, known);
        }
        let at = now();
        let figures = running.iter().filter_map(|stats| {
            let known = self.known.get(&stats.id.uuid)?;
            let balloon = stats.stats.balloon;
            let told = balloon.updated.is_some_and(|updated| updated > 0);
            let total = balloon.total.filter(|_| told);
            let figures = DomainFigures::of(&known.domain, known.online, total, at);
            Some(DomainFigures {
                state: stats.state,
                ..figures
            })
        });
        self.inventory.replace(figures.collect());
        Ok(())
    }

    fn is_stale(&self, stats: &DomainStats) -> bool {
        self.known.get(&stats.id.uuid).is_none_or(|known| {
            let seen = u32::try_from(stats.stats.vcpus.len()).unwrap_or(u32::MAX);
            // Nothing tells when a guest brings a vCPU online.
            let lags = known
                .online
                .is_some_and(|online| online < known.domain.vcpus.plugged());
            known.stale
                || lags
                || known.looked.elapsed() >= LOOK_AGAIN
                || known.domain.vcpus.plugged() != seen
        })
    }

    /// Says so once, and keeps what was seen last: each entry has its time.
    fn failed(&mut self, error: &HypervisorError) {
        if self.failed.replace(error.code()) != Some(error.code()) {
            warn!(%error, "the running domains cannot be read; trying on");
        }
    }
}

/// Looks at one domain; `None` if it cannot be looked at, such as one that has just ended.
async fn look<C: DomainControl>(
    control: &Arc<C>,
    id: DomainId,
) -> Option<(DomainId, Domain, Option<u32>)> {
    // While something is being done to a domain this would wait for that.
    let live = match timeout(LOOK_DEADLINE, control.domain(&id)).await.ok()? {
        Ok(live) => live,
        Err(error) => {
            debug!(domain = ?id.name, %error, "a domain cannot be looked at");
            return None;
        }
    };
    let domain = match Domain::parse(&live.id.name, live.xml.as_bytes(), live.state) {
        Ok(domain) => domain,
        Err(error) => {
            warn!(domain = ?id.name, %error, "a domain's XML cannot be read");
            return None;
        }
    };
    let online = match domain.agent.may_answer() && domain.state.runs() {
        true => {
            let answer = timeout(AGENT_DEADLINE, control.guest_vcpus(&id)).await;
            answer.ok().and_then(Result::ok).map(|g| g.online.len())
        }
        false => None,
    };
    Some((id, domain, online))
}
