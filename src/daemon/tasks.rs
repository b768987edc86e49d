//! The daemon's tasks: named futures that run until they are cancelled together.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Maximum time for tasks to end after cancellation. A write to the API server or the journal
/// takes less.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(super) struct Tasks {
    stop: CancellationToken,
    running: JoinSet<&'static str>,
}

impl Tasks {
    /// Starts a task that ends when the token is cancelled. `name` is for the log.
    pub(super) fn start<F>(&mut self, name: &'static str, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = task(self.stop.clone());
        self.running.spawn(async move {
            task.await;
            name
        });
    }

    /// Starts a task that is dropped at cancellation, wherever it is.
    pub(super) fn start_endless<F>(&mut self, name: &'static str, task: F)
    where
        F: Future<Output: Send> + Send + 'static,
    {
        self.start(name, |stop| async move {
            stop.run_until_cancelled_owned(task).await;
        });
    }

    /// Waits until a task ends, which none does before cancellation unless it fails. Returns the
    /// error message.
    pub(super) async fn failure(&mut self) -> String {
        match self.running.join_next().await {
            Some(Ok(task)) => format!("{task} ended unexpectedly"),
            Some(Err(error)) => format!("a task failed: {error}"),
            None => "no task is running".to_owned(),
        }
    }

    /// Cancels all tasks and waits until they have ended.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        let ended = async { while self.running.join_next().await.is_some() {} };
        if timeout(GRACE, ended).await.is_err() {
            warn!("a task did not stop within {GRACE:?}; exiting without it");
        }
    }
}
