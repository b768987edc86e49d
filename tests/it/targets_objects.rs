//! `virtnode targets` on a real API server: NodeVirtualizations, nodes that accept no pods, and
//! lists of several pages.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use virtnode::capability::{Capabilities, DomainCapabilities, NodeFacts, Version};
use virtnode::cluster::objects::NodeVirtualizationStatus;
use virtnode::hypervisor::ConnectionState;
use virtnode::probe::Reading;
use virtnode::publish::virtualization::Snapshot;

use crate::support::eventually;
use crate::support::kube::KubeServer;
use crate::support::kube::objects::define;
use crate::targets::{ask, domain, labels, placed, virtnode};

const OBJECTS: &str = "/apis/virtnode.io/v1alpha1/nodevirtualizations";
const MACHINE: &str = "pc-q35-10.0";

/// Returns the status that a daemon on Debian 13 with KVM writes.
fn described(at: Timestamp, connection: ConnectionState) -> NodeVirtualizationStatus {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0");
    let read = |file: &str| std::fs::read(directory.join(file)).unwrap();
    let document = DomainCapabilities::parse("dc", &read("dc-x86_64-q35-kvm.xml")).unwrap();
    let reading = Reading {
        facts: NodeFacts {
            libvirt_version: Some(Version::new(11, 3, 0)),
            hypervisor_version: Some(Version::new(10, 0, 2)),
            capabilities: Some(Capabilities::parse("caps", &read("capabilities.xml")).unwrap()),
            domain_capabilities: vec![document],
            kvm_max_vcpus: Some(1024),
            ..NodeFacts::default()
        },
        ..Reading::default()
    };
    let before = NodeVirtualizationStatus::default();
    Snapshot::new(&reading, &[], &[], at).status(&before, connection, at)
}

fn without_machine(mut status: NodeVirtualizationStatus) -> NodeVirtualizationStatus {
    for guest in &mut status.guests {
        guest.machines.retain(|machine| machine.name != MACHINE);
    }
    status
}

async fn create_object(
    server: &KubeServer,
    name: &str,
    status: &impl serde::Serialize,
) -> anyhow::Result<()> {
    let object = json!({
        "apiVersion": "virtnode.io/v1alpha1", "kind": "NodeVirtualization",
        "metadata": {"name": name}, "status": status,
    });
    let request = http::Request::post(OBJECTS)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&object)?)?;
    let _made: Value = server.client().request(request).await?;
    Ok(())
}

async fn change(server: &KubeServer, node: &str, patch: Value) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(server.client());
    let patch = Patch::Merge(patch);
    nodes.patch(node, &PatchParams::default(), &patch).await?;
    Ok(())
}

async fn labelled(server: &KubeServer, node: &str) -> anyhow::Result<()> {
    server.create_node(node).await?;
    change(server, node, json!({"metadata": {"labels": labels("new")}})).await
}

/// Returns name, answer and states of each node.
fn rows(answer: &Value) -> Vec<(String, String, Value)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let nodes = answer["nodes"].as_array().into_iter().flatten();
    nodes
        .map(|node| {
            (
                text(&node["name"]),
                text(&node["answer"]),
                node["states"].clone(),
            )
        })
        .collect()
}

fn row(name: &str, answer: &str, states: &[&str]) -> (String, String, Value) {
    (name.to_owned(), answer.to_owned(), json!(states))
}

#[tokio::test]
async fn objects_override_and_complete_labels_and_scheduler_agrees() -> anyhow::Result<()> {
    let mut server = KubeServer::start().await?;
    define(&server).await?;
    let now = Timestamp::now();
    let up = ConnectionState::Up(1);
    let long_ago = now - SignedDuration::from_hours(4);
    for node in [
        "confirmed",
        "cut-off",
        "plain",
        "stale",
        "taken-back",
        "unreadable",
    ] {
        labelled(&server, node).await?;
    }
    for node in ["object-only", "unlabeled"] {
        server.create_node(node).await?;
    }
    change(
        &server,
        "object-only",
        json!({"metadata": {"labels": {"kubernetes.io/arch": "amd64"}}}),
    )
    .await?;
    create_object(&server, "confirmed", &described(now, up)).await?;
    create_object(&server, "object-only", &described(now, up)).await?;
    create_object(&server, "taken-back", &without_machine(described(now, up))).await?;
    create_object(&server, "cut-off", &described(now, ConnectionState::Down)).await?;
    // A stale object does not override the labels.
    create_object(&server, "stale", &without_machine(described(long_ago, up))).await?;
    create_object(&server, "of-no-node", &described(now, up)).await?;
    // A lax schema, as another version's, lets an unreadable object in.
    let definition =
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/nodevirtualizations.virtnode.io";
    let lax = json!([{"op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema",
        "value": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}]);
    let request = http::Request::patch(definition)
        .header("content-type", "application/json-patch+json")
        .body(serde_json::to_vec(&lax)?)?;
    let _changed: Value = server.client().request(request).await?;
    eventually(Duration::from_secs(60), async || {
        create_object(
            &server,
            "unreadable",
            &json!({"architecture": {"of": "another kind"}}),
        )
        .await
    })
    .await?;

    let xml = domain("kvm", MACHINE, 4, "");
    let (code, answer, err) = ask(&server, &["--domain-xml", "-"], &xml).await?;
    assert_eq!(code, 0, "{err}");
    let complaint = "virtnode: cannot read NodeVirtualization unreadable, using the node's labels \
                     alone: ";
    assert!(err.starts_with(complaint), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    let expected = [
        row("confirmed", "feasible", &[]),
        row("object-only", "feasible", &[]),
        row("plain", "feasible", &[]),
        row("stale", "feasible", &["stale"]),
        row("unreadable", "feasible", &["unreadable"]),
        row("cut-off", "feasible", &["cut-off"]),
        row("taken-back", "infeasible", &[]),
    ];
    let mut rows = rows(&answer);
    // Nodes of equal rank are ordered by their maximum of vCPUs, which objects report more exactly.
    rows[..5].sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(rows, expected, "{answer:#}");
    assert_eq!(answer["named"], json!(["taken-back", "object-only"]));
    assert_eq!(answer["untold"], json!(["unlabeled"]));
    let reasons = answer["nodes"][6]["findings"]
        .as_array()
        .context("findings")?;
    assert_eq!(reasons[0]["code"], "machine", "{reasons:#?}");
    let note = reasons
        .iter()
        .filter_map(|finding| finding["message"].as_str());
    assert!(
        note.clone()
            .any(|text| text.starts_with("its labels say that it could"))
    );

    server.start_scheduler()?;
    let pods: Api<Pod> = Api::namespaced(server.client(), "default");
    for node in [
        "confirmed",
        "taken-back",
        "object-only",
        "unlabeled",
        "unreadable",
    ] {
        let bound = placed(&pods, &format!("vm-{node}"), node, &answer["affinity"]).await?;
        let fits = ["confirmed", "object-only", "unreadable"].contains(&node);
        assert_eq!(
            bound.as_deref(),
            fits.then_some(node),
            "{}",
            answer["affinity"]
        );
    }

    // Labels do not describe another domain type than the best one.
    let soft = domain("qemu", MACHINE, 2, "");
    let (code, answer, _) = ask(&server, &["--domain-xml", "-"], &soft).await?;
    assert_eq!(code, 0, "{answer:#}");
    let fits = |name: &str| {
        let nodes = answer["nodes"].as_array().into_iter().flatten();
        let mut of = nodes.filter(|node| node["name"] == name);
        of.next().map(|node| node["answer"].clone())
    };
    assert_eq!(fits("confirmed"), Some("feasible".into()));
    assert_eq!(fits("plain"), Some("unknown".into()));
    Ok(())
}

#[tokio::test]
async fn nodes_that_accept_no_pods_come_last_with_their_state() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    let nodes: Api<Node> = Api::all(server.client());
    for node in ["a-cordoned", "b-not-ready", "c-silent", "d-here", "e-free"] {
        labelled(&server, node).await?;
    }
    change(
        &server,
        "a-cordoned",
        json!({"spec": {"unschedulable": true}}),
    )
    .await?;
    for (node, conditions) in [
        (
            "b-not-ready",
            json!([{"type": "Ready", "status": "Unknown"}]),
        ),
        ("c-silent", json!([])),
    ] {
        let patch = Patch::Merge(json!({"status": {"conditions": conditions}}));
        nodes
            .patch_status(node, &PatchParams::default(), &patch)
            .await?;
    }
    let xml = domain("kvm", MACHINE, 4, "");
    let here = ["--domain-xml", "-", "--node-name", "d-here"];
    let (code, answer, err) = ask(&server, &here, &xml).await?;
    assert_eq!(code, 0, "{err}");
    let expected = [
        row("c-silent", "feasible", &[]),
        row("e-free", "feasible", &[]),
        row("d-here", "feasible", &["runs-here"]),
        row("a-cordoned", "feasible", &["cordoned"]),
        row("b-not-ready", "feasible", &["not-ready"]),
    ];
    assert_eq!(rows(&answer), expected, "{answer:#}");
    // The cluster has no NodeVirtualizations.
    assert!(err.contains("using labels alone"), "{err}");

    // The same list from a file.
    let list = server.client();
    let list = list
        .request_text(http::Request::get("/api/v1/nodes").body(Vec::new())?)
        .await?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("nodes.json");
    std::fs::write(&file, list)?;
    let file = file.to_str().context("a path")?;
    let from_file = [&here[..], &["--nodes", file]].concat();
    let (code, same, err) = ask(&server, &from_file, &xml).await?;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(same, answer);
    Ok(())
}

#[tokio::test]
async fn lists_of_several_pages_are_read_completely() -> anyhow::Result<()> {
    const MANY: usize = 1001;
    let server = KubeServer::start().await?;
    define(&server).await?;
    let nodes: Api<Node> = Api::all(server.client());
    let few = json!({
        "kubernetes.io/arch": "amd64", "virtnode.io/accelerator": "kvm",
        "machine.virtnode.io/pc-q35-10.0": "1024",
    });
    let (nodes, few) = (&nodes, &few);
    let server = &server;
    let makes = (0..MANY).map(async |number: usize| -> anyhow::Result<()> {
        let name = format!("node-{number:04}");
        let node = serde_json::from_value(json!({"metadata": {"name": name, "labels": few}}))?;
        nodes.create(&PostParams::default(), &node).await?;
        // The last nodes of each page, and one in the middle.
        if [499, 700, 999, 1000].contains(&number) {
            let status = without_machine(described(Timestamp::now(), ConnectionState::Up(1)));
            return create_object(server, &name, &status).await;
        }
        create_object(server, &name, &json!({"architecture": "x86_64"})).await
    });
    let made: Vec<_> = futures::stream::iter(makes)
        .buffer_unordered(16)
        .collect()
        .await;
    made.into_iter().collect::<anyhow::Result<()>>()?;
    let xml = domain("kvm", MACHINE, 4, "");
    let (code, answer, err) = ask(server, &["--domain-xml", "-"], &xml).await?;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(answer["nodes"].as_array().map(Vec::len), Some(MANY));
    assert_eq!(answer["fitting"], MANY - 4);
    assert_eq!(
        answer["named"],
        json!(["node-0499", "node-0700", "node-0999", "node-1000"])
    );
    let events = server.audit_events().await?;
    for resource in ["nodes", "nodevirtualizations"] {
        let lists = events.iter().filter(|event| {
            let ours = event.user_agent.starts_with("virtnode/");
            ours && event.verb == "list" && event.resource == resource
        });
        let proceeds: Vec<bool> = lists.map(|event| event.uri.contains("continue=")).collect();
        assert_eq!(proceeds, [false, true, true], "{resource}");
    }

    // The table lists the best nodes and summarizes the others.
    let kubeconfig = server.kubeconfig().to_str().context("a path")?.to_owned();
    let (_, out, _) = tokio::task::spawn_blocking(move || {
        virtnode(
            &["targets", "--domain-xml", "-", "--kubeconfig", &kubeconfig],
            &xml,
        )
    })
    .await?;
    assert!(
        out.starts_with("997 of 1001 nodes fit domain vm; best first:\n"),
        "{out}"
    );
    assert!(
        out.contains("\nAnd 961 more (--output json lists them all):\n  957 yes\n  4 no "),
        "{out}"
    );
    assert!(out.lines().count() < 100, "{out}");
    Ok(())
}

#[tokio::test]
async fn missing_right_to_list_is_named_in_the_error() -> anyhow::Result<()> {
    let server = KubeServer::start().await?;
    define(&server).await?;
    labelled(&server, "a").await?;
    let kubeconfig = server
        .service_account_kubeconfig("default", "reader")
        .await?;
    let asks = async || -> anyhow::Result<(i32, String, String)> {
        let kubeconfig = kubeconfig.to_str().context("a path")?.to_owned();
        let xml = domain("kvm", MACHINE, 4, "");
        Ok(tokio::task::spawn_blocking(move || {
            virtnode(
                &["targets", "--domain-xml", "-", "--kubeconfig", &kubeconfig],
                &xml,
            )
        })
        .await?)
    };
    let (code, out, err) = asks().await?;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("the right `list` on `nodes`"), "{err}");
    let grant = "apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [''], resources: [nodes], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: default}]
";
    server.apply_manifest(grant).await?;
    // The authorizer caches rights for a moment.
    let (out, err) = eventually(Duration::from_secs(60), async || {
        let (code, out, err) = asks().await?;
        anyhow::ensure!(code == 0, "{code}: {err}");
        Ok((out, err))
    })
    .await?;
    assert!(out.starts_with("1 of 1 nodes fit domain vm"), "{out}");
    assert!(
        err.contains("using labels alone: virtnode may not list"),
        "{err}"
    );
    Ok(())
}
