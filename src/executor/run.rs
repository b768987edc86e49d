//! The life of one operation.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::Executor;
use super::clock::Clock;
use super::look::{Look, Looks, SilentAgent, contact};
use super::pursuit::Pursuit;
use super::queues::Ticket;
use crate::hotplug::{
    Contact, Event, History, Host, HotplugRequest, Preflight, Terms, Verdict, extent, preflight,
};
use crate::hypervisor::{CallError, Change, Connection, DomainBackend, DomainRef, Notice, Notices};
use crate::journal::Entry;
use crate::operation::{OperationId, Record, State};

/// How long after a restart an operation whose deadline has passed may still wait for a look.
const GRACE: Duration = Duration::from_secs(15);
/// How long libvirt may take to tell why a domain ended that it does not know any more: a moment,
/// but on a node that has more to do than it can.
pub(super) const WHY: Duration = Duration::from_secs(5);

/// An operation that is under way.
pub(super) struct Operation<C> {
    pub(super) executor: Arc<Executor<C>>,
    pub(super) entry: Entry,
    pub(super) clock: Clock,
    /// The verdict if the deadline comes before anything was called.
    obstacle: Verdict,
}

/// What must happen before the domain can be changed.
enum Found {
    Domain(DomainRef, Ticket),
    Nothing,
}

/// What comes of looking at the domain before anything is called.
enum Prepared {
    Ready(Box<History>, Option<SilentAgent>),
    /// There is a verdict.
    Over,
    /// The domain is there no more.
    Gone,
}

impl<C: DomainBackend> Executor<C> {
    /// Takes up what an earlier life of this program left.
    pub(super) fn resume(self: &Arc<Self>, entry: Entry, ticket: u64) {
        if entry.record.is_done() {
            return;
        }
        info!(operation = %entry.record.id, "an operation is taken up again");
        let place = self.names.join(entry.order.domain.as_str(), ticket);
        self.tasks.spawn(Arc::clone(self).run(entry, place, ticket));
    }

    /// Goes on watching an operation that an earlier life of this program watched after its
    /// verdict, for as long as is left of the time for it.
    pub(super) fn watch_on(self: &Arc<Self>, mut entry: Entry) {
        let clock = self.clock.not_before(latest(&entry));
        let record = &entry.record;
        let (Some(finished), Some(domain)) = (record.finished, record.domain.identity()) else {
            return;
        };
        let may_change = record.verdict.is_some_and(Verdict::may_change);
        if !may_change || clock.now() >= finished.after(self.options.follow) {
            return;
        }
        let Some(mut history) = entry.history.take() else {
            return;
        };
        let Some(token) = self.follow(&domain, record) else {
            return;
        };
        info!(operation = %record.id, "an operation is watched again");
        history.lost(clock.now());
        let executor = Arc::clone(self);
        let operation = Operation::new(executor, entry, clock);
        let notices = self.control.notices();
        let looks = operation.looks(&domain);
        let pursuit = Pursuit::new(operation, domain, looks, notices, history, None);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(pursuit.watch(token)).await;
        });
    }

    /// Carries an operation out, or as far as there is time before this program ends.
    pub(super) async fn run(self: Arc<Self>, entry: Entry, place: Ticket, ticket: u64) {
        let stop = self.stop.clone();
        let clock = self.clock.not_before(latest(&entry));
        let operation = Operation::new(self, entry, clock);
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = operation.run(place, ticket) => {}
        }
    }

    /// Ends the watching of a domain's earlier operation.
    fn unfollow(&self, domain: &DomainRef) {
        let followed = self.followed().remove(&domain.uuid);
        if let Some((_, token)) = followed {
            token.cancel();
        }
    }

    /// Notes that this operation is watched; `None` if as many are as may be.
    pub(super) fn follow(&self, domain: &DomainRef, record: &Record) -> Option<CancellationToken> {
        let mut followed = self.followed();
        if followed.len() >= self.options.most_followed {
            return None;
        }
        let token = CancellationToken::new();
        followed.insert(domain.uuid.clone(), (record.id.clone(), token.clone()));
        Some(token)
    }

    /// Notes that this operation is watched no more.
    pub(super) fn followed_to_the_end(&self, domain: &DomainRef, record: &Record) {
        let mut followed = self.followed();
        if followed
            .get(&domain.uuid)
            .is_some_and(|(id, _)| *id == record.id)
        {
            followed.remove(&domain.uuid);
        }
    }
}

/// Of each domain the operation that began last: the others are not its latest word.
pub(super) fn last_of_each_domain(entries: &[Entry]) -> HashSet<OperationId> {
    let mut last = HashMap::new();
    for record in entries.iter().map(|entry| &entry.record) {
        let (Some(domain), Some(started)) = (record.domain.identity(), record.started) else {
            continue;
        };
        let known = last.entry(domain).or_insert((started, &record.id));
        *known = (*known).max((started, &record.id));
    }
    last.into_values().map(|(_, id)| id.clone()).collect()
}

fn no_answer(after: Duration) -> CallError {
    CallError::Overdue {
        call: "find-domain".into(),
        after,
    }
}

/// The last moment that an entry knows: a clock that was put back must not be before it.
fn latest(entry: &Entry) -> crate::units::Timestamp {
    let history = entry.history.as_ref();
    let seen = history.map(|history| history.latest().at);
    let called = history.and_then(|history| {
        let call = history.calls().last()?;
        Some(call.returned.as_ref().map_or(call.started, |(at, _)| *at))
    });
    let record = &entry.record;
    let told = [record.started, record.finished, record.corrected];
    [seen, called]
        .into_iter()
        .chain(told)
        .flatten()
        .fold(record.created, Ord::max)
}

impl<C: DomainBackend> Operation<C> {
    fn new(executor: Arc<Executor<C>>, entry: Entry, clock: Clock) -> Self {
        Self {
            executor,
            entry,
            clock,
            obstacle: Verdict::HypervisorUnavailable,
        }
    }

    fn looks(&self, domain: &DomainRef) -> Arc<Looks<C>> {
        let asks_agent = matches!(self.entry.order.request, HotplugRequest::Vcpus { .. });
        Arc::new(Looks::new(
            Arc::clone(&self.executor.control),
            domain.clone(),
            self.clock,
            &self.executor.options,
            asks_agent,
        ))
    }

    async fn run(mut self, place: Ticket, ticket: u64) {
        let deadline = self.deadline();
        let record = &self.entry.record;
        if self.entry.history.is_none() && self.clock.now() >= record.deadline {
            let message = "the deadline passed while virtnode was not running: nothing was changed";
            return self.end(self.obstacle, message.to_owned()).await;
        }
        let found = match timeout_at(deadline, self.find(place, ticket)).await {
            Ok(found) => found,
            Err(_) => return self.not_begun().await,
        };
        let Found::Domain(domain, place) = found else {
            return;
        };
        if !place.is_served() {
            self.awaits("another operation on this domain to end");
            self.obstacle = Verdict::Busy;
            if timeout_at(deadline, place.turn()).await.is_err() {
                return self.not_begun().await;
            }
        }
        self.begin(domain, place, deadline).await;
    }

    /// When there must be a verdict. One that was interrupted is looked at first in any case.
    fn deadline(&self) -> Instant {
        let deadline = self.clock.instant(self.entry.record.deadline);
        match self.entry.history {
            Some(_) => deadline.max(Instant::now() + GRACE),
            None => deadline,
        }
    }

    /// Finds the domain and takes a place in its line.
    async fn find(&mut self, place: Ticket, ticket: u64) -> Found {
        place.turn().await;
        let control = Arc::clone(&self.executor.control);
        let target = &self.entry.record.domain;
        let text = target.uuid.as_deref().unwrap_or(&target.name).to_owned();
        let mut pauses = self.pauses();
        let give_up = self.give_up();
        let mut last = None;
        loop {
            let asked = timeout_at(give_up, control.find_domain(&text)).await;
            let asked = asked.unwrap_or_else(|_| {
                // What was last said tells more than that there was no time for another answer.
                Err(last
                    .take()
                    .unwrap_or_else(|| no_answer(self.executor.options.reach)))
            });
            last = asked.as_ref().err().cloned();
            let why = match asked.map_err(contact) {
                Ok(domain) => {
                    let place = self.executor.domains.join(&domain.uuid, ticket);
                    self.entry.record.domain = (&domain).into();
                    self.publish();
                    return Found::Domain(domain, place);
                }
                Err(Contact::Absent) => {
                    self.absent().await;
                    return Found::Nothing;
                }
                Err(Contact::Unreachable(why)) => why,
                Err(Contact::Held) => "it does not tell of the domain".to_owned(),
            };
            if Instant::now() >= give_up {
                self.unreachable(&why).await;
                return Found::Nothing;
            }
            self.awaits(&format!("the hypervisor: {why}"));
            sleep_until(give_up.min(Instant::now() + pauses.next())).await;
        }
    }

    /// When a hypervisor that is away is waited for no longer. What was begun is not given up
    /// before the deadline.
    fn give_up(&self) -> Instant {
        match self.entry.history {
            Some(_) => self.deadline(),
            None => Instant::now() + self.executor.options.reach,
        }
    }

    /// The hypervisor is away, and nothing was asked of it yet.
    async fn unreachable(&mut self, why: &str) {
        let message = format!(
            "the hypervisor cannot be reached: {why}; nothing was changed: see that libvirtd or \
             virtqemud runs and answers, and ask again"
        );
        self.end(Verdict::HypervisorUnavailable, message).await;
    }

    /// There is no such domain, or not any more.
    async fn absent(&mut self) {
        let Some(mut history) = self.entry.history.take() else {
            let name = &self.entry.order.domain;
            let message = format!("there is no domain {name}");
            return self.end(Verdict::DomainNotFound, message).await;
        };
        let now = self.clock.now();
        history.out_of_contact(now, Contact::Absent);
        match crate::hotplug::judge(&history, now) {
            crate::hotplug::Step::Done(outcome) => self.entry.record.conclude(*outcome, now),
            _ => self
                .entry
                .record
                .end(Verdict::DomainNotRunning, "the domain ended", now),
        }
        self.save_and_tell().await;
    }

    /// It is this operation's turn.
    async fn begin(mut self, domain: DomainRef, place: Ticket, deadline: Instant) {
        self.executor.unfollow(&domain);
        // Before the first look, so that nothing is missed between it and the call.
        let mut notices = self.executor.control.notices();
        self.obstacle = Verdict::HypervisorUnavailable;
        let record = &mut self.entry.record;
        record.state = State::Running;
        record.started.get_or_insert(self.clock.now());
        record.awaits("a look at the domain", self.clock.now());
        self.publish();
        self.executor.listener.changed(&self.entry.record);
        let looks = self.looks(&domain);
        let (history, agent) = match self.entry.history.take() {
            Some(history) => self.take_up(history, &looks, deadline).await,
            None => match timeout_at(deadline, self.prepare(&looks)).await {
                Ok(Prepared::Ready(history, agent)) => (*history, agent),
                Ok(Prepared::Over) => return,
                Ok(Prepared::Gone) => return self.gone(&domain, &mut notices).await,
                Err(_) => return self.not_begun().await,
            },
        };
        Pursuit::new(self, domain, looks, notices, history, agent)
            .run(place)
            .await;
    }

    /// The deadline came before anything could be called.
    async fn not_begun(&mut self) {
        let awaited = self.awaited("the hypervisor");
        let message =
            format!("the deadline passed while waiting for {awaited}: nothing was changed");
        self.end(self.obstacle, message).await;
    }

    /// The domain ended after it had been found, and before anything was called.
    async fn gone(&mut self, domain: &DomainRef, notices: &mut Notices) {
        // An event and an answer come by different connections.
        let patience = if self.hears() { WHY } else { Duration::ZERO };
        let told = timeout(patience, async {
            while let Some(notice) = notices.next().await {
                if let Notice::Change {
                    domain: of,
                    change: Change::Event(Event::Stopped(why)),
                    ..
                } = notice
                    && of.uuid == domain.uuid
                {
                    return format!(": {why}");
                }
            }
            String::new()
        });
        let why = told.await.unwrap_or_default();
        let message = format!("the domain ended before anything was asked of it{why}");
        self.end(Verdict::DomainNotRunning, message).await;
    }

    /// Looks at the domain and plans.
    async fn prepare(&mut self, looks: &Looks<C>) -> Prepared {
        let mut pauses = self.pauses();
        let mut silent = None;
        let give_up = self.give_up();
        loop {
            let Look { seen, agent } = looks.look(silent).await;
            silent = agent;
            let seen = match seen {
                Ok(seen) => seen,
                Err(Contact::Absent) => return Prepared::Gone,
                Err(Contact::Held) => {
                    self.obstacle = Verdict::Busy;
                    self.awaits("something else that is being done to the domain to end");
                    sleep(pauses.next()).await;
                    continue;
                }
                Err(Contact::Unreachable(why)) => {
                    if !self.hears() && Instant::now() >= give_up {
                        self.unreachable(&why).await;
                        return Prepared::Over;
                    }
                    self.obstacle = Verdict::HypervisorUnavailable;
                    self.awaits(&format!("the hypervisor: {why}"));
                    sleep(pauses.next()).await;
                    continue;
                }
            };
            let request = &self.entry.order.request;
            let host = self.host();
            match preflight(request, &seen, &host) {
                Preflight::Ready(plan) => {
                    let terms = Terms {
                        require: self.entry.order.require,
                        deadline: self.entry.record.deadline,
                        patience: self.executor.options.patience,
                    };
                    // By events, or by asking for what they would have told.
                    let hears = self.hears() || seen.answers.is_some();
                    let history = History::new(request.clone(), terms, plan, seen, hears);
                    return Prepared::Ready(Box::new(history), silent);
                }
                Preflight::Blocked(awaited) => {
                    self.obstacle = Verdict::Busy;
                    self.awaits(&awaited);
                    sleep(pauses.next()).await;
                }
                Preflight::Rejected(rejection) => {
                    let extent = extent(request, &seen);
                    self.entry.record.before = Some(extent);
                    self.entry.record.after = Some(extent);
                    self.end(rejection.verdict(), rejection.to_string()).await;
                    return Prepared::Over;
                }
            }
        }
    }

    /// Whether the hypervisor tells what happens.
    pub(super) fn hears(&self) -> bool {
        *self.executor.control.listening().borrow() != Connection::Down
    }

    fn host(&self) -> Host {
        match self.entry.order.request {
            HotplugRequest::Memory { .. } => Host {
                available: (self.executor.options.available_memory)(),
            },
            HotplugRequest::Vcpus { .. } => Host::default(),
        }
    }

    /// Goes on with a history of an earlier life: a call that had not come back never will. The
    /// domain is looked at before anything is decided, until it shows what became of that call.
    async fn take_up(
        &mut self,
        mut history: History,
        looks: &Looks<C>,
        deadline: Instant,
    ) -> (History, Option<SilentAgent>) {
        history.lost(self.clock.now());
        let mut pauses = self.pauses();
        let mut silent = None;
        let first = async {
            loop {
                let Look { seen, agent } = looks.look(silent.take()).await;
                silent = agent;
                match seen {
                    Ok(seen) => {
                        history.observed(seen);
                        if !history.is_unsettled() {
                            return;
                        }
                    }
                    Err(contact) => {
                        let absent = contact == Contact::Absent;
                        history.out_of_contact(self.clock.now(), contact);
                        if absent {
                            return;
                        }
                    }
                }
                sleep(pauses.next()).await;
            }
        };
        drop(timeout_at(deadline, first).await);
        (history, silent)
    }

    fn pauses(&self) -> Pauses {
        let options = &self.executor.options;
        Pauses::new(options.shortest_pause, options.longest_pause)
    }

    /// What was last waited for, or that.
    fn awaited(&self, otherwise: &str) -> String {
        let awaiting = self.entry.record.awaiting.as_ref();
        awaiting.map_or(otherwise.to_owned(), |awaiting| awaiting.what.clone())
    }

    /// Tells what is waited for.
    pub(super) fn awaits(&mut self, what: &str) {
        if self.entry.record.awaits(what, self.clock.now()) {
            self.publish();
        }
    }

    /// Ends the operation with a verdict for which nothing was changed.
    async fn end(&mut self, verdict: Verdict, message: String) {
        self.entry.record.end(verdict, message, self.clock.now());
        self.entry.history = None;
        self.save_and_tell().await;
    }

    /// Shows the record as it is now.
    pub(super) fn publish(&self) {
        self.executor.table().set(&self.entry.record);
    }

    /// Puts the operation into the journal as it is now.
    pub(super) async fn save(&self) -> Result<(), String> {
        self.executor.write(&self.entry).await
    }

    /// Puts a verdict into the journal and shows it. A journal that fails does not withhold it.
    pub(super) async fn save_and_tell(&self) {
        // Written to the log where it failed; the verdict is still true.
        drop(self.save().await);
        self.publish();
        let record = &self.entry.record;
        self.executor.listener.changed(record);
        info!(
            operation = %record.id,
            domain = record.domain.name,
            verdict = record.verdict.map(Verdict::as_str),
            because = record.message,
            "an operation has its verdict"
        );
    }
}

/// Pauses that grow.
pub(super) struct Pauses {
    shortest: Duration,
    longest: Duration,
    next: Duration,
}

impl Pauses {
    pub(super) fn new(shortest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            longest,
            next: shortest,
        }
    }

    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }

    pub(super) fn restart(&mut self) {
        self.next = self.shortest;
    }
}
