//! `systemd/virtnode.service`: systemd's verification of the unit, the notifications, and the daemon
//! under the restrictions of the unit and of the DaemonSet's container, as far as this machine
//! allows them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Uid;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn unit_passes_systemd_analyze() -> anyhow::Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/virtnode.service");
    let text = fs::read_to_string(unit)?;
    let started = "ExecStart=/usr/bin/virtnode run\n";
    ensure!(text.contains(started), "another ExecStart");
    let ours = format!("{} ", env!("CARGO_BIN_EXE_virtnode"));
    let directory = tempfile::tempdir()?;
    let installed = directory.path().join("virtnode.service");
    fs::write(&installed, text.replace("/usr/bin/virtnode ", &ours))?;
    // The threshold is in tenths.
    for arguments in [
        &["verify", "--man=no"][..],
        &["security", "--no-pager", "--offline=true", "--threshold=19"],
    ] {
        let mut command = Command::new("systemd-analyze");
        let output = command.args(arguments).arg(&installed).output();
        let output = output.context("this test needs systemd-analyze (package systemd)")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{arguments:?}: {said}{}",
            String::from_utf8_lossy(&output.stdout)
        );
        // systemd-analyze succeeds although it ignores settings, and reports them.
        assert!(!said.contains("virtnode.service"), "{said}");
    }
    Ok(())
}

/// `Type=notify`, `WatchdogSec=` and `ExecReload=`, on the socket of the service manager.
#[tokio::test]
async fn reload_restarts_the_daemon_in_the_same_process_and_notifies_systemd() -> anyhow::Result<()>
{
    let libvirtd = Libvirtd::start()?;
    let directory = tempfile::tempdir()?;
    let manager = directory.path().join("notify");
    let notices = UnixDatagram::bind(&manager)?;
    notices.set_read_timeout(Some(LONG))?;
    let notified = |wanted: &str| -> anyhow::Result<()> {
        let mut bytes = [0; 4096];
        loop {
            let length = notices
                .recv(&mut bytes)
                .with_context(|| format!("no {wanted}"))?;
            let text = std::str::from_utf8(&bytes[..length])?;
            if text.lines().any(|line| line == wanted) {
                return Ok(());
            }
        }
    };
    let config = directory.path().join("config.yaml");
    fs::write(&config, "schema: native\n")?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    command
        .env_clear()
        .env("NOTIFY_SOCKET", &manager)
        .env("WATCHDOG_USEC", "60000000")
        .env("VIRTNODE_CONFIG", &config)
        .arg("run");
    let daemon = Daemon::spawn(directory, command, &libvirtd.uri(), &[]).await?;
    notified("READY=1")?;
    notified("WATCHDOG=1")?;
    let pid = daemon.pid()?;
    let schemas = || -> Vec<String> {
        let log = daemon.log();
        let starts = log.iter().filter_map(|line| line["schema"].as_str());
        starts.map(str::to_owned).collect()
    };
    assert_eq!(schemas(), ["native"]);

    // An invalid configuration is reported and changes nothing.
    fs::write(&config, "schema: nativ\n")?;
    kill(pid, Signal::SIGHUP)?;
    eventually(LONG, async || {
        let log = daemon.log();
        let is_reported = log
            .iter()
            .any(|line| line.to_string().contains("keeping the previous one"));
        ensure!(is_reported, "{log:?}");
        Ok(())
    })
    .await?;

    fs::write(&config, "schema: both\n")?;
    kill(pid, Signal::SIGHUP)?;
    notified("RELOADING=1")?;
    notified("READY=1")?;
    assert_eq!(
        schemas(),
        ["native", "both"],
        "the same process, with the new configuration"
    );
    notified("WATCHDOG=1")?;
    kill(pid, Signal::SIGTERM)?;
    notified("STOPPING=1")?;
    let (status, _) = daemon.stop().await?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

/// Until it has a handler, a new image of the process would end by a signal that is not blocked.
#[tokio::test]
async fn thousand_reload_signals_at_any_time_do_not_end_the_daemon() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    let pid = daemon.pid()?;
    let status = Path::new("/proc").join(pid.to_string()).join("status");
    for round in 0..1000 {
        kill(pid, Signal::SIGHUP)?;
        // The reads spread the signals over the whole restart, which takes some milliseconds.
        for _ in 0..round % 100 {
            let text = fs::read_to_string(&status)?;
            ensure!(!text.contains("State:\tZ"), "ended after {round} signals");
        }
    }
    let listening = || -> Vec<String> {
        let log = daemon.log();
        let addresses = log.iter().filter_map(|line| line["address"].as_str());
        addresses.map(str::to_owned).collect()
    };
    eventually(LONG, async || {
        let addresses = listening();
        let last = addresses.last().context("no address")?;
        std::net::TcpStream::connect(last)?;
        Ok(())
    })
    .await?;
    let reloads = listening().len();
    ensure!(reloads > 10, "only {reloads} reloads");
    let text = fs::read_to_string(&status)?;
    ensure!(!text.contains("State:\tZ"), "ended after the last signal");
    Ok(())
}

/// User and groups of a daemon without capabilities.
struct Credentials {
    /// Must exist on this machine, or libvirtd rejects it.
    uid: u32,
    /// In addition to the user's own group, which has the same number.
    groups: &'static [u32],
}

/// Group of the private libvirtd's socket.
const LIBVIRT: u32 = 65534;

#[tokio::test]
async fn daemon_works_with_the_restrictions_of_the_unit() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    open_to(&libvirtd, |path| {
        // As in libvirt's packages: the socket's group may use it.
        chown(path, None, Some(LIBVIRT))?;
        let mode = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, fs::Permissions::from_mode(mode | (mode & 0o700) >> 3))?;
        Ok(())
    })?;
    let credentials = Credentials {
        uid: 1,
        groups: &[LIBVIRT],
    };
    works_in(&credentials, &libvirtd).await
}

#[tokio::test]
async fn daemon_works_with_the_restrictions_of_the_daemonset() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    open_to(&libvirtd, |path| {
        // As in libvirt's packages: root owns the socket, and everybody may enter the directories.
        if path.is_dir() {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        } else if Uid::effective().is_root() {
            chown(path, Some(0), Some(0))?;
        }
        Ok(())
    })?;
    works_in(
        &Credentials {
            uid: 0,
            groups: &[],
        },
        &libvirtd,
    )
    .await
}

/// Changes the permissions of libvirt's socket and of its directories.
fn open_to(
    libvirtd: &Libvirtd,
    change: impl Fn(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let socket = libvirtd.socket();
    let above = socket
        .ancestors()
        .take_while(|path| path.starts_with(libvirtd.directory()));
    above.into_iter().try_for_each(change)
}

/// Runs the daemon as another user, without capabilities, and with one writable directory. Without
/// root, only those restrictions that need no privilege apply.
async fn works_in(credentials: &Credentials, libvirtd: &Libvirtd) -> anyhow::Result<()> {
    let directory = tempfile::tempdir_in("/tmp")?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    // Every user must be able to execute it.
    let binary = directory.path().join("virtnode");
    fs::copy(env!("CARGO_BIN_EXE_virtnode"), &binary)?;
    let root = Uid::effective().is_root();
    if root {
        chown(
            directory.path(),
            Some(credentials.uid),
            Some(credentials.uid),
        )?;
    }
    let mut command = Command::new("setpriv");
    if root {
        let groups: Vec<String> = credentials.groups.iter().map(u32::to_string).collect();
        command.args([
            "--reuid",
            &credentials.uid.to_string(),
            "--regid",
            &credentials.uid.to_string(),
        ]);
        if groups.is_empty() {
            command.arg("--clear-groups");
        } else {
            command.args(["--groups", &groups.join(",")]);
        }
        command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    }
    command.arg("--no-new-privs").arg(&binary).arg("run");
    // If a mount namespace can be created, everything else is read-only.
    let read_only = root
        && Command::new("unshare")
            .args(["--mount", "true"])
            .status()?
            .success();
    if read_only {
        let inner = std::mem::replace(&mut command, Command::new("unshare"));
        let script = "mount --bind \"$0\" \"$0\"; mount -o remount,bind,ro /; exec \"$@\"";
        command.args(["--mount", "--propagation", "private", "sh", "-euc", script]);
        command
            .arg(directory.path())
            .arg(inner.get_program())
            .args(inner.get_args());
    }
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    let daemon = Daemon::spawn(directory, command, &libvirtd.uri(), &[]).await?;
    daemon
        .ready()
        .await
        .with_context(|| format!("{:#?}", daemon.log()))?;

    let process = Path::new("/proc").join(daemon.pid()?.to_string());
    let status = fs::read_to_string(process.join("status"))?;
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        line.unwrap_or_default().to_owned()
    };
    assert_eq!(field("NoNewPrivs"), "1");
    if root {
        assert!(field("Uid").starts_with(&format!("{}\t", credentials.uid)));
        for set in ["CapEff", "CapPrm", "CapBnd", "CapInh"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
    }
    if read_only {
        let mounts = fs::read_to_string(process.join("mountinfo"))?;
        let of_root = mounts
            .lines()
            .rfind(|line| line.split(' ').nth(4) == Some("/"));
        let options = of_root.and_then(|line| line.split(' ').nth(5));
        assert!(options.is_some_and(|options| options.split(',').any(|option| option == "ro")));
    }

    // The daemon writes labels, the socket and the journal.
    assert!(!daemon.labels()?.is_empty());
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    command
        .env_clear()
        .args(["hotplug", "vcpus", "nobody", "2", "--socket"]);
    let output = command.arg(daemon.socket()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("nobody"), "{said}");
    let results = "virtnode_hotplug_results_total{action=\"unknown\",resource=\"vcpus\",verdict=\"DomainNotFound\"}";
    assert_eq!(daemon.metric(results)?, 1.0, "{said}");
    assert_eq!(daemon.metric("virtnode_journal_write_failures_total")?, 0.0);
    daemon.stop().await?;
    Ok(())
}
