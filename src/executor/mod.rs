//! Carries operations out: looks at domains, asks the core what to do, does it, and keeps the
//! journal. Everything that decides is in [`crate::hotplug`].
//!
//! * One operation per domain at a time, first come first served; those of different domains
//!   never wait for each other.
//! * Events are subscribed to before the first look, and each call is in the journal before it
//!   is made.
//! * After a restart an unfinished operation is looked at and judged by what the journal holds of
//!   it; a call that was carried out is not made again. One that has its verdict is watched on, if
//!   that may change.

mod call;
mod clock;
mod look;
mod options;
mod pursuit;
mod queues;
mod registry;
mod run;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info};

use self::clock::Clock;
pub use self::options::{AvailableMemory, Listener, Options};
use self::queues::Queues;
use self::registry::{Registry, Taken};
use crate::hypervisor::DomainBackend;
use crate::journal::{Entry, Journal, JournalError};
pub use crate::operation::{
    AskedBy, Awaiting, DomainName, NotADomainName, NotAnOperationId, OperationId, Order, Record,
    State, TargetDomain,
};

/// Why an order was not taken on. Nothing was done.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// The key stands for another order.
    #[error(
        "the idempotency key is that of operation {0}, which asked for something else: use \
         another key"
    )]
    KeyReused(OperationId),
    /// As many are open as may be.
    #[error("{0} operations have no verdict yet, as many as there may be: ask again later")]
    TooMany(usize),
    /// What is not in the journal is not done.
    #[error("the journal cannot be written, so nothing was done: {0}")]
    Journal(String),
    /// This program is about to end.
    #[error("the daemon is stopping: ask again when it is back")]
    Stopping,
}

impl SubmitError {
    /// Every code there is, for metrics that begin at zero.
    pub const CODES: [&'static str; 4] = ["key-reused", "too-many", "journal", "stopping"];

    /// The bounded word for this error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::KeyReused(_) => "key-reused",
            Self::TooMany(_) => "too-many",
            Self::Journal(_) => "journal",
            Self::Stopping => "stopping",
        }
    }
}

/// Carries operations out on the domains of one hypervisor.
pub struct Executor<C> {
    control: Arc<C>,
    journal: Arc<Journal>,
    options: Options,
    listener: Box<dyn Listener>,
    clock: Clock,
    table: Mutex<Registry>,
    /// Who waits for a text to become a domain, and who for the domain.
    names: Arc<Queues>,
    domains: Arc<Queues>,
    /// The operation of each domain that is watched after its verdict.
    followed: Mutex<HashMap<String, (OperationId, CancellationToken)>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<C: DomainBackend> Executor<C> {
    /// Takes up what the journal holds unfinished, and is ready for more. To be called within a
    /// tokio runtime.
    ///
    /// # Errors
    /// A journal that cannot be read at all.
    pub fn start(
        control: Arc<C>,
        journal: Journal,
        options: Options,
        listener: impl Listener,
    ) -> Result<Arc<Self>, JournalError> {
        let entries = journal.entries()?;
        let executor = Arc::new(Self {
            control,
            journal: Arc::new(journal),
            options,
            listener: Box::new(listener),
            clock: Clock::start(),
            table: Mutex::default(),
            names: Arc::default(),
            domains: Arc::default(),
            followed: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let tickets: Vec<u64> = {
            let mut table = executor.table();
            entries.iter().map(|entry| table.restore(entry)).collect()
        };
        // What is watched first: an operation that begins ends the watching of its domain.
        let watched = run::last_of_each_domain(&entries);
        for entry in entries
            .iter()
            .rev()
            .filter(|entry| watched.contains(&entry.record.id))
        {
            executor.watch_on(entry.clone());
        }
        for (entry, ticket) in entries.into_iter().zip(tickets) {
            executor.resume(entry, ticket);
        }
        Ok(executor)
    }

    /// Takes an order on: when this returns, it is in the journal. Giving up waiting for it does
    /// not take the order back.
    ///
    /// # Errors
    /// The order was not taken on.
    pub async fn submit(self: &Arc<Self>, order: Order) -> Result<OperationId, SubmitError> {
        if self.stop.is_cancelled() {
            return Err(SubmitError::Stopping);
        }
        let (record, place, ticket) = {
            // One lock for both, so that places are in the order of tickets.
            let mut table = self.table();
            match table.take(&order, self.clock.now(), self.options.most_open)? {
                Taken::Known(id) => return Ok(id),
                Taken::New(record, ticket) => {
                    let place = self.names.join(order.domain.as_str(), ticket);
                    (record, place, ticket)
                }
            }
        };
        info!(
            operation = %record.id, domain = order.domain.as_str(), request = ?order.request,
            asked_by = %order.asked_by, "an operation was asked for"
        );
        let id = record.id.clone();
        let entry = Entry {
            order,
            record: *record,
            history: None,
        };
        let (written, is_written) = oneshot::channel();
        let executor = Arc::clone(self);
        self.tasks.spawn(async move {
            let result = executor.write(&entry).await;
            let failed = result.is_err();
            if failed {
                executor.table().remove(&entry.record.id);
            } else {
                executor.listener.changed(&entry.record);
            }
            drop(written.send(result));
            if !failed {
                executor.run(entry, place, ticket).await;
            }
        });
        match is_written.await {
            Ok(Ok(())) => Ok(id),
            Ok(Err(error)) => Err(SubmitError::Journal(error)),
            Err(_) => Err(SubmitError::Stopping),
        }
    }

    /// An operation as it is now.
    pub fn operation(&self, id: &OperationId) -> Option<Record> {
        self.table().get(id)
    }

    /// Every operation that is known, the newest first.
    pub fn operations(&self) -> Vec<Record> {
        self.table().newest_first()
    }

    /// The operation that somebody asked for with that key, if it is known.
    pub fn asked_with(&self, asked_by: &AskedBy, key: &str) -> Option<OperationId> {
        self.table().by_key(asked_by, key)
    }

    /// An operation as it is now and whenever it changes, what is awaited included. It ends when
    /// the operation is so old that it is forgotten.
    pub fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        self.table().watch(id)
    }

    /// Ends all work and returns when it has ended. What is unfinished stays in the journal and
    /// is taken up by the next start.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn table(&self) -> MutexGuard<'_, Registry> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<String, (OperationId, CancellationToken)>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an entry to the journal, and lets the oldest go that are too many.
    async fn write(&self, entry: &Entry) -> Result<(), String> {
        let (journal, entry) = (Arc::clone(&self.journal), entry.clone());
        let finished = self.table().finished();
        let work = move || {
            journal.write(&entry).map_err(|error| error.to_string())?;
            let surplus = journal.surplus(finished);
            for id in &surplus {
                if let Err(error) = journal.remove(id) {
                    error!(%error, "the journal keeps more than it should");
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
                let mut table = self.table();
                for id in surplus {
                    table.remove(&id);
                }
                Ok(())
            }
            Err(error) => {
                error!(error, "the journal cannot be written");
                self.listener.journal_failed();
                Err(error)
            }
        }
    }
}
