//! `virtnode doctor`.

use std::io::{IsTerminal, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Bytes;
use axum::http::{Request, StatusCode, header};
use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::diagnosis::show;
use super::local::{Found, Local};
use super::output::{Output, print, print_value};
use super::{Exit, runtime};
use crate::config::Config;
use crate::doctor::checks::observed::Daemon;
use crate::doctor::checks::{Severity, diagnose};
use crate::doctor::{DoctorScope, observe_node};
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::telemetry::Metrics;
use crate::telemetry::metrics::now_seconds;

/// One question to libvirt is not waited for longer than this, whatever the daemon's deadline is:
/// somebody is waiting.
const QUESTION: Duration = Duration::from_secs(20);
/// The daemon answers from memory.
const DAEMON: Duration = Duration::from_secs(5);
/// No exposition is larger: 10,000 domains are less.
const METRICS_MAX_BYTES: usize = 16 * 1024 * 1024;

/// The arguments of `virtnode doctor`.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    /// How the findings are printed
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,

    /// Where the host's file system begins, such as /host in a container that has it mounted
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl Doctor {
    /// Looks this node over. Exit code 1 if there is an error, else 0: that libvirt does not
    /// answer is an error among others, since the rest is told all the same.
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        anyhow::ensure!(
            self.root.is_dir(),
            "--root {}: there is no such directory",
            self.root.display()
        );
        let waiting = Waiting::show();
        let observed = runtime()?.block_on(async {
            let daemon = daemon(config).await;
            let scope = DoctorScope {
                root: self.root.clone(),
                uri: config.connect.clone(),
                policy: config.policy.clone(),
            };
            let metrics = Arc::new(Metrics::new());
            let libvirt = LibvirtConfig {
                call_deadline: config.call_deadline.min(QUESTION),
                ..LibvirtConfig::without_events(config.connect.clone())
            };
            let libvirt = Arc::new(Libvirt::start(libvirt, metrics));
            let control = Arc::clone(&libvirt);
            observe_node(&scope, libvirt, &*control, daemon).await
        });
        drop(waiting);
        let diagnosis = diagnose(&observed);
        match self.output {
            Output::Table => print(&show(&diagnosis))?,
            output => print_value(&diagnosis, output)?,
        }
        Ok(match diagnosis.worst() {
            Severity::Ok | Severity::Warning => Exit::Done,
            Severity::Error => Exit::Failed,
        })
    }
}

/// A line on the terminal while it is looked; taken away at the end.
struct Waiting {
    on_terminal: bool,
}

impl Waiting {
    fn show() -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        if on_terminal {
            write("Looking at the host, libvirt and its domains; a slow libvirt takes a minute …");
        }
        Self { on_terminal }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.on_terminal {
            write("\r\u{1b}[2K");
        }
    }
}

fn write(text: &str) {
    let mut err = std::io::stderr().lock();
    // A closed terminal is the reader's wish.
    let _closed = write!(err, "{text}").and_then(|()| err.flush());
}

/// The daemon of this node, by its metrics; if those cannot be had, by its socket.
async fn daemon(config: &Config) -> Daemon {
    let read = timeout(DAEMON, metrics(config.listen)).await;
    let why = match read {
        Ok(Ok(metrics)) if metrics.contains("virtnode_build_info") => {
            return Daemon::Runs {
                metrics,
                now: now_seconds(),
                interval: config.probe_interval,
            };
        }
        Ok(Ok(_)) => format!("what answers at {} is not virtnode", config.listen),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("{} did not answer within {DAEMON:?}", config.listen),
    };
    match timeout(DAEMON, Local::find(&config.socket)).await {
        Ok(Ok(Found::Daemon(_))) => Daemon::Unreadable(why),
        // The socket is there and closed to this user: so is, perhaps, the daemon.
        Ok(Err(_)) | Err(_) => Daemon::Unreadable(why),
        Ok(Ok(Found::Nobody(_))) => Daemon::None,
    }
}

/// The daemon's metrics.
async fn metrics(listen: SocketAddr) -> anyhow::Result<String> {
    let address = match listen.ip() {
        ip if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), listen.port())
        }
        _ => listen,
    };
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("nobody answers at {address}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Its errors come back from the request as well.
    tokio::spawn(async move { connection.await.ok() });
    let request = Request::get("/metrics")
        .header(header::HOST, "localhost")
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    anyhow::ensure!(
        answer.status() == StatusCode::OK,
        "{address} answered {}",
        answer.status()
    );
    let body = Limited::new(answer.into_body(), METRICS_MAX_BYTES)
        .collect()
        .await;
    let body = body.map_err(|error| anyhow::anyhow!("{address}: {error}"))?;
    Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
}
