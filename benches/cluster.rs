//! Figures of DomainHotplug objects with a private Kubernetes: time from the creation of an object
//! to the hypervisor call, and API server calls per object.
//!
//! The hypervisor is in memory and answers in 2 ms, so that the figures show only the time that
//! virtnode takes. The output has the format of `daemon.rs`.

#[allow(dead_code, reason = "no benchmark uses all of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the integration tests"
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

use parts::{median, ms, progress, report};
use support::controller::HotplugNode;
use support::eventually;
use support::fake_domains::{Cpus, FakeGuest};
use support::kube::KubeServer;
use support::kube::objects::define;

const OBJECTS: usize = 50;
const NODE: &str = "figures";
/// Maximum time for steps that normally take moments.
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
        ensure!(watched > 0.0, "no watch yet");
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
        times.extend(objects.complete(verdict, cpus).await?);
        let calls = objects.calls().await? - calls;
        #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
        let each = calls as f64 / OBJECTS as f64;
        report(
            &format!("calls to the API server for a DomainHotplug that ends {verdict}"),
            &format!("{each:.1}"),
            "<= 8",
            each <= 8.0,
            "creation, status, events and deletion",
        );
    }
    let reached = median(&mut times);
    let last = times.last().copied().unwrap_or_default();
    report(
        "DomainHotplug created to hypervisor called",
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
    /// Creates objects one after another and waits until each has the verdict, its events and its
    /// deletion. Returns the time from each creation to the hypervisor call.
    async fn complete(&self, verdict: Verdict, cpus: Cpus) -> anyhow::Result<Vec<Duration>> {
        progress(&format!(
            "{OBJECTS} objects that end {verdict}, one after another"
        ));
        let events_before = self.node.metrics.events.written.get();
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
            times.push(
                timeout(PATIENCE, called)
                    .await
                    .context("no hypervisor call")??,
            );
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
        // One event on the object, and one on the Node unless everything is verified.
        let events_per_object = 1 + u64::from(verdict != Verdict::Verified);
        eventually(PATIENCE, async || {
            let left = self.api.list(&Default::default()).await?.items.len();
            ensure!(left == 0, "{left} objects are left");
            let events = self.node.metrics.events.written.get() - events_before;
            let all = events_per_object * OBJECTS as u64;
            ensure!(events >= all, "{events} of {all} events are written");
            Ok(())
        })
        .await?;
        Ok(times)
    }

    /// Returns the number of API server calls caused by objects so far: creation by the user, and by
    /// the daemon reading the Node, owning, updating and deleting the object, and writing events.
    async fn calls(&self) -> anyhow::Result<usize> {
        let events = self.server.audit_events().await?;
        let calls = events.iter().filter(|event| {
            let of_objects = event.resource == "domainhotplugs";
            let by_daemon = event.user_agent.starts_with("virtnode/");
            let is_single = !matches!(event.verb.as_str(), "list" | "watch");
            let of_daemon = of_objects || ["nodes", "events"].contains(&event.resource.as_str());
            (by_daemon && is_single && of_daemon) || (of_objects && event.verb == "create")
        });
        Ok(calls.count())
    }
}
