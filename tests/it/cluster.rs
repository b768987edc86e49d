//! The Node publisher on a real API server of any release.

#![expect(
    clippy::print_stdout,
    reason = "figures and messages, for people to read"
)]

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use virtnode::cluster::{Cluster, ClusterConfig, ClusterError, Owners};
use virtnode::label::LabelSet;
use virtnode::publish::node::NodePublisherOptions;

use crate::support::eventually;
use crate::support::kube::{KubeServer, RIGHTS};
use crate::support::publisher::{Publisher, SOON, labels, until};

const Q35: &str = "machine.virtnode.io/pc-q35-10.0";
const I440FX: &str = "machine.virtnode.io/pc-i440fx-10.0";
const EIM: &str = "virtnode.io/eim";
const ALL: [(&str, &str); 3] = [(Q35, "288"), (I440FX, "240"), (EIM, "auto")];

const DAEMON: &str = "system:serviceaccount:virtnode:virtnode";
/// Far below the fallback interval, so that the watch must have triggered the repair.
/// `benches/daemon.rs` measures the latency.
const REPAIRED_WITHIN: Duration = Duration::from_secs(20);

fn options() -> NodePublisherOptions {
    NodePublisherOptions {
        start_jitter: Duration::ZERO,
        ..NodePublisherOptions::default()
    }
}

/// A Kubernetes with the daemon's service account and rights.
struct Lab {
    server: KubeServer,
}

impl Lab {
    async fn start() -> anyhow::Result<Self> {
        let lab = Self {
            server: KubeServer::start().await?,
        };
        lab.allow_as_shipped().await?;
        Ok(lab)
    }

    /// Grants the daemon's account the rights of `manifests/base/rbac.yaml`.
    async fn allow_as_shipped(&self) -> anyhow::Result<()> {
        self.server.apply_manifest(RIGHTS).await?;
        self.allowed("virtnode").await
    }

    /// Grants a service account rights on nodes, and to write events.
    async fn allow(&self, account: &str, verbs: &[&str]) -> anyhow::Result<()> {
        let role: ClusterRole = serde_json::from_value(json!({
            "metadata": {"name": account},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes"], "verbs": verbs},
                {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
            ],
        }))?;
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": account},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": account},
            "subjects": [{"kind": "ServiceAccount", "namespace": "virtnode", "name": account}],
        }))?;
        self.bind(account, &role, &binding).await
    }

    async fn bind(
        &self,
        account: &str,
        role: &ClusterRole,
        binding: &ClusterRoleBinding,
    ) -> anyhow::Result<()> {
        let post = PostParams::default();
        Api::all(self.server.client()).create(&post, role).await?;
        Api::all(self.server.client())
            .create(&post, binding)
            .await?;
        self.allowed(account).await
    }

    /// Waits for new rights, which take effect a moment later.
    async fn allowed(&self, account: &str) -> anyhow::Result<()> {
        let cluster = self.cluster_as(account, "no-such-node").await?;
        eventually(SOON, async || match cluster.observe().await {
            Err(ClusterError::NodeNotFound { .. }) => Ok(()),
            other => anyhow::bail!("{other:?}"),
        })
        .await
    }

    async fn cluster_as(&self, account: &str, node: &str) -> anyhow::Result<Cluster> {
        let kubeconfig = self
            .server
            .service_account_kubeconfig("virtnode", account)
            .await?;
        let config = ClusterConfig {
            kubeconfig: Some(kubeconfig),
            ..ClusterConfig::new(node)
        };
        Ok(Cluster::connect(config).await?)
    }

    async fn cluster(&self, node: &str) -> anyhow::Result<Cluster> {
        self.cluster_as("virtnode", node).await
    }

    async fn publish(&self, node: &str, pairs: &[(&str, &str)]) -> anyhow::Result<Publisher> {
        let cluster = self.cluster(node).await?;
        Ok(Publisher::start(
            cluster,
            labels(pairs),
            LabelSet::new(),
            options(),
        ))
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.server.client())
    }

    async fn label(&self, node: &str, key: &str) -> anyhow::Result<Option<String>> {
        let node = self.nodes().get(node).await?;
        Ok(node.metadata.labels.unwrap_or_default().remove(key))
    }

    /// Edits a label like `kubectl label --overwrite`, or `kubectl label key-` for `None`.
    async fn edit(&self, node: &str, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let params = PatchParams {
            field_manager: Some("kubectl-label".into()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(json!({"metadata": {"labels": {key: value}}}));
        self.nodes().patch(node, &params, &patch).await?;
        Ok(())
    }

    async fn apply_as(&self, manager: &str, node: &str, labels: Value) -> anyhow::Result<()> {
        let patch = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"labels": labels}});
        let params = PatchParams::apply(manager).force();
        self.nodes()
            .patch(node, &params, &Patch::Apply(patch))
            .await?;
        Ok(())
    }

    /// Updates the status like the kubelet, every few minutes.
    async fn heartbeat(&self, node: &str) -> anyhow::Result<()> {
        let beat = json!({"type": "Ready", "status": "True", "reason": format!("Beat{:x}", fastrand::u64(..))});
        let patch = Patch::Strategic(json!({"status": {"conditions": [beat]}}));
        self.nodes()
            .patch_status(node, &PatchParams::default(), &patch)
            .await?;
        Ok(())
    }

    /// Returns the time until the label has this value.
    async fn time_until(&self, node: &str, key: &str, value: &str) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        while self.label(node, key).await?.as_deref() != Some(value) {
            ensure!(begin.elapsed() < SOON, "{key} is not back");
        }
        Ok(begin.elapsed())
    }

    /// Returns the daemon's requests about nodes so far: (reads, writes).
    async fn requests(&self) -> anyhow::Result<(usize, usize)> {
        let events = self.server.audit_events().await?;
        let ours = || {
            events
                .iter()
                .filter(|event| event.user == DAEMON && event.resource == "nodes")
        };
        let reads = ours().filter(|event| event.verb == "get").count();
        Ok((reads, ours().filter(|event| event.is_write()).count()))
    }
}

#[tokio::test]
async fn node_labels_follow_the_desired_set() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    println!("Kubernetes {:?}", lab.server.version());
    applied_and_cleared(&lab)
        .await
        .context("applied and cleared")?;
    in_conflict(&lab).await.context("in conflict")?;
    restored(&lab).await.context("restored")?;
    idle(&lab).await.context("idle")?;
    another_node(&lab).await.context("another node")?;
    without_rights(&lab).await.context("without rights")
}

async fn applied_and_cleared(lab: &Lab) -> anyhow::Result<()> {
    lab.server.create_node("clear").await?;
    lab.edit("clear", "other.io/x", Some("1")).await?;
    let mut publisher = lab.publish("clear", &ALL).await?;
    publisher.state(|state| state.synced).await?;

    let cluster = lab.cluster("clear").await?;
    let node = cluster.observe().await?;
    assert_eq!(node.shown.owned.len(), ALL.len());
    for (key, value) in ALL {
        assert_eq!(node.shown.labels.get(key).map(String::as_str), Some(value));
        assert!(
            !node.shown.owners.contains_key(key),
            "{:?}",
            node.shown.owners
        );
    }
    let entries = lab
        .nodes()
        .get("clear")
        .await?
        .metadata
        .managed_fields
        .context("fields")?;
    let ours: Vec<_> = entries
        .iter()
        .filter(|entry| entry.manager.as_deref() == Some("virtnode"))
        .collect();
    assert_eq!(ours.len(), 1);
    assert_eq!(ours[0].operation.as_deref(), Some("Apply"));

    // A label that is no longer desired is removed, with an event.
    publisher.publish(&ALL[..2]);
    until(|| publisher.changes("removed") == 1).await?;
    assert_eq!(lab.label("clear", EIM).await?, None);
    event(lab, "clear", "LabelsRemoved", EIM).await?;

    // A stop removes nothing; a clear removes virtnode's labels only.
    publisher.stop().await?;
    assert_eq!(lab.label("clear", Q35).await?.as_deref(), Some("288"));
    let mut removed = cluster.clear().await?;
    removed.sort();
    assert_eq!(removed, [I440FX, Q35]);
    let node = cluster.observe().await?;
    assert!(node.shown.owned.is_empty());
    let left: Vec<_> = node.shown.labels.keys().map(String::as_str).collect();
    assert_eq!(left, ["kubernetes.io/hostname", "other.io/x"]);
    assert_eq!(cluster.clear().await?, Vec::<String>::new());
    Ok(())
}

async fn event(lab: &Lab, node: &str, reason: &str, note: &str) -> anyhow::Result<()> {
    let events: Api<Event> = Api::namespaced(lab.server.client(), "default");
    eventually(SOON, async || {
        let found = events.list(&ListParams::default()).await?;
        let ours = found.items.iter().filter(|event| {
            event
                .regarding
                .as_ref()
                .and_then(|node| node.name.as_deref())
                == Some(node)
                && event.reason.as_deref() == Some(reason)
        });
        let ours: Vec<_> = ours.collect();
        ensure!(ours.len() == 1, "{} events {reason}", ours.len());
        let text = ours[0].note.as_deref().unwrap_or_default();
        ensure!(text.contains(note), "{text}");
        Ok(())
    })
    .await
}

async fn in_conflict(lab: &Lab) -> anyhow::Result<()> {
    lab.server.create_node("conflict").await?;
    lab.edit("conflict", Q35, Some("by-hand")).await?;
    lab.apply_as("gitops", "conflict", json!({I440FX: "by-apply"}))
        .await?;
    let mut publisher = lab.publish("conflict", &ALL).await?;
    let state = publisher.state(|state| state.synced).await?;
    let conflicts: Vec<_> = state
        .conflicts
        .iter()
        .map(|(key, conflict)| {
            let owner = conflict.owner.as_ref().map(|owner| owner.manager.as_str());
            (key.as_str(), owner, conflict.value.as_deref())
        })
        .collect();
    assert_eq!(
        conflicts,
        [
            (I440FX, Some("gitops"), Some("by-apply")),
            (Q35, Some("kubectl-label"), Some("by-hand"))
        ]
    );
    assert_eq!(lab.label("conflict", EIM).await?.as_deref(), Some("auto"));
    assert_eq!(
        lab.label("conflict", Q35).await?.as_deref(),
        Some("by-hand")
    );
    assert_eq!(publisher.conflicts("dropped"), 2);
    event(lab, "conflict", "LabelConflict", "gitops owns it").await?;

    // One owner releases its label, the other sets the desired value.
    lab.apply_as("gitops", "conflict", json!({"gitops.io/x": "1"}))
        .await?;
    lab.edit("conflict", Q35, Some("288")).await?;
    publisher
        .state(|state| state.conflicts.is_empty() && state.published.len() == ALL.len())
        .await?;
    assert_eq!(lab.label("conflict", I440FX).await?.as_deref(), Some("240"));

    // A published label that another applier takes is a conflict.
    lab.apply_as("gitops", "conflict", json!({EIM: "none"}))
        .await?;
    let state = publisher.state(|state| !state.conflicts.is_empty()).await?;
    assert_eq!(state.conflicts.len(), 1);
    assert_eq!(lab.label("conflict", EIM).await?.as_deref(), Some("none"));
    assert_eq!(publisher.failures("api-conflict"), 0);
    Ok(())
}

async fn restored(lab: &Lab) -> anyhow::Result<()> {
    lab.server.create_node("drift").await?;
    let mut publisher = lab.publish("drift", &ALL).await?;
    publisher.state(|state| state.synced).await?;
    let mut times = Vec::new();
    // Three edits: a fourth would make the label contested.
    for edit in [None, Some("999"), None] {
        for (key, value) in ALL {
            lab.edit("drift", key, edit).await?;
            times.push(lab.time_until("drift", key, value).await?);
        }
    }
    until(|| publisher.changes("repaired") == times.len() as u64).await?;
    times.sort();
    println!(
        "restored after: median {:?}, longest {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
    assert!(times[times.len() - 1] <= REPAIRED_WITHIN, "{times:?}");
    assert!(
        lab.cluster("drift")
            .await?
            .observe()
            .await?
            .shown
            .owned
            .contains(Q35)
    );
    assert_eq!(publisher.conflicts("dropped"), 0);
    Ok(())
}

async fn idle(lab: &Lab) -> anyhow::Result<()> {
    lab.server.create_node("rest").await?;
    let mut publisher = lab.publish("rest", &ALL).await?;
    publisher.state(|state| state.synced).await?;
    // The watch exists once it has been answered.
    lab.edit("rest", EIM, None).await?;
    until(|| publisher.changes("repaired") == 1).await?;
    let (reads, writes) = lab.requests().await?;

    for round in 0..25 {
        lab.edit("rest", "other.io/round", Some(&round.to_string()))
            .await?;
        lab.heartbeat("rest").await?;
    }
    // Handled after all heartbeats.
    lab.edit("rest", EIM, None).await?;
    until(|| publisher.changes("repaired") == 2).await?;
    let (reads_then, writes_then) = lab.requests().await?;
    println!(
        "50 changes by others: {} reads and {} writes by us",
        reads_then - reads - 1,
        writes_then - writes - 1
    );
    assert_eq!(
        (reads_then, writes_then),
        (reads + 1, writes + 1),
        "only what puts {EIM} back"
    );
    Ok(())
}

async fn another_node(lab: &Lab) -> anyhow::Result<()> {
    // With all rights, including `create`.
    let admin =
        |node| Cluster::with_client(lab.server.client(), node, ClusterConfig::CALL_DEADLINE);
    let ghost = admin("ghost")?;
    let missing = ghost.observe().await.expect_err("no node");
    assert_eq!(missing.code(), "api-node-not-found", "{missing}");
    let uid = "00000000-0000-0000-0000-000000000001";
    let set = labels(&ALL);
    for cluster in [ghost.clone(), lab.cluster("ghost").await?] {
        let refused = cluster
            .apply(&set, uid, Owners::Respect)
            .await
            .expect_err("no node");
        println!("apply to a missing Node: {refused}");
        assert!(
            ["api-node-not-found", "api-forbidden"].contains(&refused.code()),
            "{refused}"
        );
    }
    assert!(lab.nodes().get_opt("ghost").await?.is_none());
    let mut publisher = lab.publish("ghost", &ALL).await?;
    let problem = publisher
        .state(|state| state.problem.is_some())
        .await?
        .problem;
    assert_eq!(problem.context("a problem")?.code, "api-node-not-found");
    assert!(lab.nodes().get_opt("ghost").await?.is_none());

    // It is labeled once the kubelet has registered it.
    lab.server.create_node("ghost").await?;
    publisher.state(|state| state.synced).await?;

    // A write with the uid of a replaced Node is refused.
    let refused = ghost
        .apply(&set, uid, Owners::Respect)
        .await
        .expect_err("another uid");
    println!("apply to another Node by this name: {refused}");
    assert_eq!(refused.code(), "api-conflict", "{refused}");

    // Force is limited to the version that was read.
    let seen = ghost.observe().await?;
    lab.heartbeat("ghost").await?;
    let owners = Owners::Override {
        version: &seen.resource_version,
    };
    let refused = ghost
        .apply(&set, &seen.uid, owners)
        .await
        .expect_err("a new version");
    assert_eq!(refused.code(), "api-conflict", "{refused}");

    // The Node is recreated: the labels are restored without counting repairs.
    lab.nodes()
        .delete("ghost", &DeleteParams::default())
        .await?;
    publisher.state(|state| state.problem.is_some()).await?;
    lab.server.create_node("ghost").await?;
    until(|| publisher.changes("added") == 6).await?;
    assert_eq!(publisher.changes("repaired"), 0);
    Ok(())
}

async fn without_rights(lab: &Lab) -> anyhow::Result<()> {
    lab.server.create_node("rights").await?;
    lab.allow("reader", &["get", "list", "watch"]).await?;
    let cluster = lab.cluster_as("reader", "rights").await?;
    let mut publisher = Publisher::start(cluster, labels(&ALL), LabelSet::new(), options());
    let problem = publisher
        .state(|state| state.problem.is_some())
        .await?
        .problem;
    let problem = problem.context("a problem")?;
    println!("without the right to patch: {}", problem.message);
    assert_eq!(problem.code, "api-forbidden");
    assert!(
        problem
            .message
            .starts_with("virtnode may not patch Node rights")
    );
    assert!(problem.message.contains("the right `patch` on `nodes`"));

    let without_rights = Cluster::with_client(
        lab.server
            .service_account_client("virtnode", "nobody")
            .await?,
        "rights",
        ClusterConfig::CALL_DEADLINE,
    )?;
    let refused = without_rights.observe().await.expect_err("no right");
    assert!(
        refused.to_string().contains("the right `get` on `nodes`"),
        "{refused}"
    );
    Ok(())
}

#[tokio::test]
async fn restarted_api_server_gets_pending_changes() -> anyhow::Result<()> {
    let mut lab = Lab::start().await?;
    lab.server.create_node("node-a").await?;
    let mut publisher = lab.publish("node-a", &ALL).await?;
    publisher.state(|state| state.synced).await?;
    lab.edit("node-a", EIM, None).await?;
    until(|| publisher.changes("repaired") == 1).await?;

    lab.server.stop_api();
    let problem = publisher
        .state(|state| state.problem.is_some())
        .await?
        .problem;
    let problem = problem.context("a problem")?;
    println!("without an API server: {}", problem.message);
    assert_eq!(problem.code, "api-unreachable");
    // Changes during the outage are not lost.
    publisher.publish(&[(Q35, "710"), (EIM, "auto")]);
    until(|| publisher.failures("api-unreachable") >= 3).await?;
    lab.server.start_api().await?;
    let begin = Instant::now();
    eventually(Duration::from_secs(60), async || {
        ensure!(lab.label("node-a", Q35).await?.as_deref() == Some("710"));
        Ok(())
    })
    .await?;
    println!(
        "new labels {:?} after the API server was ready again",
        begin.elapsed()
    );
    assert_eq!(lab.label("node-a", I440FX).await?, None);
    publisher.state(|state| state.problem.is_none()).await?;

    // The watch has recovered too.
    lab.edit("node-a", Q35, Some("1")).await?;
    let took = lab.time_until("node-a", Q35, "710").await?;
    println!("restored after {took:?} again");
    assert!(took <= REPAIRED_WITHIN, "{took:?}");
    Ok(())
}

#[tokio::test]
async fn pod_is_scheduled_to_a_node_with_enough_vcpus() -> anyhow::Result<()> {
    let mut lab = Lab::start().await?;
    lab.server.start_scheduler()?;
    let pods: Api<Pod> = Api::namespaced(lab.server.client(), "default");
    let mut publishers = Vec::new();
    for (node, maximum) in [("small", "240"), ("middle", "288"), ("large", "710")] {
        lab.server.create_node(node).await?;
        let mut publisher = lab.publish(node, &[(Q35, maximum)]).await?;
        publisher.state(|state| state.synced).await?;
        publishers.push(publisher);
    }
    let pod = serde_json::from_value(json!({
        "metadata": {"name": "vm"},
        "spec": {
            "containers": [{"name": "vm", "image": "example.com/vm"}],
            "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{
                    "matchExpressions": [{"key": Q35, "operator": "Gt", "values": ["299"]}],
                }]},
            }},
        },
    }))?;
    pods.create(&PostParams::default(), &pod).await?;
    let node = eventually(Duration::from_secs(60), async || {
        let pod = pods.get("vm").await?;
        pod.spec
            .and_then(|spec| spec.node_name)
            .context("the pod is not bound")
    })
    .await?;
    assert_eq!(node, "large");
    Ok(())
}
