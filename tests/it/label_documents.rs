//! Labels from documents that KubeVirt's node-labeller would write, compared with those of the same
//! libvirt live.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use assert_cmd::Command;
use tempfile::TempDir;
use virtnode::config::LabelOrigin;
use virtnode::daemon::Metrics;
use virtnode::documents::{DocumentDirectory, DocumentFile};
use virtnode::domain::ConnectionId;
use virtnode::hypervisor::{Libvirt, LibvirtConfig};
use virtnode::label::{LabelSet, Policy, Schema, derive};
use virtnode::probe::{LabelSource, LaunchersSeen, Prober, Reading};

use crate::support::daemon::Daemon;
use crate::support::guest::Host;
use crate::support::launchers::vm::Vm;
use crate::support::launchers::{Launchers, pod_uid};
use crate::support::libvirtd::Libvirtd;

/// Writes the documents by the commands of KubeVirt's node-labeller.sh, without KVM.
pub(crate) fn write_documents(
    directory: &Path,
    virsh: impl Fn(&[&str]) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let documents = DocumentDirectory::new(directory);
    let target = ["--machine", "q35", "--arch", "x86_64", "--virttype", "qemu"];
    let help = virsh(&["help", "domcapabilities"])?;
    let flags = |names: &[&'static str]| -> Vec<&'static str> {
        let known = names.iter().filter(|name| help.contains(**name));
        known.copied().collect()
    };
    let query = |names: &[&'static str]| {
        virsh(&[&["domcapabilities"], &target[..], &flags(names)].concat())
    };
    fs::write(
        documents.file(DocumentFile::DomainCapabilities),
        query(&["--expand-cpu-features"])?,
    )?;
    let supported = query(&["--expand-cpu-features", "--supported-cpu-features"])?;
    let input = tempfile::NamedTempFile::new()?;
    fs::write(input.path(), supported)?;
    let input = input.path().to_string_lossy();
    let baseline = ["hypervisor-cpu-baseline", "--features", &input];
    fs::write(
        documents.file(DocumentFile::SupportedFeatures),
        virsh(&[&baseline[..], &target].concat())?,
    )?;
    fs::write(
        documents.file(DocumentFile::Capabilities),
        virsh(&["capabilities"])?,
    )?;
    Ok(())
}

fn labels(arguments: &[&str]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    let state = tempfile::tempdir()?;
    command
        .env_clear()
        .args(["labels", "--output", "json"])
        .arg("--state-directory")
        .arg(state.path())
        .args(arguments);
    let output = command.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{complaint}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(serde_json::from_value(report["labels"].clone())?)
}

#[test]
fn labels_from_documents_equal_those_of_the_same_libvirt() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let directory = TempDir::new()?;
    write_documents(directory.path(), |arguments| libvirtd.virsh(arguments))?;
    let schema = ["--schema", "kubevirt"];
    let labels = |arguments: &[&str]| labels(&[arguments, &schema].concat());
    let live = labels(&["--connect", &libvirtd.uri()])?;
    ensure!(live.len() > 100, "{live:?}");

    let config = directory.path().join("config.yaml");
    let path = directory.path().display();
    for origin in ["auto", "files"] {
        fs::write(
            &config,
            format!("labels: {{source: {origin}, documents: {path}}}\n"),
        )?;
        let config = config.to_string_lossy();
        let from_files = labels(&["--config", &config, "--connect", "test:///default"])?;
        assert_eq!(from_files, live, "{origin}");
    }
    // Offline, the facts of the host are missing.
    let offline = labels(&["--documents", &path.to_string()])?;
    let is_hosts = |key: &&String| {
        *key == "kubevirt.io/realtime" || key.starts_with("hyperv.node.kubevirt.io/")
    };
    let missing: Vec<&String> = live
        .keys()
        .filter(|key| !offline.contains_key(*key))
        .filter(|key| !is_hosts(key))
        .collect();
    assert_eq!(missing, Vec::<&String>::new());
    assert!(
        offline
            .iter()
            .all(|(key, value)| live.get(key) == Some(value))
    );
    Ok(())
}

/// Probes once with an empty directory as the host's root.
async fn probe<S: virtnode::hypervisor::NodeSource>(source: S) -> Reading {
    let root = tempfile::tempdir().unwrap();
    let metrics = Arc::clone(&Metrics::new().labeller.probe);
    let mut prober = Prober::new(Arc::new(source), metrics, root.path().to_owned());
    prober.read().await
}

fn both_schemas(reading: &Reading) -> LabelSet {
    let policy = Policy {
        schema: Schema::Both,
        ..Policy::default()
    };
    derive(&reading.facts, &policy).labels
}

#[tokio::test]
async fn launcher_completes_the_documents_with_versions_and_holds_its_labels() -> anyhow::Result<()>
{
    let launchers = Launchers::new()?;
    let launcher = launchers.start(&pod_uid(1)).await?;
    let directory = TempDir::new()?;
    write_documents(directory.path(), |arguments| launcher.virsh(arguments))?;
    let vm = Vm {
        memory_mib: 16,
        ..Vm::default()
    };
    launcher.start_paused(&vm)?;

    let connect = || {
        Libvirt::start(
            LibvirtConfig::new(launcher.uri()),
            Metrics::new().hypervisor,
        )
    };
    let live = probe(connect()).await;
    ensure!(live.failures.is_empty(), "{:?}", live.failures);

    let id = ConnectionId::Launcher { pod: pod_uid(1) };
    let connected = Arc::new(connect());
    let up = vec![(id.clone(), Arc::clone(&connected))];
    let seen = move || LaunchersSeen {
        scanned: true,
        up: up.clone(),
        unreachable: Vec::new(),
    };
    let documents = DocumentDirectory::new(directory.path());
    let source = LabelSource::new(LabelOrigin::Files, documents, None, Some(Box::new(seen)));
    let from_files = probe(source).await;
    ensure!(from_files.failures.is_empty(), "{:?}", from_files.failures);
    assert_eq!(from_files.unread, []);
    assert_eq!(both_schemas(&from_files), both_schemas(&live));
    let usage = from_files.domains.first().context("no domain")?;
    assert_eq!(usage.id.connection, id);
    assert_eq!(usage.id.name, vm.domain());
    let in_use = |key: &str| from_files.in_use.includes(&key.parse().unwrap());
    assert!(in_use("machine-type.node.kubevirt.io/q35"));
    assert!(in_use("cpu-model.node.kubevirt.io/qemu64"));

    // Nothing but documents.
    let documents = DocumentDirectory::new(directory.path());
    let source = LabelSource::<Libvirt>::new(LabelOrigin::Files, documents, None, None);
    let alone = probe(source).await;
    let kubevirt = |reading: &Reading| {
        let policy = Policy {
            schema: Schema::Kubevirt,
            ..Policy::default()
        };
        derive(&reading.facts, &policy).labels
    };
    assert_eq!(kubevirt(&alone), kubevirt(&live));
    assert_eq!(alone.facts.libvirt_version, None);
    Ok(())
}

#[tokio::test]
async fn daemon_on_a_node_without_libvirt_publishes_the_labels_of_its_launchers_libvirt()
-> anyhow::Result<()> {
    let launchers = Launchers::new()?;
    let launcher = launchers.start(&pod_uid(1)).await?;
    let directory = TempDir::new()?;
    write_documents(directory.path(), |arguments| launcher.virsh(arguments))?;
    let config = directory.path().join("config.yaml");
    fs::write(
        &config,
        format!(
            "connect: none\nlabels: {{documents: {}}}\nlaunchers: {{enabled: true, directory: {}}}\n",
            directory.path().display(),
            launchers.pods().display()
        ),
    )?;
    let config = config.to_string_lossy();
    let daemon = Daemon::start("none", &["--config", &config, "--schema", "both"]).await?;
    daemon.ready().await?;
    let live = labels(&["--connect", &launcher.uri(), "--schema", "both"])?;
    ensure!(live.contains_key("virtnode.io/libvirt-version"), "{live:?}");
    assert_eq!(daemon.labels()?, live);
    let metrics = daemon.get("/metrics")?.text();
    assert!(
        !metrics.contains("virtnode_hypervisor_connected"),
        "{metrics}"
    );
    let failure = "virtnode_probe_failures_total{reason=\"unavailable\",source=\"domains\"}";
    assert_eq!(daemon.metric(failure)?, 0.0);
    Ok(())
}
