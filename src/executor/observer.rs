//! Observes one domain through every source that libvirt and QEMU offer.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::clock::Clock;
use super::options::Options;
use crate::domain::Domain;
use crate::hotplug::{Agent, Contact, Observation, Ost};
use crate::hypervisor::{CallError, DomainBackend, DomainRef, LiveDomain};

/// Pause after an unanswered question to the guest agent: each one occupies a worker until its
/// own deadline, and other domains need workers too.
const AGENT_PAUSE: Duration = Duration::from_secs(2);

/// Source of observations of one domain. Every source has its own timeout, so that a guest agent
/// or a job on the domain delays an observation but does not prevent it.
pub(super) struct Observer<C> {
    backend: Arc<C>,
    domain: DomainRef,
    clock: Clock,
    timeout: Duration,
    agent_timeout: Duration,
    asks_agent: bool,
    asks_qemu: bool,
    silent_agent: Mutex<Option<SilentAgent>>,
}

/// Guest agent that did not answer the last question.
#[derive(Clone)]
struct SilentAgent {
    error: String,
    until: Instant,
}

impl<C: DomainBackend> Observer<C> {
    pub(super) fn new(
        backend: Arc<C>,
        domain: DomainRef,
        clock: Clock,
        options: &Options,
        asks_agent: bool,
    ) -> Self {
        Self {
            backend,
            domain,
            clock,
            timeout: options.observe_timeout,
            agent_timeout: options.agent_timeout,
            asks_agent,
            asks_qemu: options.deep_verify,
            silent_agent: Mutex::default(),
        }
    }

    pub(super) async fn observe(&self) -> Result<Observation, Contact> {
        let at = self.clock.now();
        // A job on the domain blocks the first query and not the second: if only the statistics
        // arrive, the domain is held and libvirt is reachable.
        let live = timeout(self.timeout, self.backend.domain(&self.domain));
        let stats = timeout(self.timeout, self.backend.domain_stats(&self.domain));
        let (live, stats) = tokio::join!(live, stats);
        let stats = stats.ok().and_then(Result::ok);
        let live = match live {
            Ok(Ok(live)) => live,
            Ok(Err(CallError::Busy { .. })) | Err(_) if stats.is_some() => {
                return Err(Contact::Held);
            }
            Ok(Err(CallError::NotFound(_))) => return Err(Contact::Absent),
            Ok(Err(error)) => return Err(Contact::Unreachable(error.to_string())),
            Err(_) => {
                let waited = self.timeout;
                let why = format!("no description of the domain within {waited:?}");
                return Err(Contact::Unreachable(why));
            }
        };
        let domain = parse(&live)?;
        let agent = if self.asks_agent && domain.agent.may_answer() && live.state.runs() {
            self.ask_agent().await
        } else {
            Agent::NotAsked
        };
        Ok(Observation {
            at,
            domain,
            reason: live.reason,
            persistent: live.persistent,
            stats: stats.map(|stats| stats.stats),
            agent,
            job: live.job,
            answers: self.ask_qemu().await,
        })
    }

    async fn ask_qemu(&self) -> Option<Vec<Ost>> {
        if !self.asks_qemu {
            return None;
        }
        let answers = timeout(self.timeout, self.backend.acpi_answers(&self.domain));
        answers.await.ok()?.ok()
    }

    async fn ask_agent(&self) -> Agent {
        let last = self.silent_agent().clone();
        if let Some(silent) = last.filter(|last| last.until > Instant::now()) {
            return Agent::Silent(silent.error);
        }
        let answer = timeout(self.agent_timeout, self.backend.guest_vcpus(&self.domain)).await;
        let error = match answer {
            Ok(Ok(guest)) => {
                *self.silent_agent() = None;
                return Agent::Answered(guest);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.agent_timeout),
        };
        *self.silent_agent() = Some(SilentAgent {
            error: error.clone(),
            until: Instant::now() + AGENT_PAUSE,
        });
        Agent::Silent(error)
    }

    fn silent_agent(&self) -> std::sync::MutexGuard<'_, Option<SilentAgent>> {
        let silent = self.silent_agent.lock();
        silent.unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(live: &LiveDomain) -> Result<Domain, Contact> {
    Domain::parse(&live.id.name, live.xml.as_bytes(), live.state)
        .map_err(|error| Contact::Unreachable(format!("cannot read the domain XML: {error}")))
}

/// Exponentially growing pauses between attempts.
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
        }
    }

    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        pause
    }

    pub(super) fn restart(&mut self) {
        self.next = self.min;
    }
}
