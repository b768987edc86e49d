//! Looking at a domain from all sides.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::clock::Clock;
use super::options::Options;
use crate::domain::Domain;
use crate::hotplug::{Agent, Contact, Observation, Ost};
use crate::hypervisor::{CallError, DomainBackend, DomainRef, LiveDomain};

/// An agent that did not answer is not asked again for so long: each question takes a place that
/// others may need.
const AGENT_REST: Duration = Duration::from_secs(2);

/// Looks at one domain, again and again.
pub(super) struct Looks<C> {
    control: Arc<C>,
    domain: DomainRef,
    clock: Clock,
    look_deadline: Duration,
    agent_deadline: Duration,
    /// Whether the guest's CPUs are of interest.
    asks_agent: bool,
    asks_qemu: bool,
}

/// What an agent did the last time.
#[derive(Debug, Clone)]
pub(super) struct SilentAgent {
    words: String,
    until: Instant,
}

/// What came of a look.
pub(super) struct Look {
    pub(super) seen: Result<Observation, Contact>,
    pub(super) agent: Option<SilentAgent>,
}

impl<C: DomainBackend> Looks<C> {
    pub(super) fn new(
        control: Arc<C>,
        domain: DomainRef,
        clock: Clock,
        options: &Options,
        asks_agent: bool,
    ) -> Self {
        Self {
            control,
            domain,
            clock,
            look_deadline: options.look_deadline,
            agent_deadline: options.agent_deadline,
            asks_agent,
            asks_qemu: options.deep_verify,
        }
    }

    pub(super) async fn look(&self, agent: Option<SilentAgent>) -> Look {
        let mut agent = agent;
        let seen = self.see(&mut agent).await;
        Look { seen, agent }
    }

    async fn see(&self, silent: &mut Option<SilentAgent>) -> Result<Observation, Contact> {
        let at = self.clock.now();
        // Not to be held up for longer than a look by what is being done to the domain, ...
        let live = timeout(self.look_deadline, self.control.domain(&self.domain));
        // ... for which the statistics do not wait: whether they come tells the two apart.
        let stats = timeout(self.look_deadline, self.control.domain_stats(&self.domain));
        let (live, stats) = tokio::join!(live, stats);
        let stats = stats.ok().and_then(Result::ok);
        let live = match live {
            Ok(Ok(live)) => live,
            Ok(Err(CallError::Busy { .. })) | Err(_) if stats.is_some() => {
                return Err(Contact::Held);
            }
            Ok(Err(error)) => return Err(contact(error)),
            Err(_) => {
                return Err(Contact::Unreachable(format!(
                    "it did not tell of the domain within {:?}",
                    self.look_deadline
                )));
            }
        };
        let domain = parse(&live)?;
        let agent = match self.asks_agent && domain.agent.may_answer() && live.state.runs() {
            true => self.ask(silent).await,
            false => Agent::NotAsked,
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

    /// What QEMU remembers of the guest's answers, if that is wanted and can be had.
    async fn ask_qemu(&self) -> Option<Vec<Ost>> {
        if !self.asks_qemu {
            return None;
        }
        let asked = timeout(self.look_deadline, self.control.acpi_answers(&self.domain));
        asked.await.ok()?.ok()
    }

    async fn ask(&self, silent: &mut Option<SilentAgent>) -> Agent {
        if let Some(silent) = silent.as_ref().filter(|last| last.until > Instant::now()) {
            return Agent::Silent(silent.words.clone());
        }
        let answer = timeout(self.agent_deadline, self.control.guest_vcpus(&self.domain)).await;
        let words = match answer {
            Ok(Ok(guest)) => {
                *silent = None;
                return Agent::Answered(guest);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.agent_deadline),
        };
        *silent = Some(SilentAgent {
            words: words.clone(),
            until: Instant::now() + AGENT_REST,
        });
        Agent::Silent(words)
    }
}

fn parse(live: &LiveDomain) -> Result<Domain, Contact> {
    Domain::parse(&live.id.name, live.xml.as_bytes(), live.state)
        .map_err(|error| Contact::Unreachable(format!("its answer cannot be read: {error}")))
}

/// What an error means about the domain.
pub(super) fn contact(error: CallError) -> Contact {
    match error {
        CallError::NotFound(_) => Contact::Absent,
        error => Contact::Unreachable(error.to_string()),
    }
}
