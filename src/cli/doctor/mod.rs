//! `virtnode doctor`.

mod show;

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

use self::show::show;
use super::api_client::{ApiClient, DaemonLookup};
use super::output::{OutputOption, StatusLine};
use super::{Exit, runtime};
use crate::config::Config;
use crate::daemon::Metrics;
use crate::daemon::one_shot_libvirt_config;
use crate::doctor::checks::observed::Daemon;
use crate::doctor::checks::{Severity, diagnose};
use crate::doctor::{DoctorScope, observe_node};
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::telemetry::now_seconds;

/// Maximum timeout of a libvirt call, whatever the daemon's is: a person waits for the command.
const LIBVIRT_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the daemon, which answers from memory.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of the daemon's metrics. Those of 10,000 domains are smaller.
const METRICS_MAX_BYTES: usize = 16 * 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct DoctorCommand {
    #[command(flatten)]
    output: OutputOption,

    /// Root of the host's file system, such as /host in a container that mounts it there
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

impl DoctorCommand {
    /// Diagnoses this node. The exit code is 1 if any finding is an error, else 0. An unreachable
    /// libvirt is such a finding, because the other checks still run.
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        anyhow::ensure!(
            self.root.is_dir(),
            "--root {}: directory does not exist",
            self.root.display()
        );
        let status = StatusLine::new();
        status.show("Checking the host, libvirt and its domains. A slow libvirt takes a minute …");
        let observed = runtime()?.block_on(async {
            let daemon = daemon(config).await;
            let scope = DoctorScope {
                root: self.root.clone(),
                uri: config.connect.clone(),
                policy: config.policy.clone(),
                label_origin: config.label_origin,
                documents: config.documents.clone(),
            };
            let metrics = Metrics::new().hypervisor;
            // Without a libvirt it is not asked.
            let libvirt =
                one_shot_libvirt_config(config).unwrap_or_else(|_| LibvirtConfig::new(""));
            let libvirt = LibvirtConfig {
                call_deadline: config.call_deadline.min(LIBVIRT_TIMEOUT),
                ..libvirt
            };
            let libvirt = Arc::new(Libvirt::start(libvirt, metrics));
            observe_node(&scope, Arc::clone(&libvirt), &*libvirt, daemon).await
        });
        drop(status);
        let diagnosis = diagnose(&observed);
        self.output.print(&diagnosis, || show(&diagnosis))?;
        Ok(match diagnosis.worst() {
            Severity::Ok | Severity::Warning => Exit::Done,
            Severity::Error => Exit::Failed,
        })
    }
}

/// Finds this node's daemon by its metrics or, if they cannot be read, by its socket.
async fn daemon(config: &Config) -> Daemon {
    let read = timeout(DAEMON_TIMEOUT, metrics(config.listen)).await;
    let problem = match read {
        Ok(Ok(metrics)) if metrics.contains("virtnode_build_info") => {
            return Daemon::Runs {
                metrics,
                now: now_seconds(),
                interval: config.probe_interval,
            };
        }
        Ok(Ok(_)) => format!("the server at {} is not virtnode", config.listen),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => format!("{} did not answer within {DAEMON_TIMEOUT:?}", config.listen),
    };
    match timeout(DAEMON_TIMEOUT, ApiClient::find(&config.socket)).await {
        Ok(Ok(DaemonLookup::Absent(_))) => Daemon::None,
        // An error means that this user cannot use the socket, behind which a daemon may run.
        Ok(Ok(DaemonLookup::Running(_)) | Err(_)) | Err(_) => Daemon::Unreadable(problem),
    }
}

/// Fetches the daemon's metrics.
async fn metrics(listen: SocketAddr) -> anyhow::Result<String> {
    let address = match listen.ip() {
        ip if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), listen.port())
        }
        _ => listen,
    };
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("no server answers at {address}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // The request returns the errors of the connection.
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
