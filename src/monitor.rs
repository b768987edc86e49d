//! Keeps the inventory of running domains up to date: bulk statistics on a timer and when
//! something happens, and a closer look at those domains that something happened to. What it sees
//! it also hands on, to be diagnosed.

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
use crate::domain::Domain;
use crate::hypervisor::{CallError, DomainBackend, DomainRef, DomainStats, Notice, Notices};

/// Between two readings of the bulk statistics when nothing happens.
const PERIOD: Duration = Duration::from_secs(15);
/// A domain is looked at this often even if nothing is heard of it.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// What happens within this time of the first is looked at together.
const GATHER: Duration = Duration::from_millis(100);
/// Domains looked at at a time.
const AT_A_TIME: usize = 4;
/// How long it waits: the other domains wait for that.
const PATIENCE: Patience = Patience {
    libvirt: Duration::from_secs(2),
    agent: Duration::from_secs(3),
};

/// How long a look at one domain may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For libvirt to tell of it.
    pub libvirt: Duration,
    /// For its guest agent to tell.
    pub agent: Duration,
}

/// The running domains as last seen, or why they cannot be; `None` before the first time.
pub type Sight = Option<Result<Arc<[ObservedDomain]>, String>>;

/// Keeps the inventory up to date.
pub struct Monitor<C> {
    control: Arc<C>,
    inventory: Arc<Inventory>,
    known: HashMap<String, Known>,
    /// Why a domain could not be looked at when that was last tried.
    unlooked: HashMap<String, String>,
    sight: watch::Sender<Sight>,
    failed: Option<&'static str>,
}

/// A domain as last looked at.
struct Known {
    look: Arc<DomainDetails>,
    looked: Instant,
    /// Something happened to it since.
    stale: bool,
}

impl<C: DomainBackend> Monitor<C> {
    /// Of this hypervisor's domains. Nothing is asked before [`Self::run`].
    pub fn new(control: Arc<C>, inventory: Arc<Inventory>) -> Self {
        Self {
            control,
            inventory,
            known: HashMap::new(),
            unlooked: HashMap::new(),
            sight: watch::Sender::new(None),
            failed: None,
        }
    }

    /// The running domains as it sees them from now on.
    pub fn sight(&self) -> watch::Receiver<Sight> {
        self.sight.subscribe()
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
                Err(error @ CallError::Unsupported { .. }) => {
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
    pub async fn refresh(&mut self) -> Result<(), CallError> {
        let running = self.control.all_domain_stats().await?;
        let there: HashSet<&str> = running.iter().map(|stats| stats.id.uuid.as_str()).collect();
        self.known.retain(|uuid, _| there.contains(uuid.as_str()));
        self.unlooked
            .retain(|uuid, _| there.contains(uuid.as_str()));
        let stale: Vec<DomainRef> = running
            .iter()
            .filter(|stats| self.is_stale(stats))
            .map(|stats| stats.id.clone())
            .collect();
        let control = &self.control;
        let looks: Vec<_> = stream::iter(stale)
            .map(|id| async {
                let seen = look(&**control, &id, PATIENCE).await;
                (id, seen)
            })
            .buffer_unordered(AT_A_TIME)
            .collect()
            .await;
        for (id, seen) in looks {
            match seen {
                Ok(look) => {
                    let known = Known {
                        look: Arc::new(look),
                        looked: Instant::now(),
                        stale: false,
                    };
                    self.unlooked.remove(&id.uuid);
                    self.known.insert(id.uuid, known);
                }
                Err(why) => {
                    debug!(domain = id.name, why, "a domain cannot be looked at");
                    self.unlooked.insert(id.uuid, why);
                }
            }
        }
        let at = now();
        let figures = running.iter().filter_map(|stats| {
            let known = self.known.get(&stats.id.uuid)?;
            let balloon = stats.stats.balloon;
            let told = balloon.updated.is_some_and(|updated| updated > 0);
            let total = balloon.total.filter(|_| told);
            let look = &known.look;
            let figures = DomainFigures::of(&look.domain, look.online(), total, at);
            Some(DomainFigures {
                connection: stats.id.connection.clone(),
                state: stats.state,
                ..figures
            })
        });
        self.inventory.replace(figures.collect());
        let seen = running.into_iter().map(|stats| self.seen(stats));
        let seen: Arc<[ObservedDomain]> = seen.collect();
        self.sight.send_replace(Some(Ok(seen)));
        Ok(())
    }

    fn seen(&self, stats: DomainStats) -> ObservedDomain {
        let uuid = &stats.id.uuid;
        let look = match (self.unlooked.get(uuid), self.known.get(uuid)) {
            (None, Some(known)) => Ok(Arc::clone(&known.look)),
            (Some(why), _) => Err(why.clone()),
            (None, None) => Err("not looked at yet".to_owned()),
        };
        ObservedDomain {
            name: stats.id.name,
            uuid: stats.id.uuid,
            state: stats.state,
            stats: stats.stats,
            details: look,
            earlier: BTreeMap::new(),
        }
    }

    fn is_stale(&self, stats: &DomainStats) -> bool {
        self.known.get(&stats.id.uuid).is_none_or(|known| {
            let seen = u32::try_from(stats.stats.vcpus.len()).unwrap_or(u32::MAX);
            // Nothing tells when a guest brings a vCPU online.
            let plugged = known.look.domain.vcpus.plugged();
            let lags = known.look.online().is_some_and(|online| online < plugged);
            known.stale || lags || known.looked.elapsed() >= LOOK_AGAIN || plugged != seen
        })
    }

    /// Says so once, and keeps what was seen last: each entry has its time.
    fn failed(&mut self, error: &CallError) {
        self.sight.send_replace(Some(Err(error.to_string())));
        if self.failed.replace(error.code()) != Some(error.code()) {
            warn!(%error, "the running domains cannot be read; trying on");
        }
    }
}

/// Looks at one domain.
///
/// # Errors
/// Why it cannot be looked at, as a sentence; it may have just ended.
pub async fn look<C: DomainBackend>(
    control: &C,
    id: &DomainRef,
    patience: Patience,
) -> Result<DomainDetails, String> {
    // While something is being done to a domain this would wait for that.
    let live = match timeout(patience.libvirt, control.domain(id)).await {
        Ok(Ok(live)) => live,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => {
            let waited = patience.libvirt;
            return Err(format!(
                "no answer within {waited:?}; something is being done to it"
            ));
        }
    };
    let domain = match Domain::parse(&live.id.name, live.xml.as_bytes(), live.state) {
        // Reading the XML takes away what is white around the name.
        Ok(domain) => Domain {
            name: live.id.name,
            ..domain
        },
        Err(error) => {
            warn!(domain = id.name, %error, "a domain's XML cannot be read");
            return Err(error.to_string());
        }
    };
    let agent = match domain.agent.may_answer() && domain.state.runs() {
        true => match timeout(patience.agent, control.guest_vcpus(id)).await {
            Ok(Ok(vcpus)) => AgentAnswer::Answered(vcpus),
            Ok(Err(error)) => AgentAnswer::Silent(error.to_string()),
            Err(_) => AgentAnswer::Silent(format!("no answer within {:?}", patience.agent)),
        },
        false => AgentAnswer::NotAsked,
    };
    Ok(DomainDetails {
        domain,
        persistent: live.persistent,
        agent,
    })
}
