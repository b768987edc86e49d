//! From the first call to the verdict, and what comes after it.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::call;
use super::look::{Look, Looks, SilentAgent};
use super::queues::Ticket;
use super::run::{Operation, Pauses, WHY};
use crate::hotplug::{
    Action, Contact, Event, History, Outcome, Return, Step, Verdict, judge, settle,
};
use crate::hypervisor::{Change, DomainBackend, DomainRef, Notice, Notices};

/// So long before the deadline there is a last look, so that the verdict is about what is.
const LAST_LOOK: Duration = Duration::from_millis(250);

/// Events come in bunches: they are written to the journal at most so often.
const BETWEEN_SAVES: Duration = Duration::from_millis(250);

/// A call that failed at once is made again at most so often.
const BETWEEN_TRIES: Duration = Duration::from_secs(1);

/// The pauses between looks after the verdict.
const FOLLOW_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// An operation whose domain is known and looked at.
pub(super) struct Pursuit<C> {
    operation: Operation<C>,
    domain: DomainRef,
    looks: Arc<Looks<C>>,
    notices: Option<Notices>,
    history: History,
    agent: Option<SilentAgent>,
    call: Option<BoxFuture<'static, Return>>,
    look: Option<BoxFuture<'static, Look>>,
    /// Whether something happened since the look began.
    look_again: bool,
    next_look: Instant,
    /// Since when the hypervisor does not know the domain.
    absent_since: Option<Instant>,
    pauses: Pauses,
    /// When the last event or look came that may have decided.
    heard: Instant,
    /// Whether something happened that is not in the journal yet.
    unsaved: bool,
    saved: Instant,
}

impl<C: DomainBackend> Pursuit<C> {
    pub(super) fn new(
        operation: Operation<C>,
        domain: DomainRef,
        looks: Arc<Looks<C>>,
        notices: Notices,
        history: History,
        agent: Option<SilentAgent>,
    ) -> Self {
        let options = &operation.executor.options;
        let pauses = Pauses::new(options.shortest_pause, options.longest_pause);
        let now = Instant::now();
        Self {
            operation,
            domain,
            looks,
            notices: Some(notices),
            history,
            agent,
            call: None,
            look: None,
            look_again: false,
            next_look: now,
            absent_since: None,
            pauses,
            heard: now,
            unsaved: false,
            saved: now,
        }
    }

    /// Goes on until there is a verdict, and puts it right later if the guest follows. The place
    /// is given up when nothing of this operation runs any more.
    pub(super) async fn run(mut self, place: Ticket) {
        self.take_notices();
        let outcome = match self.pursue().await {
            Ok(outcome) => outcome,
            Err(journal) => self.without_journal(&journal),
        };
        let may_change = outcome.verdict.may_change();
        let now = self.operation.clock.now();
        let entry = &mut self.operation.entry;
        entry.record.conclude(outcome, now);
        entry.history = may_change.then(|| self.history.clone());
        self.operation.save_and_tell().await;
        let listener = &self.operation.executor.listener;
        listener.concluded_after(self.heard.elapsed());
        let token = match may_change {
            true => {
                let record = &self.operation.entry.record;
                self.operation.executor.follow(&self.domain, record)
            }
            false => None,
        };
        // libvirt is still at it: the next operation would only run into that.
        if let Some(call) = self.call.take() {
            let how = call.await;
            self.history.returned(self.operation.clock.now(), how);
        }
        drop(place);
        if let Some(token) = token {
            self.watch(token).await;
        }
    }

    /// Watches the domain after the verdict, until that is put right, another operation begins, or
    /// the time for it is over.
    pub(super) async fn watch(mut self, token: CancellationToken) {
        tokio::select! {
            biased;
            () = token.cancelled() => {}
            () = self.follow() => {}
        }
        let record = &self.operation.entry.record;
        self.operation
            .executor
            .followed_to_the_end(&self.domain, record);
    }

    /// The journal could not be written, so a call was not made.
    fn without_journal(&mut self, error: &str) -> Outcome {
        let first = self.history.calls().is_empty();
        let (verdict, what) = match first {
            true => (Verdict::Infeasible, "nothing was changed"),
            false => (Verdict::Pending, "the rest was not asked for"),
        };
        let request = &self.history.request;
        Outcome {
            verdict,
            message: format!(
                "the journal cannot be written, so {what}: {error}; make room in the state directory"
            ),
            before: crate::hotplug::extent(request, &self.history.before),
            requested: request.extent(),
            after: crate::hotplug::extent(request, self.history.latest()),
            evidence: Vec::new(),
            hypervisor_error: None,
            diagnosis: None,
        }
    }

    /// # Errors
    /// The journal's, if a call could not be written to it. It was not made then.
    async fn pursue(&mut self) -> Result<Outcome, String> {
        loop {
            let now = self.operation.clock.now();
            match judge(&self.history, now) {
                Step::Done(outcome) => return Ok(*outcome),
                Step::Call(action) => match self.too_soon(&action) {
                    Some(until) => {
                        self.operation.awaits("libvirt to be free for the domain");
                        self.wait(until).await;
                    }
                    None => self.make(action).await?,
                },
                Step::Wait { awaiting, until } => {
                    self.operation.awaits(&awaiting);
                    if self.unsaved && self.saved.elapsed() >= BETWEEN_SAVES {
                        self.save().await.ok();
                    }
                    let until = self.operation.clock.instant(until);
                    self.wait(until).await;
                }
            }
        }
    }

    /// When that call may be made again, if the last one was the same and failed at once.
    fn too_soon(&self, action: &Action) -> Option<Instant> {
        let last = self.history.calls().last()?;
        let (at, how) = last.returned.as_ref()?;
        let failed = matches!(how, Return::Failed(error) if error.text().is_some());
        let failed = failed && last.action == *action;
        let until = last.started.after(BETWEEN_TRIES);
        (failed && *at < until && self.operation.clock.now() < until)
            .then(|| self.operation.clock.instant(until))
    }

    /// Writes down that a call is about to be made, and begins it.
    async fn make(&mut self, action: Action) -> Result<(), String> {
        let before = self.history.clone();
        self.history
            .called(self.operation.clock.now(), action.clone());
        if let Err(error) = self.save().await {
            self.history = before;
            return Err(error);
        }
        let (control, domain) = (
            Arc::clone(&self.operation.executor.control),
            self.domain.clone(),
        );
        let call = async move { call::make(control.as_ref(), &domain, &action).await };
        self.call = Some(Box::pin(call));
        self.look_soon();
        Ok(())
    }

    async fn save(&mut self) -> Result<(), String> {
        self.operation.entry.history = Some(self.history.clone());
        self.unsaved = false;
        self.saved = Instant::now();
        self.operation.save().await
    }

    /// Waits for something to happen, and notes it.
    async fn wait(&mut self, until: Instant) {
        let until_deadline = self.operation.clock.instant(self.history.terms.deadline);
        let last_look = until_deadline.checked_sub(LAST_LOOK);
        let next_look = match last_look {
            Some(last) if last > Instant::now() => self.next_look.min(last),
            _ => self.next_look,
        };
        tokio::select! {
            biased;
            notice = next(&mut self.notices) => self.noticed(notice),
            how = running(&mut self.call) => {
                self.call = None;
                self.history.returned(self.operation.clock.now(), how);
                self.look_soon();
                // What is not in the journal is found out again after a restart.
                self.save().await.ok();
            }
            look = running(&mut self.look) => {
                self.look = None;
                self.looked(look);
            }
            () = sleep_until(next_look), if self.look.is_none() => self.begin_look(),
            // What time alone decides, it decides about what is then.
            () = sleep_until(until) => self.look_soon(),
        }
        self.take_notices();
    }

    /// Takes what has come already, so that all of it is judged together.
    fn take_notices(&mut self) {
        use futures::FutureExt as _;
        while let Some(notice) = next(&mut self.notices).now_or_never() {
            self.noticed(notice);
        }
    }

    fn noticed(&mut self, notice: Option<Notice>) {
        match notice {
            None => self.notices = None,
            Some(Notice::Gap) => self.look_soon(),
            Some(Notice::Change { domain, at, change }) if domain == self.domain => {
                if let Change::Event(event) = change {
                    let at = self.operation.clock.heard(at);
                    self.happened(at, event);
                }
                self.look_soon();
            }
            Some(Notice::Change { .. }) => {}
        }
    }

    fn happened(&mut self, at: crate::units::Timestamp, event: Event) {
        self.history.happened(at, event);
        self.heard = Instant::now();
        self.unsaved = true;
    }

    fn look_soon(&mut self) {
        self.pauses.restart();
        self.next_look = Instant::now();
        self.look_again = self.look.is_some();
    }

    fn begin_look(&mut self) {
        let (looks, agent) = (Arc::clone(&self.looks), self.agent.clone());
        self.look = Some(Box::pin(async move { looks.look(agent).await }));
        self.look_again = false;
    }

    fn looked(&mut self, look: Look) {
        let Look { seen, agent } = look;
        self.agent = agent;
        self.heard = Instant::now();
        match seen {
            Ok(seen) => self.history.observed(seen),
            Err(Contact::Absent) if self.may_be_told_why() => {}
            Err(contact) => self
                .history
                .out_of_contact(self.operation.clock.now(), contact),
        }
        self.next_look = match self.look_again {
            true => Instant::now(),
            false => Instant::now() + self.pauses.next(),
        };
    }

    /// Whether the domain ended just now: events and answers come by different connections.
    fn may_be_told_why(&mut self) -> bool {
        let since = *self.absent_since.get_or_insert_with(Instant::now);
        let in_time = self.operation.clock.now() < self.history.terms.deadline;
        self.operation.hears() && in_time && since.elapsed() < WHY
    }

    /// Until the guest has followed, or there was time enough for it.
    async fn follow(&mut self) {
        let finished = self.operation.entry.record.finished;
        let finished = finished.unwrap_or(self.operation.clock.now());
        let end = finished.after(self.operation.executor.options.follow);
        let end = self.operation.clock.instant(end);
        self.pauses = Pauses::new(FOLLOW_PAUSES.0, FOLLOW_PAUSES.1);
        self.next_look = Instant::now() + self.pauses.next();
        while Instant::now() < end {
            self.wait(end).await;
            if self.call.is_none()
                && let Some(action) = settle(&self.history)
                && self.too_soon(&action).is_none()
            {
                // What is not in the journal is not called.
                self.make(action).await.ok();
            }
            let now = self.operation.clock.now();
            let Step::Done(outcome) = judge(&self.history, now) else {
                continue;
            };
            match outcome.verdict {
                Verdict::Verified => {
                    let entry = &mut self.operation.entry;
                    // Too old to be kept: nobody would see it.
                    if self
                        .operation
                        .executor
                        .operation(&entry.record.id)
                        .is_none()
                    {
                        return;
                    }
                    entry.record.conclude(*outcome, now);
                    entry.history = None;
                    return self.operation.save_and_tell().await;
                }
                // It ended or was started anew: what comes now is not of this operation.
                Verdict::DomainNotRunning | Verdict::DomainNotFound => return,
                _ => {}
            }
        }
    }
}

/// The next notice; waits for ever when there are none any more.
async fn next(notices: &mut Option<Notices>) -> Option<Notice> {
    match notices {
        Some(notices) => notices.next().await,
        None => pending().await,
    }
}

/// What a future that may be running comes to; waits for ever when there is none.
async fn running<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}
