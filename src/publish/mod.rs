//! Publishers: services that write the node's labels, its `NodeVirtualization` and events.

pub mod change_events;
pub mod events;
pub mod file;
pub mod metrics;
pub mod node;
pub mod node_events;
pub mod virtualization;

use tokio::time::{Instant, sleep_until};

/// Waits until this time; forever without one.
pub(crate) async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
