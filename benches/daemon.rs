//! The figures of the running daemon, measured on a libvirt and a Kubernetes of its own.
//!
//! Standard output: what it was measured with, behind a `#`, and one line a figure, its fields
//! separated by tabs: what, measured, to reach, whether it was reached, what it is to be compared
//! with. Progress goes to standard error.
//! `scripts/figures.sh` prints them as a table; `VIRTNODE` names the binary to measure.

#[allow(dead_code, reason = "each benchmark needs another part of it")]
mod parts;
#[path = "../tests/it/support/mod.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "the integration tests need more of it"
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

use parts::{Ended, Memory, curl, free_port, median, ms, print, progress, scrape_time, tell};
use support::eventually;
use support::kube::KubeServer;
use support::kube::objects::define;
use support::libvirtd::Libvirtd;

const STARTS: usize = 15;
const DELETIONS: usize = 20;
const SCRAPES: usize = 100;
/// How long the daemon is watched at rest, and how often others touch its Node meanwhile.
const REST: Duration = Duration::from_secs(60);
const TOUCH: Duration = Duration::from_secs(1);
/// More often than the default of 60 s, so that there are probes while it rests.
const PROBE_INTERVAL_SECONDS: &str = "5";
/// How closely a file is looked for.
const SAMPLING: Duration = Duration::from_millis(1);
/// For what should take moments.
const PATIENCE: Duration = Duration::from_secs(60);
const NODE: &str = "figures";
/// Whose daemon looks for no DomainHotplugs.
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
    lab.memory("memory at rest, no DomainHotplugs", &daemon, 8.0, 28.0)?;
    drop(daemon);

    lab.kubernetes.create_node(NODE).await?;
    let daemon = lab.run(NODE, "", &settings)?;
    lab.labels_on(NODE, &daemon).await?;
    lab.all_at_work(&daemon).await?;
    lab.rest(&daemon).await?;
    lab.memory("memory at rest", &daemon, 10.0, 30.0)?;
    lab.scrapes(&daemon)?;
    lab.deletions(&daemon).await
}

/// The parts around the daemon.
struct Lab {
    // Dropped in this order.
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

    /// Starts a daemon with files of its own.
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
            process: Ended(child),
            started,
            labels: state.join("labels.json"),
            log,
            metrics: format!("http://127.0.0.1:{port}/metrics"),
        })
    }

    /// From the start of the process to the labels in the file and on the Node, less the time
    /// that libvirt took to answer.
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
            // There is one probe so far, and the next is a minute away.
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
        let beside = format!(
            "libvirt's own answers: {}, not counted",
            ms(median(&mut libvirt))
        );
        let goal = Duration::from_millis(300);
        for (what, times) in [
            ("warm start to labels in the file", &mut to_file),
            ("warm start to labels on the Node", &mut to_node),
        ] {
            let median = median(times);
            tell(what, &ms(median), "<= 300 ms", median <= goal, &beside);
        }
        Ok(())
    }

    /// The changes of a Node after a version of it.
    async fn changes(
        &self,
        node: &str,
        version: &str,
    ) -> anyhow::Result<impl Stream<Item = anyhow::Result<Node>> + Unpin + use<>> {
        let params = WatchParams::default().fields(&format!("metadata.name={node}"));
        let events = self.nodes.watch(&params, version).await?;
        let nodes = events.map(|event| match event? {
            WatchEvent::Added(node) | WatchEvent::Modified(node) => Ok(node),
            other => bail!("the watch said {other:?}"),
        });
        Ok(Box::pin(nodes))
    }

    /// Waits until the Node has all that the daemon published.
    async fn labels_on(&self, name: &str, daemon: &Daemon) -> anyhow::Result<Vec<String>> {
        eventually(PATIENCE, async || {
            let written = fs::read(&daemon.labels)?;
            let written: serde_json::Value = serde_json::from_slice(&written)?;
            let written = written["labels"]
                .as_object()
                .context("labels.json has labels")?;
            let node = self.nodes.get(name).await?;
            let keys: Vec<String> = our_labels(&node).map(str::to_owned).collect();
            ensure!(keys.len() == written.len(), "not all labels are there");
            Ok(keys)
        })
        .await
        .with_context(|| format!("the daemon's log:\n{}", daemon.log()))
    }

    /// Writes to the API server while nothing changes but what is not ours.
    async fn rest(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("{REST:?} at rest"));
        let probes = daemon.probes()?;
        let before = self.requests().await?;
        let mut tick = interval(TOUCH);
        let end = Instant::now() + REST;
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
        tell(
            &format!("writes to the API server at rest, {} s", REST.as_secs()),
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

    /// What the daemon asked of the API server so far.
    async fn requests(&self) -> anyhow::Result<Requests> {
        let events = self.kubernetes.audit_events().await?;
        let daemons = events
            .iter()
            .filter(|e| e.user_agent.starts_with("virtnode/"));
        let (writes, reads): (Vec<_>, Vec<_>) = daemons.partition(|event| event.is_write());
        ensure!(
            !writes.is_empty(),
            "the daemon is not found in the audit log"
        );
        Ok(Requests {
            writes: writes.len(),
            reads: reads.len(),
        })
    }

    /// Waits until the daemon does all that it does in a cluster.
    async fn all_at_work(&self, daemon: &Daemon) -> anyhow::Result<()> {
        let objects: Api<NodeVirtualization> = Api::all(self.kubernetes.client());
        eventually(PATIENCE, async || {
            let facts = objects.get(NODE).await?.spec.facts;
            let watched = Condition::find(&facts.conditions, HOTPLUG_OBJECTS_WATCHED);
            ensure!(
                watched.is_some_and(Condition::holds),
                "DomainHotplugs are not watched yet"
            );
            Ok(())
        })
        .await
        .with_context(|| format!("the daemon's log:\n{}", daemon.log()))
    }

    /// The daemon's memory, beside that of a virsh that is connected and does nothing.
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
            tell(
                what,
                &format!("{own:.1} MB"),
                &format!("<= {goal} MB"),
                own <= goal,
                &format!("virsh, connected and idle: {other:.1} MB"),
            );
        }
        Ok(())
    }

    fn idle_virsh(&self) -> anyhow::Result<Ended> {
        let answer = self.directory.path().join("virsh");
        let mut child = Command::new("virsh")
            .args(["--quiet", "--connect", &self.libvirtd.uri()])
            .stdin(Stdio::piped())
            .stdout(File::create(&answer)?)
            .spawn()
            .map(Ended)?;
        let input = child.0.stdin.as_mut().context("virsh has an input")?;
        std::io::Write::write_all(input, b"uri\n")?;
        let until = Instant::now() + PATIENCE;
        while !fs::read_to_string(&answer)?.contains("qemu:") {
            ensure!(Instant::now() < until, "virsh does not answer");
            std::thread::sleep(SAMPLING);
        }
        Ok(child)
    }

    /// The time to `/metrics`, and whether libvirt was called for it.
    fn scrapes(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("{SCRAPES} times /metrics"));
        // A probe in between would call libvirt as well: then once more.
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
            tell(
                "/metrics answered, by curl",
                &format!("{}, {calls} libvirt calls", ms(median)),
                "<= 2 ms, 0 calls",
                median <= Duration::from_millis(2) && calls == 0.0,
                "prometheus-libvirt-exporter 0.2.0, 50 domains: 28-36 ms",
            );
            return Ok(());
        }
        bail!("a probe came in between each time")
    }

    /// From the answer to somebody's deletion of a label to its return.
    async fn deletions(&self, daemon: &Daemon) -> anyhow::Result<()> {
        progress(&format!("{DELETIONS} deletions"));
        let keys = self.labels_on(NODE, daemon).await?;
        let mut times = Vec::new();
        // Each another one: a label that is deleted again and again is given up.
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
                "{key} is still there"
            );
            let mut gone = false;
            let back = loop {
                let node = changes.next().await.context("the watch ended")??;
                let there = our_labels(&node).any(|have| have == key);
                gone |= !there;
                if gone && there {
                    break Instant::now();
                }
            };
            times.push(back.saturating_duration_since(deleted));
        }
        let median = median(&mut times);
        let slowest = times.last().copied().unwrap_or_default();
        tell(
            "a label deleted by someone else is back",
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
    process: Ended,
    started: Instant,
    labels: PathBuf,
    log: PathBuf,
    metrics: String,
}

impl Daemon {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the file with the labels, which is renamed into its place.
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
                let (name, value) = line.rsplit_once(' ').context("a sample has a value")?;
                Ok((name.to_owned(), value.parse()?))
            })
            .collect()
    }

    /// The calls to libvirt so far.
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
        Ok(found.context("probes are counted")?.1)
    }

    /// Waits for some probes more.
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

/// Waits for the event in which the Node has labels of ours.
async fn has_labels(
    mut changes: impl Stream<Item = anyhow::Result<Node>> + Unpin,
) -> anyhow::Result<Instant> {
    let seen = async {
        loop {
            let node = changes.next().await.context("the watch ended")??;
            // They are all written at once.
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
