//! Shared by the benchmarks that print figures.

use std::env;
use std::fs;
use std::future::Future;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use tokio::signal::unix::{SignalKind, signal};

/// Runs the measurement, unless `cargo test --benches` only checks that the benchmark starts. A signal
/// ends the measurement too, so that guards end the started processes.
pub(crate) fn main(measure: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    if !env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            tokio::select! {
                outcome = measure => outcome,
                _ = terminate.recv() => bail!("interrupted by a signal"),
                _ = interrupt.recv() => bail!("interrupted by a signal"),
            }
        })
}

/// Returns the binary to measure.
pub(crate) fn virtnode() -> PathBuf {
    env::var_os("VIRTNODE")
        .unwrap_or(env!("CARGO_BIN_EXE_virtnode").into())
        .into()
}

/// Prints a figure as one line of the table.
pub(crate) fn report(what: &str, measured: &str, goal: &str, reached: bool, comparison: &str) {
    let reached = if reached { "yes" } else { "NO" };
    print(&format!(
        "{what}\t{measured}\t{goal}\t{reached}\t{comparison}"
    ));
}

pub(crate) fn print(line: &str) {
    #[expect(clippy::print_stdout, reason = "the figures are the output")]
    {
        println!("{line}");
    }
}

pub(crate) fn progress(step: &str) {
    #[expect(
        clippy::print_stderr,
        reason = "progress of a measurement that takes minutes"
    )]
    {
        eprintln!("figures: {step}");
    }
}

/// Kills the process when dropped.
pub(crate) struct KillOnDrop(pub(crate) Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // An error means that the process has already ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Memory of a process in MB (million bytes).
pub(crate) struct Memory {
    pub(crate) anonymous: f64,
    pub(crate) resident: f64,
}

impl Memory {
    pub(crate) fn of(process: u32) -> anyhow::Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let field = |name: &str| -> anyhow::Result<f64> {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
            let kib: f64 = kib.with_context(|| format!("no {name}"))?.parse()?;
            Ok(kib * 1024.0 / 1e6)
        };
        Ok(Self {
            anonymous: field("Anonymous:")?,
            resident: field("Rss:")?,
        })
    }
}

pub(crate) fn scrape_time(url: &str) -> anyhow::Result<Duration> {
    let seconds = curl(&[
        "--fail",
        "--output",
        "/dev/null",
        "--write-out",
        "%{time_total}",
        url,
    ])?;
    Ok(Duration::from_secs_f64(seconds.trim().parse()?))
}

pub(crate) fn curl(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "10"])
        .args(arguments)
        .output()
        .context("curl is not installed")?;
    ensure!(
        output.status.success(),
        "curl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns a port without a listener, below the range for outgoing connections.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let mut ports = std::iter::repeat_with(|| fastrand::u16(20_000..32_768)).take(1000);
    ports
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .context("no free port")
}

/// Returns the median, and sorts the times.
pub(crate) fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

pub(crate) fn ms(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else {
        format!("{ms:.0} ms")
    }
}
