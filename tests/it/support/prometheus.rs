//! A real Prometheus, which scrapes and evaluates the rules each second.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::eventually;
use super::kube::process::{Process, free_ports};

const LONG: Duration = Duration::from_secs(60);

/// Returns the directory of `prometheus` and `promtool`.
///
/// # Errors
/// They are not installed and cannot be downloaded.
pub(crate) fn programs() -> anyhow::Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/prometheus/unpack.sh");
    let mut command = Command::new(&script);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        output.status.success(),
        "no Prometheus to test with: see {}",
        script.display()
    );
    Ok(String::from_utf8(output.stdout)?.trim_end().into())
}

/// A running Prometheus with one target, the job `virtnode` of the instance `n1`.
pub(crate) struct Prometheus {
    process: Process,
    address: SocketAddr,
    _directory: TempDir,
}

impl Prometheus {
    /// Starts a Prometheus that scrapes `target` and evaluates `rules`, and waits for three scrapes.
    pub(crate) async fn start(target: SocketAddr, rules: &Value) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = |name: &str| directory.path().join(name);
        fs::write(file("rules.yaml"), rules.to_string())?;
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{
                "job_name": "virtnode",
                "static_configs": [{"targets": [target.to_string()], "labels": {"instance": "n1"}}],
            }],
        });
        fs::write(file("prometheus.yaml"), config.to_string())?;
        let [port] = free_ports()?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let arguments = [
            format!("--config.file={}", file("prometheus.yaml").display()),
            format!("--storage.tsdb.path={}", file("data").display()),
            format!("--web.listen-address={address}"),
        ];
        let process = Process::start(&programs()?.join("prometheus"), &arguments, file("log"))?;
        let mut prometheus = Self {
            process,
            address,
            _directory: directory,
        };
        eventually(LONG, async || {
            if let Err(ended) = prometheus.process.ensure_running() {
                return Ok(Err(ended));
            }
            let scraped = prometheus.query("count_over_time(up{job=\"virtnode\"}[5m]) >= 3")?;
            ensure!(
                scraped.as_array().is_some_and(|list| !list.is_empty()),
                "no scrapes yet"
            );
            Ok(Ok(()))
        })
        .await
        .context("Prometheus does not scrape")?
        .context("Prometheus ended")?;
        Ok(prometheus)
    }

    /// Returns the current result of an expression.
    pub(crate) fn query(&self, expression: &str) -> anyhow::Result<Value> {
        let data = self.get(&format!("/api/v1/query?query={}", encoded(expression)))?;
        Ok(data["result"].clone())
    }

    /// Returns the results of an expression over a period until now.
    pub(crate) fn query_range(
        &self,
        expression: &str,
        from: f64,
        to: f64,
        step: f64,
    ) -> anyhow::Result<Value> {
        let query = encoded(expression);
        let data = self.get(&format!(
            "/api/v1/query_range?query={query}&start={from}&end={to}&step={step}"
        ))?;
        Ok(data["result"].clone())
    }

    /// Returns the names of all metrics.
    pub(crate) fn names(&self) -> anyhow::Result<BTreeSet<String>> {
        Ok(serde_json::from_value(
            self.get("/api/v1/label/__name__/values")?,
        )?)
    }

    /// Returns `data` of an answer of its API.
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(LONG))?;
        // HTTP/1.0, so that the answer is not chunked.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let mut answer: Value = serde_json::from_str(body)?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].take())
    }
}

fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => encoded.push(byte.into()),
            // Writing to a String cannot fail.
            _ => write!(encoded, "%{byte:02X}").unwrap(),
        }
    }
    encoded
}
