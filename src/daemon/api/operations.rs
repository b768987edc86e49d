//! What the API needs of whoever carries operations out.

use std::future::Future;

use futures::{Stream, stream};
use tokio::sync::watch;

use crate::executor::SubmitError;
use crate::operation::{OperationId, Order, Record};

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
