//! What the integration tests share: real parts to test against, and waiting for conditions.

pub(crate) mod by_virsh;
pub(crate) mod guest;
pub(crate) mod kube;
pub(crate) mod libvirtd;

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
    while let Ok(outcome) = timeout_at(deadline, condition()).await {
        match outcome {
            Ok(value) => return Ok(value),
            Err(error) => last = error,
        }
        sleep(POLL_INTERVAL).await;
    }
    Err(last).with_context(|| format!("did not happen within {within:?}"))
}
