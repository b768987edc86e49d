//! Observes one domain through every source that libvirt and QEMU offer.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::clock::Clock;
use super::lives::VcpuLives;
use super::options::Options;
use crate::hotplug::{Agent, AnswerTimes, Contact, GuestVcpus, Observation};
use crate::hypervisor::{CallError, DomainBackend, DomainRef, ObservationQuery, Seen};
use crate::units::Timestamp;

/// Pauses after an unanswered question to the guest agent, each twice as long as the one before: a
/// silent agent occupies a place that other domains need too.
const MIN_AGENT_PAUSE: Duration = Duration::from_secs(2);
const MAX_AGENT_PAUSE: Duration = Duration::from_secs(30);

/// Source of observations of one domain. Every source has its own timeout, so that a guest agent
/// or a job on the domain delays an observation but does not prevent it.
pub(super) struct Observer<C> {
    backend: Arc<C>,
    domain: DomainRef,
    clock: Clock,
    timeout: Duration,
    agent_timeout: Duration,
    vcpu_lives: Arc<VcpuLives>,
    asks_agent: bool,
    asks_qemu: bool,
    silent_agent: Mutex<Option<SilentAgent>>,
}

/// Guest agent that did not answer the last question.
#[derive(Clone)]
struct SilentAgent {
    error: String,
    until: Instant,
    pause: Duration,
}

impl<C: DomainBackend> Observer<C> {
    pub(super) fn new(
        backend: Arc<C>,
        domain: DomainRef,
        clock: Clock,
        options: &Options,
        vcpu_lives: Arc<VcpuLives>,
        asks_agent: bool,
    ) -> Self {
        Self {
            backend,
            domain,
            clock,
            timeout: options.observe_timeout,
            agent_timeout: options.agent_timeout,
            vcpu_lives,
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
            background: false,
            answers: self.asks_qemu,
            definition: false,
        };
        let seen = self.backend.observe(&self.domain, query).await;
        let agent = seen.agent.clone();
        let mut observation = observation(self.clock, at, seen)?;
        let domain = &observation.domain;
        let may_answer = domain.agent.may_answer() && domain.state.runs();
        observation.agent = match (agent, pause) {
            (Some(answer), _) => self.agent_answer(answer),
            (None, Some(silent)) if self.asks_agent && may_answer => Agent::Silent(silent.error),
            (None, _) => Agent::NotAsked,
        };
        self.vcpu_lives.observe(&self.domain, &observation);
        Ok(observation)
    }

    fn agent_answer(&self, answer: Result<GuestVcpus, CallError>) -> Agent {
        let agent = Agent::from_call(answer);
        let mut silent = self.silent_agent();
        match &agent {
            Agent::Silent(error) => {
                let pause = silent.as_ref().map_or(MIN_AGENT_PAUSE, |last| {
                    (last.pause * 2).min(MAX_AGENT_PAUSE)
                });
                *silent = Some(SilentAgent {
                    error: error.clone(),
                    until: Instant::now() + pause,
                    pause,
                });
            }
            // The next observation tries again.
            Agent::NotQueried(_) => {}
            Agent::NotAsked | Agent::Refused(_) | Agent::Answered(_) => *silent = None,
        }
        agent
    }

    fn silent_agent(&self) -> std::sync::MutexGuard<'_, Option<SilentAgent>> {
        let silent = self.silent_agent.lock();
        silent.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Converts what a backend answered since `at` into an observation, or the reason for none.
pub(crate) fn observation(clock: Clock, at: Timestamp, seen: Seen) -> Result<Observation, Contact> {
    // A job on the domain blocks its description and not its statistics: if only the
    // statistics arrive, the domain is held and libvirt is reachable.
    let live = match seen.live {
        Ok(live) => live,
        Err(CallError::Busy { .. } | CallError::Overdue { .. }) if seen.statistics.is_some() => {
            return Err(Contact::Held);
        }
        Err(CallError::NotFound(_)) => return Err(Contact::Absent),
        Err(CallError::Overdue { after, .. }) => {
            let why = format!("no description of the domain within {after:?}");
            return Err(Contact::Unreachable(why));
        }
        Err(error) => return Err(Contact::Unreachable(error.to_string())),
    };
    let received = |at| clock.received(at);
    let answered = AnswerTimes {
        live: Some(received(seen.times.live)),
        statistics: seen
            .statistics
            .as_ref()
            .map(|_| received(seen.times.statistics)),
        agent: seen.times.agent.map(received),
    };
    Ok(Observation {
        at,
        answered,
        domain: live.domain,
        reason: live.reason,
        persistent: live.persistent,
        stats: seen.statistics.map(|statistics| statistics.stats),
        agent: seen.agent.map_or(Agent::NotAsked, Agent::from_call),
        job: live.job,
        answers: seen.answers,
    })
}

/// Observes a domain once, without its guest agent: for a preflight without an operation.
///
/// # Errors
/// The domain does not exist, is held by a job, or the hypervisor does not answer.
pub async fn observe_once<C: DomainBackend>(
    backend: Arc<C>,
    domain: DomainRef,
) -> Result<Observation, Contact> {
    let options = Options::default();
    let lives = Arc::new(VcpuLives::default());
    let observer = Observer::new(backend, domain, Clock::start(), &options, lives, false);
    observer.observe().await
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
