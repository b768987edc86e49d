//! Drives one operation from its queue to its verdict, and follows the guest afterward.
//!
//! ```text
//!   submitted ──┐      ┌── restarted without a verdict
//!               ▼      ▼
//!             ┌──────────┐
//!             │  queued  │  first-come queue of the name or UUID that was asked for
//!             └────┬─────┘
//!             ┌────▼─────┐  no such domain, or the hypervisor stays unavailable
//!             │ finding  ├──────────────────────────────────────────────┐
//!             └────┬─────┘                                              │
//!          ┌───────▼────────┐                                           │
//!          │waiting for turn│  first-come queue of the domain           │
//!          └───────┬────────┘                                           │
//!            ┌─────▼─────┐  request rejected, domain ended              │
//!            │ preflight ├─────────────────────────────────────────────►│
//!            └─────┬─────┘  (skipped if the journal has a history)      │
//!   ┌──────────────▼──────────────┐                                     │
//!   │    calling / observing      │◄─┐ event, observation, return of a  │
//!   │  hotplug::judge(history)    ├──┘ call, or timer                   │
//!   └──────────────┬──────────────┘                                     │
//!             ┌────▼────┐                                               │
//!             │ verdict │◄──────────────────────────────────────────────┘
//!             └────┬────┘
//!                  │ the verdict may change        ┌── restarted with a verdict that may change
//!            ┌─────▼─────┐                         │
//!            │ following │◄────────────────────────┘
//!            └─────┬─────┘  guest caught up, next operation on the domain, time is up
//!                done
//! ```
//!
//! A [`Driver`] is in stage [`Unstarted`] until the domain may be changed, and in stage
//! [`Attached`] from then on. [`crate::hotplug`] makes every decision about the domain; the driver
//! supplies the history and executes the answer.
//!
//! | state | record | in the journal | if the deadline passes |
//! | --- | --- | --- | --- |
//! | queued, finding | queued | order and record | `HypervisorUnavailable` |
//! | waiting for turn | queued | order and record | `Busy` |
//! | preflight | running | order and record | `Busy` or `HypervisorUnavailable` |
//! | calling, observing | running | and the history, written before each call | as judged |
//! | following | done | and the history | not applicable |
//! | done | done | order and record | not applicable |
//!
//! **Ownership.** A driver owns its entry of the journal and is the only writer of it. It holds a
//! [`Ticket`](super::queues::Ticket) of the domain's queue from finding until no call of its operation is running, so two
//! operations never change a domain at the same time. A follower holds no ticket: the next
//! operation on the domain cancels it.
//!
//! **Blocking.** Nothing blocks the runtime: journal writes run on its blocking threads, backend
//! calls on the backend's. The driver waits for a journal write before a call and before it
//! reports a verdict. It never waits for a call while it could observe the domain.
//!
//! **Failure.** If the journal cannot be written, the call is not made and the operation ends; a
//! verdict is reported all the same. If the hypervisor is unavailable before the first call, the
//! operation ends after [`Options::unavailable_timeout`](super::Options); after the first call the
//! driver keeps observing until the deadline. If the process stops, the driver's future is dropped
//! at any await, and the next start resumes from the journal.

mod pursue;
mod start;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{Span, info, info_span};

use super::Executor;
use super::clock::Clock;
use super::observer::{Backoff, Observer};
use crate::hotplug::{Contact, History, Observation, Return, Verdict};
use crate::hypervisor::{ConnectionState, DomainBackend, DomainRef, Notices};
use crate::journal::Entry;
use crate::operation::Record;
use crate::units::Timestamp;

/// Time for the event that explains why a domain ended, counted from the first answer that does
/// not list the domain. The event and the answer arrive on different connections.
const STOP_EVENT_TIMEOUT: Duration = Duration::from_secs(5);

/// An operation in progress.
pub(super) struct Driver<C, S> {
    executor: Arc<Executor<C>>,
    entry: Entry,
    clock: Clock,
    stage: S,
}

/// Stage of an operation that has not changed anything in this process.
pub(super) struct Unstarted {
    /// Verdict if the deadline passes in this stage.
    if_overdue: Verdict,
}

/// Stage of an operation that may change its domain, or that follows it.
pub(super) struct Attached<C> {
    domain: DomainRef,
    observer: Arc<Observer<C>>,
    /// `None` once the backend has closed its channel.
    notices: Option<Notices>,
    history: History,
    call: Option<BoxFuture<'static, Return>>,
    observation: Option<BoxFuture<'static, Result<Observation, Contact>>>,
    /// Something happened since the running observation began, so the next one follows at once.
    observe_again: bool,
    next_observation: Instant,
    /// First observation for which the hypervisor did not list the domain.
    absent_since: Option<Instant>,
    backoff: Backoff,
    /// Arrival of the last event or observation.
    last_evidence: Instant,
    /// The history has events that are not in the journal.
    unsaved: bool,
    saved: Instant,
}

impl<C: DomainBackend> Driver<C, Unstarted> {
    pub(super) fn new(executor: Arc<Executor<C>>, entry: Entry) -> Self {
        // The clock must not run behind a timestamp in the journal.
        let clock = executor.clock.not_before(latest_timestamp(&entry));
        Self {
            executor,
            entry,
            clock,
            stage: Unstarted {
                if_overdue: Verdict::HypervisorUnavailable,
            },
        }
    }

    fn attach(
        self,
        domain: DomainRef,
        observer: Arc<Observer<C>>,
        notices: Notices,
        history: History,
    ) -> Driver<C, Attached<C>> {
        let now = Instant::now();
        let stage = Attached {
            domain,
            observer,
            notices: Some(notices),
            history,
            call: None,
            observation: None,
            observe_again: false,
            next_observation: now,
            absent_since: None,
            backoff: self.backoff(),
            last_evidence: now,
            unsaved: false,
            saved: now,
        };
        Driver {
            executor: self.executor,
            entry: self.entry,
            clock: self.clock,
            stage,
        }
    }
}

impl<C: DomainBackend, S> Driver<C, S> {
    fn observer(&self, domain: &DomainRef) -> Arc<Observer<C>> {
        let asks_agent = self.entry.order.request.wanted().guest_cpus;
        Arc::new(Observer::new(
            Arc::clone(&self.executor.backend),
            domain.clone(),
            self.clock,
            &self.executor.options,
            Arc::clone(&self.executor.vcpu_lives),
            asks_agent,
        ))
    }

    fn backoff(&self) -> Backoff {
        let options = &self.executor.options;
        Backoff::new(options.min_pause, options.max_pause)
    }

    /// Returns the state of the domain's connection; until the domain is found, of all.
    fn health(&self) -> watch::Receiver<ConnectionState> {
        let backend = &self.executor.backend;
        match self.entry.record.domain.identity() {
            Some(domain) => backend.health_of(&domain.connection),
            None => backend.health(),
        }
    }

    fn has_events(&self) -> bool {
        *self.health().borrow() != ConnectionState::Down
    }

    /// Records and publishes what the operation waits for.
    fn awaits(&mut self, what: &str) {
        if self.entry.record.awaits(what, self.clock.now()) {
            self.publish();
        }
    }

    /// Makes the record visible to readers and watchers.
    fn publish(&self) {
        self.executor.registry().set(&self.entry.record);
    }

    /// Writes the entry to the journal.
    async fn save(&mut self) -> Result<(), String> {
        let domain = self.entry.record.domain.identity();
        self.entry.vcpu_life = domain.and_then(|domain| self.executor.vcpu_lives.get(&domain));
        self.executor.write(&self.entry).await
    }

    /// Writes a verdict to the journal, then publishes, reports and logs it.
    async fn report_verdict(&mut self) {
        let record = &mut self.entry.record;
        // An earlier process had the verdict, but could not write it.
        if let Some(first) = self.executor.journal.kept_verdict(&record.id) {
            record.finished = record.finished.map(|finished| finished.min(first.at));
        }
        // The executor logged the failure; the verdict is true without the journal.
        self.save().await.ok();
        self.publish();
        let record = &self.entry.record;
        self.executor.listener.changed(record);
        info!(
            verdict = record.verdict.map(Verdict::as_str),
            because = record.message,
            "operation finished"
        );
    }
}

/// Returns the span for every log line about an operation.
pub(super) fn span(record: &Record) -> Span {
    info_span!(
        "hotplug",
        operation = %record.id,
        domain = record.domain.name,
        connection = %record.domain.connection
    )
}

fn latest_timestamp(entry: &Entry) -> Timestamp {
    let history = entry.history.as_ref();
    let observed = history.map(|history| history.latest().ended());
    let called = history.and_then(|history| {
        let call = history.calls().last()?;
        Some(call.returned.as_ref().map_or(call.started, |(at, _)| *at))
    });
    let record = &entry.record;
    let recorded = [record.started, record.finished, record.corrected];
    [observed, called]
        .into_iter()
        .chain(recorded)
        .flatten()
        .fold(record.created, Ord::max)
}
