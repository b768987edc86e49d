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
use virtnode::hotplug::Verdict;

use parts::{median, ms, progress, tell};
use support::controller::HotplugNode;
use support::eventually;
use support::fake_domains::{Cpus, FakeGuest};
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

    let objects = Objects {
        api: Api::all(server.client()),
        server,
        node,
    };
    let mut times = Vec::new();
    for (verdict, cpus) in [
        (Verdict::Verified, Cpus::Onlines),
        (Verdict::GuestRefused, Cpus::ThrowsAway),
    ] {
        let calls = objects.calls().await?;
        times.extend(objects.live(verdict, cpus).await?);
        let calls = objects.calls().await? - calls;
        #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
        let each = calls as f64 / OBJECTS as f64;
        tell(
            &format!("calls to the API server for a DomainHotplug that ends {verdict}"),
            &format!("{each:.1}"),
            "<= 8",
            each <= 8.0,
            "made, status, events and deletion",
        );
    }
    let reached = median(&mut times);
    let last = times.last().copied().unwrap_or_default();
    tell(
        "DomainHotplug made to hypervisor called",
        &format!("{}, at most {}", ms(reached), ms(last)),
        "<= 200 ms",
        reached <= Duration::from_millis(200),
        "",
    );
    Ok(())
}

/// A node and its objects.
struct Objects {
    server: KubeServer,
    api: Api<DomainHotplug>,
    node: HotplugNode,
}

impl Objects {
    /// Makes objects one after another, and waits until all have ended so, have been told of and
    /// are deleted. Says how long each took until the hypervisor was called.
    async fn live(&self, verdict: Verdict, cpus: Cpus) -> anyhow::Result<Vec<Duration>> {
        progress(&format!(
            "{OBJECTS} objects that end {verdict}, one after another"
        ));
        let told = self.node.metrics.cluster.events.get();
        let name = |number: usize| format!("{verdict}-{number}").to_lowercase();
        let mut times = Vec::new();
        for number in 0..OBJECTS {
            let name = name(number);
            let guest = FakeGuest {
                cpus,
                ..FakeGuest::default()
            };
            self.node.control.add(&name, guest);
            let object = serde_json::from_value(json!({
                "apiVersion": "virtnode.io/v1alpha1", "kind": "DomainHotplug",
                "metadata": {"name": name, "labels": {"virtnode.io/node": NODE}},
                "spec": {"nodeName": NODE, "domain": {"name": name}, "vcpus": {"count": 3},
                    "ttlSecondsAfterFinished": 2},
            }))?;
            let begun = Instant::now();
            let called = async {
                let called = self.node.control.called();
                let params = PostParams::default();
                let (made, ()) = tokio::join!(self.api.create(&params, &object), called);
                made.map(|_| begun.elapsed())
            };
            times.push(timeout(PATIENCE, called).await.context("no call")??);
        }
        for number in 0..OBJECTS {
            let name = name(number);
            eventually(PATIENCE, async || {
                let records = self.node.operations_of(&name);
                let ended = records.iter().find_map(|record| record.verdict);
                ensure!(ended == Some(verdict), "{name}: {ended:?}");
                Ok(())
            })
            .await?;
        }
        // On the object, and on the Node if not all is proven.
        let of_each = 1 + u64::from(verdict != Verdict::Verified);
        eventually(PATIENCE, async || {
            let left = self.api.list(&Default::default()).await?.items.len();
            ensure!(left == 0, "{left} objects are left");
            let told = self.node.metrics.cluster.events.get() - told;
            let all = of_each * OBJECTS as u64;
            ensure!(told >= all, "{told} of {all} events are written");
            Ok(())
        })
        .await?;
        Ok(times)
    }

    /// All calls so far that objects cost: made by their user; by the daemon the Node looked up, the
    /// object owned, told of and deleted, and events written.
    async fn calls(&self) -> anyhow::Result<usize> {
        let events = self.server.audit_events().await?;
        let calls = events.iter().filter(|event| {
            let of_objects = event.resource == "domainhotplugs";
            let by_daemon = event.user_agent.starts_with("virtnode/");
            let is_answered = !matches!(event.verb.as_str(), "list" | "watch");
            let of_daemon = of_objects || ["nodes", "events"].contains(&event.resource.as_str());
            (by_daemon && is_answered && of_daemon) || (of_objects && event.verb == "create")
        });
        Ok(calls.count())
    }
}
