//! The figures of DomainHotplug objects, on a Kubernetes of its own: how soon the hypervisor is
//! called after an object was made, and how many calls to the API server an object costs.
//!
//! The hypervisor is in memory and takes 2 ms for a question, so that what is measured is our own
//! way. One line a figure, as in `daemon.rs`.

#[allow(dead_code, reason = "each benchmark needs another part of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "the integration tests need more of it"
)]
mod support;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kube::api::{Api, PostParams};
use serde_json::json;
use tokio::time::timeout;
use virtnode::cluster::objects::DomainHotplug;
use virtnode::cluster::{Cluster, ClusterConfig};

use parts::{median, ms, progress, tell};
use support::controller::HotplugNode;
use support::eventually;
use support::fake_domains::FakeGuest;
use support::kube::KubeServer;
use support::kube::objects::define;

const OBJECTS: usize = 50;
const NODE: &str = "figures";
/// For what should take moments.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

async fn measure() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    define(&server).await?;
    server.create_node(NODE).await?;
    let config = ClusterConfig {
        kubeconfig: Some(server.kubeconfig().to_owned()),
        ..ClusterConfig::new(NODE)
    };
    let node = HotplugNode::start(Cluster::connect(config).await?);
    eventually(PATIENCE, async || {
        let watched = node.metric("virtnode_hotplug_objects_watched");
        ensure!(watched > 0.0, "not watched yet");
        Ok(())
    })
    .await?;

    progress(&format!("making {OBJECTS} objects, one after another"));
    let objects: Api<DomainHotplug> = Api::all(server.client());
    let mut times = Vec::new();
    for number in 0..OBJECTS {
        let name = format!("vm-{number}");
        node.control.add(&name, FakeGuest::default());
        let object = serde_json::from_value(json!({
            "apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
            "metadata": {"name": name, "labels": {"virtnode.io/node": NODE}},
            "spec": {"nodeName": NODE, "domain": {"name": name}, "vcpus": {"count": 3},
                "ttlSecondsAfterFinished": 2},
        }))?;
        let begun = Instant::now();
        let called = async {
            let called = node.control.called();
            let (made, ()) = tokio::join!(objects.create(&PostParams::default(), &object), called);
            made.map(|_| begun.elapsed())
        };
        times.push(timeout(PATIENCE, called).await.context("no call")??);
    }
    eventually(PATIENCE, async || {
        let left = objects.list(&Default::default()).await?.items.len();
        ensure!(left == 0, "{left} objects are left");
        Ok(())
    })
    .await?;

    let reached = median(&mut times);
    let last = times.last().copied().unwrap_or_default();
    tell(
        "DomainHotplug made to hypervisor called",
        &format!("{}, at most {}", ms(reached), ms(last)),
        "<= 200 ms",
        reached <= Duration::from_millis(200),
        "",
    );
    // All told: made by its user, the Node looked up, owned, told of, deleted.
    let events = server.audit_events().await?;
    let calls = events.iter().filter(|event| {
        let of_objects = event.resource == "domainhotplugs";
        let by_daemon = event.user_agent.starts_with("virtnode/");
        let of_daemon = (of_objects || event.resource == "nodes")
            && !matches!(event.verb.as_str(), "list" | "watch");
        (by_daemon && of_daemon) || (of_objects && event.verb == "create")
    });
    let calls = calls.count();
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let each = calls as f64 / OBJECTS as f64;
    tell(
        "calls to the API server for a DomainHotplug, from made to deleted",
        &format!("{each:.1}"),
        "<= 8",
        each <= 8.0,
        "",
    );
    Ok(())
}
