//! The publisher of the `NodeVirtualization` on a real API server.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use virtnode::cluster::objects::node_virtualization::{HYPERVISOR_CONNECTED, PROBED};
use virtnode::cluster::objects::{Condition, NodeVirtualization, NodeVirtualizationStatus};
use virtnode::cluster::{Cluster, ClusterConfig, Retry};
use virtnode::daemon::Metrics;
use virtnode::hypervisor::ConnectionState;
use virtnode::label::FactSource;
use virtnode::probe::SourceFailure;
use virtnode::publish::virtualization::{
    Snapshot, VirtualizationPublisher, VirtualizationPublisherOptions,
};

use crate::support::eventually;
use crate::support::kube::{KubeServer, RIGHTS};
use crate::support::publisher::SOON;

const CRDS: &str = include_str!("../../manifests/base/crds.yaml");

/// A running publisher and its inputs.
struct Writer {
    pictures: watch::Sender<Option<Arc<Snapshot>>>,
    connection: watch::Sender<ConnectionState>,
    metrics: Arc<Metrics>,
    _stop: DropGuard,
}

impl Writer {
    async fn start(
        server: &KubeServer,
        node: &str,
        options: VirtualizationPublisherOptions,
    ) -> anyhow::Result<Self> {
        let kubeconfig = server.pod_kubeconfig("virtnode", "virtnode", node).await?;
        let config = ClusterConfig {
            kubeconfig: Some(kubeconfig),
            ..ClusterConfig::new(node)
        };
        let cluster = Cluster::connect(config).await?;
        let metrics = Arc::new(Metrics::new());
        let publisher =
            VirtualizationPublisher::new(cluster, Arc::clone(&metrics.virtualization), options);
        let (pictures, seen) = watch::channel(None);
        let (connection, connected) = watch::channel(ConnectionState::Up(1));
        let stop = CancellationToken::new();
        tokio::spawn(publisher.run(seen, connected, stop.clone()));
        Ok(Self {
            pictures,
            connection,
            metrics,
            _stop: stop.drop_guard(),
        })
    }

    /// Publishes a probe with this maximum of vCPUs.
    fn probe(&self, max_vcpus: u32, failures: Vec<SourceFailure>) {
        let facts = NodeVirtualizationStatus {
            accelerator: Some("kvm".to_owned()),
            max_vcpus: Some(max_vcpus),
            ..NodeVirtualizationStatus::default()
        };
        self.pictures.send_replace(Some(Arc::new(Snapshot {
            facts,
            failures,
            unread: Vec::new(),
            unreadable: Vec::new(),
            at: Timestamp::now(),
        })));
    }

    fn attempts(&self) -> u64 {
        self.metrics.virtualization.attempts.get()
    }
}

fn options() -> VirtualizationPublisherOptions {
    VirtualizationPublisherOptions {
        start_jitter: Duration::ZERO,
        settle: Duration::ZERO,
        retry: Retry {
            needs_people: Duration::from_secs(1),
            ..Retry::default()
        },
        ..VirtualizationPublisherOptions::default()
    }
}

async fn shown(
    objects: &Api<NodeVirtualization>,
    is: impl Fn(&NodeVirtualization) -> bool,
) -> anyhow::Result<NodeVirtualization> {
    eventually(SOON, async || {
        let object = objects.get("n1").await?;
        ensure!(is(&object), "{object:?}");
        Ok(object)
    })
    .await
}

fn condition(object: &NodeVirtualization, kind: &str) -> Option<bool> {
    Condition::find(&object.spec.facts.conditions, kind).map(Condition::holds)
}

async fn writes(server: &KubeServer) -> anyhow::Result<usize> {
    let events = server.audit_events().await?;
    let ours = events.iter().filter(|event| {
        event.resource == "nodevirtualizations"
            && event.is_write()
            && event.user_agent.starts_with("virtnode/")
    });
    Ok(ours.count())
}

#[tokio::test]
async fn node_virtualization_is_written_only_after_changes() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    server.apply_manifest(RIGHTS).await?;
    let node = server.create_node("n1").await?;
    let objects: Api<NodeVirtualization> = Api::all(server.client());

    // Without the definition: reported and retried.
    let writer = Writer::start(&server, "n1", options()).await?;
    writer.probe(288, Vec::new());
    let missing = || {
        let failures = &writer.metrics.virtualization.failures;
        failures.with_label_values(&["api-not-found"]).get()
    };
    eventually(SOON, async || {
        ensure!(missing() >= 2, "not missed yet");
        Ok(())
    })
    .await?;
    server.apply_manifest(CRDS).await?;

    let object = shown(&objects, |object| object.spec.facts.max_vcpus == Some(288)).await?;
    assert_eq!(condition(&object, PROBED), Some(true));
    assert_eq!(condition(&object, HYPERVISOR_CONNECTED), Some(true));
    let owners = object.metadata.owner_references.context("no owner")?;
    assert_eq!(owners.len(), 1);
    assert_eq!(owners[0].kind, "Node");
    assert_eq!(Some(&owners[0].uid), node.metadata.uid.as_ref());
    let fields = object.metadata.managed_fields.context("fields")?;
    assert_eq!(fields.len(), 1);
    assert!(
        serde_json::to_vec(&fields)?.len() < 512,
        "one field, one owner: {fields:?}"
    );

    // Equal probes are not written.
    let before = writes(&server).await?;
    for _ in 0..20 {
        writer.probe(288, Vec::new());
        tokio::task::yield_now().await;
    }
    // A different probe is written.
    writer.probe(710, Vec::new());
    shown(&objects, |object| object.spec.facts.max_vcpus == Some(710)).await?;
    assert_eq!(writes(&server).await?, before + 1);

    // libvirt is lost: the conditions change, the facts are kept.
    let lost = SourceFailure {
        source: FactSource::Capabilities,
        code: "unavailable",
        message: "no connection to libvirt".to_owned(),
        is_partial: false,
    };
    writer.connection.send_replace(ConnectionState::Down);
    shown(&objects, |object| {
        condition(object, HYPERVISOR_CONNECTED) == Some(false)
    })
    .await?;
    writer.probe(1, vec![lost]);
    let object = shown(&objects, |object| condition(object, PROBED) == Some(false)).await?;
    assert_eq!(object.spec.facts.max_vcpus, Some(710));
    writer.connection.send_replace(ConnectionState::Up(2));
    writer.probe(710, Vec::new());
    shown(&objects, |object| {
        condition(object, PROBED) == Some(true)
            && condition(object, HYPERVISOR_CONNECTED) == Some(true)
    })
    .await?;

    // Changes by others are reverted.
    let edit = Patch::Merge(json!({"status": {"maxVcpus": 1}}));
    objects.patch("n1", &PatchParams::default(), &edit).await?;
    shown(&objects, |object| object.spec.facts.max_vcpus == Some(710)).await?;
    objects.delete("n1", &DeleteParams::default()).await?;
    shown(&objects, |object| object.spec.facts.max_vcpus == Some(710)).await?;

    // Another daemon writes nothing.
    let before = writes(&server).await?;
    drop(writer);
    let writer = Writer::start(&server, "n1", options()).await?;
    writer.probe(710, Vec::new());
    eventually(SOON, async || {
        ensure!(writer.attempts() >= 1, "no look yet");
        Ok(())
    })
    .await?;
    // The watch starts after the first successful sync.
    let objects_watched = async || {
        let events = server.audit_events().await?;
        let watches = events.iter().filter(|event| {
            event.resource == "nodevirtualizations"
                && event.verb == "watch"
                && event.code == 200
                && event.user_agent.starts_with("virtnode/")
        });
        ensure!(watches.count() >= 2, "not watched yet");
        Ok(())
    };
    eventually(SOON, objects_watched).await?;
    assert_eq!(writes(&server).await?, before);
    Ok(())
}

#[tokio::test]
async fn time_of_the_probe_is_refreshed_after_an_hour() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    server.apply_manifest(RIGHTS).await?;
    server.apply_manifest(CRDS).await?;
    server.create_node("n1").await?;
    let objects: Api<NodeVirtualization> = Api::all(server.client());
    // The refresh interval is four seconds.
    let refresh = Duration::from_secs(4);
    let writer = Writer::start(
        &server,
        "n1",
        VirtualizationPublisherOptions {
            refresh,
            ..options()
        },
    )
    .await?;
    writer.probe(288, Vec::new());
    let time = |object: NodeVirtualization| -> anyhow::Result<Timestamp> {
        let time = object.spec.facts.last_probe_time;
        Ok(time.context("no time")?.into())
    };
    let first = time(shown(&objects, |_| true).await?)?;
    let second = eventually(SOON, async || {
        writer.probe(288, Vec::new());
        let second = time(objects.get("n1").await?)?;
        ensure!(second != first, "not written yet");
        Ok(second)
    })
    .await?;
    // Times are in whole seconds.
    let between = second.duration_since(first).unsigned_abs();
    assert!(between >= refresh - Duration::from_secs(1), "{between:?}");
    assert_eq!(writes(&server).await?, 2);
    Ok(())
}

#[tokio::test]
async fn object_that_another_client_keeps_writing_is_left_to_it() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    server.apply_manifest(RIGHTS).await?;
    server.apply_manifest(CRDS).await?;
    server.create_node("n1").await?;
    let objects: Api<NodeVirtualization> = Api::all(server.client());
    let writer = Writer::start(&server, "n1", options()).await?;
    writer.probe(288, Vec::new());
    let is_own = |object: &NodeVirtualization| object.spec.facts.max_vcpus == Some(288);
    shown(&objects, is_own).await?;
    let foreign = Patch::Merge(json!({"status": {"maxVcpus": 1}}));
    for _ in 0..3 {
        objects
            .patch("n1", &PatchParams::default(), &foreign)
            .await?;
        shown(&objects, is_own).await?;
    }
    objects
        .patch("n1", &PatchParams::default(), &foreign)
        .await?;
    let failures = &writer.metrics.virtualization.failures;
    let left = failures.with_label_values(&["another-daemon"]);
    eventually(SOON, async || {
        ensure!(left.get() == 1, "not reported");
        Ok(())
    })
    .await?;
    writer.probe(289, Vec::new());
    assert_eq!(writes(&server).await?, 4);
    assert!(!is_own(&objects.get("n1").await?));
    Ok(())
}
