//! Figures of the running daemon, measured with a private libvirt and a private Kubernetes.
//!
//! Standard output has the versions on lines that start with `#`, and one line per figure with
//! fields separated by tabs: name, measured value, goal, goal reached, comparison. Progress goes to
//! standard error. `scripts/figures.sh` prints a table; `VIRTNODE` names the binary to measure.

#[allow(dead_code, reason = "no benchmark uses all of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "shared with the integration tests"
)]
mod support;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams, WatchEvent, WatchParams};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{interval, sleep, timeout};
use virtnode::cluster::objects::node_virtualization::HOTPLUG_OBJECTS_WATCHED;
use virtnode::cluster::objects::{Condition, NodeVirtualization};

use parts::{
    KillOnDrop, Memory, curl, free_port, median, ms, print, progress, report, scrape_time,
};
use support::eventually;
use support::kube::KubeServer;
use support::kube::objects::define;
use support::libvirtd::Libvirtd;

const STARTS: usize = 15;
const DELETIONS: usize = 20;
const SCRAPES: usize = 100;
/// Period of measuring the idle daemon.
const IDLE_PERIOD: Duration = Duration::from_secs(60);
/// Interval between writes of other clients to the Node meanwhile.
const TOUCH_INTERVAL: Duration = Duration::from_secs(1);
/// Shorter than the default of 60 s, so that several probes happen while the daemon is idle.
const PROBE_INTERVAL_SECONDS: &str = "5";
/// Interval between checks for a file.
const SAMPLING: Duration = Duration::from_millis(1);
/// Maximum time for steps that normally take moments.
const PATIENCE: Duration = Duration::from_secs(60);
const NODE: &str = "figures";
/// Node whose daemon does not watch DomainHotplugs.
const LABELS_ONLY: &str = "labels-only";

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

async fn measure() -> anyhow::Result<()> {
    let lab = Lab::start().await?;
    lab.warm_starts().await?;

    let settings = ["--probe-interval", PROBE_INTERVAL_SECONDS];
    lab.kubernetes.create_node(LABELS_ONLY).await?;
    let daemon = lab.run(LABELS_ONLY, "hotplug: {objects: false}", &settings)?;
    lab.labels_on(LABELS_ONLY, &daemon).await?;
    daemon.probes_on().await?;
    lab.memory("memory idle, no DomainHotplugs", &daemon, 8.0, 28.0)?;
    drop(daemon);

    lab.kubernetes.create_node(NODE).await?;
    let daemon = lab.run(NODE, "", &settings)?;
    lab.labels_on(NODE, &daemon).await?;
    lab.watching_objects(&daemon).await?;
    lab.idle_writes(&daemon).await?;
    lab.memory("memory idle", &daemon, 10.0, 30.0)?;
    lab.scrapes(&daemon)?;
    lab.deletions(&daemon).await
}

/// The environment of the daemon.
struct Lab {
    // Fields are dropped in this order.
    kubernetes: KubeServer,
    libvirtd: Libvirtd,
    directory: TempDir,
    virtnode: PathBuf,
    nodes: Api<Node>,
}

impl Lab {
    async fn start() -> anyhow::Result<Self> {
        progress("starting libvirt");
        let libvirtd = Libvirtd::start()?;
        progress("starting Kubernetes");
        let kubernetes = KubeServer::start().await?;
        define(&kubernetes).await?;
        let (major, minor) = kubernetes.version();
        let versions = libvirtd.virsh(&["version", "--daemon"])?;
        let version = |of: &str| {
            let said = versions.lines().find_map(|line| line.strip_prefix(of));
            said.unwrap_or("?").to_owned()
        };
        let libvirt = version("Running against daemon: ");
        let hypervisor = version("Running hypervisor: ");
        print(&format!(
            "# libvirt {libvirt}, {hypervisor}, Kubernetes {major}.{minor}"
        ));
        Ok(Self {
            nodes: Api::all(kubernetes.client()),
            kubernetes,
            libvirtd,
            directory: tempfile::Builder::new()
                .prefix("virtnode-figures-")
                .tempdir()?,
            virtnode: parts::virtnode(),
        })
    }

    /// Starts a daemon with its own files.
    fn run(&self, node: &str, configuration: &str, more: &[&str]) -> anyhow::Result<Daemon> {
        let directory = self.directory.path().join(node);
        fs::create_dir(&directory)?;
        let config = directory.join("config.yaml");
        fs::write(&config, configuration)?;
        let state = directory.join("state");
        let port = free_port()?;
        let log = directory.join("log");
        let output = File::create(&log)?;
        let mut command = Command::new(&self.virtnode);
        command
            .args(["run", "--publish", "file,node", "--start-jitter", "0"])
            .args(["--connect", &self.libvirtd.uri(), "--node-name", node])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--kubeconfig")
            .arg(self.kubernetes.kubeconfig())
            .arg("--config")
            .arg(&config)
            .arg("--state-directory")
            .arg(&state)
            .arg("--socket")
            .arg(directory.join("socket"))
            .arg("--features-directory")
            .arg(directory.join("features.d"))
            .args(more)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", self.virtnode.display()))?;
        Ok(Daemon {
            process: KillOnDrop(child),
            started,
            labels: state.join("labels.json"),
            log,
            metrics: format!("http://127.0.0.1:{port}/metrics"),
        })
    }

    /// Measures the time from the start of the process to the labels in the file and on the Node,
    /// without the time of libvirt's calls.
    async fn warm_starts(&self) -> anyhow::Result<()> {
        progress(&format!("{STARTS} warm starts"));
        let mut to_file = Vec::new();
        let mut to_node = Vec::new();
        let mut libvirt = Vec::new();
        for n in 0..STARTS {
            let node = format!("start-{n}");
            let version = version(&self.kubernetes.create_node(&node).await?);
            let changes = self.changes(&node, &version).await?;
            let mut daemon = self.run(&node, "", &[])?;
            let (file, seen) = tokio::join!(daemon.wrote_labels(), has_labels(changes));
            let (file, seen) = (file?, seen?);
            // Only one probe has happened; the next follows in a minute.
            let answered = daemon.libvirt_calls()?;
            to_file.push(
                file.duration_since(daemon.started)
                    .saturating_sub(answered.time),
            );
            to_node.push(
                seen.duration_since(daemon.started)
                    .saturating_sub(answered.time),
            );
            libvirt.push(answered.time);
        }
        let comparison = format!("libvirt calls: {}, not included", ms(median(&mut libvirt)));
        let goal = Duration::from_millis(300);
        for (what, times) in [
            ("warm start to labels in the file", &mut to_file),
            ("warm start to labels on the Node", &mut to_node),
        ] {
            let median = median(times);
            report(what, &ms(median), "<= 300 ms", median <= goal, &comparison);
        }
        Ok(())
    }

    /// Watches a Node from a version on.
    async fn changes(
        &self,
        node: &str,
        version: &str,
    ) -> anyhow::Result<impl Stream<Item = anyhow::Result<Node>> + Unpin + use<>> {
        let params = WatchParams::default().fields(&format!("metadata.name={node}"));
        let events = self.nodes.watch(&params, version).await?;
        let nodes = events.map(|event| match event? {
            WatchEvent::Added(node) | WatchEvent::Modified(node) => Ok(node),
            other => bail!("unexpected watch event: {other:?}"),
        });
        Ok(Box::pin(nodes))
    }

    /// Waits until the Node has all labels of the file, and returns their keys.
    async fn labels_on(&self, name: &str, daemon: &Daemon) -> anyhow::Result<Vec<String>> {
        eventually(PATIENCE, async || {
            let written = fs::read(&daemon.labels)?;
            let written: serde_json::Value = serde_json::from_slice(&written)?;
            let written = written["labels"]
                .as_object()
                .context("labels.json has no labels")?;
            let node = self.nodes.get(name).await?;
            let keys: Vec<String> = our_labels(&node).map(str::to_owned).collect();
            ensure!(
                keys.len() == written.len(),
                "the Node has {} of {} labels",
                keys.len(),
                written.len()
            );
            Ok(keys)
        })
        .await
        .with_context(|| format!("the daemon's log:\n{}", daemon.log()))
    }

    /// Counts the daemon's writes to the API server while other clients change the Node.
    async fn idle_writes(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("idle for {IDLE_PERIOD:?}"));
        let probes = daemon.probes()?;
        let before = self.requests().await?;
        let mut tick = interval(TOUCH_INTERVAL);
        let end = Instant::now() + IDLE_PERIOD;
        let mut touches = 0;
        while Instant::now() < end {
            tick.tick().await;
            touches += 1;
            let params = PatchParams::default();
            let label =
                json!({"metadata": {"labels": {"example.com/touched": touches.to_string()}}});
            self.nodes
                .patch(NODE, &params, &Patch::Merge(label))
                .await?;
            let status = json!({"status": {"conditions": [
                {"type": "Ready", "status": "True", "reason": format!("Touched{touches}")},
            ]}});
            self.nodes
                .patch_status(NODE, &params, &Patch::Strategic(status))
                .await?;
        }
        let after = self.requests().await?;
        let probes = daemon.probes()? - probes;
        let writes = after.writes - before.writes;
        report(
            &format!("writes to the API server idle, {} s", IDLE_PERIOD.as_secs()),
            &writes.to_string(),
            "0",
            writes == 0,
            &format!(
                "{touches} foreign label changes, {touches} status updates, {probes} probes; {} reads",
                after.reads - before.reads
            ),
        );
        ensure!(probes >= 3.0, "too few probes");
        Ok(())
    }

    /// Counts the daemon's requests to the API server so far.
    async fn requests(&self) -> anyhow::Result<Requests> {
        let events = self.kubernetes.audit_events().await?;
        let daemons = events
            .iter()
            .filter(|e| e.user_agent.starts_with("virtnode/"));
        let (writes, reads): (Vec<_>, Vec<_>) = daemons.partition(|event| event.is_write());
        ensure!(
            !writes.is_empty(),
            "the audit log has no request of the daemon"
        );
        Ok(Requests {
            writes: writes.len(),
            reads: reads.len(),
        })
    }

    /// Waits until the daemon watches DomainHotplugs, the last part of it to start.
    async fn watching_objects(&self, daemon: &Daemon) -> anyhow::Result<()> {
        let objects: Api<NodeVirtualization> = Api::all(self.kubernetes.client());
        eventually(PATIENCE, async || {
            let facts = objects.get(NODE).await?.spec.facts;
            let watched = Condition::find(&facts.conditions, HOTPLUG_OBJECTS_WATCHED);
            ensure!(
                watched.is_some_and(Condition::holds),
                "no watch of DomainHotplugs yet"
            );
            Ok(())
        })
        .await
        .with_context(|| format!("the daemon's log:\n{}", daemon.log()))
    }

    /// Reports the daemon's memory, compared with that of an idle, connected virsh.
    fn memory(
        &self,
        when: &str,
        daemon: &Daemon,
        anonymous: f64,
        resident: f64,
    ) -> anyhow::Result<()> {
        let own = Memory::of(daemon.process.0.id())?;
        let virsh = self.idle_virsh()?;
        let other = Memory::of(virsh.0.id())?;
        for (kind, own, other, goal) in [
            ("anonymous", own.anonymous, other.anonymous, anonymous),
            ("resident", own.resident, other.resident, resident),
        ] {
            let what = &format!("{when}, {kind}");
            report(
                what,
                &format!("{own:.1} MB"),
                &format!("<= {goal} MB"),
                own <= goal,
                &format!("virsh, connected and idle: {other:.1} MB"),
            );
        }
        Ok(())
    }

    fn idle_virsh(&self) -> anyhow::Result<KillOnDrop> {
        let answer = self.directory.path().join("virsh");
        let mut child = Command::new("virsh")
            .args(["--quiet", "--connect", &self.libvirtd.uri()])
            .stdin(Stdio::piped())
            .stdout(File::create(&answer)?)
            .spawn()
            .map(KillOnDrop)?;
        let input = child
            .0
            .stdin
            .as_mut()
            .context("virsh has no standard input")?;
        std::io::Write::write_all(input, b"uri\n")?;
        let until = Instant::now() + PATIENCE;
        while !fs::read_to_string(&answer)?.contains("qemu:") {
            ensure!(Instant::now() < until, "virsh does not answer");
            std::thread::sleep(SAMPLING);
        }
        Ok(child)
    }

    /// Measures `/metrics`, and counts the libvirt calls it causes.
    fn scrapes(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("{SCRAPES} scrapes"));
        // A probe meanwhile also calls libvirt, so such a round is repeated.
        for _ in 0..10 {
            let before = (daemon.probes()?, daemon.libvirt_calls()?.count);
            let mut times = Vec::new();
            for _ in 0..SCRAPES {
                times.push(scrape_time(&daemon.metrics)?);
            }
            let after = (daemon.probes()?, daemon.libvirt_calls()?.count);
            if before.0 != after.0 {
                continue;
            }
            let calls = after.1 - before.1;
            let median = median(&mut times);
            report(
                "/metrics answered, by curl",
                &format!("{}, {calls} libvirt calls", ms(median)),
                "<= 2 ms, 0 calls",
                median <= Duration::from_millis(2) && calls == 0.0,
                "prometheus-libvirt-exporter 0.2.0, 50 domains: 28-36 ms",
            );
            return Ok(());
        }
        bail!("every round overlapped a probe")
    }

    /// Measures the time from the deletion of a label by another client to its restoration.
    async fn deletions(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("{DELETIONS} deletions"));
        let keys = self.labels_on(NODE, daemon).await?;
        let mut times = Vec::new();
        // A different label each time: virtnode stops restoring one that is deleted repeatedly.
        for key in keys.iter().step_by(keys.len() / DELETIONS).take(DELETIONS) {
            let before = version(&self.nodes.get(NODE).await?);
            let mut changes = self.changes(NODE, &before).await?;
            let delete = Patch::Merge(json!({"metadata": {"labels": {key: null}}}));
            let without = self
                .nodes
                .patch(NODE, &PatchParams::default(), &delete)
                .await?;
            let deleted = Instant::now();
            ensure!(
                !our_labels(&without).any(|have| have == key),
                "{key} was not deleted"
            );
            let mut was_absent = false;
            let restored = loop {
                let node = changes.next().await.context("the watch ended")??;
                let exists = our_labels(&node).any(|have| have == key);
                was_absent |= !exists;
                if was_absent && exists {
                    break Instant::now();
                }
            };
            times.push(restored.saturating_duration_since(deleted));
        }
        let median = median(&mut times);
        let slowest = times.last().copied().unwrap_or_default();
        report(
            "label deleted by another client to restored",
            &format!("{}, at most {}", ms(median), ms(slowest)),
            "<= 1 s",
            slowest <= Duration::from_secs(1),
            &format!("{} deletions", times.len()),
        );
        Ok(())
    }
}

struct Requests {
    writes: usize,
    reads: usize,
}

struct Daemon {
    process: KillOnDrop,
    started: Instant,
    labels: PathBuf,
    log: PathBuf,
    metrics: String,
}

impl Daemon {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the label file, which appears complete by a rename.
    async fn wrote_labels(&mut self) -> anyhow::Result<Instant> {
        while !self.labels.exists() {
            let runs = self.process.0.try_wait()?.is_none();
            ensure!(
                runs && self.started.elapsed() < PATIENCE,
                "no labels:\n{}",
                self.log()
            );
            sleep(SAMPLING).await;
        }
        Ok(Instant::now())
    }

    fn samples(&self) -> anyhow::Result<Vec<(String, f64)>> {
        let text = curl(&["--fail", &self.metrics])?;
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').context("sample without a value")?;
                Ok((name.to_owned(), value.parse()?))
            })
            .collect()
    }

    /// Counts the libvirt calls so far.
    fn libvirt_calls(&self) -> anyhow::Result<Calls> {
        let samples = self.samples()?;
        let sum = |name: &str| -> f64 {
            let of = format!("virtnode_hypervisor_call_{name}{{");
            let values = samples.iter().filter(|(name, _)| name.starts_with(&of));
            values.map(|(_, value)| value).sum()
        };
        Ok(Calls {
            count: sum("duration_seconds_count") + sum("timeouts_total"),
            time: Duration::from_secs_f64(sum("duration_seconds_sum")),
        })
    }

    fn probes(&self) -> anyhow::Result<f64> {
        let name = "virtnode_probe_attempts_total{source=\"versions\"}";
        let samples = self.samples()?;
        let found = samples.iter().find(|(have, _)| have == name);
        Ok(found.context("no probe counter")?.1)
    }

    /// Waits for three more probes.
    async fn probes_on(&self) -> anyhow::Result<()> {
        let before = self.probes()?;
        eventually(PATIENCE, async || {
            let probes = self.probes()? - before;
            ensure!(probes >= 3.0, "{probes} probes");
            Ok(())
        })
        .await
    }
}

struct Calls {
    count: f64,
    time: Duration,
}

/// Waits for the event in which the Node has our labels, which one write adds.
async fn has_labels(
    mut changes: impl Stream<Item = anyhow::Result<Node>> + Unpin,
) -> anyhow::Result<Instant> {
    let seen = async {
        loop {
            let node = changes.next().await.context("the watch ended")??;
            if our_labels(&node).next().is_some() {
                return Ok(Instant::now());
            }
        }
    };
    timeout(PATIENCE, seen)
        .await
        .context("no labels on the Node")?
}

fn our_labels(node: &Node) -> impl Iterator<Item = &str> {
    let labels = node.metadata.labels.iter().flatten();
    labels.map(|(key, _)| key.as_str()).filter(|key| {
        key.split('/')
            .next()
            .is_some_and(|prefix| prefix.ends_with("virtnode.io"))
    })
}

fn version(node: &Node) -> String {
    node.metadata.resource_version.clone().unwrap_or_default()
}
