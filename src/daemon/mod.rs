//! The daemon: starts the tasks, connects them, and supervises them.
//!
//! ```text
//!  libvirt ┬ labeller ┬ label set ┬ file publisher
//!          │          │           └ Node publisher ─────────────┐
//!          │          └ snapshot ── NodeVirtualization publisher┤ API server
//!          ├ executor ┬ controller ─────────────────────────────┤
//!          │          ├ events ──── event writer ───────────────┘
//!          │          └ local API
//!          ├ monitor ┬ inventory ┬ HTTP server, local API
//!          │         │           └ doctor
//!          └ verifier of external changes (if enabled) ── local API, metrics
//! ```
//!
//! **Ownership.** [`Tasks`] owns every task; tasks share the libvirt adapter, [`Metrics`] and
//! the executor by `Arc`, and pass values on through channels. The sockets are owned by the tasks
//! that serve them.
//!
//! **Blocking.** No task blocks the runtime's only thread: libvirt calls run on the adapter's own
//! threads, and file writes are small. If something blocks it nevertheless, `/healthz` fails and
//! systemd's watchdog restarts the process.
//!
//! **Start.** Bind the HTTP port → connect to the API server's configuration → bind the local
//! socket, which also excludes a second daemon → open the journal → start the other tasks → notify
//! the service manager. Nothing waits for libvirt or the API server: the tasks retry.
//!
//! **Stop.** SIGTERM and SIGINT cancel all tasks at once, and labels stay. A second signal exits
//! immediately. **Reload.** On SIGHUP the configuration is validated; if it is valid, the daemon
//! stops and the process executes its own program again, so that no task has to support a change of
//! configuration. A SIGHUP meanwhile stays pending until the new image handles it.
//!
//! **Failure.** If the directory with libvirt's socket is deleted, which a mount of a container
//! outlives, the daemon ends: a restarted container mounts the new one. A task that ends or panics stops the daemon with an error, for the service manager
//! to restart. If the socket or the journal cannot be opened, hotplug stays off until the next
//! start, labels are published all the same, and the daemon is not ready.

pub mod api;
mod cluster;
mod external;
mod health;
pub mod hotplug;
mod http;
mod listener;
mod metrics;
mod mount;
mod options;
mod signals;
mod socket;
mod stream;
mod tasks;

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::ObjectReference;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use self::cluster::ClusterTasks;
pub use self::metrics::Metrics;
use self::tasks::Tasks;
use crate::cluster::{Cluster, LauncherPods};
use crate::config::{Config, ConfigError, PublishTarget};
use crate::connections::ConnectionSet;
use crate::doctor::{DoctorScope, DoctorTask};
use crate::documents::DocumentDirectory;
use crate::domain::ConnectionId;
use crate::executor::Executor;
use crate::external::{ExternalChanges, OwnOperations, ServiceOptions};
use crate::files::raise_descriptor_limit;
use crate::hotplug::Patience;
use crate::hypervisor::{Libvirt, Workers};
use crate::labeller::{Labeller, Outputs};
use crate::launchers::{LauncherScan, Launchers};
use crate::monitor::Monitor;
use crate::probe::{LabelSource, ObserveLaunchers};
use crate::publish::events::EventRecorder;
use crate::publish::file::FilePublisher;
use api::Access;
pub use health::Health;
pub use options::NoLibvirt;
pub(crate) use options::{cluster_config, libvirt_config, one_shot_libvirt_config};
pub use signals::block_hangup;
pub use socket::{LocalSocket, Peer};

/// Why the daemon exited without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    Stop,
    /// SIGHUP with a valid configuration: execute the program again.
    Reload,
}

/// Runs until a signal stops or reloads the daemon, or a task fails. `check` validates the current
/// configuration file before a reload.
///
/// # Errors
/// A task could not be started, or ended without being cancelled.
pub async fn run(
    config: Config,
    check: impl Fn() -> Result<(), ConfigError>,
) -> anyhow::Result<ExitReason> {
    let hangup = signals::handle_hangup().context("cannot handle SIGHUP")?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        commit = env!("VIRTNODE_COMMIT"),
        connect = config.connect.as_deref().unwrap_or("none"),
        publish = ?config.publish,
        schema = %config.policy.schema,
        "virtnode starting"
    );
    let listener = listener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    info!(address = %listener.local_addr()?, "serving /metrics, /healthz and /readyz");
    let mut tasks = Tasks::default();
    start(&config, listener, &mut tasks).await?;
    notify(NotifyState::Ready);
    let outcome = supervise(&mut tasks, hangup, check).await;
    notify(match outcome {
        Ok(ExitReason::Reload) => NotifyState::Reloading,
        Ok(ExitReason::Stop) | Err(_) => NotifyState::Stopping,
    });
    tasks.stop().await;
    info!("virtnode stopped; published labels stay");
    outcome
}

/// Notifies the service manager, if there is one.
fn notify(state: NotifyState<'_>) {
    let _unsupervised = sd_notify::notify(&[state]);
}

async fn start(config: &Config, listener: TcpListener, tasks: &mut Tasks) -> anyhow::Result<()> {
    let metrics = Arc::new(Metrics::new());
    let workers = Workers::new();
    let libvirt = libvirt_config(config).ok().map(|options| {
        let calls = Arc::clone(&metrics.hypervisor);
        Arc::new(Libvirt::start_on(workers.clone(), options, calls))
    });
    if libvirt.is_none() {
        metrics.registry.remove(&metrics.hypervisor.connected);
    }
    let host = libvirt.clone().map(|libvirt| (ConnectionId::Host, libvirt));
    let connections = ConnectionSet::new(host.into_iter().collect());
    let connections = Arc::new(connections.with_launcher_changes(config.launchers.hotplug));
    let launchers = start_launchers(config, &workers, &connections, &metrics, tasks);
    let observed = launchers
        .clone()
        .map(|launchers| Box::new(move || launchers.census().into()) as ObserveLaunchers<Libvirt>);
    let source = Arc::new(LabelSource::new(
        config.label_origin,
        DocumentDirectory::new(&config.documents),
        libvirt,
        observed,
    ));
    let cluster_tasks = if config.publishes_to(PublishTarget::Node) {
        let cluster = Cluster::connect(cluster_config(config)?).await?;
        Some(ClusterTasks::start(cluster, config, &metrics, tasks))
    } else {
        None
    };

    let events = cluster_tasks.as_ref().map(ClusterTasks::events);
    let pods = cluster_tasks.as_ref().and_then(ClusterTasks::launcher_pods);
    let on_instance = events.clone().zip(pods.clone());
    let on_verdict = on_instance.map(|((events, _), pods)| external::record_events(events, pods));
    let verifies = config.external_changes.enabled;
    let own = verifies.then(Arc::<OwnOperations>::default);
    let executor = start_hotplug(
        config,
        &connections,
        &metrics,
        events,
        own.clone(),
        pods,
        tasks,
    );
    let executor = executor.map_err(|error| {
        let directories = [
            Some(config.state_directory.as_path()),
            config.socket.parent(),
        ];
        hotplug::with_owner(error, directories.into_iter().flatten())
    });
    let hotplug_problem = executor.as_ref().err().map(|error| format!("{error:#}"));
    if let Some(problem) = &hotplug_problem {
        error!("hotplug is off until the next start: {problem}");
    }

    let mut outputs = Outputs {
        file: config
            .publishes_to(PublishTarget::File)
            .then(|| FilePublisher::new(&config.state_directory, &config.features_directory)),
        ..Outputs::default()
    };
    let sync_state = cluster_tasks.map(|cluster_tasks| {
        let watched = match executor {
            Ok(Some(executor)) if config.hotplug_objects => {
                cluster_tasks.start_controller(executor, tasks)
            }
            Ok(_) => cluster::not_watched(
                "SwitchedOff",
                "DomainHotplug objects for this node are ignored, because the daemon's \
                 configuration disables them (hotplug.enabled, hotplug.objects).",
            ),
            Err(_) => cluster::not_watched(
                "CannotStart",
                "DomainHotplug objects for this node are ignored, because the daemon could not \
                 start hotplug. Its log has the reason.",
            ),
        };
        cluster_tasks.start_publishers(config, &source, watched, &mut outputs, tasks)
    });
    let root = Path::new("/").to_owned();
    let labeller = Labeller::new(
        source,
        config.policy.clone(),
        config.probe_interval,
        root.clone(),
        outputs,
        Arc::clone(&metrics.labeller),
    );
    let monitor = Monitor::new(Arc::clone(&connections), Arc::clone(&metrics.inventory));
    if let Some(own) = own {
        let options = ServiceOptions {
            grace: config.external_changes.grace,
            patience: Patience::default(),
        };
        let metrics = Arc::clone(&metrics.external);
        let changes = ExternalChanges::new(connections, options, monitor.sightings(), own, metrics);
        let changes = changes.with_listener(on_verdict);
        tasks.start("the verifier of external changes", |stop| changes.run(stop));
    }
    let scope = DoctorScope {
        root,
        uri: config.connect.clone(),
        policy: config.policy.clone(),
        label_origin: config.label_origin,
        documents: config.documents.clone(),
    };
    let doctor = DoctorTask::new(
        scope,
        config.probe_interval,
        labeller.latest(),
        monitor.observed(),
        Arc::clone(&metrics.doctor),
    );
    let health = Health::new(labeller.progress(), sync_state);
    let health = health.with_domains(Arc::clone(&metrics.inventory));
    let health = health.with_hotplug_problem(hotplug_problem);
    let health = Arc::new(health.with_launchers(launchers));
    if let Some(directory) = config.connect.as_deref().and_then(mount::socket_directory) {
        tasks.start_endless("libvirt's directory", mount::until_deleted(directory));
    }
    tasks.start("the labeller", |stop| labeller.run(stop));
    tasks.start("the monitor of running domains", |stop| monitor.run(stop));
    tasks.start("the doctor", |stop| doctor.run(stop));
    tasks.start_endless("the watchdog", heartbeat(Arc::clone(&health)));
    let router = http::router(metrics.registry.clone(), health);
    let limits = listener::ConnectionLimits::default();
    tasks.start_endless("the HTTP server", listener::serve(listener, router, limits));
    Ok(())
}

/// Starts the connections to launchers, if the configuration enables them.
fn start_launchers(
    config: &Config,
    workers: &Workers,
    connections: &Arc<ConnectionSet<Libvirt>>,
    metrics: &Arc<Metrics>,
    tasks: &mut Tasks,
) -> Option<Arc<Launchers>> {
    if !config.launchers.enabled {
        return None;
    }
    if let Err(error) = raise_descriptor_limit() {
        warn!(%error, "cannot raise the limit of open files; many launchers may exceed it");
    }
    let scan = LauncherScan::new(
        config.launchers.clone(),
        workers,
        Arc::clone(connections),
        Arc::clone(&metrics.hypervisor),
        Arc::clone(&metrics.launchers),
    );
    let launchers = scan.launchers();
    tasks.start("the connections to launchers", |stop| scan.run(stop));
    let directory = config.launchers.directory.display();
    info!(%directory, "connecting to launchers");
    Some(launchers)
}

/// Starts the executor and the local API. Returns the executor, or `None` if the configuration
/// disables hotplug.
fn start_hotplug(
    config: &Config,
    connections: &Arc<ConnectionSet<Libvirt>>,
    metrics: &Arc<Metrics>,
    events: Option<(EventRecorder, ObjectReference)>,
    own: Option<Arc<OwnOperations>>,
    pods: Option<LauncherPods>,
    tasks: &mut Tasks,
) -> anyhow::Result<Option<Arc<Executor<ConnectionSet<Libvirt>>>>> {
    // Before the journal, because the socket excludes a second daemon, which would resume the same
    // operations.
    let gid = config.allowed_gids.first().copied();
    let socket = api::bind(&config.socket, gid)
        .with_context(|| format!("cannot serve the local API at {}", config.socket.display()))?;
    let executor = if config.hotplug {
        let executor = hotplug::start_executor(
            config,
            Arc::clone(connections),
            &metrics.hotplug,
            events,
            own,
            pods,
        )
        .context("cannot start hotplug (hotplug.enabled: false disables it)")?;
        let (metrics, running) = (Arc::clone(metrics), Arc::clone(&executor));
        tasks.start("the executor", |stop: CancellationToken| async move {
            let counting = hotplug::count_operations(&running, &metrics.hotplug);
            stop.run_until_cancelled(counting).await;
            running.stop().await;
        });
        Some(executor)
    } else {
        None
    };
    let access = Access::new(config.allowed_uids.clone(), config.allowed_gids.clone());
    let verifies = config.external_changes.enabled;
    let external = verifies.then(|| Arc::clone(&metrics.external.log));
    let inventory = Arc::clone(&metrics.inventory);
    let router = api::router(executor.clone(), inventory, external, access);
    tasks.start_endless("the local API", api::serve(socket, router));
    info!(socket = %config.socket.display(), hotplug = config.hotplug, "serving the local API");
    Ok(executor)
}

/// Records once a second that the event loop runs, for `/healthz` and systemd's watchdog.
async fn heartbeat(health: Arc<Health>) {
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let has_watchdog = sd_notify::watchdog_enabled().is_some();
    loop {
        second.tick().await;
        health.tick();
        if has_watchdog {
            notify(NotifyState::Watchdog);
        }
    }
}

/// Waits for a signal or the failure of a task.
async fn supervise(
    tasks: &mut Tasks,
    mut hangup: Signal,
    check: impl Fn() -> Result<(), ConfigError>,
) -> anyhow::Result<ExitReason> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // SIGHUP means that the terminal closed, if there is one. Checked now, because a closed
    // terminal is no longer recognizable as one.
    let on_terminal = std::io::stderr().is_terminal();
    loop {
        tokio::select! {
            _ = terminate.recv() => info!("received SIGTERM, stopping"),
            _ = interrupt.recv() => info!("received SIGINT, stopping"),
            _ = hangup.recv() => match check() {
                _ if on_terminal => info!("terminal closed, stopping"),
                Ok(()) => {
                    info!("received SIGHUP, reloading");
                    return Ok(ExitReason::Reload);
                }
                Err(error) => {
                    error!(%error, "received SIGHUP, but the configuration is not valid; keeping the previous one");
                    continue;
                }
            },
            failure = tasks.failure() => bail!(failure),
        }
        break;
    }
    // Exits at once on a second signal.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        crate::ffi::leave(130);
    });
    Ok(ExitReason::Stop)
}
