//! From the first call to the verdict, and following the guest after it.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Attached, Driver, STOP_EVENT_TIMEOUT};
use crate::domain::{CallError, DomainRef};
use crate::executor::observer::Backoff;
use crate::executor::queues::Ticket;
use crate::hotplug::{
    Action, Contact, Event, Evidence, Observation, Outcome, Return, Source, Step, Verdict, judge,
    put_back, settle,
};
use crate::hypervisor::{Change, DomainBackend, Notice, Notices};
use crate::units::Timestamp;

/// Time between the last observation before the deadline and the deadline, so that the verdict
/// rests on the present state of the domain.
const LAST_OBSERVATION: Duration = Duration::from_millis(250);

/// Time to put back what was changed only to obtain evidence: the verdict waits for it.
const PUT_BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum interval between journal writes for events alone: events arrive in bursts.
const SAVE_INTERVAL: Duration = Duration::from_millis(250);

/// Minimum interval between equal calls when the first one failed at once.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Minimum and maximum pause between observations while following.
const FOLLOW_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

impl<C: DomainBackend> Driver<C, Attached<C>> {
    /// Drives the operation to its verdict, then follows the guest if the verdict may change.
    /// Holds the domain's ticket until no call is running.
    pub(super) async fn pursue(mut self, ticket: Ticket<DomainRef>) {
        self.take_notices();
        let mut outcome = match self.reach_verdict().await {
            Ok(outcome) => outcome,
            Err(journal) => self.outcome_without_journal(&journal),
        };
        // The journal has the history until the verdict, so a restart puts it back as well.
        if self.stage.call.is_none() {
            outcome.evidence.extend(self.put_back().await);
        }
        let may_change = outcome.verdict.may_change();
        self.entry.record.conclude(outcome, self.clock.now());
        self.entry.history = may_change.then(|| self.stage.history.clone());
        self.report_verdict().await;
        let elapsed = self.stage.last_evidence.elapsed();
        self.executor.listener.concluded_after(elapsed);
        let token = if may_change {
            let id = &self.entry.record.id;
            self.executor.followers().add(&self.stage.domain, id)
        } else {
            None
        };
        // libvirt still holds the domain's lock, so the next operation would fail as busy.
        if let Some(call) = self.stage.call.take() {
            let how = call.await;
            self.stage.history.returned(self.clock.now(), how);
            self.put_back().await;
        }
        drop(ticket);
        if let Some(token) = token {
            self.follow(token).await;
        }
    }

    /// Puts back what was changed only to obtain evidence, and returns a line about it.
    async fn put_back(&mut self) -> Option<Evidence> {
        let action = put_back(&self.stage.history)?;
        let what = action.describe()?;
        self.stage.history.called(self.clock.now(), action.clone());
        let call = self.executor.backend.apply(&self.stage.domain, &action);
        let how = match timeout(PUT_BACK_TIMEOUT, call).await {
            Ok(Ok(())) => Return::Done,
            Ok(Err(error)) => Return::Failed(error),
            Err(_) => Return::Failed(CallError::Overdue {
                call: "set-stats-period".into(),
                after: PUT_BACK_TIMEOUT,
            }),
        };
        let result = match &how {
            Return::Done => "accepted".to_owned(),
            Return::Failed(error) => {
                warn!(%error, "cannot put the statistics period of a domain back");
                format!("failed: {error}")
            }
        };
        let time = self.clock.now();
        self.stage.history.returned(time, how);
        Some(Evidence {
            source: Source::HypervisorCall,
            detail: format!("{what}: {result}"),
            time,
        })
    }

    /// Follows the guest until the verdict is corrected, the next operation on the domain cancels
    /// the token, or the time for following is over.
    pub(super) async fn follow(mut self, token: CancellationToken) {
        tokio::select! {
            biased;
            () = token.cancelled() => {}
            () = self.await_correction() => {}
        }
        let id = &self.entry.record.id;
        self.executor.followers().remove(&self.stage.domain, id);
    }

    /// Calls and observes until there is a verdict.
    ///
    /// # Errors
    /// A call could not be written to the journal. It was not made.
    async fn reach_verdict(&mut self) -> Result<Outcome, String> {
        loop {
            match judge(&self.stage.history, self.clock.now()) {
                Step::Done(outcome) => return Ok(*outcome),
                Step::Call(action) => match self.retry_at(&action) {
                    Some(until) => {
                        self.awaits("libvirt to release the domain");
                        self.wait(until).await;
                    }
                    None => self.call(action).await?,
                },
                Step::Wait { awaiting, until } => {
                    self.awaits(&awaiting);
                    if self.stage.unsaved && self.stage.saved.elapsed() >= SAVE_INTERVAL {
                        self.save_history().await.ok();
                    }
                    self.wait(self.clock.instant(until)).await;
                }
            }
        }
    }

    fn outcome_without_journal(&self, error: &str) -> Outcome {
        let history = &self.stage.history;
        let (verdict, consequence) = if history.calls().is_empty() {
            (Verdict::Infeasible, "nothing was changed")
        } else {
            (Verdict::Pending, "the remaining calls were not made")
        };
        Outcome {
            verdict,
            message: format!(
                "cannot write the journal, so {consequence}: {error}; free space in the state \
                 directory"
            ),
            before: history.request.amount_of(&history.before),
            requested: history.request.amount(),
            after: history.request.amount_of(history.latest()),
            evidence: Vec::new(),
            hypervisor_error: None,
            diagnosis: None,
        }
    }

    /// Returns the time before which a call must not be repeated, if the previous one was equal
    /// and failed at once.
    fn retry_at(&self, action: &Action) -> Option<Instant> {
        let last = self.stage.history.calls().last()?;
        let (returned_at, how) = last.returned.as_ref()?;
        let failed = matches!(how, Return::Failed(error) if error.text().is_some());
        let failed = failed && last.action == *action;
        let until = last.started.after(RETRY_INTERVAL);
        (failed && *returned_at < until && self.clock.now() < until)
            .then(|| self.clock.instant(until))
    }

    /// Writes a call to the journal, then starts it.
    async fn call(&mut self, action: Action) -> Result<(), String> {
        let before = self.stage.history.clone();
        let now = self.clock.now();
        self.stage.history.called(now, action.clone());
        if let Err(error) = self.save_history().await {
            self.stage.history = before;
            return Err(error);
        }
        let backend = Arc::clone(&self.executor.backend);
        let domain = self.stage.domain.clone();
        let call = async move {
            match backend.apply(&domain, &action).await {
                Ok(()) => Return::Done,
                Err(error) => Return::Failed(error),
            }
        };
        self.stage.call = Some(call.boxed());
        self.observe_soon();
        Ok(())
    }

    async fn save_history(&mut self) -> Result<(), String> {
        self.entry.history = Some(self.stage.history.clone());
        self.stage.unsaved = false;
        self.stage.saved = Instant::now();
        self.save().await
    }

    /// Waits for one thing to happen and adds it to the history.
    async fn wait(&mut self, until: Instant) {
        let deadline = self.clock.instant(self.stage.history.terms.deadline);
        let last_observation = deadline.checked_sub(LAST_OBSERVATION);
        let next_observation = match last_observation {
            Some(last) if last > Instant::now() => self.stage.next_observation.min(last),
            _ => self.stage.next_observation,
        };
        let is_observing = self.stage.observation.is_some();
        tokio::select! {
            biased;
            notice = next_notice(&mut self.stage.notices) => self.noticed(notice),
            how = join(&mut self.stage.call) => {
                self.stage.call = None;
                self.stage.history.returned(self.clock.now(), how);
                self.observe_soon();
                // Without the journal, a restart finds the effect of the call by observing.
                self.save_history().await.ok();
            }
            observation = join(&mut self.stage.observation) => {
                self.stage.observation = None;
                self.observed(observation);
            }
            () = sleep_until(next_observation), if !is_observing => self.observe(),
            // A verdict for lack of time rests on an observation after that time.
            () = sleep_until(until) => self.observe_soon(),
        }
        self.take_notices();
    }

    /// Takes every notice that has arrived, so that they are judged together.
    fn take_notices(&mut self) {
        while let Some(notice) = next_notice(&mut self.stage.notices).now_or_never() {
            self.noticed(notice);
        }
    }

    fn noticed(&mut self, notice: Option<Notice>) {
        match notice {
            None => self.stage.notices = None,
            Some(gap @ Notice::Gap { .. }) => {
                if gap.is_gap_of(&self.stage.domain.connection) {
                    self.observe_soon();
                }
            }
            Some(Notice::Change { domain, at, change }) if domain == self.stage.domain => {
                if let Change::Event(event) = change {
                    self.happened(self.clock.received(at), event);
                }
                self.observe_soon();
            }
            Some(Notice::Change { .. }) => {}
        }
    }

    fn happened(&mut self, at: Timestamp, event: Event) {
        self.stage.history.happened(at, event);
        self.stage.last_evidence = Instant::now();
        self.stage.unsaved = true;
    }

    fn observe_soon(&mut self) {
        self.stage.backoff.restart();
        self.stage.next_observation = Instant::now();
        self.stage.observe_again = self.stage.observation.is_some();
    }

    fn observe(&mut self) {
        let observer = Arc::clone(&self.stage.observer);
        let observation = async move { observer.observe().await };
        self.stage.observation = Some(observation.boxed());
        self.stage.observe_again = false;
    }

    fn observed(&mut self, observation: Result<Observation, Contact>) {
        self.stage.last_evidence = Instant::now();
        match observation {
            Ok(observation) => self.stage.history.observed(observation),
            Err(Contact::Absent) if self.may_receive_stop_event() => {}
            Err(contact) => {
                let now = self.clock.now();
                self.stage.history.out_of_contact(now, contact);
            }
        }
        self.stage.next_observation = Instant::now();
        if !self.stage.observe_again {
            self.stage.next_observation += self.stage.backoff.next();
        }
    }

    /// True while the event that explains why the domain ended may still arrive.
    fn may_receive_stop_event(&mut self) -> bool {
        let since = *self.stage.absent_since.get_or_insert_with(Instant::now);
        let in_time = self.clock.now() < self.stage.history.terms.deadline;
        self.has_events() && in_time && since.elapsed() < STOP_EVENT_TIMEOUT
    }

    async fn await_correction(&mut self) {
        let finished = self.entry.record.finished.unwrap_or(self.clock.now());
        let end = finished.after(self.executor.options.follow);
        let end = self.clock.instant(end);
        self.stage.backoff = Backoff::new(FOLLOW_PAUSES.0, FOLLOW_PAUSES.1);
        self.stage.next_observation = Instant::now() + self.stage.backoff.next();
        while Instant::now() < end {
            self.wait(end).await;
            if self.stage.call.is_none()
                && let Some(action) = settle(&self.stage.history)
                && self.retry_at(&action).is_none()
            {
                // A call that is not in the journal is not made.
                self.call(action).await.ok();
            }
            let now = self.clock.now();
            let Step::Done(outcome) = judge(&self.stage.history, now) else {
                continue;
            };
            match outcome.verdict {
                Verdict::Verified => {
                    // The journal's limit may have removed the operation meanwhile.
                    if self.executor.operation(&self.entry.record.id).is_some() {
                        self.entry.record.conclude(*outcome, now);
                        self.entry.history = None;
                        self.report_verdict().await;
                    }
                    return;
                }
                // The guest that the request was made to no longer runs.
                Verdict::DomainNotRunning | Verdict::DomainNotFound => return,
                _ => {}
            }
        }
    }
}

/// Returns the next notice; waits forever when there are no more.
async fn next_notice(notices: &mut Option<Notices>) -> Option<Notice> {
    match notices {
        Some(notices) => notices.next().await,
        None => pending().await,
    }
}

/// Returns the result of a future; waits forever if there is none.
async fn join<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}
