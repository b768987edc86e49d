//! The daemon: builds every part, joins them, and ends when one of them does.

pub mod api;
mod cluster;
mod health;
pub mod hotplug;
mod http;
mod listener;
mod socket;
mod tasks;

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::ObjectReference;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::cluster::OnNode;
use self::tasks::Parts;
use crate::cluster::{Cluster, ClusterConfig};
use crate::config::{Config, ConfigError, Target};
use crate::doctor::{DoctorScope, DoctorTask};
use crate::executor::Executor;
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::labeller::{Labeller, Outputs};
use crate::monitor::Monitor;
use crate::publish::events::EventRecorder;
use crate::publish::file::FilePublisher;
use crate::telemetry::Metrics;
use api::Access;
pub use health::Health;
use hotplug::Carried;
pub use socket::{LocalSocket, Peer};

/// The cluster and Node that a configuration names.
///
/// # Errors
/// No name is given and the machine's own cannot be read.
pub fn cluster_config(config: &Config) -> anyhow::Result<ClusterConfig> {
    let node = match &config.node_name {
        Some(name) => name.clone(),
        // The kubelet registers under the host name in lower case (pkg/util/node: GetHostname).
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .context("cannot read the host name; set --node-name")?
            .trim()
            .to_lowercase(),
    };
    Ok(ClusterConfig {
        kubeconfig: config.kubeconfig.clone(),
        context: config.context.clone(),
        ..ClusterConfig::new(node)
    })
}

/// Why the daemon ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was told to stop.
    Stop,
    /// It was told to read its configuration anew, and that can be used: start again.
    Reload,
}

/// Runs until a signal asks to stop or to reload, or a part ends by itself. Published labels
/// stay. `check` reads the configuration anew: one that is wrong does not end the daemon.
///
/// # Errors
/// A part that cannot be started, or that ended without being asked to.
pub async fn run(
    config: Config,
    check: impl Fn() -> Result<(), ConfigError>,
) -> anyhow::Result<Ending> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        commit = env!("VIRTNODE_COMMIT"),
        connect = %config.connect,
        publish = ?config.publish,
        schema = %config.policy.schema,
        "virtnode starts"
    );
    let listener = listener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    info!(address = %listener.local_addr()?, "serving /metrics, /healthz and /readyz");
    let mut parts = Parts::default();
    start(&config, listener, &mut parts).await?;
    // Where no service manager listens this does nothing.
    let _nobody = sd_notify::notify(&[NotifyState::Ready]);
    let outcome = supervise(&mut parts, check).await;
    let _nobody = match outcome {
        Ok(Ending::Reload) => sd_notify::notify(&[NotifyState::Reloading]),
        _ => sd_notify::notify(&[NotifyState::Stopping]),
    };
    parts.end().await;
    info!("virtnode ends; labels stay as they are");
    outcome
}

/// Builds the parts, joins them and starts them.
async fn start(config: &Config, listener: TcpListener, parts: &mut Parts) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let libvirt = libvirt_config(config);
    let hypervisor = Arc::new(Libvirt::start(libvirt, Arc::clone(&metrics)));
    let control = Arc::clone(&hypervisor);
    let on_node = match config.publishes_to(Target::Node) {
        true => {
            let cluster = Cluster::connect(cluster_config(config)?).await?;
            Some(OnNode::start(cluster, config, &metrics, parts))
        }
        false => None,
    };

    let events = on_node.as_ref().map(OnNode::events);
    let executor = start_hotplug(config, &control, &metrics, events, parts);

    let mut outlets = Outputs {
        file: config
            .publishes_to(Target::File)
            .then(|| FilePublisher::new(&config.state_directory, &config.features_directory)),
        ..Outputs::default()
    };
    let synced = on_node.map(|on_node| {
        let watched = match executor {
            Ok(Some(executor)) if config.hotplug_objects => on_node.control(executor, parts),
            Ok(_) => cluster::not_watched(
                "SwitchedOff",
                "DomainHotplug objects for this node are not seen: its daemon's configuration switches \
                 them off (hotplug.enabled, hotplug.objects).",
            ),
            Err(_) => cluster::not_watched(
                "CannotStart",
                "DomainHotplug objects for this node are not seen: its daemon could not start hotplug, \
                 and its log says why.",
            ),
        };
        on_node.publish(config, &hypervisor, watched, &mut outlets, parts)
    });
    let root = Path::new("/").to_owned();
    let labeller = Labeller::new(
        hypervisor,
        config.policy.clone(),
        config.probe_interval,
        root.clone(),
        outlets,
        Arc::clone(&metrics),
    );
    let monitor = Monitor::new(control, Arc::clone(&metrics.inventory));
    let scope = DoctorScope {
        root,
        uri: config.connect.clone(),
        policy: config.policy.clone(),
    };
    let doctor = DoctorTask::new(
        scope,
        config.probe_interval,
        labeller.latest(),
        monitor.sight(),
        Arc::clone(&metrics),
    );
    let health = Health::new(labeller.progress(), synced);
    let health = Arc::new(health.with_domains(Arc::clone(&metrics.inventory)));
    parts.start("the labeller", |stop| labeller.run(stop));
    parts.start("the monitor of running domains", |stop| monitor.run(stop));
    parts.start("the doctor", |stop| doctor.run(stop));
    parts.start_endless("the watchdog", beat(Arc::clone(&health)));
    let router = http::router(metrics, health);
    let serving = listener::serve(listener, router, listener::Bounds::default());
    parts.start_endless("the HTTP server", serving);
    Ok(())
}

/// Returns how libvirt is reached.
pub(crate) fn libvirt_config(config: &Config) -> LibvirtConfig {
    LibvirtConfig {
        call_deadline: config.call_deadline,
        ..LibvirtConfig::new(config.connect.clone())
    }
}

/// Starts the executor and the local API, and gives the executor, unless hotplug is switched off.
/// Labels do not wait for a socket or a journal that cannot be made: that is told here.
fn start_hotplug(
    config: &Config,
    control: &Arc<Libvirt>,
    metrics: &Arc<Metrics>,
    events: Option<(EventRecorder, ObjectReference)>,
    parts: &mut Parts,
) -> anyhow::Result<Option<Arc<Executor<Libvirt>>>> {
    let started = serve_operations(config, control, metrics, events, parts);
    if let Err(error) = &started {
        error!("hotplug is off until the next start: {error:#}");
    }
    started
}

fn serve_operations(
    config: &Config,
    control: &Arc<Libvirt>,
    metrics: &Arc<Metrics>,
    events: Option<(EventRecorder, ObjectReference)>,
    parts: &mut Parts,
) -> anyhow::Result<Option<Arc<Executor<Libvirt>>>> {
    // First: it also keeps a second daemon away from the journal.
    let gid = config.allowed_gids.first().copied();
    let socket = api::bind(&config.socket, gid)
        .with_context(|| format!("cannot serve the local API at {}", config.socket.display()))?;
    let mut carried = None;
    if config.hotplug {
        let (state, deep) = (&config.state_directory, config.deep_verify);
        let started = Carried::start(Arc::clone(control), state, deep, metrics, events)
            .context("hotplug cannot be served (hotplug.enabled: false switches it off)")?;
        carried = Some(Arc::new(started));
    }
    if let Some(carried) = carried.clone() {
        let metrics = Arc::clone(metrics);
        parts.start("the executor", |stop: CancellationToken| async move {
            stop.run_until_cancelled(carried.count(&metrics)).await;
            carried.stop().await;
        });
    }
    let executor = carried.as_ref().map(|carried| carried.executor());
    let access = Access::new(config.allowed_uids.clone(), config.allowed_gids.clone());
    let router = api::router(carried, Arc::clone(metrics), access);
    parts.start_endless("the local API", api::serve(socket, router));
    info!(socket = %config.socket.display(), hotplug = config.hotplug, "serving the local API");
    Ok(executor)
}

/// Ticks once a second, for `/healthz` and for the service manager's watchdog.
async fn beat(health: Arc<Health>) {
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let watched = sd_notify::watchdog_enabled().is_some();
    loop {
        second.tick().await;
        health.tick();
        if watched {
            let _nobody = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Waits for a signal, or for a part to end, which none should.
async fn supervise(
    parts: &mut Parts,
    check: impl Fn() -> Result<(), ConfigError>,
) -> anyhow::Result<Ending> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // A terminal that is closed ends what runs on it. Asked now: a closed one is none any more.
    let on_terminal = std::io::stderr().is_terminal();
    loop {
        tokio::select! {
            _ = terminate.recv() => info!("told to stop by SIGTERM"),
            _ = interrupt.recv() => info!("told to stop by SIGINT"),
            _ = hangup.recv() => match check() {
                _ if on_terminal => info!("its terminal is closed"),
                Ok(()) => {
                    info!("told to reload by SIGHUP; starting again");
                    return Ok(Ending::Reload);
                }
                Err(error) => {
                    error!(%error, "told to reload by SIGHUP, but the configuration cannot be used; going on as before");
                    continue;
                }
            },
            ended = parts.ended() => bail!(ended),
        }
        break;
    }
    // A second signal does not wait.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        crate::ffi::leave(130);
    });
    Ok(Ending::Stop)
}
