//! What the integration tests share: real parts to test against, and waiting for conditions.

pub(crate) mod backend;
pub(crate) mod controller;
pub(crate) mod daemon;
pub(crate) mod domains;
pub(crate) mod fake_api;
pub(crate) mod fake_domains;
pub(crate) mod guest;
pub(crate) mod hypervisor;
pub(crate) mod kube;
pub(crate) mod kustomize;
pub(crate) mod libvirtd;
pub(crate) mod nbd;
pub(crate) mod operations;
pub(crate) mod prometheus;
pub(crate) mod publisher;
pub(crate) mod relay;

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::time::{Instant, sleep, timeout_at};

/// Between two looks at a condition: short, for a test takes as long as what it waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Tries `condition` until it gives a value, for at most `within`.
///
/// # Errors
/// When the time is over: why the last try failed. A try that is still under way then is
/// given up.
pub(crate) async fn eventually<T>(
    within: Duration,
    mut condition: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    let mut last = anyhow!("the first try did not come to an end");
    loop {
        match timeout_at(deadline, condition()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        // A try that is over at once is never too late for the timeout.
        if Instant::now() >= deadline {
            break;
        }
        sleep(POLL_INTERVAL).await;
    }
    Err(last).with_context(|| format!("did not happen within {within:?}"))
}
