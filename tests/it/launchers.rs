//! Connections to imitated launchers with a real libvirt: which are made, refused, lost and made again.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use virtnode::config::LauncherConfig;
use virtnode::connections::ConnectionSet;
use virtnode::domain::ConnectionId;
use virtnode::hypervisor::{
    CallError, DomainBackend as _, HypervisorMetrics, Libvirt, Notice, Workers,
};
use virtnode::launchers::{Census, LauncherMetrics, LauncherScan};
use virtnode::telemetry::MetricRegistry;

use crate::support::daemon::{self, Daemon};
use crate::support::eventually;
use crate::support::guest::Host as _;
use crate::support::launchers::vm::Vm;
use crate::support::launchers::{
    Identity, LIBVIRT_SOCK, LauncherConfig as Pod, Launchers, QEMU, VIRTQEMUD_SOCK, pod_uid,
};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// The product's part: the task that keeps the connections, with this process's rights.
struct Node {
    set: Arc<ConnectionSet<Libvirt>>,
    launchers: Arc<virtnode::launchers::Launchers>,
    registry: MetricRegistry,
    task: tokio::task::JoinHandle<()>,
}

impl Node {
    fn scan(directory: &Path) -> Self {
        Self::scan_at_most(directory, 64)
    }

    fn scan_at_most(directory: &Path, most: usize) -> Self {
        let config = LauncherConfig {
            enabled: true,
            directory: directory.to_owned(),
            volume: "libvirt-runtime".to_owned(),
            sockets: vec![VIRTQEMUD_SOCK.to_owned(), LIBVIRT_SOCK.to_owned()],
            scan_interval: Duration::from_millis(200),
            most,
            hotplug: false,
            verify_pods: false,
        };
        let registry = MetricRegistry::new();
        let set = Arc::new(ConnectionSet::new(Vec::new()));
        let scan = LauncherScan::new(
            config,
            &Workers::new(),
            Arc::clone(&set),
            Arc::new(HypervisorMetrics::register(&registry)),
            Arc::new(LauncherMetrics::register(&registry)),
        );
        let launchers = scan.launchers();
        let task = tokio::spawn(scan.run(tokio_util::sync::CancellationToken::new()));
        Self {
            set,
            launchers,
            registry,
            task,
        }
    }

    fn census(&self) -> Census {
        self.launchers.census()
    }

    fn metric(&self, series: &str) -> f64 {
        let text = self.registry.encode().unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series));
        value.and_then(|value| value.trim().parse().ok()).unwrap()
    }

    fn in_state(&self, state: &str) -> f64 {
        self.metric(&format!("virtnode_launchers{{state=\"{state}\"}}"))
    }

    /// Waits until this many launchers have this state.
    async fn count(&self, state: &str, count: f64) {
        let counted = eventually(LONG, async || {
            let shown = self.in_state(state);
            ensure!(shown == count, "{shown} {state}: {}", self.states());
            Ok(())
        });
        counted.await.unwrap();
    }

    fn states(&self) -> String {
        let text = self.registry.encode().unwrap();
        let lines = text
            .lines()
            .filter(|line| line.starts_with("virtnode_launcher"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Waits until the domains of these names are running.
    async fn shows(&self, names: &[&str]) {
        let wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let shown = eventually(LONG, async || {
            let running = self.set.statistics().await?;
            let names = running
                .iter()
                .map(|stats| stats.id.display_name().into_owned());
            let names: BTreeSet<String> = names.collect();
            ensure!(names == wanted, "{names:?}");
            Ok(())
        });
        shown.await.unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn vm(namespace: &'static str) -> Vm<'static> {
    Vm {
        namespace,
        memory_mib: 16,
        ..Vm::default()
    }
}

#[tokio::test]
async fn launchers_of_both_users_are_connected_by_paths_longer_than_a_sockets_address() {
    let pods = Launchers::new().unwrap();
    let (first, second) = (pod_uid(1), pod_uid(2));
    let of_qemu = pods.start(&first).await.unwrap();
    let of_root = Pod {
        user: 0,
        socket: LIBVIRT_SOCK,
        ..Pod::new(&second)
    };
    let of_root = pods.start_with(of_root).await.unwrap();
    assert!(of_qemu.socket().as_os_str().len() > 107);
    of_qemu.start_paused(&vm("tenant-a")).unwrap();
    of_root.start_paused(&vm("tenant-b")).unwrap();

    let node = Node::scan(&pods.pods());
    node.count("up", 2.0).await;
    node.shows(&["tenant-a/web", "tenant-b/web"]).await;
    let census = node.census();
    assert!(census.scanned && census.unreachable.is_empty());
    assert_eq!(census.up.len(), 2);
    assert!(node.metric("virtnode_launcher_scan_last_success_timestamp_seconds") > 0.0);

    // Both have the UUID that old KubeVirt derives from the name.
    let error = node.set.find(vm("tenant-a").uuid).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("tenant-a/web") && error.contains("tenant-b/web"),
        "{error}"
    );
    let domain = node.set.find("tenant-b/web").await.unwrap();
    assert_eq!(domain.connection, ConnectionId::launcher(&second));
    let domain = node.set.find("tenant-a_web").await.unwrap();
    assert_eq!(domain.connection, ConnectionId::launcher(&first));
    let unknown = node.set.find("tenant-c/web").await;
    assert!(
        matches!(unknown, Err(CallError::NotFound(_))),
        "{unknown:?}"
    );
}

#[tokio::test]
async fn link_to_the_socket_of_another_pod_is_odd() {
    let pods = Launchers::new().unwrap();
    let victim = pods.start(&pod_uid(1)).await.unwrap();
    victim.start_paused(&vm("tenant-a")).unwrap();
    let evil = pods.volume(&pod_uid(2), "libvirt-runtime").unwrap();
    symlink(victim.socket(), evil.join(VIRTQEMUD_SOCK)).unwrap();

    let node = Node::scan(&pods.pods());
    node.count("up", 1.0).await;
    node.count("odd", 1.0).await;
    node.shows(&["tenant-a/web"]).await;
    assert_eq!(
        node.census().unreachable,
        [ConnectionId::launcher(pod_uid(2))]
    );
    assert_eq!(
        node.metric("virtnode_launcher_opens_total{result=\"opened\"}"),
        1.0
    );
}

#[tokio::test]
async fn daemon_that_ends_is_lost_and_connected_again_with_its_next_socket() {
    let pods = Launchers::new().unwrap();
    let mut launcher = pods.start(&pod_uid(1)).await.unwrap();
    launcher.start_paused(&vm("tenant-a")).unwrap();
    let node = Node::scan(&pods.pods());
    node.shows(&["tenant-a/web"]).await;

    // The socket stays, and nobody listens.
    launcher.kill().unwrap();
    node.count("lost", 1.0).await;
    assert_eq!(node.census().unreachable.len(), 1);
    launcher.restart().await.unwrap();
    node.count("up", 1.0).await;
    node.shows(&["tenant-a/web"]).await;

    // The socket is removed.
    launcher.terminate().unwrap();
    node.count("lost", 1.0).await;
    launcher.restart().await.unwrap();
    node.count("up", 1.0).await;

    // Events come once: the earlier connections are closed, with their callbacks.
    let mut notices = node.set.events();
    launcher.virsh(&["resume", "tenant-a_web"]).unwrap();
    launcher.virsh(&["destroy", "tenant-a_web"]).unwrap();
    let (mut resumed, mut has_gap) = (0, false);
    let stopped = eventually(LONG, async || {
        loop {
            match notices.next().await.context("ended")? {
                Notice::Gap { .. } => has_gap = true,
                Notice::Change { change, .. } => {
                    let change = format!("{change:?}");
                    resumed += usize::from(change.contains("Resumed"));
                    if change.contains("Stopped") {
                        return Ok(());
                    }
                }
            }
        }
    });
    stopped.await.unwrap();
    // libvirt sends one event for the unpausing, QEMU another. The daemon changes its socket's status
    // once more after it listens: then the connection is replaced, and a gap reported.
    assert!(resumed <= 2, "{resumed}");
    assert!(resumed > 0 || has_gap, "an event is missing without a gap");
}

#[tokio::test]
async fn stopped_daemons_delay_no_other_launcher() {
    let pods = Launchers::new().unwrap();
    let uids: Vec<String> = (1..=3).map(pod_uid).collect();
    let mut launchers = pods.start_all(&uids).await.unwrap();
    let mut later = launchers.pop().unwrap();
    let mut stopped = launchers.pop().unwrap();
    let healthy = launchers.pop().unwrap();
    for (launcher, namespace) in [(&healthy, "a"), (&stopped, "b"), (&later, "c")] {
        launcher.start_paused(&vm(namespace)).unwrap();
    }
    // Stopped before the first connection.
    later.freeze().unwrap();
    let node = Node::scan(&pods.pods());
    node.count("up", 2.0).await;
    node.shows(&["a/web", "b/web"]).await;
    // Stopped with an open connection.
    stopped.freeze().unwrap();

    let hung = ConnectionId::launcher(pod_uid(2));
    let asked = {
        let (set, hung) = (Arc::clone(&node.set), hung.clone());
        tokio::spawn(async move { set.statistics_of(&hung).await })
    };
    // The question to the stopped one is in progress all the time.
    for _ in 0..50 {
        let connection = ConnectionId::launcher(pod_uid(1));
        let running = node.set.statistics_of(&connection).await.unwrap();
        assert_eq!(running.len(), 1);
        node.set.find("a/web").await.unwrap();
    }
    assert!(
        !asked.is_finished(),
        "50 answers took longer than its bound"
    );
    assert!(asked.await.unwrap().is_err());
    node.count("unresponsive", 1.0).await;
    assert_eq!(node.set.statistics().await.unwrap().len(), 1);
    let error = node.set.statistics_of(&hung).await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");

    // A launcher that comes meanwhile is connected.
    let new = pods.start(&pod_uid(4)).await.unwrap();
    new.start_paused(&vm("d")).unwrap();
    node.count("up", 2.0).await;
    later.thaw().unwrap();
    stopped.thaw().unwrap();
    node.count("up", 4.0).await;
    node.shows(&["a/web", "b/web", "c/web", "d/web"]).await;
}

#[tokio::test]
async fn pod_that_is_created_again_replaces_the_earlier_one() {
    let pods = Launchers::new().unwrap();
    let first = pods.start(&pod_uid(1)).await.unwrap();
    first.start_paused(&vm("tenant-a")).unwrap();
    let node = Node::scan(&pods.pods());
    node.shows(&["tenant-a/web"]).await;
    let mut notices = node.set.events();

    // The same name and UUID in another pod, while the first one still exists.
    let second = pods.start(&pod_uid(2)).await.unwrap();
    second.start_paused(&vm("tenant-a")).unwrap();
    let newer = ConnectionId::launcher(pod_uid(2));
    let moved = eventually(LONG, async || {
        let running = node.set.statistics().await?;
        let [one] = &running[..] else {
            anyhow::bail!("{running:?}");
        };
        ensure!(one.id.connection == newer, "{one:?}");
        Ok(())
    });
    moved.await.unwrap();
    node.count("conflict", 1.0).await;
    let found = node.set.find("tenant-a/web").await.unwrap();
    assert_eq!(found.connection, newer);

    first.remove().unwrap();
    node.count("conflict", 0.0).await;
    node.count("up", 1.0).await;
    // Until a scan finds its pod gone, it is lost.
    let alone = eventually(LONG, async || {
        let connections = node.set.connections();
        ensure!(connections == [newer.clone()], "{connections:?}");
        Ok(())
    });
    alone.await.unwrap();
    let gone = ConnectionId::launcher(pod_uid(1));
    let gap = eventually(LONG, async || {
        while !notices.next().await.context("ended")?.is_gap_of(&gone) {}
        Ok(())
    });
    gap.await.unwrap();
}

#[tokio::test]
async fn many_launchers_are_connected_at_once_up_to_the_maximum() {
    let pods = Launchers::new().unwrap();
    let uids: Vec<String> = (1..=6).map(pod_uid).collect();
    let launchers = pods.start_all(&uids).await.unwrap();
    // A directory without the volume is no launcher.
    fs::create_dir(pods.pod("not-a-launcher")).unwrap();
    let node = Node::scan_at_most(&pods.pods(), 5);
    node.count("up", 5.0).await;
    node.count("surplus", 1.0).await;
    assert_eq!(node.census().unreachable.len(), 1);
    for launcher in launchers {
        launcher.remove().unwrap();
    }
    for state in ["up", "lost", "gone", "surplus", "found"] {
        node.count(state, 0.0).await;
    }
    assert!(node.set.connections().is_empty());
}

/// Listens in the broker's layout and forwards to a launcher. Counts the open connections.
fn relay(directory: &Path, pod: &str, to: &Path) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(directory.join(format!("{pod}.sock"))).unwrap();
    let to = to.to_owned();
    let open = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&open);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut daemon = UnixStream::connect(&to).await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                copy_bidirectional(&mut client, &mut daemon).await.ok();
                count.fetch_sub(1, Ordering::Relaxed);
            });
        }
    });
    open
}

#[tokio::test]
async fn connection_of_a_pod_that_is_gone_is_really_closed() {
    let pods = Launchers::new().unwrap();
    let launcher = pods.start(&pod_uid(1)).await.unwrap();
    launcher.start_paused(&vm("tenant-a")).unwrap();
    let served = tempfile::tempdir().unwrap();
    let short = served.path().join("l");
    symlink(launcher.socket().parent().unwrap(), &short).unwrap();
    let sockets = served.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    let open = relay(&sockets, "pod-a", &short.join(VIRTQEMUD_SOCK));

    let node = Node::scan(&sockets);
    node.shows(&["tenant-a/web"]).await;
    // The greeting's connection is closed, and one carries events and calls.
    let connections = async |wanted| {
        let counted = eventually(LONG, async || {
            let open = open.load(Ordering::Relaxed);
            ensure!(open == wanted, "{open} connections");
            Ok(())
        });
        counted.await.unwrap();
    };
    connections(1).await;
    fs::remove_file(sockets.join("pod-a.sock")).unwrap();
    connections(0).await;
    node.count("gone", 0.0).await;
    assert!(node.set.connections().is_empty());
}

#[tokio::test]
async fn daemon_of_user_107_without_capabilities_shows_what_it_may_and_counts_the_rest() {
    let pods = Launchers::new().unwrap();
    let (first, second) = (pod_uid(1), pod_uid(2));
    let of_qemu = pods.start(&first).await.unwrap();
    of_qemu.start_paused(&vm("tenant-a")).unwrap();
    let of_root = Pod {
        user: 0,
        socket: LIBVIRT_SOCK,
        ..Pod::new(&second)
    };
    let _of_root = pods.start_with(of_root).await.unwrap();

    let directory = tempfile::Builder::new().tempdir_in("/tmp").unwrap();
    let everyone = fs::Permissions::from_mode(0o777);
    fs::set_permissions(directory.path(), everyone.clone()).unwrap();
    let program = directory.path().join("virtnode");
    fs::copy(env!("CARGO_BIN_EXE_virtnode"), &program).unwrap();
    fs::set_permissions(&program, everyone).unwrap();
    let config = directory.path().join("config.yaml");
    let text = format!(
        "launchers: {{enabled: true, directory: {}, scanSeconds: 1}}\n",
        pods.pods().display()
    );
    fs::write(&config, text).unwrap();
    let identity = Identity {
        user: QEMU,
        group: 0,
    };
    let mut command = identity.command(&program);
    command.arg("run").arg("--config").arg(&config);
    let arguments = ["--publish", "none"];
    let daemon = Daemon::spawn(directory, command, "none", &arguments)
        .await
        .unwrap();
    let shows = async |series: &str, value: f64| {
        let shown = eventually(LONG, async || {
            let shown = daemon.metric(series)?;
            ensure!(shown == value, "{series} is {shown}");
            Ok(())
        });
        shown.await.unwrap();
    };
    shows("virtnode_launchers{state=\"up\"}", 1.0).await;
    shows("virtnode_launchers{state=\"refused\"}", 1.0).await;
    let series = "virtnode_domain_vcpus{connection=\"launcher\",domain=\"tenant-a_web\",\
                  name=\"web\",namespace=\"tenant-a\",state=\"maximum\"}";
    shows(series, 16.0).await;
    shows("virtnode_domains{state=\"paused\"}", 1.0).await;

    // Commands and API know the name in both forms; changes are off by default.
    let socket = daemon.socket();
    for name in ["tenant-a/web", "tenant-a_web", vm("tenant-a").uuid] {
        let arguments = ["hotplug", "vcpus", name, "2", "--output", "json"];
        let (_, output, error) = daemon::run(&socket, &arguments).unwrap();
        let record: serde_json::Value = serde_json::from_str(&output).expect(&error);
        assert_eq!(record["domain"]["name"], "tenant-a_web", "{record}");
        assert_ne!(record["verdict"], "Verified", "{record}");
    }
    let count = of_qemu.virsh(&["vcpucount", "tenant-a_web", "--live", "--active"]);
    assert_eq!(count.unwrap().trim(), "1");
    let (code, listed, error) = daemon::run(&socket, &["operations"]).unwrap();
    assert_eq!(code, 0, "{error}");
    assert!(listed.contains("tenant-a/web"), "{listed}");

    drop(of_qemu);
    shows("virtnode_launchers{state=\"lost\"}", 1.0).await;
    // The pod still exists, so what is known of its domain stays.
    shows(series, 16.0).await;
}
