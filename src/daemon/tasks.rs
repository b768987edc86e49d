//! The running parts of the daemon: tasks with names, and what asks them to end.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How long parts may take to end after they were asked to.
const GRACE: Duration = Duration::from_secs(5);

/// All that runs.
#[derive(Default)]
pub(super) struct Parts {
    stop: CancellationToken,
    running: JoinSet<&'static str>,
}

impl Parts {
    /// Starts a part, which is given what tells it to end. `name` is how its end is told.
    pub(super) fn start<P>(&mut self, name: &'static str, part: impl FnOnce(CancellationToken) -> P)
    where
        P: Future<Output = ()> + Send + 'static,
    {
        let part = part(self.stop.clone());
        self.running.spawn(async move {
            part.await;
            name
        });
    }

    /// Starts a part that needs no time to end: it is dropped where it stands.
    pub(super) fn start_endless<P>(&mut self, name: &'static str, part: P)
    where
        P: Future<Output: Send> + Send + 'static,
    {
        self.start(name, |stop| async move {
            stop.run_until_cancelled_owned(part).await;
        });
    }

    /// Waits until a part ends, which none should by itself; says which and how.
    pub(super) async fn ended(&mut self) -> String {
        match self.running.join_next().await {
            Some(Ok(part)) => format!("{part} ended by itself"),
            Some(Err(error)) => format!("a part of the daemon failed: {error}"),
            None => "no part of the daemon is left".to_owned(),
        }
    }

    /// Asks all to end, and waits for them.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        let ended = async { while self.running.join_next().await.is_some() {} };
        if timeout(GRACE, ended).await.is_err() {
            warn!("a part did not end within {GRACE:?}; leaving it");
        }
    }
}
