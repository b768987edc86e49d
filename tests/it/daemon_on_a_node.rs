//! The daemon with a real libvirtd and a real API server: from capabilities to a Node's labels,
//! until `cleanup` removes them.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::kube::KubeServer;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);
const Q35: &str = "machine-alias.virtnode.io/q35";

async fn labels(nodes: &Api<Node>) -> anyhow::Result<BTreeMap<String, String>> {
    Ok(nodes.get("n1").await?.metadata.labels.unwrap_or_default())
}

#[tokio::test]
async fn labels_reach_the_node_are_restored_and_cleaned_up() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let kube = KubeServer::start().await?;
    kube.create_node("n1").await?;
    let nodes: Api<Node> = Api::all(kube.client());
    let foreign = json!({"metadata": {"labels": {"example.com/theirs": "yes"}}});
    nodes
        .patch("n1", &PatchParams::default(), &Patch::Merge(foreign))
        .await?;

    let kubeconfig = kube.kubeconfig().to_str().context("a path")?;
    let to_node = [
        "--publish",
        "node",
        "--kubeconfig",
        kubeconfig,
        "--node-name",
        "n1",
    ];
    let arguments = [&to_node[..], &["--start-jitter", "0"]].concat();
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    let published = labels(&nodes).await?;
    ensure!(published.contains_key(Q35), "{published:?}");
    assert_eq!(published["example.com/theirs"], "yes");
    let ours = |labels: &BTreeMap<String, String>| {
        labels
            .keys()
            .filter(|key| key.contains("virtnode.io/"))
            .count()
    };
    assert!(ours(&published) > 50);
    assert!(!daemon.labels_file().exists(), "the file is not a target");

    let delete = json!({"metadata": {"labels": {Q35: null}}});
    nodes
        .patch("n1", &PatchParams::default(), &Patch::Merge(delete))
        .await?;
    eventually(Duration::from_secs(2), async || {
        ensure!(labels(&nodes).await? == published, "not restored yet");
        Ok(())
    })
    .await?;
    assert_eq!(
        daemon.metric("virtnode_label_changes_total{action=\"repaired\"}")?,
        1.0
    );

    let (status, directory) = daemon.stop().await?;
    assert_eq!(status.code(), Some(0));
    assert_eq!(
        labels(&nodes).await?,
        published,
        "labels stay when the daemon ends"
    );

    // Edited while no daemon runs: the next one restores it.
    let edit = json!({"metadata": {"labels": {Q35: "edited"}}});
    nodes
        .patch("n1", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    let daemon = Daemon::start_in(directory, &libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    assert_eq!(labels(&nodes).await?, published);
    daemon.stop().await?;

    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .arg("cleanup")
        .args(to_node)
        .output()?;
    let printed = String::from_utf8(output.stdout)?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        printed,
        format!("Node n1: {} labels removed.\n", ours(&published))
    );
    let left = labels(&nodes).await?;
    assert_eq!(ours(&left), 0, "{left:?}");
    assert_eq!(left["example.com/theirs"], "yes");
    Ok(())
}

#[tokio::test]
async fn missing_node_is_reported_and_not_created() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let kube = KubeServer::start().await?;
    let kubeconfig = kube.kubeconfig().to_str().context("a path")?;
    let arguments = [
        "--publish",
        "node,file",
        "--kubeconfig",
        kubeconfig,
        "--node-name",
        "nobody",
        "--start-jitter",
        "0",
    ];
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    // The file does not need the Node.
    eventually(LONG, async || {
        ensure!(
            daemon.labels()?.contains_key(Q35),
            "no labels in the file yet"
        );
        Ok(())
    })
    .await?;
    let answer = daemon.get("/readyz")?;
    assert_eq!(answer.status, 503);
    assert!(
        answer.text().contains("first labels on the Node"),
        "{}",
        answer.text()
    );
    eventually(LONG, async || {
        let log = daemon.log();
        let is_reported = log.iter().any(|line| line.to_string().contains("nobody"));
        ensure!(is_reported, "{log:?}");
        Ok(())
    })
    .await?;
    let failures = "virtnode_label_sync_failures_total{reason=\"api-node-not-found\"}";
    assert!(daemon.metric(failures)? >= 1.0);
    let nodes: Api<Node> = Api::all(kube.client());
    assert_eq!(nodes.list(&Default::default()).await?.items.len(), 0);
    kube.create_node("nobody").await?;
    daemon.ready().await?;
    Ok(())
}
