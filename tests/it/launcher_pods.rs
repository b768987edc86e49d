//! Launchers in a cluster: their identity by the API server's word, and changes of their vCPUs through
//! the broker, on real guests.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use virtnode::cluster::{Cluster, ClusterConfig, IdentityError, LauncherPods};

use crate::manifests::{KUBEVIRT, manifests};
use crate::own_node::{has_policies, is_denied};
use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::guest::Host as _;
use crate::support::kube::{KubeServer, RIGHTS};
use crate::support::launchers::Launchers;
use crate::support::launchers::broker::Broker;
use crate::support::launchers::vm::Vm;

const CRDS: &str = include_str!("../../manifests/base/crds.yaml");
const LAUNCHER_RIGHTS: &str = include_str!("../../manifests/overlays/kubevirt/rbac.yaml");
/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(90);
const INSTANCE: &str = "2f6fda6e-8c0f-4b2e-a7f1-0f7a3c1f9b11";

/// Creates a namespace with its account.
async fn namespace(server: &KubeServer, name: &str) -> anyhow::Result<()> {
    let namespaces: Api<Namespace> = Api::all(server.client());
    let namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
    namespaces
        .create(&PostParams::default(), &namespace)
        .await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(server.client(), name);
    let account = serde_json::from_value(json!({"metadata": {"name": "default"}}))?;
    accounts.create(&PostParams::default(), &account).await?;
    Ok(())
}

/// Creates the Pod of a launcher, as KubeVirt does, and returns its UID.
async fn launcher_pod(
    server: &KubeServer,
    namespace: &str,
    node: &str,
    instance: &str,
) -> anyhow::Result<String> {
    let pod = json!({
        "metadata": {
            "name": format!("virt-launcher-{instance}-x7k2p"),
            "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/created-by": INSTANCE},
            "ownerReferences": [{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance",
                "name": instance, "uid": INSTANCE, "controller": true}],
        },
        "spec": {
            "nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": "compute", "image": "virt-launcher"}],
        },
    });
    let pods: Api<Pod> = Api::namespaced(server.client(), namespace);
    let pod = serde_json::from_value(pod)?;
    let created = pods.create(&PostParams::default(), &pod).await?;
    created.metadata.uid.context("a UID")
}

async fn server() -> anyhow::Result<KubeServer> {
    let server = KubeServer::start().await?;
    for manifest in [CRDS, RIGHTS, LAUNCHER_RIGHTS] {
        server.apply_manifest(manifest).await?;
    }
    for node in ["n1", "n2"] {
        server.create_node(node).await?;
    }
    for name in ["tenant-a", "tenant-b"] {
        namespace(&server, name).await?;
    }
    Ok(server)
}

#[tokio::test]
async fn pods_of_this_node_are_known_by_their_metadata_alone() -> anyhow::Result<()> {
    let server = server().await?;
    let here = launcher_pod(&server, "tenant-a", "n1", "web").await?;
    let elsewhere = launcher_pod(&server, "tenant-a", "n2", "db").await?;
    let kubeconfig = server.pod_kubeconfig("virtnode", "virtnode", "n1").await?;
    let config = ClusterConfig {
        kubeconfig: Some(kubeconfig),
        ..ClusterConfig::new("n1")
    };
    let pods = LauncherPods::default();
    assert_eq!(pods.find(&here), Err(IdentityError::NotListed));
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    tokio::spawn(pods.clone().follow(Cluster::connect(config).await?, stop));

    let found = eventually(LONG, async || Ok(pods.find(&here)?)).await?;
    assert_eq!((&*found.namespace, &*found.instance), ("tenant-a", "web"));
    assert_eq!(found.instance_uid, INSTANCE);
    assert!(pods.find(&elsewhere).is_err());
    let later = launcher_pod(&server, "tenant-b", "n1", "web").await?;
    eventually(LONG, async || Ok(pods.find(&later)?)).await?;
    let api: Api<Pod> = Api::namespaced(server.client(), "tenant-a");
    let at_once = DeleteParams::default().grace_period(0);
    api.delete("virt-launcher-web-x7k2p", &at_once).await?;
    eventually(LONG, async || {
        ensure!(pods.find(&here).is_err(), "known still");
        Ok(())
    })
    .await?;
    Ok(())
}

/// Creates the overlay's admission policies, and waits until that for events denies one about a Pod.
async fn apply_policies(server: &KubeServer) -> anyhow::Result<()> {
    for object in manifests(KUBEVIRT)? {
        let kind = object["kind"].as_str().unwrap_or_default();
        if kind.starts_with("ValidatingAdmissionPolicy") {
            server.apply_manifest(&object.to_string()).await?;
        }
    }
    let client = server.pod_client("virtnode", "virtnode", "n1").await?;
    let events: Api<Event> = Api::namespaced(client, "tenant-a");
    let mut event: Event = serde_json::from_value(json!({
        "metadata": {"generateName": "probe-"},
        "eventTime": "2026-11-21T11:22:46.000000Z", "type": "Normal", "reason": "Probe",
        "action": "Probe", "note": "x", "reportingController": "virtnode",
        "reportingInstance": "n1",
        "regarding": {"apiVersion": "v1", "kind": "Pod", "name": "web", "namespace": "tenant-a"},
    }))?;
    eventually(LONG, async || {
        is_denied(events.create(&PostParams::default(), &event).await)
    })
    .await?;
    let about = event.regarding.as_mut().context("an object")?;
    about.api_version = Some("kubevirt.io/v1".to_owned());
    about.kind = Some("VirtualMachineInstance".to_owned());
    event.reporting_instance = Some("n2".to_owned());
    is_denied(events.create(&PostParams::default(), &event).await)?;
    Ok(())
}

/// With the overlay's rights and policies, and the launcher by way of a broker that permits reading
/// alone.
#[tokio::test]
async fn change_that_a_guest_has_not_taken_is_an_event_about_its_instance() -> anyhow::Result<()> {
    let server = server().await?;
    // Up to 1.29 there are none.
    if has_policies(&server).await? {
        apply_policies(&server).await?;
    }
    let uid = launcher_pod(&server, "tenant-a", "n1", "web").await?;
    let node = Launchers::new()?;
    let launcher = node.start(&uid).await?;
    let vm = Vm {
        namespace: "tenant-a",
        words: "nr_cpus=1",
        ..Vm::default()
    };
    let _guest = launcher.guest(&vm).await?;
    let broker = Broker::start(&node, &[]).await?;
    broker.uri(&uid).await?;
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.yaml");
    let text = json!({
        "connect": "none", "publish": ["node"], "nodeName": "n1",
        "kubeconfig": server.pod_kubeconfig("virtnode", "virtnode", "n1").await?,
        "launchers": {"enabled": true, "directory": broker.directory(), "verifyPods": true},
        "externalChanges": {"enabled": true},
    });
    fs::write(&config, text.to_string())?;
    let config = config.to_string_lossy().into_owned();
    let arguments = ["--config", &config, "--start-jitter", "0"];
    let daemon = Daemon::start_in(directory, "none", &arguments).await?;
    eventually(LONG, async || {
        let metrics = daemon.get("/metrics")?.text();
        let mut lines = metrics.lines();
        let seen = |line: &str| line.contains("name=\"web\"") && line.contains("\"online\"");
        ensure!(lines.any(seen), "{metrics}");
        Ok(())
    })
    .await?;

    launcher.virsh(&["setvcpus", &vm.domain(), "2", "--live", "--config"])?;
    let events: Api<Event> = Api::namespaced(server.client(), "tenant-a");
    let event = eventually(LONG, async || {
        let all = events.list(&ListParams::default()).await?;
        let ours = |event: &Event| {
            let is_probe = event.reason.as_deref() == Some("Probe");
            event.reporting_controller.as_deref() == Some("virtnode") && !is_probe
        };
        let event = all.items.into_iter().find(ours);
        event.with_context(|| format!("no event: {:#?}", daemon.log()))
    })
    .await?;
    assert_eq!(event.reason.as_deref(), Some("GuestRefused"));
    assert_eq!(event.type_.as_deref(), Some("Warning"));
    let note = event.note.context("a note")?;
    assert!(
        note.starts_with("plug vcpus: ") && note.contains("Remedy: "),
        "{note}"
    );
    let about = event.regarding.context("an object")?;
    assert_eq!(about.kind.as_deref(), Some("VirtualMachineInstance"));
    assert_eq!(about.name.as_deref(), Some("web"));
    assert_eq!(about.uid.as_deref(), Some(INSTANCE));
    let related = event.related.context("a second object")?;
    assert_eq!(related.kind.as_deref(), Some("Pod"));
    assert_eq!(related.uid, Some(uid));
    Ok(())
}

/// The daemon has the rights of its account, and the launchers only by way of the broker.
#[tokio::test]
async fn vcpus_in_a_launcher_change_only_for_a_verified_instance() -> anyhow::Result<()> {
    let server = server().await?;
    let uid = launcher_pod(&server, "tenant-a", "n1", "web").await?;
    let node = Launchers::new()?;
    let launcher = node.start(&uid).await?;
    let vm = Vm {
        namespace: "tenant-a",
        words: "lab.cpus=online",
        ..Vm::default()
    };
    let guest = launcher.guest(&vm).await?;
    let broker = Broker::start(&node, &["--allow-changes"]).await?;
    broker.uri(&uid).await?;

    let kubeconfig = server.pod_kubeconfig("virtnode", "virtnode", "n1").await?;
    let daemon = |hotplug: bool| {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("config.yaml");
        let text = json!({
            "connect": "none", "publish": ["node"], "nodeName": "n1", "kubeconfig": kubeconfig,
            "launchers": {"enabled": true, "directory": broker.directory(), "verifyPods": true,
                "hotplug": hotplug},
        });
        fs::write(&config, text.to_string())?;
        anyhow::Ok((directory, config))
    };
    let start = async |hotplug: bool| {
        let (directory, config) = daemon(hotplug)?;
        let config = config.to_string_lossy().into_owned();
        let arguments = ["--config", &config, "--start-jitter", "0"];
        let daemon = Daemon::start_in(directory, "none", &arguments).await?;
        // The domain is known once its launcher is.
        eventually(LONG, async || {
            let running = daemon.metric("virtnode_launchers{state=\"up\"}")?;
            ensure!(running == 1.0, "{running} up: {:#?}", daemon.log());
            Ok(())
        })
        .await?;
        anyhow::Ok(daemon)
    };
    let ask = |daemon: &Daemon, arguments: &[&str]| {
        let words = [&["hotplug"], arguments, &["--output", "json"]].concat();
        let (code, out, err) = run(&daemon.socket(), &words)?;
        let record: Value = serde_json::from_str(&out).with_context(|| format!("{out}{err}"))?;
        let message = record["message"].as_str().unwrap_or_default().to_owned();
        anyhow::Ok((code, message))
    };
    let vcpus = ["vcpus", "tenant-a/web", "2"];
    let memory = ["memory", "tenant-a/web", "1GiB"];

    let off = start(false).await?;
    let (code, message) = ask(&off, &vcpus)?;
    assert_eq!(code, 4, "{message}");
    let command = r#"kubectl -n tenant-a patch vm web --type merge -p '{"spec":{"template":{"spec":{"domain":{"cpu":{"sockets":2}}}}}}'"#;
    assert!(message.ends_with(command), "{message}");
    off.stop().await?;

    let on = start(true).await?;
    let (code, message) = eventually(LONG, async || {
        let answer = ask(&on, &vcpus)?;
        // The Pods are listed a moment later.
        ensure!(!answer.1.contains("has not listed"), "{}", answer.1);
        Ok(answer)
    })
    .await?;
    assert_eq!(code, 0, "{message}");
    guest.sees(|guest| guest.online == "0-1").await?;
    let count = |which: &str| launcher.virsh(&["vcpucount", &vm.domain(), which, "--current"]);
    assert_eq!(
        (count("--live")?.trim(), count("--config")?.trim()),
        ("2", "1")
    );
    for arguments in [
        &memory[..],
        &[&vcpus[..], &["--persistent"]].concat(),
        &[&vcpus[..], &["--online"]].concat(),
    ] {
        let (code, message) = ask(&on, arguments)?;
        assert_eq!(code, 4, "{message}");
        assert!(
            message.contains("kubectl -n tenant-a patch vm web"),
            "{message}"
        );
    }

    let api: Api<Pod> = Api::namespaced(server.client(), "tenant-a");
    let at_once = DeleteParams::default().grace_period(0);
    api.delete("virt-launcher-web-x7k2p", &at_once).await?;
    eventually(LONG, async || {
        let (code, message) = ask(&on, &["vcpus", "tenant-a/web", "3"])?;
        ensure!(
            code == 4 && message.contains("no launcher Pod"),
            "{code}: {message}"
        );
        Ok(())
    })
    .await?;
    assert_eq!(count("--live")?.trim(), "2");
    assert!(!broker.log().contains("refused"), "{}", broker.log());
    Ok(())
}
