//! The daemon: builds every part, joins them, and ends when one of them does.

pub mod api;
mod cluster;
mod health;
pub mod hotplug;
mod http;
mod listener;
mod socket;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::ObjectReference;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::cluster::{Cluster, ClusterConfig, HotplugObjects};
use crate::config::{Config, ConfigError, Target};
use crate::controller::{self, Controller};
use crate::doctor::{Doctor, Scope};
use crate::hypervisor::{ControlConfig, Libvirt, LibvirtConfig, LibvirtControl};
use crate::label::{LabelKey, LabelSet, LabelValue};
use crate::labeller::{Labeller, Outlets};
use crate::monitor::Monitor;
use crate::publish::events::Events;
use crate::publish::file::{self, FilePublisher, NODE_LABELS_FILE, Report};
use crate::publish::node::{NodePublisher, Options, SyncState};
use crate::telemetry::Metrics;
use api::Access;
pub use health::Health;
use hotplug::Carried;
pub use socket::{LocalSocket, Peer};

/// How long parts may take to end after they were asked to.
const GRACE: Duration = Duration::from_secs(5);

/// Between two attempts to see the Node for the first time.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

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
    let stop = CancellationToken::new();
    let mut parts = JoinSet::new();
    start(&config, listener, &stop, &mut parts).await?;
    // Where no service manager listens this does nothing.
    let _nobody = sd_notify::notify(&[NotifyState::Ready]);
    let outcome = supervise(&mut parts, check).await;
    let _nobody = match outcome {
        Ok(Ending::Reload) => sd_notify::notify(&[NotifyState::Reloading]),
        _ => sd_notify::notify(&[NotifyState::Stopping]),
    };
    stop.cancel();
    let ended = timeout(GRACE, async { while parts.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        warn!("a part did not end within {GRACE:?}; leaving it");
    }
    info!("virtnode ends; labels stay as they are");
    outcome
}

/// Builds the parts and starts each as a task with a name.
async fn start(
    config: &Config,
    listener: TcpListener,
    stop: &CancellationToken,
    parts: &mut JoinSet<&'static str>,
) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let hypervisor = Arc::new(Libvirt::start(
        LibvirtConfig {
            call_deadline: config.call_deadline,
            ..LibvirtConfig::new(config.connect.clone())
        },
        Arc::clone(&metrics),
    ));
    let mut outlets = Outlets {
        file: config
            .publishes_to(Target::File)
            .then(|| FilePublisher::new(&config.state_directory, &config.features_directory)),
        ..Outlets::default()
    };
    let mut node = None;
    let mut on_node = None;
    if config.publishes_to(Target::Node) {
        let cluster = Cluster::connect(cluster_config(config)?).await?;
        let events = cluster::start(
            &cluster,
            config,
            &hypervisor,
            &metrics,
            &mut outlets,
            stop,
            parts,
        );
        on_node = Some((events.clone(), cluster.node_reference()));
        let options = Options {
            force_conflicts: config.force_conflicts,
            start_jitter: config.start_jitter,
            ..Options::default()
        };
        let publisher = NodePublisher::new(cluster.clone(), events, Arc::clone(&metrics), options);
        let (desired, to_publish) = watch::channel(None);
        let (found, found_on_node) = oneshot::channel();
        outlets.node = Some(desired);
        outlets.found_on_node = Some(found_on_node);
        node = Some((cluster, publisher, to_publish, found));
    }
    let control = Arc::new(LibvirtControl::start(control_config(config), &metrics));
    let labeller = Labeller::new(
        hypervisor,
        config.policy.clone(),
        config.probe_interval,
        Path::new("/").to_owned(),
        outlets,
        Arc::clone(&metrics),
    );
    let synced = node.as_ref().map(|(_, publisher, ..)| publisher.state());
    let inventory = Arc::clone(&metrics.inventory);
    let health = Arc::new(Health::new(labeller.progress(), synced).with_domains(inventory));
    let monitor = Monitor::new(Arc::clone(&control), Arc::clone(&metrics.inventory));
    let scope = Scope {
        root: Path::new("/").to_owned(),
        uri: config.connect.clone(),
        policy: config.policy.clone(),
    };
    let doctor = Doctor::new(
        scope,
        config.probe_interval,
        labeller.latest(),
        monitor.sight(),
        Arc::clone(&metrics),
    );
    let token = stop.clone();
    parts.spawn(async move {
        doctor.run(token).await;
        "the doctor"
    });
    let token = stop.clone();
    parts.spawn(async move {
        monitor.run(token).await;
        "the monitor of running domains"
    });
    // Labels do not wait for a socket or a journal that cannot be made.
    match start_hotplug(config, &control, &metrics, on_node, stop, parts) {
        Ok(Some(carried)) if config.hotplug_objects => {
            if let Some((cluster, ..)) = &node {
                let options = controller::Options {
                    start_jitter: config.start_jitter,
                    ..controller::Options::default()
                };
                let objects = HotplugObjects::new(cluster);
                let counted = Arc::clone(&metrics);
                let controller = Controller::new(objects, carried.executor(), counted, options);
                let token = stop.clone();
                parts.spawn(async move {
                    controller.run(token).await;
                    "the controller of DomainHotplug objects"
                });
            }
        }
        Ok(_) => {}
        Err(error) => error!("hotplug is off until the next start: {error:#}"),
    }
    if let Some((cluster, publisher, to_publish, found)) = node {
        let memory = config.state_directory.join(NODE_LABELS_FILE);
        parts.spawn(remember(publisher.state(), memory.clone(), stop.clone()));
        let stop = stop.clone();
        let counted = Arc::clone(&metrics);
        parts.spawn(async move {
            let look = stop
                .run_until_cancelled(found_on_node(&cluster, &counted))
                .await;
            if let Some(on_node) = look {
                // Ours are those that the Node shows as ours, and those that somebody edited
                // while this daemon was away.
                let mut ours = file::load(&memory).unwrap_or_default();
                ours.extend(on_node.clone());
                // The labeller goes away only when the daemon stops.
                let _stopping = found.send(on_node);
                publisher.run(to_publish, ours, stop).await;
            }
            "the Node's publisher"
        });
    }
    let token = stop.clone();
    parts.spawn(async move {
        labeller.run(token).await;
        "the labeller"
    });
    let token = stop.clone();
    let watched = Arc::clone(&health);
    parts.spawn(async move {
        token.run_until_cancelled(beat(&watched)).await;
        "the watchdog"
    });
    let token = stop.clone();
    parts.spawn(async move {
        let router = http::router(metrics, health);
        token
            .run_until_cancelled(listener::serve(
                listener,
                router,
                listener::Bounds::default(),
            ))
            .await;
        "the HTTP server"
    });
    Ok(())
}

/// How libvirt is reached for its domains.
pub(crate) fn control_config(config: &Config) -> ControlConfig {
    ControlConfig {
        libvirt: LibvirtConfig {
            call_deadline: config.call_deadline,
            ..LibvirtConfig::new(config.connect.clone())
        },
        ..ControlConfig::new(config.connect.clone())
    }
}

/// Starts the executor and the local API. `None` if hotplug is switched off.
fn start_hotplug(
    config: &Config,
    control: &Arc<LibvirtControl>,
    metrics: &Arc<Metrics>,
    on_node: Option<(Events, ObjectReference)>,
    stop: &CancellationToken,
    parts: &mut JoinSet<&'static str>,
) -> anyhow::Result<Option<Arc<Carried<LibvirtControl>>>> {
    // First: it also keeps a second daemon away from the journal.
    let gid = config.allowed_gids.first().copied();
    let socket = api::bind(&config.socket, gid)
        .with_context(|| format!("cannot serve the local API at {}", config.socket.display()))?;
    let mut carried = None;
    if config.hotplug {
        let (state, deep) = (&config.state_directory, config.deep_verify);
        let started = Carried::start(Arc::clone(control), state, deep, metrics, on_node)
            .context("hotplug cannot be served (hotplug.enabled: false switches it off)")?;
        let started = Arc::new(started);
        carried = Some(Arc::clone(&started));
        let (token, metrics) = (stop.clone(), Arc::clone(metrics));
        parts.spawn(async move {
            token.run_until_cancelled(started.count(&metrics)).await;
            started.stop().await;
            "the executor"
        });
    }
    let access = Access::new(config.allowed_uids.clone(), config.allowed_gids.clone());
    let router = api::router(carried.clone(), Arc::clone(metrics), access);
    let serving = api::serve(socket, router);
    info!(socket = %config.socket.display(), hotplug = config.hotplug, "serving the local API");
    let token = stop.clone();
    parts.spawn(async move {
        token.run_until_cancelled(serving).await;
        "the local API"
    });
    Ok(carried)
}

/// Keeps what the Node has from us in a file, for the next run. A read-only state directory costs
/// only the knowledge which labels were edited while no daemon ran.
async fn remember(
    mut state: watch::Receiver<SyncState>,
    path: PathBuf,
    stop: CancellationToken,
) -> &'static str {
    let keep = async {
        let mut told = false;
        while state.changed().await.is_ok() {
            let published = Arc::clone(&state.borrow_and_update().published);
            if published.is_empty() {
                continue;
            }
            if let Err(error) = file::store(&path, &Report::of(&published))
                && !std::mem::replace(&mut told, true)
            {
                warn!(%error, "what is published on the Node cannot be kept for the next run");
            }
        }
        // Its sender ends with the publisher, which is told apart.
        std::future::pending::<()>().await;
    };
    stop.run_until_cancelled(keep).await;
    "the memory of the Node's labels"
}

/// What of ours the Node has: the labels that are ours by its field managers, with the values it
/// shows. Looks until it is told; the publisher reports what stands in the way from then on.
async fn found_on_node(cluster: &Cluster, metrics: &Metrics) -> LabelSet {
    let mut told = None;
    loop {
        match cluster.observe().await {
            Ok(state) => {
                let owned = state.shown.owned.iter().filter_map(|key| {
                    let value = state.shown.labels.get(key)?;
                    let key: LabelKey = key.parse().ok()?;
                    let value: LabelValue = value.parse().ok()?;
                    Some((key, value))
                });
                return owned.collect();
            }
            Err(error) => {
                metrics.sync_attempts.inc();
                metrics
                    .sync_failures
                    .with_label_values(&[error.code()])
                    .inc();
                if told != Some(error.code()) {
                    warn!(node = cluster.node(), %error, "the Node cannot be seen yet; trying on");
                    told = Some(error.code());
                }
                sleep(LOOK_AGAIN.mul_f64(0.5 + fastrand::f64())).await;
            }
        }
    }
}

/// Ticks once a second, for `/healthz` and for the service manager's watchdog.
async fn beat(health: &Health) {
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
    parts: &mut JoinSet<&'static str>,
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
            ended = parts.join_next() => match ended {
                Some(Ok(part)) => bail!("{part} ended by itself"),
                Some(Err(error)) => bail!("a part of the daemon failed: {error}"),
                None => bail!("no part of the daemon is left"),
            },
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
