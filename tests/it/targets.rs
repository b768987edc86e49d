//! `virtnode targets` on three kinds of nodes: a real scheduler agrees with every result.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use assert_cmd::Command;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::kube::KubeServer;

const OLD: &str = "tests/fixtures/debian12-libvirt-9.0.0-qemu-7.2";
const NEW: &str = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0";
const NODES: [&str; 3] = ["new", "old", "soft"];

/// Returns exit code, standard output and standard error.
pub(crate) fn virtnode(arguments: &[&str], input: &str) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .args(arguments)
        .write_stdin(input)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Returns the labels that the daemon would publish with the node's documents.
pub(crate) fn labels(node: &str) -> Value {
    let (directory, document, versions) = match node {
        "old" => (OLD, "dc-x86_64-q35-kvm.xml", ["9.0.0", "7.2.0"]),
        "new" => (NEW, "dc-x86_64-q35-kvm.xml", ["11.3.0", "10.0.2"]),
        _ => (NEW, "dc-x86_64-q35-qemu.xml", ["11.3.0", "10.0.2"]),
    };
    let capabilities = format!("{directory}/capabilities.xml");
    let document = format!("{directory}/{document}");
    let mut arguments = vec![
        "labels",
        "--output",
        "json",
        "--domain-capabilities",
        &document,
    ];
    arguments.extend([
        "--libvirt-version",
        versions[0],
        "--qemu-version",
        versions[1],
    ]);
    if node != "soft" {
        arguments.extend(["--capabilities", &capabilities]);
    }
    let (code, out, err) = virtnode(&arguments, "");
    assert_eq!((code, err.as_str()), (0, ""));
    let mut labels = serde_json::from_str::<Value>(&out).unwrap()["labels"].take();
    labels["kubernetes.io/arch"] = "amd64".into(); // the kubelet's
    labels
}

pub(crate) fn domain(virt_type: &str, machine: &str, vcpus: u32, cpu: &str) -> String {
    format!(
        "<domain type='{virt_type}'><name>vm</name><memory unit='GiB'>1</memory>\
         <vcpu>{vcpus}</vcpu><os><type arch='x86_64' machine='{machine}'>hvm</type></os>\
         <features><acpi/></features>{cpu}</domain>"
    )
}

/// Returns domains, and the nodes that can run them.
fn cases() -> Vec<(String, &'static [&'static str])> {
    let require = |feature: &str| {
        format!(
            "<cpu mode='host-model' check='partial'><feature policy='require' name='{feature}'/></cpu>"
        )
    };
    let model = |name: &str| {
        format!(
            "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>{name}</model></cpu>"
        )
    };
    vec![
        (domain("kvm", "pc-q35-7.2", 4, ""), &["new", "old"]),
        (domain("kvm", "pc-q35-10.0", 4, ""), &["new"]),
        (domain("kvm", "pc-q35-7.2", 256, ""), &["new"]),
        (domain("kvm", "q35", 4, ""), &["new", "old"]),
        (domain("kvm", "q35", 600, ""), &["new"]),
        (domain("kvm", "pc", 255, ""), &["new", "old"]),
        (domain("kvm", "pc", 256, ""), &[]),
        (
            domain("kvm", "pc-q35-7.2", 1, &model("pentium3")),
            &["new", "old"],
        ),
        (domain("kvm", "pc-q35-7.2", 1, &model("486-v1")), &["new"]),
        (domain("kvm", "pc-q35-7.2", 1, &require("vme")), &["old"]),
        (domain("qemu", "pc-q35-10.0", 2, ""), &["soft"]),
        (domain("kvm", "pc-q35-99.0", 2, ""), &[]),
    ]
}

/// Creates a pod that only `node` can run, returns the node that the scheduler binds it to, and
/// deletes the pod.
pub(crate) async fn placed(
    pods: &Api<Pod>,
    name: &str,
    node: &str,
    affinity: &Value,
) -> anyhow::Result<Option<String>> {
    let pod = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "affinity": {"nodeAffinity": affinity},
            "containers": [{"name": "vm", "image": "example.com/vm"}],
        },
    }))?;
    pods.create(&PostParams::default(), &pod).await?;
    let bound = eventually(Duration::from_secs(120), async || {
        let pod = pods.get(name).await?;
        let bound = pod.spec.and_then(|spec| spec.node_name);
        let conditions = pod.status.and_then(|status| status.conditions);
        let is_unschedulable = conditions
            .iter()
            .flatten()
            .any(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
        ensure!(
            bound.is_some() || is_unschedulable,
            "the scheduler has not handled {name}"
        );
        Ok(bound)
    })
    .await?;
    let at_once = DeleteParams::default().grace_period(0);
    pods.delete(name, &at_once).await?;
    Ok(bound)
}

/// Runs `virtnode targets` on a cluster and returns exit code, answer and standard error.
pub(crate) async fn ask(
    server: &KubeServer,
    arguments: &[&str],
    xml: &str,
) -> anyhow::Result<(i32, Value, String)> {
    let kubeconfig = server.kubeconfig().to_str().context("a path")?;
    let of = ["targets", "--kubeconfig", kubeconfig, "--output", "json"];
    let arguments: Vec<String> = of.iter().chain(arguments).map(|&a| a.to_owned()).collect();
    let xml = xml.to_owned();
    let (code, out, err) = tokio::task::spawn_blocking(move || {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        virtnode(&arguments, &xml)
    })
    .await?;
    let answer = serde_json::from_str(&out).with_context(|| format!("{code}: {err}"))?;
    Ok((code, answer, err))
}

#[tokio::test]
async fn scheduler_agrees_with_every_answer() -> anyhow::Result<()> {
    let mut server = KubeServer::start().await?;
    let nodes: Api<Node> = Api::all(server.client());
    for node in NODES {
        server.create_node(node).await?;
        let patch = Patch::Merge(json!({"metadata": {"labels": labels(node)}}));
        nodes.patch(node, &PatchParams::default(), &patch).await?;
    }
    server.start_scheduler()?;
    let pods: Api<Pod> = Api::namespaced(server.client(), "default");
    for (at, (xml, expected)) in cases().into_iter().enumerate() {
        let (code, answer, err) = ask(&server, &["--domain-xml", "-"], &xml).await?;
        let mut fitting: Vec<&str> = answer["nodes"]
            .as_array()
            .context("nodes")?
            .iter()
            .filter(|node| node["answer"] == "feasible")
            .filter_map(|node| node["name"].as_str())
            .collect();
        fitting.sort_unstable();
        assert_eq!(fitting, expected, "{xml}\n{answer}\n{err}");
        assert_eq!(code, if expected.is_empty() { 4 } else { 0 }, "{xml}");
        assert_eq!(answer["named"], json!([]), "labels suffice: {xml}");
        let affinity = &answer["affinity"];
        assert!(affinity.is_object(), "{xml}");
        // One pod for each node, which only that node can run.
        for node in NODES {
            let name = format!("vm-{at}-{node}");
            let bound = placed(&pods, &name, node, affinity).await?;
            let wanted = expected.contains(&node).then(|| node.to_owned());
            assert_eq!(bound, wanted, "{node}: {xml}\n{affinity}");
        }
    }
    Ok(())
}
