//! Joins what the cluster is told beside labels: events, and the `NodeVirtualization`.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::config::Config;
use crate::hypervisor::Hypervisor;
use crate::labeller::Outlets;
use crate::publish::events::Events;
use crate::publish::news::tell_of_hypervisor;
use crate::publish::virtualization::{Options, VirtualizationPublisher};
use crate::telemetry::Metrics;

/// Starts the tasks, and answers with the place to tell of events.
pub(super) fn start<H: Hypervisor>(
    cluster: &Cluster,
    config: &Config,
    hypervisor: &Arc<H>,
    metrics: &Arc<Metrics>,
    outlets: &mut Outlets,
    stop: &CancellationToken,
    parts: &mut JoinSet<&'static str>,
) -> Events {
    let (events, writer) = Events::new(cluster.clone(), Arc::clone(metrics));
    let token = stop.clone();
    parts.spawn(async move {
        writer.run(token).await;
        "the writer of events"
    });
    let told = tell_of_hypervisor(
        events.clone(),
        cluster.node_reference(),
        hypervisor.connection(),
        stop.clone(),
    );
    parts.spawn(async move {
        told.await;
        "the news of the hypervisor"
    });
    let (pictures, to_publish) = watch::channel(None);
    outlets.pictures = Some(pictures);
    let options = Options {
        start_jitter: config.start_jitter,
        ..Options::default()
    };
    let publisher = VirtualizationPublisher::new(cluster.clone(), Arc::clone(metrics), options);
    let (connection, token) = (hypervisor.connection(), stop.clone());
    parts.spawn(async move {
        publisher.run(to_publish, connection, token).await;
        "the NodeVirtualization's publisher"
    });
    events
}
