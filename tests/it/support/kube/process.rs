//! Child processes that are killed with their owner, and free ports for them.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, anyhow, ensure};

/// Below Linux's range of ephemeral ports (32768 and up), so that the port of a stopped server stays
/// free until its restart.
const PORTS: std::ops::Range<u16> = 20_000..32_768;

/// A running program, killed and awaited when dropped.
#[derive(Debug)]
pub(in crate::support) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`, whose output is appended to `log`.
    pub(in crate::support) fn start(
        program: &Path,
        args: &[String],
        log: PathBuf,
    ) -> anyhow::Result<Self> {
        let output = File::options().create(true).append(true).open(&log)?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self { child, log })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    /// If the program has exited: its status and the last lines of its output.
    pub(in crate::support) fn ensure_running(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(anyhow!(
                "{status}; {}:\n{}",
                self.log.display(),
                self.log_tail()
            )),
        }
    }

    fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has exited by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Returns the output of a program with one argument, such as `--version`.
pub(in crate::support) fn output_of(program: &Path, arg: &str) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg(arg)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {arg}: {}",
        program.display(),
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Returns `N` different free ports of the loopback address. Another process may take one before it is
/// used, so callers retry.
pub(in crate::support) fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    // All are held until all are found, to avoid duplicates.
    let listeners: Vec<TcpListener> = (0..1000)
        .filter_map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(PORTS))).ok())
        .take(N)
        .collect();
    let ports: Vec<u16> = listeners
        .iter()
        .map(|l| Ok(l.local_addr()?.port()))
        .collect::<anyhow::Result<_>>()?;
    ports
        .try_into()
        .map_err(|_| anyhow!("no {N} free ports on the loopback address"))
}
