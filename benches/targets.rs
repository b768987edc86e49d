//! Run time of the processes `virtnode targets` and `virtnode baseline` with 5,000 nodes: from a file
//! written by kubectl, and from a real API server.
//!
//! Each Node has the labels of a real one and a status of typical size, with fifty images. The output
//! has the format of `daemon.rs`.

#[allow(dead_code, reason = "no benchmark uses all of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the integration tests"
)]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use virtnode::capability::{Capabilities, CpuDefinition, DomainCapabilities, NodeFacts, Version};
use virtnode::hypervisor::ConnectionState;
use virtnode::label::{Policy, derive};
use virtnode::probe::Reading;
use virtnode::publish::virtualization::Snapshot;

use parts::{median, ms, progress, report, virtnode};
use support::kube::KubeServer;

const NODES: usize = 5000;
const GOAL: Duration = Duration::from_secs(1);
/// Every third node lacks this machine type.
const MACHINE: &str = "machine.virtnode.io/pc-q35-10.0";
const DOMAIN: &str = "<domain type='kvm'><name>vm</name><memory unit='GiB'>1</memory>\
    <vcpu>4</vcpu><os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
    <features><acpi/></features><cpu mode='host-model' check='partial'/></domain>";

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

async fn measure() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let domain = directory.path().join("domain.xml");
    fs::write(&domain, DOMAIN)?;
    let nodes: Vec<Value> = {
        let labels = labels()?;
        (0..NODES).map(|number| node(number, &labels)).collect()
    };
    let file = directory.path().join("nodes.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": nodes});
    fs::write(&file, serde_json::to_vec_pretty(&list)?)?;
    drop(list);
    let size = fs::metadata(&file)?.len() / 1_000_000;
    figure(
        &format!("virtnode targets, whole process, {NODES} nodes in a file of {size} MB"),
        20,
        &domain,
        &["--nodes".as_ref(), file.as_path()],
    )?;
    baseline(&directory.path().join("objects.json"))?;

    let server = KubeServer::start().await?;
    progress(&format!("creating {NODES} Nodes"));
    let api: Api<Node> = Api::all(server.client());
    let post = PostParams::default();
    let created = futures::stream::iter(nodes).map(async |node| -> anyhow::Result<()> {
        api.create(&post, &serde_json::from_value(node)?).await?;
        Ok(())
    });
    let created: Vec<_> = created.buffer_unordered(16).collect().await;
    created.into_iter().collect::<anyhow::Result<()>>()?;
    let (major, minor) = server.version();
    figure(
        &format!("  from an API server of Kubernetes {major}.{minor} on the same machine"),
        10,
        &domain,
        &["--kubeconfig".as_ref(), server.kubeconfig()],
    )
}

/// Measures whole runs, after one that fills the caches.
fn figure(what: &str, runs: usize, domain: &Path, source: &[&Path]) -> anyhow::Result<()> {
    progress(what.trim());
    let mut times = Vec::new();
    for _ in 0..=runs {
        let begun = Instant::now();
        let output = Command::new(virtnode())
            .env_clear()
            .args(["targets", "--output", "json", "--domain-xml"])
            .arg(domain)
            .args(source)
            .stdin(Stdio::null())
            .output()?;
        times.push(begun.elapsed());
        let answer: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        let without = NODES.div_ceil(3);
        ensure!(
            answer["fitting"] == NODES - without,
            "{} nodes fit",
            answer["fitting"]
        );
    }
    times.remove(0);
    let middle = median(&mut times);
    let last = times.last().copied().unwrap_or_default();
    report(
        &format!("{what} ({runs} times)"),
        &format!("{}, at most {}", ms(middle), ms(last)),
        "<= 1 s",
        middle <= GOAL,
        "",
    );
    Ok(())
}

/// Measures `virtnode baseline` with the NodeVirtualizations of as many nodes, which have three CPUs.
fn baseline(file: &Path) -> anyhow::Result<()> {
    let kinds = [
        ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-q35-kvm"),
        ("debian13-libvirt-11.3.0-qemu-10.0", "x86_64-pc-kvm"),
        ("debian12-libvirt-9.0.0-qemu-7.2", "x86_64-q35-kvm"),
    ];
    let kinds = kinds.map(|(folder, name)| status(folder, name));
    let kinds: Vec<Value> = kinds.into_iter().collect::<anyhow::Result<_>>()?;
    let items: Vec<Value> = (0..NODES)
        .map(|number| {
            json!({"apiVersion": "virtnode.io/v1alpha1", "kind": "NodeVirtualization",
                "metadata": {"name": format!("node-{number:04}")},
                "status": kinds[number % kinds.len()]})
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    fs::write(file, serde_json::to_vec_pretty(&list)?)?;
    let size = fs::metadata(file)?.len() / 1_000_000;
    let what = format!("virtnode baseline, whole process, {NODES} objects in a file of {size} MB");
    progress(&what);
    let mut times = Vec::new();
    for _ in 0..=10 {
        let begun = Instant::now();
        let output = Command::new(virtnode())
            .env_clear()
            .args(["baseline", "--output", "json", "--nodes"])
            .arg(file)
            .stdin(Stdio::null())
            .output()?;
        times.push(begun.elapsed());
        let answer: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        ensure!(answer["nodes"] == NODES, "{} nodes", answer["nodes"]);
    }
    times.remove(0);
    let middle = median(&mut times);
    let last = times.last().copied().unwrap_or_default();
    report(
        &format!("{what} (10 times)"),
        &format!("{}, at most {}", ms(middle), ms(last)),
        "<= 1 s",
        middle <= GOAL,
        "",
    );
    Ok(())
}

/// Returns the status of a NodeVirtualization that a daemon writes on a captured host.
fn status(folder: &str, name: &str) -> anyhow::Result<Value> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(folder);
    let read = |file: &str| fs::read(directory.join(file));
    let document = DomainCapabilities::parse("dc", &read(&format!("dc-{name}.xml"))?)?;
    let features = CpuDefinition::parse("cpu", &read(&format!("features-{name}.xml"))?)?;
    let reading = Reading {
        facts: NodeFacts {
            libvirt_version: Some(Version::new(11, 3, 0)),
            hypervisor_version: Some(Version::new(10, 0, 2)),
            capabilities: Some(Capabilities::parse("caps", &read("capabilities.xml")?)?),
            domain_capabilities: vec![document],
            baseline_cpu: Some(features),
            ..NodeFacts::default()
        },
        ..Reading::default()
    };
    let at = k8s_openapi::jiff::Timestamp::now();
    let status = Snapshot::new(&reading, &[], &[], at);
    let status = status.status(&Default::default(), ConnectionState::Up(1), at);
    Ok(serde_json::to_value(status)?)
}

/// Returns the labels of a node with Debian 13 and KVM.
fn labels() -> anyhow::Result<serde_json::Map<String, Value>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0");
    let capabilities = fs::read(directory.join("capabilities.xml"))?;
    let document = fs::read(directory.join("dc-x86_64-q35-kvm.xml"))?;
    let facts = NodeFacts {
        libvirt_version: Some(Version::new(11, 3, 0)),
        hypervisor_version: Some(Version::new(10, 0, 2)),
        capabilities: Some(Capabilities::parse("capabilities", &capabilities)?),
        domain_capabilities: vec![DomainCapabilities::parse("domain capabilities", &document)?],
        ..NodeFacts::default()
    };
    let labels = derive(&facts, &Policy::default()).labels;
    let labels = serde_json::to_value(labels)?;
    let mut labels = labels.as_object().cloned().context("labels")?;
    labels.insert("kubernetes.io/arch".to_owned(), "amd64".into());
    labels.insert("kubernetes.io/os".to_owned(), "linux".into());
    Ok(labels)
}

fn node(number: usize, labels: &serde_json::Map<String, Value>) -> Value {
    let name = format!("node-{number:04}");
    let mut labels = labels.clone();
    labels.insert("kubernetes.io/hostname".to_owned(), name.as_str().into());
    if number.is_multiple_of(3) {
        labels.remove(MACHINE);
    }
    let images: Vec<Value> = (0..50)
        .map(|image| {
            let digest = "0123456789abcdef".repeat(4);
            let of = format!("registry.example.com/some/image-{image}");
            json!({"names": [format!("{of}@sha256:{digest}"), format!("{of}:v1.2.3")],
                "sizeBytes": 123_456_789})
        })
        .collect();
    let time = "2026-01-01T00:00:00Z";
    let conditions = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"].map(|kind| {
        json!({"type": kind, "status": if kind == "Ready" { "True" } else { "False" },
            "reason": "KubeletHasWhatItNeeds", "message": "kubelet has what it needs",
            "lastHeartbeatTime": time, "lastTransitionTime": time})
    });
    let room = json!({"cpu": "64", "memory": "263000000Ki", "pods": "110"});
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"capacity": room, "allocatable": room, "conditions": conditions,
            "images": images, "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}
