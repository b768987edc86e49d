//! The real daemon, as a process.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::eventually;
use virtnode::hypervisor::CALLS;
use virtnode::operation::OperationId;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

/// A running `virtnode run`, killed when dropped.
pub(crate) struct Daemon {
    directory: TempDir,
    child: Child,
    address: SocketAddr,
}

/// An answer of the daemon's HTTP server.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Daemon {
    /// Starts a daemon with a new state directory, and waits until it listens.
    pub(crate) async fn start(uri: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(tempfile::tempdir()?, uri, arguments).await
    }

    /// Starts a daemon with the state directory of another.
    pub(crate) async fn start_in(
        directory: TempDir,
        uri: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
        command.env_clear().arg("run");
        Self::spawn(directory, command, uri, arguments).await
    }

    /// Starts a daemon by a command that executes `virtnode run`.
    pub(crate) async fn spawn(
        directory: TempDir,
        mut command: Command,
        uri: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let log = directory.path().join("log");
        let child = command
            .args([
                "--connect",
                uri,
                "--listen",
                "127.0.0.1:0",
                "--log-format",
                "json",
            ])
            .arg("--state-directory")
            .arg(directory.path().join("state"))
            .arg("--socket")
            .arg(directory.path().join("virtnode.sock"))
            .arg("--features-directory")
            .arg(directory.path().join("features.d"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let mut daemon = Self {
            directory,
            child,
            address: ([127, 0, 0, 1], 0).into(),
        };
        let address = eventually(LONG, async || {
            let lines = daemon.log();
            let serving = lines.iter().find_map(|line| line["address"].as_str());
            let serving = serving.with_context(|| format!("not listening: {lines:?}"))?;
            Ok(serving.parse()?)
        });
        daemon.address = address.await?;
        Ok(daemon)
    }

    /// Waits until `/readyz` succeeds.
    pub(crate) async fn ready(&self) -> anyhow::Result<()> {
        eventually(LONG, async || {
            let answer = self.get("/readyz")?;
            ensure!(answer.status == 200, "{}", answer.text());
            Ok(())
        })
        .await
    }

    /// Returns the log so far, a value per line.
    pub(crate) fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap_or(Value::String(line.to_owned())))
            .collect()
    }

    /// Returns the path of the published labels.
    pub(crate) fn labels_file(&self) -> PathBuf {
        self.directory.path().join("state/labels.json")
    }

    /// Returns the labels in the file.
    pub(crate) fn labels(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let file: Value = serde_json::from_slice(&fs::read(self.labels_file())?)?;
        Ok(serde_json::from_value(file["labels"].clone())?)
    }

    /// Returns the path of the local API's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("virtnode.sock")
    }

    /// Returns the address of metrics and health.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a GET request.
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.request(&format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ))
    }

    /// Sends a request and reads until the server closes.
    pub(crate) fn request(&self, request: &str) -> anyhow::Result<Answer> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .context("no answer")?;
        let head = String::from_utf8(answer[..end].to_vec())?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok(Answer {
            status,
            head,
            body: answer[end + 4..].to_vec(),
        })
    }

    /// Returns the value of a series, named as in the exposition.
    pub(crate) fn metric(&self, series: &str) -> anyhow::Result<f64> {
        let text = self.get("/metrics")?.text();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(line
            .with_context(|| format!("no {series} in\n{text}"))?
            .parse()?)
    }

    /// Returns the number of libvirt calls for labels so far.
    pub(crate) fn libvirt_calls(&self) -> anyhow::Result<f64> {
        let text = self.get("/metrics")?.text();
        text.lines()
            .filter_map(|line| line.strip_prefix("virtnode_hypervisor_call_duration_seconds_count"))
            .filter(|rest| {
                CALLS
                    .iter()
                    .any(|call| rest.contains(&format!("\"{call}\"")))
            })
            .map(|rest| Ok(rest.split(' ').nth(1).context("no value")?.parse::<f64>()?))
            .sum()
    }

    pub(crate) fn pid(&self) -> anyhow::Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Sends a request to the local API and returns the JSON of a successful answer.
    pub(crate) fn api(&self, method: &str, path: &str, body: &str) -> anyhow::Result<Value> {
        let length = body.len();
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(LONG))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.contains(" 200 ") || head.contains(" 202 "), "{answer}");
        Ok(serde_json::from_str(body)?)
    }

    /// Returns an operation's record in the journal.
    pub(crate) fn journal(&self, id: &OperationId) -> anyhow::Result<Value> {
        let file = format!("state/operations/{id}.json");
        let text = fs::read(self.directory.path().join(file))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Kills the daemon with `SIGKILL`, and returns its state directory for the next one.
    pub(crate) fn kill(mut self) -> anyhow::Result<TempDir> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(std::mem::replace(&mut self.directory, tempfile::tempdir()?))
    }

    /// Waits until the daemon ends by itself.
    pub(crate) async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        eventually(LONG, async || {
            self.child.try_wait()?.context("still running")
        })
        .await
    }

    /// Stops the daemon with `SIGTERM`, and returns its state directory for the next one.
    pub(crate) async fn stop(mut self) -> anyhow::Result<(ExitStatus, TempDir)> {
        kill(self.pid()?, Signal::SIGTERM)?;
        let status = eventually(LONG, async || {
            self.child.try_wait()?.context("still running")
        })
        .await?;
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir()?);
        Ok((status, directory))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs a command with the local API at `socket`. Returns exit code, standard output and standard
/// error.
pub(crate) fn run(socket: &Path, arguments: &[&str]) -> anyhow::Result<(i32, String, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        .output()?;
    Ok((
        output.status.code().context("killed")?,
        String::from_utf8(output.stdout)?,
        String::from_utf8(output.stderr)?,
    ))
}
