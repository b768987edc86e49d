//! Awaiting the probes of a labeller.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use virtnode::labeller::LatestProbe;

/// Timeout that only a failing test reaches, in paused time.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Waits until `count` more probes have been published.
pub(crate) async fn published(latest: &watch::Receiver<Option<Arc<LatestProbe>>>, count: u64) {
    let mut latest = latest.clone();
    latest.mark_unchanged();
    for _ in 0..count {
        let changed = timeout(DAY, latest.changed()).await;
        changed.expect("a probe within a day").unwrap();
    }
}
