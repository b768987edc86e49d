//! The test Kubernetes behaves as other tests require.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::support::eventually;
use crate::support::kube::KubeServer;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn scheduler_binds_a_pod_to_the_node_that_its_affinity_allows() -> anyhow::Result<()> {
    let mut server = KubeServer::start().await?;
    let nodes: Api<Node> = Api::all(server.client());
    for (name, maximum) in [("small", "240"), ("large", "710"), ("middle", "288")] {
        server.create_node(name).await?;
        let label = json!({"metadata": {"labels": {"example.com/maximum": maximum}}});
        nodes
            .patch(name, &PatchParams::default(), &Patch::Merge(label))
            .await?;
    }
    let pods: Api<Pod> = Api::namespaced(server.client(), "default");
    pods.create(&PostParams::default(), &pod_with_more_than("299")?)
        .await?;

    server.start_scheduler()?;

    let node = eventually(SOON, async || {
        let pod = pods.get("vm").await?;
        pod.spec
            .and_then(|spec| spec.node_name)
            .context("the pod is not bound")
    })
    .await?;
    assert_eq!(node, "large");
    pods.delete("vm", &DeleteParams::default().grace_period(0))
        .await?;
    Ok(())
}

fn pod_with_more_than(limit: &str) -> anyhow::Result<Pod> {
    Ok(serde_json::from_value(json!({
        "metadata": {"name": "vm"},
        "spec": {
            "containers": [{"name": "vm", "image": "example.com/vm"}],
            "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{
                    "matchExpressions": [
                        {"key": "example.com/maximum", "operator": "Gt", "values": [limit]},
                    ],
                }]},
            }},
        },
    }))?)
}

#[tokio::test]
async fn restarted_api_server_keeps_its_port_and_data() -> anyhow::Result<()> {
    let mut server = KubeServer::start().await?;
    let nodes: Api<Node> = Api::all(server.client());
    server.create_node("node-a").await?;

    server.stop_api();
    ensure!(
        nodes.get("node-a").await.is_err(),
        "a stopped server answered"
    );
    server.start_api().await?;

    nodes.get("node-a").await?;
    // The audit log is continued.
    let events = server.audit_events().await?;
    assert!(
        events
            .iter()
            .any(|e| e.verb == "create" && e.name == "node-a")
    );
    assert!(events.iter().any(|e| e.verb == "get" && e.name == "node-a"));
    Ok(())
}

#[tokio::test]
async fn audit_log_counts_every_write_of_a_user() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    server.create_node("node-a").await?;
    let client = server.service_account_client("virtnode", "daemon").await?;
    let nodes: Api<Node> = Api::all(client);
    let user = "system:serviceaccount:virtnode:daemon";

    let label = Patch::Merge(json!({"metadata": {"labels": {"example.com/x": "1"}}}));
    for _ in 0..3 {
        let refused = nodes.patch("node-a", &PatchParams::default(), &label).await;
        assert!(matches!(refused, Err(kube::Error::Api(status)) if status.is_forbidden()));
    }

    let events = server.audit_events().await?;
    let writes: Vec<_> = events
        .iter()
        .filter(|e| e.user == user && e.is_write())
        .collect();
    assert_eq!(writes.len(), 3);
    for write in writes {
        assert_eq!(write.verb, "patch");
        assert_eq!(
            (write.resource.as_str(), write.subresource.as_str()),
            ("nodes", "")
        );
        assert_eq!((write.name.as_str(), write.code), ("node-a", 403));
        assert_eq!(write.stage, "ResponseComplete");
        assert_eq!(write.user_agent, "virtnode-test");
    }
    Ok(())
}

#[tokio::test]
async fn admin_kubeconfig_works_for_another_program() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    let config = kube::Config::from_custom_kubeconfig(
        kube::config::Kubeconfig::read_from(server.kubeconfig())?,
        &kube::config::KubeConfigOptions::default(),
    )
    .await?;
    let version = kube::Client::try_from(config)?.apiserver_version().await?;
    assert_eq!(version.major, server.version().0.to_string());
    // Some builds report "20+".
    assert!(version.minor.starts_with(&server.version().1.to_string()));
    Ok(())
}
