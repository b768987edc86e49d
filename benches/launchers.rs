//! Figures of connections to launchers: the real daemon with 250 sockets, and with 50 at idle.
//!
//! The output has the format of `benches/daemon.rs`. Ten imitated launchers with a domain each have
//! several names for their socket, in a directory of the broker's layout: for the daemon each name is a
//! launcher with a connection of its own. Their domains have the same names, so only ten are shown; the
//! memory of 250 shown domains is not part of the figures. It needs root.

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
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use virtnode::config::LauncherConfig;
use virtnode::connections::ConnectionSet;
use virtnode::hypervisor::{DomainBackend as _, HypervisorMetrics, Libvirt, Workers};
use virtnode::launchers::{LauncherMetrics, LauncherScan};
use virtnode::telemetry::MetricRegistry;

use parts::{KillOnDrop, Memory, curl, free_port, median, ms, progress, report, virtnode};
use support::launchers::vm::Vm;
use support::launchers::{Launchers, pod_uid};

const DAEMONS: u32 = 10;
const SOCKETS: usize = 250;
const IDLE_SOCKETS: usize = 50;
/// Time for the first readings, before the daemon is idle.
const SETTLE: Duration = Duration::from_secs(40);
const IDLE: Duration = Duration::from_secs(60);
const READINGS: usize = 10;
/// Maximum time for steps that normally take moments.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    parts::main(measure())
}

async fn measure() -> anyhow::Result<()> {
    progress("starting launchers");
    let pods = Launchers::new()?;
    let uids: Vec<String> = (1..=DAEMONS).map(pod_uid).collect();
    let launchers = pods.start_all(&uids).await?;
    let names: Vec<String> = (0..DAEMONS).map(|number| format!("vm-{number}")).collect();
    for (launcher, name) in launchers.iter().zip(&names) {
        launcher.start_paused(&Vm {
            name,
            memory_mib: 16,
            ..Vm::default()
        })?;
    }
    let serve = |directory: &str, sockets: usize| -> anyhow::Result<_> {
        // Hard links need the file system of the sockets.
        let directory = pods.pods().join(directory);
        fs::create_dir(&directory)?;
        for number in 0..sockets {
            let launcher = &launchers[number % launchers.len()];
            fs::hard_link(
                launcher.socket(),
                directory.join(format!("pod-{number}.sock")),
            )?;
        }
        Ok(directory)
    };
    let many = serve("many", SOCKETS)?;
    let few = serve("few", IDLE_SOCKETS)?;

    progress("250 sockets");
    let began = Instant::now();
    let daemon = RunningDaemon::start(&many)?;
    daemon.connected(SOCKETS).await?;
    let took = began.elapsed();
    report(
        "250 launchers: from the start of the daemon until all are connected",
        &ms(took),
        "2 s",
        took <= Duration::from_secs(2),
        "",
    );
    sleep(SETTLE).await;
    let memory = Memory::of(daemon.child.0.id())?;
    report(
        "250 launchers: anonymous memory, idle",
        &format!(
            "{:.1} MB (resident: {:.1} MB)",
            memory.anonymous, memory.resident
        ),
        "14 MB",
        memory.anonymous <= 14.0,
        "",
    );
    let process = format!("/proc/{}", daemon.child.0.id());
    let threads = fs::read_dir(format!("{process}/task"))?.count();
    let files = fs::read_dir(format!("{process}/fd"))?.count();
    report(
        "250 launchers: threads, idle",
        &format!("{threads} ({files} open files)"),
        "16",
        threads <= 16,
        "",
    );
    drop(daemon);

    progress("statistics of all 250");
    let mut times = statistics(&many).await?;
    let median = median(&mut times);
    report(
        "250 launchers: statistics of all at once",
        &format!("{}, at most {}", ms(median), ms(times[times.len() - 1])),
        "0.6 s",
        median <= Duration::from_millis(600),
        "",
    );

    progress("50 sockets, idle");
    let daemon = RunningDaemon::start(&few)?;
    daemon.connected(IDLE_SOCKETS).await?;
    sleep(SETTLE).await;
    let (before, began) = (daemon.cpu()?, Instant::now());
    sleep(IDLE).await;
    let share = (daemon.cpu()? - before).as_secs_f64() / began.elapsed().as_secs_f64();
    report(
        "50 launchers: CPU of the idle daemon, 60 s",
        &format!("{:.2} % of a core", share * 100.0),
        "1 %",
        share <= 0.01,
        "",
    );
    Ok(())
}

struct RunningDaemon {
    child: KillOnDrop,
    port: u16,
    _state: tempfile::TempDir,
}

impl RunningDaemon {
    fn start(directory: &Path) -> anyhow::Result<Self> {
        let state = tempfile::tempdir()?;
        let config = state.path().join("config.yaml");
        let directory = directory.display();
        fs::write(
            &config,
            format!("launchers: {{enabled: true, directory: {directory}}}\n"),
        )?;
        let port = free_port()?;
        let child = Command::new(virtnode())
            .env_clear()
            .args(["run", "--connect", "none", "--publish", "none"])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .arg("--config")
            .arg(&config)
            .arg("--state-directory")
            .arg(state.path())
            .arg("--socket")
            .arg(state.path().join("socket"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self {
            child: KillOnDrop(child),
            port,
            _state: state,
        })
    }

    /// Waits until this many launchers are connected.
    async fn connected(&self, wanted: usize) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let url = format!("http://127.0.0.1:{}/metrics", self.port);
            let metrics = curl(&[&url]).unwrap_or_default();
            let count = |state: &str| {
                let series = format!("virtnode_launchers{{state=\"{state}\"}} ");
                let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
                value
                    .and_then(|value| value.parse::<usize>().ok())
                    .unwrap_or(0)
            };
            if count("up") + count("conflict") >= wanted {
                return Ok(());
            }
            ensure!(Instant::now() < until, "not connected: {metrics}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Returns the CPU time so far.
    fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.0.id()))?;
        let (_, rest) = stat.rsplit_once(')').context("no name")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        let ticks = ticks(11).zip(ticks(12)).context("no times")?;
        // Linux reports times in hundredths of a second.
        Ok(Duration::from_millis((ticks.0 + ticks.1) * 10))
    }
}

/// Reads the statistics of all launchers at once, several times.
async fn statistics(directory: &Path) -> anyhow::Result<Vec<Duration>> {
    let config = LauncherConfig {
        enabled: true,
        directory: directory.to_owned(),
        volume: "libvirt-runtime".to_owned(),
        sockets: vec!["virtqemud-sock".to_owned()],
        scan_interval: Duration::from_secs(2),
        most: 512,
        hotplug: false,
        verify_pods: false,
    };
    let registry = MetricRegistry::new();
    let set: Arc<ConnectionSet<Libvirt>> = Arc::new(ConnectionSet::new(Vec::new()));
    let scan = LauncherScan::new(
        config,
        &Workers::new(),
        Arc::clone(&set),
        Arc::new(HypervisorMetrics::register(&registry)),
        Arc::new(LauncherMetrics::register(&registry)),
    );
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(scan.run(stop));
    let until = Instant::now() + PATIENCE;
    while set.up().len() < SOCKETS {
        ensure!(Instant::now() < until, "{} are connected", set.up().len());
        sleep(Duration::from_millis(20)).await;
    }
    let mut times = Vec::new();
    for _ in 0..READINGS {
        let began = Instant::now();
        ensure!(!set.statistics().await?.is_empty());
        times.push(began.elapsed());
    }
    Ok(times)
}
