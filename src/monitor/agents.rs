//! The monitor's questions to guest agents: which is due, and how many are under way.
//!
//! A guest decides how long its agent takes. So a silent agent is asked again only after a pause,
//! which doubles from [`MIN_PAUSE`] to [`MAX_PAUSE`], never before those that answer, and never by
//! more than [`SILENT_AT_A_TIME`] questions at a time. A guest cannot end its pause by reconnecting
//! its agent.

use std::collections::{HashMap, HashSet};
use std::future::pending;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::hotplug::Agent;
use crate::hypervisor::{DomainRef, Seen};

/// Maximum number of questions under way.
const AT_A_TIME: usize = 3;
/// Maximum number of those to silent agents.
const SILENT_AT_A_TIME: usize = 1;
/// Maximum wait until an agent can be asked: one silent agent may be in the way.
const WAIT: Duration = Duration::from_secs(10);
/// Pauses of a silent agent.
const MIN_PAUSE: Duration = Duration::from_secs(15);
const MAX_PAUSE: Duration = Duration::from_secs(240);

type Question = BoxFuture<'static, (DomainRef, Seen)>;

/// The agents of the running domains.
#[derive(Default)]
pub(super) struct Agents {
    known: HashMap<DomainRef, KnownAgent>,
    questions: FuturesUnordered<Question>,
}

struct KnownAgent {
    /// libvirt's number of the running domain: another start is another guest.
    start: Option<u32>,
    answer: Agent,
    /// Time of the last question's end.
    asked: Option<Instant>,
    /// True if something happened since, or it was never asked.
    due: bool,
    is_asking: bool,
    /// The pause after the last answer, if that was silence.
    pause: Option<Duration>,
    /// It is not asked before.
    rests_until: Option<Instant>,
}

impl KnownAgent {
    fn new(start: Option<u32>) -> Self {
        Self {
            start,
            answer: Agent::NotQueried("other agents are queried first".to_owned()),
            asked: None,
            due: true,
            is_asking: false,
            pause: None,
            rests_until: None,
        }
    }

    fn is_due(&self) -> bool {
        let rests = self.rests_until.is_some_and(|until| until > Instant::now());
        self.due && !self.is_asking && !rests
    }

    fn is_silent(&self) -> bool {
        self.pause.is_some()
    }
}

impl Agents {
    /// Forgets the agents of other domains.
    pub(super) fn retain(&mut self, running: &HashSet<&DomainRef>) {
        self.known.retain(|id, _| running.contains(id));
    }

    /// Makes the agent of a domain due that was just observed, and returns its last answer.
    pub(super) fn observed(
        &mut self,
        id: &DomainRef,
        start: Option<u32>,
        may_answer: bool,
    ) -> Agent {
        if !may_answer {
            // A pause outlives a disconnected channel.
            if self.known.get(id).is_some_and(|known| !known.is_silent()) {
                self.known.remove(id);
            }
            return Agent::NotAsked;
        }
        let new = || KnownAgent::new(start);
        let known = self.known.entry(id.clone()).or_insert_with(new);
        if known.start != start {
            *known = KnownAgent::new(start);
        }
        known.due = true;
        known.answer.clone()
    }

    /// Returns the next agent to question, and the time to wait for that: those that answer first,
    /// then those that were never asked, then those that were silent, by age.
    pub(super) fn next_due(&mut self) -> Option<(DomainRef, Duration)> {
        if self.questions.len() >= AT_A_TIME {
            return None;
        }
        let asking = self.known.values().filter(|known| known.is_asking);
        let silent = asking.filter(|known| known.is_silent()).count();
        let due = self.known.iter_mut().filter(|(_, known)| {
            known.is_due() && (!known.is_silent() || silent < SILENT_AT_A_TIME)
        });
        let (id, known) =
            due.min_by_key(|(_, known)| (known.is_silent(), known.asked.is_none(), known.asked))?;
        known.is_asking = true;
        Some((id.clone(), WAIT))
    }

    /// Adds a question that is under way.
    pub(super) fn asked(&mut self, question: Question) {
        self.questions.push(question);
    }

    /// Waits for the next answer; without questions it never returns. Safe to cancel.
    pub(super) async fn next_answer(&mut self) -> (DomainRef, Seen) {
        match self.questions.next().await {
            Some(answer) => answer,
            None => pending().await,
        }
    }

    /// Records an answer, `None` if the domain could not be observed or its agent is not
    /// connected now; returns the agent's answer from now on.
    pub(super) fn answered(&mut self, id: &DomainRef, answer: Option<Agent>) -> Option<Agent> {
        let known = self.known.get_mut(id)?;
        known.is_asking = false;
        known.asked = Some(Instant::now());
        known.due = false;
        match answer? {
            Agent::NotQueried(reason) => {
                known.due = true;
                known.rests_until = Some(Instant::now() + MIN_PAUSE);
                if matches!(known.answer, Agent::NotQueried(_)) {
                    known.answer = Agent::NotQueried(reason);
                }
            }
            silent @ Agent::Silent(_) => {
                let longer = |pause: Duration| (pause * 2).min(MAX_PAUSE);
                let pause = known.pause.map_or(MIN_PAUSE, longer);
                known.pause = Some(pause);
                known.rests_until = Some(Instant::now() + pause);
                known.answer = silent;
            }
            answer => {
                (known.pause, known.rests_until) = (None, None);
                known.answer = answer;
            }
        }
        Some(known.answer.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hotplug::GuestVcpus;

    fn domain(name: &str) -> DomainRef {
        DomainRef::on_host(name, name)
    }

    /// Asks whatever is due, with these agents silent; returns the names in order.
    fn ask(agents: &mut Agents, silent: &[&str]) -> Vec<String> {
        let mut asked = Vec::new();
        while let Some((id, _)) = agents.next_due() {
            let answer = if silent.contains(&id.name.as_str()) {
                Agent::Silent("timed out".to_owned())
            } else {
                Agent::Answered(GuestVcpus::default())
            };
            agents.answered(&id, Some(answer));
            asked.push(id.name);
        }
        asked
    }

    fn observe(agents: &mut Agents, names: &[&str]) {
        for name in names {
            agents.observed(&domain(name), Some(1), true);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_agents_pause_longer_each_time_and_come_last() {
        let mut agents = Agents::default();
        let all = ["bad", "good"];
        observe(&mut agents, &all);
        assert_eq!(ask(&mut agents, &["bad"]).len(), 2);
        let mut at = Vec::new();
        for tick in 1..=60 {
            tokio::time::advance(Duration::from_secs(15)).await;
            observe(&mut agents, &all);
            let asked = ask(&mut agents, &["bad"]);
            assert_eq!(asked.first().map(String::as_str), Some("good"));
            if asked.len() > 1 {
                at.push(tick * 15);
            }
        }
        assert_eq!(at, [15, 45, 105, 225, 465, 705]);
        // A disconnected channel does not end the pause.
        agents.observed(&domain("bad"), Some(1), false);
        observe(&mut agents, &all);
        assert_eq!(ask(&mut agents, &[]), ["good"]);
        // Another start is another guest.
        agents.observed(&domain("bad"), Some(2), true);
        assert_eq!(ask(&mut agents, &[]), ["bad"]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_silent_agent_is_asked_at_a_time() {
        let mut agents = Agents::default();
        let bad = ["bad1", "bad2", "bad3"];
        observe(&mut agents, &bad);
        assert_eq!(ask(&mut agents, &bad).len(), 3);
        tokio::time::advance(Duration::from_secs(20)).await;
        observe(&mut agents, &bad);
        observe(&mut agents, &["good"]);
        assert_eq!(agents.next_due().unwrap().0.name, "good");
        assert!(agents.next_due().unwrap().0.name.starts_with("bad"));
        assert_eq!(agents.next_due().map(|(id, _)| id.name), None);
    }

    #[tokio::test(start_paused = true)]
    async fn agent_that_was_not_queried_is_not_silent() {
        let mut agents = Agents::default();
        observe(&mut agents, &["good"]);
        let (id, _) = agents.next_due().unwrap();
        let busy = Agent::NotQueried("calls for other domains".to_owned());
        assert_eq!(agents.answered(&id, Some(busy.clone())), Some(busy));
        assert!(agents.next_due().is_none());
        tokio::time::advance(MIN_PAUSE).await;
        // Without another observation.
        assert_eq!(ask(&mut agents, &[]), ["good"]);
        let known = agents.observed(&id, Some(1), true);
        assert!(matches!(known, Agent::Answered(_)), "{known:?}");
    }
}
