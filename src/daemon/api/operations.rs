//! The executor as the local API uses it.

use std::future::Future;
use std::sync::Arc;

use futures::{Stream, stream};
use tokio::sync::watch;

use crate::executor::SubmitError;
use crate::operation::{OperationId, Order, Record};

/// Accepts and lists operations. The executor implements it, and tests do in memory.
pub trait OperationService: Send + Sync + 'static {
    /// Enqueues an operation. It is in the journal when this returns.
    fn submit(
        self: &Arc<Self>,
        order: Order,
    ) -> impl Future<Output = Result<OperationId, SubmitError>> + Send;

    fn operation(&self, id: &OperationId) -> Option<Record>;

    /// Returns all operations in the journal, the newest first.
    fn operations(&self) -> Vec<Record>;

    /// Returns the current record of an operation and its changes.
    fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>>;
}

/// Returns the current record and every later one, until the verdict or the end of the channel.
pub fn states(record: watch::Receiver<Record>) -> impl Stream<Item = Record> + Send + 'static {
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
