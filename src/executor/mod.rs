//! Executes hotplug operations on the domains of one hypervisor.
//!
//! ```text
//!  submit ─▶ Registry ─▶ Journal ─▶ Driver ─▶ Listener (metrics, events)
//!               ▲                   │    ▲
//!               └── every change ───┘    │ observations, events, returns of calls
//!                                    DomainBackend
//! ```
//! * The [`Registry`] holds all operations in memory; readers and watchers see only it. The
//!   [`Journal`] holds the same on disk, plus the history that a restart needs.
//! * Each operation has one [`Driver`], a task that owns its journal entry. The state machine is
//!   drawn there, with what blocks and what happens on failure.
//! * [`Queues`] order the drivers: operations on one domain run one at a time in the order of
//!   submission, operations on different domains do not wait for each other.
//! * [`Followers`] are the drivers that watch a domain after a verdict that may change.
//!
//! [`Executor::submit`] returns once the order is in the journal: from then on the operation gets
//! a verdict, whatever ends the process. An order that cannot be written is rejected.
//! [`Executor::stop`] ends every driver at its next await and loses nothing.

mod clock;
mod driver;
mod followers;
mod lives;
mod metrics;
mod observer;
mod options;
mod queues;
mod registry;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info};

pub(crate) use self::clock::Clock;
use self::driver::Driver;
use self::followers::Followers;
use self::lives::VcpuLives;
pub use self::metrics::HotplugMetrics;
pub(crate) use self::observer::observation;
pub use self::observer::observe_once;
pub use self::options::{AvailableMemory, LauncherRights, Listener, Options};
use self::queues::Queues;
use self::registry::{Registered, Registry};
use crate::domain::DomainRef;
use crate::hypervisor::DomainBackend;
use crate::journal::{Entry, Journal, JournalError};
pub use crate::operation::{
    AskedBy, Awaiting, DomainName, OperationId, Order, Record, State, TargetDomain,
};

/// Reason why an order was rejected. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    #[error(
        "the idempotency key belongs to operation {0} with a different request: use another key"
    )]
    KeyReused(OperationId),
    #[error("{0} operations have no verdict yet, which is the maximum: retry later")]
    TooMany(usize),
    #[error("cannot write the journal, so nothing was changed: {0}")]
    Journal(String),
    #[error("the daemon is stopping: retry after it has restarted")]
    Stopping,
}

impl SubmitError {
    /// Every code, so that metrics start at zero.
    pub const CODES: [&'static str; 4] = ["key-reused", "too-many", "journal", "stopping"];

    /// Returns the fixed metrics label of this error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::KeyReused(_) => "key-reused",
            Self::TooMany(_) => "too-many",
            Self::Journal(_) => "journal",
            Self::Stopping => "stopping",
        }
    }
}

/// Executes operations on the domains of one hypervisor.
pub struct Executor<C> {
    backend: Arc<C>,
    journal: Arc<Journal>,
    options: Options,
    listener: Box<dyn Listener>,
    clock: Clock,
    registry: Mutex<Registry>,
    /// Queues by the name or UUID that was asked for, until it is resolved to a domain.
    names: Arc<Queues<DomainName>>,
    /// Queues by domain.
    domains: Arc<Queues<DomainRef>>,
    followers: Mutex<Followers>,
    vcpu_lives: Arc<VcpuLives>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<C: DomainBackend> Executor<C> {
    /// Resumes the unfinished operations of the journal and accepts new ones. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub fn start(
        backend: Arc<C>,
        journal: Journal,
        options: Options,
        listener: impl Listener,
    ) -> Result<Arc<Self>, JournalError> {
        let mut entries = journal.entries()?;
        for entry in &mut entries {
            restore_kept_verdict(&journal, entry);
        }
        let executor = Arc::new(Self {
            backend,
            journal: Arc::new(journal),
            followers: Mutex::new(Followers::new(options.max_followed)),
            options,
            listener: Box::new(listener),
            clock: Clock::start(),
            registry: Mutex::default(),
            names: Arc::default(),
            domains: Arc::default(),
            vcpu_lives: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let sequences: Vec<u64> = {
            let mut registry = executor.registry();
            let restored = entries.iter().map(|entry| registry.restore(entry));
            restored.collect()
        };
        for entry in &entries {
            let domain = entry.record.domain.identity();
            if let Some((domain, life)) = domain.zip(entry.vcpu_life.clone()) {
                executor.vcpu_lives.restore(domain, life);
            }
        }
        let (lives, events) = (Arc::clone(&executor.vcpu_lives), executor.backend.events());
        let stop = executor.stop.clone();
        executor.tasks.spawn(async move {
            stop.run_until_cancelled(lives.follow(events)).await;
        });
        // Followers first: an operation that starts cancels the follower of its domain. The
        // newest come first, because their number is limited.
        let last = last_of_each_domain(&entries);
        for entry in entries.iter().rev() {
            if last.contains(&entry.record.id)
                && let Some(follow) = Driver::resume_following(Arc::clone(&executor), entry.clone())
            {
                executor.tasks.spawn(follow);
            }
        }
        for (entry, sequence) in entries.into_iter().zip(sequences) {
            if !entry.record.is_done() {
                driver::span(&entry.record).in_scope(|| info!("operation resumed"));
                let ticket = executor.names.join(entry.order.domain.clone(), sequence);
                let driver = Driver::new(Arc::clone(&executor), entry);
                executor.tasks.spawn(driver.run(ticket, sequence));
            }
        }
        Ok(executor)
    }

    /// Accepts an order: once this returns, the order is in the journal. Dropping the future does
    /// not cancel the operation.
    ///
    /// # Errors
    /// The order was rejected.
    pub async fn submit(self: &Arc<Self>, order: Order) -> Result<OperationId, SubmitError> {
        if self.stop.is_cancelled() {
            return Err(SubmitError::Stopping);
        }
        let (record, ticket, sequence) = {
            // One lock for both, so that tickets are in the order of sequence numbers.
            let mut registry = self.registry();
            match registry.register(&order, self.clock.now(), self.options.max_open)? {
                Registered::Existing(id) => return Ok(id),
                Registered::New(record, sequence) => {
                    let ticket = self.names.join(order.domain.clone(), sequence);
                    (*record, ticket, sequence)
                }
            }
        };
        driver::span(&record).in_scope(|| {
            info!(request = ?order.request, asked_by = %order.asked_by, "operation submitted");
        });
        let id = record.id.clone();
        let entry = Entry {
            order,
            record,
            history: None,
            vcpu_life: None,
        };
        let (written, is_written) = oneshot::channel();
        let executor = Arc::clone(self);
        self.tasks.spawn(async move {
            let result = executor.write(&entry).await;
            let is_accepted = result.is_ok();
            if is_accepted {
                executor.listener.changed(&entry.record);
            } else {
                executor.registry().remove(&entry.record.id);
            }
            written.send(result).ok();
            if is_accepted {
                Driver::new(executor, entry).run(ticket, sequence).await;
            }
        });
        match is_written.await {
            Ok(Ok(())) => Ok(id),
            Ok(Err(error)) => Err(SubmitError::Journal(error)),
            Err(_) => Err(SubmitError::Stopping),
        }
    }

    /// Returns the present record of an operation.
    pub fn operation(&self, id: &OperationId) -> Option<Record> {
        self.registry().get(id)
    }

    /// Returns all operations, newest first.
    pub fn operations(&self) -> Vec<Record> {
        self.registry().newest_first()
    }

    /// Returns the operation with this requester and idempotency key.
    pub fn find_by_key(&self, asked_by: &AskedBy, key: &str) -> Option<OperationId> {
        self.registry().find_by_key(asked_by, key)
    }

    /// Watches the record of an operation. The channel closes when the journal's limit removes
    /// the operation.
    pub fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        self.registry().watch(id)
    }

    /// Stops every driver, waits for them, and releases the journal. The next start resumes
    /// unfinished operations.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.journal.release();
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        let registry = self.registry.lock();
        registry.unwrap_or_else(PoisonError::into_inner)
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        let followers = self.followers.lock();
        followers.unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an entry to the journal and removes the oldest finished entries above its limit.
    async fn write(&self, entry: &Entry) -> Result<(), String> {
        let (journal, entry) = (Arc::clone(&self.journal), entry.clone());
        let finished = self.registry().finished();
        let work = move || {
            if let Err(error) = journal.write(&entry) {
                journal.keep_verdict(&entry.record);
                return Err(error.to_string());
            }
            let surplus = journal.surplus(finished);
            for id in &surplus {
                if let Err(error) = journal.remove(id) {
                    error!(%error, "cannot remove an old operation from the journal");
                }
            }
            Ok(surplus)
        };
        let written = match tokio::task::spawn_blocking(work).await {
            Ok(written) => written,
            Err(error) => Err(error.to_string()),
        };
        match written {
            Ok(surplus) => {
                let mut registry = self.registry();
                for id in surplus {
                    registry.remove(&id);
                }
                Ok(())
            }
            Err(error) => {
                error!(error, "cannot write the journal");
                self.listener.journal_failed();
                Err(error)
            }
        }
    }
}

/// Ends an operation whose verdict could not be written, if it changed nothing. One with a history is
/// judged again.
fn restore_kept_verdict(journal: &Journal, entry: &mut Entry) {
    let record = &mut entry.record;
    if record.is_done() || entry.history.is_some() {
        return;
    }
    let Some(kept) = journal.kept_verdict(&record.id) else {
        return;
    };
    let message = "the journal could not be written at the time of the verdict, so its reason is \
                   lost; nothing was changed";
    record.end(kept.verdict, message, kept.at);
    if let Err(error) = journal.write(entry) {
        error!(%error, "cannot write the journal");
    }
}

/// Returns the operation of each domain that started last. Only that one can be followed.
fn last_of_each_domain(entries: &[Entry]) -> HashSet<OperationId> {
    let mut last = HashMap::new();
    for record in entries.iter().map(|entry| &entry.record) {
        let (Some(domain), Some(started)) = (record.domain.identity(), record.started) else {
            continue;
        };
        let newest = last.entry(domain).or_insert((started, &record.id));
        *newest = (*newest).max((started, &record.id));
    }
    last.into_values().map(|(_, id)| id.clone()).collect()
}
