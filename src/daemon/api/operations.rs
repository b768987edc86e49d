//! What the API needs of whoever carries operations out.

use std::future::Future;

use futures::{Stream, stream};
use thiserror::Error;
use tokio::sync::watch;

use crate::operation::{OperationId, Order, Record};

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

/// Who carries operations out, one at a time for each domain.
pub trait Operations: Send + Sync + 'static {
    /// Takes one on: it is in the journal when this returns.
    fn submit(&self, order: Order)
    -> impl Future<Output = Result<OperationId, SubmitError>> + Send;

    /// One of them as it is now.
    fn operation(&self, id: &OperationId) -> Option<Record>;

    /// All that are known, the newest first.
    fn operations(&self) -> Vec<Record>;

    /// One of them as it is now and whenever it changes.
    fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>>;
}

/// An operation as it is now and whenever it changes, until it has a verdict or is forgotten.
pub(super) fn states(record: watch::Receiver<Record>) -> impl Stream<Item = Record> + Send {
    stream::unfold(Some((record, true)), |rest| async move {
        let (mut record, is_first) = rest?;
        if !is_first {
            record.changed().await.ok()?;
        }
        let state = record.borrow_and_update().clone();
        let rest = (!state.is_done()).then_some((record, false));
        Some((state, rest))
    })
}
