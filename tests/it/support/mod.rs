//! Shared by the integration tests: real and fake systems, and waiting for conditions.

pub(crate) mod backend;
pub(crate) mod controller;
pub(crate) mod daemon;
pub(crate) mod device_domains;
pub(crate) mod domains;
pub(crate) mod fake_api;
pub(crate) mod fake_domains;
pub(crate) mod guest;
pub(crate) mod hypervisor;
pub(crate) mod kube;
pub(crate) mod kustomize;
pub(crate) mod label_reference;
pub(crate) mod launchers;
pub(crate) mod libvirtd;
pub(crate) mod nbd;
pub(crate) mod operations;
pub(crate) mod probes;
pub(crate) mod prometheus;
pub(crate) mod publisher;
pub(crate) mod relay;

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use tokio::time::{Instant, sleep, timeout_at};

/// Interval between checks of a condition. It is short, because a test takes as long as its waits.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Retries `condition` until it returns a value, for at most `within`. An attempt that takes longer
/// is canceled.
///
/// # Errors
/// The error of the last attempt.
pub(crate) async fn eventually<T>(
    within: Duration,
    mut condition: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    let mut last = anyhow!("the first attempt did not finish");
    loop {
        match timeout_at(deadline, condition()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        // The timeout does not fire for an attempt that finishes at once.
        if Instant::now() >= deadline {
            break;
        }
        sleep(POLL_INTERVAL).await;
    }
    Err(last).with_context(|| format!("did not happen within {within:?}"))
}
