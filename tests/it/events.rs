//! EventRecorder with a real API server: times of events, series of repeated ones, counts of lost ones.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::ListParams;
use tokio_util::sync::{CancellationToken, DropGuard};
use virtnode::cluster::{Cluster, ClusterConfig, EventKind, ObjectEvent};
use virtnode::daemon::Metrics;
use virtnode::publish::events::EventRecorder;

use crate::support::eventually;
use crate::support::kube::{KubeServer, RIGHTS};

/// Longer than the minimum interval between two writes of a count.
const LONG: Duration = Duration::from_secs(60);

struct Told {
    events: EventRecorder,
    cluster: Cluster,
    metrics: Arc<Metrics>,
    _stop: DropGuard,
}

impl Told {
    async fn start(server: &KubeServer) -> anyhow::Result<Self> {
        server.apply_manifest(RIGHTS).await?;
        let config = ClusterConfig {
            kubeconfig: Some(server.pod_kubeconfig("virtnode", "virtnode", "n1").await?),
            ..ClusterConfig::new("n1")
        };
        let cluster = Cluster::connect(config).await?;
        let metrics = Arc::new(Metrics::new());
        let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(&metrics.events));
        let stop = CancellationToken::new();
        tokio::spawn(writer.run(stop.clone()));
        Ok(Self {
            events,
            cluster,
            metrics,
            _stop: stop.drop_guard(),
        })
    }

    fn tell(&self, note: &str) {
        self.events.record(ObjectEvent {
            about: self.cluster.node_reference(),
            related: None,
            kind: EventKind::Warning,
            reason: "HypervisorLost".to_owned(),
            action: "Connect",
            note: note.to_owned(),
        });
    }

    fn dropped(&self, reason: &str) -> u64 {
        let dropped = &self.metrics.events.dropped;
        dropped.with_label_values(&[reason]).get()
    }
}

async fn events(server: &KubeServer) -> anyhow::Result<Vec<Event>> {
    let events: Api<Event> = Api::namespaced(server.client(), "default");
    let all = events.list(&ListParams::default()).await?.items;
    let ours = |event: &Event| event.reporting_controller.as_deref() == Some("virtnode");
    Ok(all.into_iter().filter(ours).collect())
}

async fn event(server: &KubeServer, note: &str, count: i32) -> anyhow::Result<Event> {
    eventually(LONG, async || {
        let all = events(server).await?;
        let event = all.iter().find(|event| event.note.as_deref() == Some(note));
        let event = event.with_context(|| format!("no event {note:?}"))?;
        let told = event.series.as_ref().map_or(1, |series| series.count);
        ensure!(told == count, "counted {told}");
        Ok(event.clone())
    })
    .await
}

#[tokio::test]
async fn repeated_event_becomes_series_and_recording_never_blocks() -> anyhow::Result<()> {
    let mut server = KubeServer::start().await?;
    let told = Told::start(&server).await?;
    for _ in 0..3 {
        told.tell("once more");
    }
    told.tell("something else");
    let series = event(&server, "once more", 3).await?;
    event(&server, "something else", 1).await?;
    assert_eq!(events(&server).await?.len(), 2);
    assert_eq!(series.type_.as_deref(), Some("Warning"));
    assert_eq!(series.reason.as_deref(), Some("HypervisorLost"));
    assert_eq!(series.reporting_instance.as_deref(), Some("n1"));
    let about = series.regarding.context("an object")?;
    assert_eq!(
        (about.kind.as_deref(), about.name.as_deref()),
        (Some("Node"), Some("n1"))
    );
    // The first event, one write for its two repeats, and the other event.
    let writes = server.audit_events().await?;
    let ours = writes.iter().filter(|event| {
        event.resource == "events" && event.user_agent.starts_with("virtnode/") && event.code < 300
    });
    assert_eq!(ours.count(), 3);

    // Without an API server: recording continues, events beyond the queue are lost and counted,
    // and the others are written later with the time at which they occurred.
    server.stop_api();
    let before = Timestamp::now();
    for n in 0..300 {
        told.tell(&format!("number {n}"));
    }
    let after = Timestamp::now();
    // The writer may hold one event besides the queue.
    let lost = told.dropped("queue-full");
    assert!((43..=44).contains(&lost), "{lost}");
    server.start_api().await?;
    let late = event(&server, "number 5", 1).await?;
    let at = late.event_time.context("a time")?.0;
    assert!((before..=after).contains(&at), "{before} {at} {after}");
    event(&server, "number 255", 1).await?;
    for reason in ["api-unreachable", "rejected"] {
        assert_eq!(told.dropped(reason), 0, "{reason}");
    }
    Ok(())
}
