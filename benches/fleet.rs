//! Requests that a thousand idle nodes send to one real API server, and the memory they cost it.
//!
//! Each node has its own label set, `NodeVirtualization`, connections and three watches: the
//! daemon's publishers and the watch of its controller, which all run in this process. Nothing else
//! writes to the Nodes, not even a kubelet's heartbeat, so that only bookmarks keep a watch alive.
//!
//! The output has the format of `benches/daemon.rs`. `VIRTNODE_FLEET_NODES` is the number of nodes.
//! `VIRTNODE_FLEET_SPEED` divides every interval of the daemon and the measured hour: 1 is exact and
//! takes an hour, 4 takes a quarter of that. The API server sends bookmarks once a minute in any
//! case.

#[allow(dead_code, reason = "no benchmark uses all of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the integration tests"
)]
mod support;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use virtnode::capability::{Capabilities, DomainCapabilities, NodeFacts, Version};
use virtnode::cluster::objects::NodeVirtualization;
use virtnode::cluster::{Cluster, ClusterConfig, HotplugObjects, ListOptions};
use virtnode::daemon::Metrics;
use virtnode::hypervisor::ConnectionState;
use virtnode::label::{LabelSet, Policy, derive};
use virtnode::probe::Reading;
use virtnode::publish::events::EventRecorder;
use virtnode::publish::node::{NodePublisher, NodePublisherOptions, SyncState};
use virtnode::publish::virtualization::{
    Snapshot, VirtualizationPublisher, VirtualizationPublisherOptions,
};

use parts::{Memory, print, progress, report};
use support::kube::{AuditEvent, KubeServer};

const RIGHTS: [&str; 4] = [
    include_str!("../manifests/base/crds.yaml"),
    include_str!("../manifests/base/namespace.yaml"),
    include_str!("../manifests/base/serviceaccount.yaml"),
    include_str!("../manifests/base/rbac.yaml"),
];
const GOAL: f64 = 10.0;
/// Maximum time until all nodes have published everything.
const PATIENCE: Duration = Duration::from_secs(1200);
/// Period over which the nodes start, as in a rollout.
const START: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

fn number(name: &str, default: u32) -> anyhow::Result<u32> {
    match env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}: {text:?}")),
        Err(_) => Ok(default),
    }
}

async fn measure() -> anyhow::Result<()> {
    let nodes = number("VIRTNODE_FLEET_NODES", 1000)?;
    let speed = number("VIRTNODE_FLEET_SPEED", 4)?;
    ensure!(
        nodes > 0 && speed > 0,
        "the number of nodes and the speed must be at least 1"
    );
    let server = KubeServer::start().await?;
    for manifest in RIGHTS {
        server.apply_manifest(manifest).await?;
    }
    progress(&format!("creating {nodes} Nodes"));
    let names: Vec<String> = (0..nodes).map(|n| format!("node-{n:04}")).collect();
    let created = futures::stream::iter(&names).map(|name| server.create_node(name));
    let created: Vec<_> = created.buffer_unordered(16).collect().await;
    created.into_iter().collect::<Result<Vec<_>, _>>()?;
    let without = memory(&server).await?;

    progress(&format!(
        "starting {nodes} daemons within {} s",
        START.as_secs()
    ));
    let kubeconfig = server
        .service_account_kubeconfig("virtnode", "virtnode")
        .await?;
    let token = CancellationToken::new();
    let facts = facts()?;
    let metrics = Arc::new(Metrics::new());
    let mut fleet = Vec::new();
    for (n, name) in (0..).zip(&names) {
        let config = ClusterConfig {
            kubeconfig: Some(kubeconfig.clone()),
            call_deadline: Duration::from_secs(60),
            ..ClusterConfig::new(name)
        };
        let cluster = Cluster::connect(config).await?;
        fleet.push(start(cluster, n, speed, &facts, &metrics, &token));
        sleep(START / nodes).await;
    }
    let began = Instant::now();
    let objects: Api<NodeVirtualization> = Api::all(server.client());
    let synced = async || {
        let labelled = fleet.iter().filter(|state| state.borrow().synced).count();
        ensure!(
            labelled == names.len(),
            "{labelled} Nodes have their labels"
        );
        let described = objects
            .list_metadata(&ListParams::default())
            .await?
            .items
            .len();
        ensure!(
            described == names.len(),
            "{described} NodeVirtualizations exist"
        );
        // One watch each of Nodes, NodeVirtualizations and DomainHotplugs.
        let events = server.audit_events().await?;
        let begun = events
            .iter()
            .filter(|event| is_ours(event) && event.verb == "watch");
        let begun = begun
            .filter(|event| event.stage == "ResponseStarted")
            .count();
        ensure!(begun >= 3 * names.len(), "{begun} watches");
        Ok(())
    };
    // Each check reads the whole audit log.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = synced().await {
        ensure!(
            Instant::now() < deadline,
            "the nodes do not become idle: {error}"
        );
        progress(&format!("{error}"));
        sleep(Duration::from_secs(5)).await;
    }
    progress(&format!("all idle after {} s", began.elapsed().as_secs()));

    let hour = Duration::from_secs(3600) / speed;
    let before = server.audit_events().await?.len();
    let begin = Instant::now();
    progress(&format!("watching for {} s", hour.as_secs()));
    sleep(hour).await;
    let window = begin.elapsed();
    let events = server.audit_events().await?;
    let requests = requests(&events[before..]);
    let hours = window.as_secs_f64() * f64::from(speed) / 3600.0;
    let per_hour = |count: usize| count as f64 / f64::from(nodes) / hours;
    let (major, minor) = server.version();
    print(&format!(
        "# {nodes} nodes, Kubernetes {major}.{minor}, {:.0} s, every interval of the daemon divided by {speed}",
        window.as_secs_f64()
    ));
    for (what, count) in &requests {
        print(&format!(
            "# {what}: {:.2} per node and hour",
            per_hour(*count)
        ));
    }
    let total = per_hour(requests.values().sum());
    report(
        "requests to the API server per node and hour, idle",
        &format!("{total:.1}"),
        &format!("≤ {GOAL:.0}"),
        total <= GOAL,
        "",
    );
    let with = memory(&server).await?;
    let each = |with: f64, without: f64| (with - without) * 1000.0 / f64::from(nodes);
    print(&format!(
        "# API server: {:.0} MB without the daemons, {:.0} MB with them; etcd: {:.0} MB, {:.0} MB",
        without.0, with.0, without.1, with.1
    ));
    report(
        "memory of the API server and of etcd for each node",
        &format!(
            "{:.0} kB and {:.0} kB",
            each(with.0, without.0),
            each(with.1, without.1)
        ),
        "measured",
        true,
        "",
    );
    let size = objects.get(&names[0]).await?;
    let size = serde_json::to_vec(&size)?.len();
    print(&format!("# a NodeVirtualization has {size} bytes"));
    token.cancel();
    Ok(())
}

/// Starts the tasks that the daemon of a node runs in a cluster.
fn start(
    cluster: Cluster,
    n: u32,
    speed: u32,
    facts: &NodeFacts,
    metrics: &Arc<Metrics>,
    token: &CancellationToken,
) -> watch::Receiver<SyncState> {
    let cluster = cluster.with_watch_seconds(27 * 60 / speed..=29 * 60 / speed);
    let mut facts = facts.clone();
    facts.kvm_max_vcpus = Some(100 + n);
    let labels: LabelSet = derive(&facts, &Policy::default()).labels;
    let (events, writer) = EventRecorder::new(cluster.clone(), Arc::clone(&metrics.events));
    tokio::spawn(writer.run(token.clone()));

    let defaults = NodePublisherOptions::default();
    let options = NodePublisherOptions {
        start_jitter: Duration::ZERO,
        fallback: defaults.fallback / speed,
        ..defaults
    };
    let publisher = NodePublisher::new(cluster.clone(), events, Arc::clone(&metrics.sync), options);
    let state = publisher.state();
    let (desired, to_publish) = watch::channel(Some(Arc::new(labels)));
    tokio::spawn(publisher.run(to_publish, LabelSet::new(), token.clone()));

    let defaults = VirtualizationPublisherOptions::default();
    let options = VirtualizationPublisherOptions {
        start_jitter: Duration::ZERO,
        refresh: defaults.refresh / speed,
        ..defaults
    };
    let publisher = VirtualizationPublisher::new(
        cluster.clone(),
        Arc::clone(&metrics.virtualization),
        options,
    );
    let (snapshots, to_describe) = watch::channel(None);
    let (connection, connected) = watch::channel(ConnectionState::Up(1));
    tokio::spawn(publisher.run(to_describe, connected, token.clone()));

    let mut hotplugs = HotplugObjects::new(&cluster)
        .watch(ListOptions {
            max: 512,
            max_stubs: 8192,
            in_pages: false,
        })
        .boxed();
    let token = token.clone();
    tokio::spawn(async move {
        // The daemon probes once a minute.
        let mut probe = interval(Duration::from_secs(60) / speed);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let reading = Reading {
            facts,
            ..Reading::default()
        };
        loop {
            tokio::select! {
                () = token.cancelled() => break,
                _ = probe.tick() => {
                    let snapshot = Snapshot::new(&reading, &[], &[], Timestamp::now());
                    snapshots.send_replace(Some(Arc::new(snapshot)));
                }
                _ = hotplugs.next() => {}
            }
        }
        drop((desired, connection));
    });
    state
}

/// Returns the facts of a captured host.
fn facts() -> anyhow::Result<NodeFacts> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0");
    let capabilities = fs::read(directory.join("capabilities.xml"))?;
    let document = fs::read(directory.join("dc-x86_64-q35-kvm.xml"))?;
    Ok(NodeFacts {
        libvirt_version: Some(Version::new(11, 3, 0)),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        capabilities: Some(Capabilities::parse("capabilities", &capabilities)?),
        domain_capabilities: vec![DomainCapabilities::parse("domain capabilities", &document)?],
        ..NodeFacts::default()
    })
}

fn is_ours(event: &AuditEvent) -> bool {
    event.user_agent.starts_with("virtnode/")
}

/// Counts the daemons' requests by verb and resource. A watch counts once, at its start.
fn requests(events: &[AuditEvent]) -> BTreeMap<String, usize> {
    let mut requests = BTreeMap::new();
    for event in events.iter().filter(|event| is_ours(event)) {
        let is_end = event.verb == "watch" && event.stage != "ResponseStarted";
        if !is_end {
            let what = format!("{} {}", event.verb, event.resource);
            *requests.entry(what).or_default() += 1;
        }
    }
    requests
}

/// Returns the resident memory of the API server and of etcd in MB, after an idle period.
async fn memory(server: &KubeServer) -> anyhow::Result<(f64, f64)> {
    sleep(Duration::from_secs(20)).await;
    let (api_server, etcd) = server.processes();
    let api_server = api_server.context("no API server")?;
    Ok((Memory::of(api_server)?.resident, Memory::of(etcd)?.resident))
}
