//! From the queue to the first call.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::field::display;
use tracing::{Instrument as _, Span, info};

use super::{Attached, Driver, STOP_EVENT_TIMEOUT, Unstarted, span};
use crate::domain::{CallError, DomainRef};
use crate::executor::Executor;
use crate::executor::observer::Observer;
use crate::executor::queues::Ticket;
use crate::hotplug::{
    Contact, Event, History, Host, Observation, Preflight, Rejection, Scope, Step, Terms, Verdict,
    check_launcher, judge, preflight,
};
use crate::hypervisor::{Change, ConnectionState, DomainBackend, Notice, Notices};
use crate::journal::Entry;
use crate::operation::{DomainName, State};

/// Minimum time between a restart and the verdict of an interrupted operation. Its deadline may
/// have passed meanwhile, but the verdict needs an observation; libvirtd may be restarting too.
const RESTART_GRACE: Duration = Duration::from_secs(15);

/// Time for libvirt to give the reason of a pause. A job pauses the domain a moment before it reports
/// the reason, and ends a moment before it resumes the domain.
const UNEXPLAINED_PAUSE: Duration = Duration::from_secs(3);

/// Reason why an operation ends without a call.
enum Refusal {
    Rejected(Rejection),
    DomainEnded,
    Unreachable(String),
}

impl<C: DomainBackend> Driver<C, Unstarted> {
    /// Drives an operation until it is done or the process stops.
    pub(in crate::executor) async fn run(self, name_ticket: Ticket<DomainName>, sequence: u64) {
        let stop = self.executor.stop.clone();
        let span = span(&self.entry.record);
        let drive = async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = self.drive(name_ticket, sequence) => {}
            }
        };
        drive.instrument(span).await;
    }

    /// Resumes following an operation that an earlier process followed. Returns `None` if its
    /// verdict can no longer change. Call this before any operation starts: a starting operation
    /// cancels the follower of its domain.
    pub(in crate::executor) fn resume_following(
        executor: Arc<Executor<C>>,
        entry: Entry,
    ) -> Option<impl Future<Output = ()> + Send> {
        let mut driver = Self::new(executor, entry);
        let record = &driver.entry.record;
        let (finished, domain) = (record.finished?, record.domain.identity()?);
        let until = finished.after(driver.executor.options.follow);
        if !record.verdict?.may_change() || driver.clock.now() >= until {
            return None;
        }
        let span = span(record);
        let mut history = driver.entry.history.take()?;
        let token = driver
            .executor
            .followers()
            .add(&domain, &driver.entry.record.id)?;
        span.in_scope(|| info!("following resumed"));
        history.lost(driver.clock.now());
        let notices = driver.executor.backend.events();
        let observer = driver.observer(&domain);
        let stop = driver.executor.stop.clone();
        let driver = driver.attach(domain, observer, notices, history);
        let follow = async move { stop.run_until_cancelled(driver.follow(token)).await };
        Some(follow.map(drop).instrument(span))
    }

    async fn drive(mut self, name_ticket: Ticket<DomainName>, sequence: u64) {
        let deadline = self.deadline();
        if self.entry.history.is_none() && Instant::now() >= deadline {
            let message = "the deadline passed while virtnode was not running: nothing was changed";
            return self.end(self.stage.if_overdue, message.to_owned()).await;
        }
        let found = match timeout_at(deadline, self.find(name_ticket, sequence)).await {
            Ok(found) => found,
            Err(_) => return self.end_overdue().await,
        };
        let (domain, ticket) = match found {
            Ok(found) => found,
            Err(CallError::NotFound(_)) => return self.end_absent().await,
            Err(CallError::Ambiguous(which)) => return self.end(Verdict::Infeasible, which).await,
            Err(error) => return self.end_unreachable(&error.to_string()).await,
        };
        if !ticket.is_served() {
            self.awaits("another operation on this domain to end");
            self.stage.if_overdue = Verdict::Busy;
            if timeout_at(deadline, ticket.turn()).await.is_err() {
                return self.end_overdue().await;
            }
        }
        if let Some(attached) = self.start(domain, deadline).await {
            attached.pursue(ticket).await;
        }
    }

    /// Returns the deadline for the verdict.
    fn deadline(&self) -> Instant {
        let deadline = self.clock.instant(self.entry.record.deadline);
        match self.entry.history {
            Some(_) => deadline.max(Instant::now() + RESTART_GRACE),
            None => deadline,
        }
    }

    /// Returns the time at which an unavailable hypervisor ends the operation. Once a call was
    /// made, that is the deadline.
    fn give_up_at(&self) -> Instant {
        match self.entry.history {
            Some(_) => self.deadline(),
            None => Instant::now() + self.executor.options.unavailable_timeout,
        }
    }

    /// Waits until `give_up_at` and then for the connection to be down.
    async fn unavailable_since(&self, give_up_at: Instant) {
        sleep_until(give_up_at).await;
        let mut health = self.health();
        let down = health.wait_for(|state| *state == ConnectionState::Down);
        if down.await.is_err() {
            // The backend ended, and its calls end with it.
            std::future::pending::<()>().await;
        }
    }

    /// Finds the domain and joins its queue.
    async fn find(
        &mut self,
        name_ticket: Ticket<DomainName>,
        sequence: u64,
    ) -> Result<(DomainRef, Ticket<DomainRef>), CallError> {
        name_ticket.turn().await;
        let backend = Arc::clone(&self.executor.backend);
        let target = &self.entry.record.domain;
        let (known, text) = (target.identity(), target.name.clone());
        let find = async || match &known {
            Some(known) => backend.find_again(known).await,
            None => backend.find(&text).await,
        };
        let mut backoff = self.backoff();
        let give_up_at = self.give_up_at();
        let mut last_error = None;
        loop {
            let found = tokio::select! {
                biased;
                found = find() => found,
                // A connected libvirt that is slow has until the operation's deadline.
                () = self.unavailable_since(give_up_at) => {
                    // An earlier error says more than a timeout that was cut short.
                    Err(last_error.take().unwrap_or(CallError::Overdue {
                        call: "find-domain".into(),
                        after: self.executor.options.unavailable_timeout,
                    }))
                }
            };
            let error = match found {
                Ok(domain) => {
                    let target = &self.entry.record.domain;
                    if target.name != domain.name {
                        Span::current().record("domain", &*domain.name);
                    }
                    if target.connection != domain.connection {
                        Span::current().record("connection", display(&domain.connection));
                    }
                    self.entry.record.domain = (&domain).into();
                    let ticket = self.executor.domains.join(domain.clone(), sequence);
                    self.publish();
                    return Ok((domain, ticket));
                }
                Err(error) => error,
            };
            let gives_up = !self.has_events() && Instant::now() >= give_up_at;
            let is_final = matches!(error, CallError::NotFound(_) | CallError::Ambiguous(_));
            if is_final || gives_up {
                return Err(error);
            }
            self.awaits(&format!("the hypervisor: {error}"));
            last_error = Some(error);
            sleep(backoff.next()).await;
        }
    }

    /// Starts the operation: plans it, or restores its history after a restart. Returns `None` if
    /// the operation ended.
    async fn start(
        mut self,
        domain: DomainRef,
        deadline: Instant,
    ) -> Option<Driver<C, Attached<C>>> {
        self.executor.followers().cancel(&domain);
        // Subscribed before the first observation: no event between it and the call is missed.
        let mut notices = self.executor.backend.events();
        self.stage.if_overdue = Verdict::HypervisorUnavailable;
        let record = &mut self.entry.record;
        record.state = State::Running;
        record.started.get_or_insert(self.clock.now());
        record.awaits("an observation of the domain", self.clock.now());
        self.publish();
        self.executor.listener.changed(&self.entry.record);
        let observer = self.observer(&domain);
        let history = match self.entry.history.take() {
            Some(history) => self.restore(history, &observer, deadline).await,
            None => match timeout_at(deadline, self.preflight(&domain, &observer)).await {
                Ok(Ok(history)) => history,
                Ok(Err(refusal)) => {
                    self.end_refused(refusal, &domain, &mut notices).await;
                    return None;
                }
                Err(_) => {
                    self.end_overdue().await;
                    return None;
                }
            },
        };
        Some(self.attach(domain, observer, notices, *history))
    }

    /// Observes the domain until the request can be planned or rejected.
    async fn preflight(
        &mut self,
        domain: &DomainRef,
        observer: &Observer<C>,
    ) -> Result<Box<History>, Refusal> {
        let mut backoff = self.backoff();
        let give_up_at = self.give_up_at();
        let mut unexplained: Option<Instant> = None;
        loop {
            let awaited = match observer.observe().await {
                Ok(observation) => {
                    let request = &self.entry.order.request;
                    let scope = Scope::of(self.entry.order.persistent);
                    let result = match self.check_launcher(domain, &observation) {
                        Some(rejection) => Preflight::Rejected(rejection),
                        None => preflight(request, scope, &observation, &self.host()),
                    };
                    match result {
                        Preflight::Ready(plan) => {
                            let terms = Terms {
                                require: self.entry.order.require,
                                deadline: self.entry.record.deadline,
                                patience: self.executor.options.patience,
                            };
                            // QEMU's memory of the guest's answers stands in for its events.
                            let has_events = self.has_events() || observation.answers.is_some();
                            let request = request.clone();
                            let mut history =
                                History::new(request, terms, plan, observation, has_events);
                            let record = &self.entry.record;
                            history.earlier = self.executor.registry().earlier(record);
                            return Ok(Box::new(history));
                        }
                        Preflight::Unexplained(_)
                            if unexplained.get_or_insert_with(Instant::now).elapsed()
                                < UNEXPLAINED_PAUSE =>
                        {
                            "the reason for the pause of the domain".to_owned()
                        }
                        Preflight::Unexplained(rejection) | Preflight::Rejected(rejection) => {
                            let amount = request.amount_of(&observation);
                            self.entry.record.before = Some(amount);
                            self.entry.record.after = Some(amount);
                            return Err(Refusal::Rejected(rejection));
                        }
                        Preflight::Blocked(awaited) => {
                            self.stage.if_overdue = Verdict::Busy;
                            awaited
                        }
                    }
                }
                Err(Contact::Absent) => return Err(Refusal::DomainEnded),
                Err(Contact::Held) => {
                    self.stage.if_overdue = Verdict::Busy;
                    "another job on the domain to end".to_owned()
                }
                Err(Contact::Unreachable(why)) => {
                    if !self.has_events() && Instant::now() >= give_up_at {
                        return Err(Refusal::Unreachable(why));
                    }
                    self.stage.if_overdue = Verdict::HypervisorUnavailable;
                    format!("the hypervisor: {why}")
                }
            };
            self.awaits(&awaited);
            sleep(backoff.next()).await;
        }
    }

    /// Restores the history of an interrupted operation. Its running call never returns to this
    /// process, so the domain is observed until the effect of that call is known.
    async fn restore(
        &self,
        mut history: History,
        observer: &Observer<C>,
        deadline: Instant,
    ) -> Box<History> {
        history.lost(self.clock.now());
        let mut backoff = self.backoff();
        let until_settled = async {
            loop {
                match observer.observe().await {
                    Ok(observation) => {
                        history.observed(observation);
                        if !history.is_unsettled() {
                            return;
                        }
                    }
                    Err(contact) => {
                        let is_absent = contact == Contact::Absent;
                        history.out_of_contact(self.clock.now(), contact);
                        if is_absent {
                            return;
                        }
                    }
                }
                sleep(backoff.next()).await;
            }
        };
        timeout_at(deadline, until_settled).await.ok();
        Box::new(history)
    }

    /// Returns the reason against the request if the domain is in a launcher.
    fn check_launcher(&self, domain: &DomainRef, seen: &Observation) -> Option<Rejection> {
        if !domain.connection.is_launcher() {
            return None;
        }
        let right = (self.executor.options.launcher_rights)(domain);
        let order = &self.entry.order;
        let claimed = domain.namespace_and_name();
        check_launcher(&order.request, order.persistent, &right, claimed, seen)
    }

    fn host(&self) -> Host {
        let available = if self.entry.order.request.wanted().host_memory {
            (self.executor.options.available_memory)()
        } else {
            None
        };
        let domain = self.entry.record.domain.identity();
        let released = domain.map(|domain| self.executor.vcpu_lives.released(&domain));
        Host {
            available,
            released_vcpus: released.unwrap_or(0),
        }
    }

    async fn end_refused(&mut self, refusal: Refusal, domain: &DomainRef, notices: &mut Notices) {
        match refusal {
            Refusal::Rejected(rejection) => {
                self.end(rejection.verdict(), rejection.to_string()).await;
            }
            Refusal::Unreachable(why) => self.end_unreachable(&why).await,
            Refusal::DomainEnded => {
                let patience = if self.has_events() {
                    STOP_EVENT_TIMEOUT
                } else {
                    Duration::ZERO
                };
                let reason = timeout(patience, stop_reason(domain, notices)).await;
                let reason = reason.ok().flatten().map(|why| format!(": {why}"));
                let message = format!(
                    "the domain ended before the first call{}",
                    reason.unwrap_or_default()
                );
                self.end(Verdict::DomainNotRunning, message).await;
            }
        }
    }

    async fn end_unreachable(&mut self, why: &str) {
        let message = format!(
            "cannot reach the hypervisor: {why}; nothing was changed: check that libvirtd or \
             virtqemud is running and responds, then retry"
        );
        self.end(Verdict::HypervisorUnavailable, message).await;
    }

    async fn end_absent(&mut self) {
        let Some(mut history) = self.entry.history.take() else {
            let message = format!("domain {} does not exist", self.entry.order.domain);
            return self.end(Verdict::DomainNotFound, message).await;
        };
        let now = self.clock.now();
        history.out_of_contact(now, Contact::Absent);
        let record = &mut self.entry.record;
        match judge(&history, now) {
            Step::Done(outcome) => record.conclude(*outcome, now),
            _ => record.end(Verdict::DomainNotRunning, "the domain ended", now),
        }
        self.report_verdict().await;
    }

    async fn end_overdue(&mut self) {
        let awaiting = self.entry.record.awaiting.as_ref();
        let awaited = awaiting.map_or("the hypervisor", |awaiting| &awaiting.what);
        let message =
            format!("the deadline passed while waiting for {awaited}: nothing was changed");
        self.end(self.stage.if_overdue, message).await;
    }

    /// Ends the operation with a verdict that needs no history.
    async fn end(&mut self, verdict: Verdict, message: String) {
        self.entry.record.end(verdict, message, self.clock.now());
        self.entry.history = None;
        self.report_verdict().await;
    }
}

/// Waits for the event that explains why a domain ended.
async fn stop_reason(domain: &DomainRef, notices: &mut Notices) -> Option<String> {
    while let Some(notice) = notices.next().await {
        if let Notice::Change {
            domain: changed,
            change: Change::Event(Event::Stopped(why)),
            ..
        } = notice
            && changed == *domain
        {
            return Some(why);
        }
    }
    None
}
