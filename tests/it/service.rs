//! `systemd/virtnode.service`: what systemd says of it, what it may rely on, and the daemon under
//! the restrictions of the unit and of the DaemonSet's container, as far as this machine lets a
//! test make them.

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
fn systemd_finds_nothing_wrong_and_little_exposed() -> anyhow::Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/virtnode.service");
    let text = fs::read_to_string(unit)?;
    let started = "ExecStart=/usr/bin/virtnode run\n";
    ensure!(text.contains(started), "it starts something else");
    let ours = format!("ExecStart={} run\n", env!("CARGO_BIN_EXE_virtnode"));
    let directory = tempfile::tempdir()?;
    let installed = directory.path().join("virtnode.service");
    fs::write(&installed, text.replace(started, &ours))?;
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
        // It says what it ignores and succeeds all the same.
        assert!(!said.contains("virtnode.service"), "{said}");
    }
    Ok(())
}

/// `Type=notify`, `WatchdogSec=`, `ExecReload=`: what the service manager is told, on its socket.
#[tokio::test]
async fn the_service_manager_is_told_and_a_reload_starts_it_again_in_its_process()
-> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let directory = tempfile::tempdir()?;
    let manager = directory.path().join("notify");
    let notices = UnixDatagram::bind(&manager)?;
    notices.set_read_timeout(Some(LONG))?;
    let told = |wanted: &str| -> anyhow::Result<()> {
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
    told("READY=1")?;
    told("WATCHDOG=1")?;
    let pid = daemon.pid()?;
    let schemas = || -> Vec<String> {
        let log = daemon.log();
        let starts = log.iter().filter_map(|line| line["schema"].as_str());
        starts.map(str::to_owned).collect()
    };
    assert_eq!(schemas(), ["native"]);

    // A configuration that cannot be used is told and changes nothing.
    fs::write(&config, "schema: nativ\n")?;
    kill(pid, Signal::SIGHUP)?;
    eventually(LONG, async || {
        let log = daemon.log();
        let told = log
            .iter()
            .any(|line| line.to_string().contains("going on as before"));
        ensure!(told, "{log:?}");
        Ok(())
    })
    .await?;

    fs::write(&config, "schema: both\n")?;
    kill(pid, Signal::SIGHUP)?;
    told("RELOADING=1")?;
    told("READY=1")?;
    assert_eq!(
        schemas(),
        ["native", "both"],
        "the same process, with the new configuration"
    );
    told("WATCHDOG=1")?;
    kill(pid, Signal::SIGTERM)?;
    told("STOPPING=1")?;
    let (status, _) = daemon.stop().await?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}

/// Who a daemon runs as that has no capability.
struct Cage {
    /// One that the machine knows: libvirtd refuses another.
    uid: u32,
    /// Beside the user's own group, which has the user's number.
    groups: &'static [u32],
}

/// libvirt's group: here that of the private libvirtd.
const LIBVIRT: u32 = 65534;

#[tokio::test]
async fn it_works_as_the_unit_restricts_it() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    open_to(&libvirtd, |path| {
        // What libvirt's packages do: the socket's group may use it.
        chown(path, None, Some(LIBVIRT))?;
        let mode = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, fs::Permissions::from_mode(mode | (mode & 0o700) >> 3))?;
        Ok(())
    })?;
    let cage = Cage {
        uid: 1,
        groups: &[LIBVIRT],
    };
    works_in(&cage, &libvirtd).await
}

#[tokio::test]
async fn it_works_as_the_daemonset_restricts_it() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    open_to(&libvirtd, |path| {
        // As libvirt's packages have it: root owns the socket. The directories are for everybody.
        if path.is_dir() {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        } else if Uid::effective().is_root() {
            chown(path, Some(0), Some(0))?;
        }
        Ok(())
    })?;
    works_in(
        &Cage {
            uid: 0,
            groups: &[],
        },
        &libvirtd,
    )
    .await
}

/// Changes the rights of libvirt's socket and of the directories that it is in.
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

/// As root: another user, no capabilities, none to be had, and everything but one directory
/// read-only. As another user: what of it needs no right, so that the rest is tested all the same.
async fn works_in(cage: &Cage, libvirtd: &Libvirtd) -> anyhow::Result<()> {
    let directory = tempfile::tempdir_in("/tmp")?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    // Where every user can run it.
    let binary = directory.path().join("virtnode");
    fs::copy(env!("CARGO_BIN_EXE_virtnode"), &binary)?;
    let root = Uid::effective().is_root();
    if root {
        chown(directory.path(), Some(cage.uid), Some(cage.uid))?;
    }
    let mut command = Command::new("setpriv");
    if root {
        let groups: Vec<String> = cage.groups.iter().map(u32::to_string).collect();
        command.args([
            "--reuid",
            &cage.uid.to_string(),
            "--regid",
            &cage.uid.to_string(),
        ]);
        match groups.is_empty() {
            true => command.arg("--clear-groups"),
            false => command.args(["--groups", &groups.join(",")]),
        };
        command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    }
    command.arg("--no-new-privs").arg(&binary).arg("run");
    // Where a namespace of its own can be had, nothing else can be written.
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
        assert!(field("Uid").starts_with(&format!("{}\t", cage.uid)));
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

    // It writes what it has to: labels, the socket, the journal.
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
