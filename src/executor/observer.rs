//! Observes one domain through every source that libvirt and QEMU offer.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::clock::Clock;
use super::options::Options;
use crate::hotplug::{Agent, Contact, GuestVcpus, Observation};
use crate::hypervisor::{CallError, DomainBackend, DomainRef, ObservationQuery};

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
        let pause = self.silent_agent().clone();
        let pause = pause.filter(|last| last.until > Instant::now());
        let query = ObservationQuery {
            timeout: self.timeout,
            statistics: true,
            agent: Some(self.agent_timeout).filter(|_| self.asks_agent && pause.is_none()),
            answers: self.asks_qemu,
        };
        let seen = self.backend.observe(&self.domain, query).await;
        // A job on the domain blocks its description and not its statistics: if only the
        // statistics arrive, the domain is held and libvirt is reachable.
        let live = match seen.live {
            Ok(live) => live,
            Err(CallError::Busy { .. } | CallError::Overdue { .. })
                if seen.statistics.is_some() =>
            {
                return Err(Contact::Held);
            }
            Err(CallError::NotFound(_)) => return Err(Contact::Absent),
            Err(CallError::Overdue { after, .. }) => {
                let why = format!("no description of the domain within {after:?}");
                return Err(Contact::Unreachable(why));
            }
            Err(error) => return Err(Contact::Unreachable(error.to_string())),
        };
        let may_answer = live.domain.agent.may_answer() && live.domain.state.runs();
        let agent = match (seen.agent, pause) {
            (Some(answer), _) => self.agent_answer(answer),
            (None, Some(silent)) if self.asks_agent && may_answer => Agent::Silent(silent.error),
            (None, _) => Agent::NotAsked,
        };
        Ok(Observation {
            at,
            domain: live.domain,
            reason: live.reason,
            persistent: live.persistent,
            stats: seen.statistics.map(|statistics| statistics.stats),
            agent,
            job: live.job,
            answers: seen.answers,
        })
    }

    fn agent_answer(&self, answer: Result<GuestVcpus, CallError>) -> Agent {
        let error = match answer {
            Ok(guest) => {
                *self.silent_agent() = None;
                return Agent::Answered(guest);
            }
            Err(CallError::Overdue { after, .. }) => format!("no answer within {after:?}"),
            Err(error) => error.to_string(),
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
