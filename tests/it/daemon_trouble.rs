//! The daemon among clients that do not read, other daemons, and strange files.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;
use nix::sys::stat::Mode;

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

const LONG: Duration = Duration::from_secs(60);

/// Milliseconds on an idle machine, and far below the age and timeouts of the other connections.
const PROBE_TIMEOUT: Duration = Duration::from_secs(4);

fn check_health(daemon: &Daemon) -> anyhow::Result<()> {
    for path in ["/healthz", "/readyz"] {
        let started = Instant::now();
        let answer = daemon.get(path)?;
        let expected = if path == "/healthz" { 200 } else { 503 };
        assert_eq!(answer.status, expected, "{}", answer.text());
        let elapsed = started.elapsed();
        ensure!(elapsed < PROBE_TIMEOUT, "{path} took {elapsed:?}");
    }
    Ok(())
}

#[tokio::test]
async fn clients_that_read_nothing_leave_health_checks_answered() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    let mut clients = Vec::new();
    for _ in 0..70 {
        let mut client = TcpStream::connect(daemon.address())?;
        client.set_nonblocking(true)?;
        // More answers than the kernel's buffers hold.
        for _ in 0..500 {
            match client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") {
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The daemon has replaced it.
                Err(_) => break,
                Ok(()) => {}
            }
        }
        clients.push(client);
        check_health(&daemon)?;
    }
    for _ in 0..20 {
        check_health(&daemon)?;
    }
    drop(clients);
    Ok(())
}

#[tokio::test]
async fn clients_that_send_slowly_leave_health_checks_answered() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    let mut clients: Vec<TcpStream> = Vec::new();
    for byte in b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: abcdefgh" {
        for client in &mut clients {
            // Fails for those that were replaced.
            client.write_all(&[*byte]).ok();
        }
        while clients.len() < 200 {
            clients.push(TcpStream::connect(daemon.address())?);
        }
        check_health(&daemon)?;
    }
    Ok(())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).map_or(0, |found| found.permissions().mode() & 0o7777)
}

#[tokio::test]
async fn umask_of_zero_lets_nobody_else_write() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let mut command = Command::new("sh");
    command.args(["-c", "umask 000; exec \"$0\" run \"$@\""]);
    command.arg(env!("CARGO_BIN_EXE_virtnode"));
    let daemon = Daemon::spawn(tempfile::tempdir()?, command, &libvirtd.uri(), &[]).await?;
    let (_, _, said) = run(&daemon.socket(), &["hotplug", "vcpus", "nobody", "2"])?;
    let state = daemon.labels_file().with_file_name("");
    let journal = state.join("operations");
    let records: Vec<_> = fs::read_dir(&journal)?.collect::<Result<_, _>>()?;
    assert_eq!(records.len(), 1, "{said}");
    assert_eq!(mode(&records[0].path()), 0o600);
    assert_eq!(mode(&journal), 0o700);
    assert_eq!(mode(&state), 0o755);
    assert_eq!(mode(&daemon.socket()), 0o660);
    eventually(LONG, async || {
        ensure!(daemon.labels_file().exists(), "no labels yet");
        Ok(())
    })
    .await?;
    assert_eq!(mode(&daemon.labels_file()), 0o644);
    Ok(())
}

#[tokio::test]
async fn strange_files_in_the_state_directory_stop_nothing() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let directory = tempfile::tempdir()?;
    let journal = directory.path().join("state/operations");
    fs::create_dir_all(journal.join(".x.draft/y"))?;
    let fifos = ["operations/019ac5a6e0fa00000007.json", "labels.json"];
    for fifo in fifos {
        let path = directory.path().join("state").join(fifo);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU)?;
    }
    let daemon = Daemon::start_in(directory, &libvirtd.uri(), &[]).await?;
    assert_eq!(daemon.get("/healthz")?.status, 200);
    let operations = daemon.api("GET", "/v1/operations", "")?;
    assert_eq!(operations["operations"], serde_json::json!([]));
    eventually(LONG, async || {
        let found = fs::symlink_metadata(daemon.labels_file())?;
        ensure!(found.is_file(), "labels.json is still a FIFO");
        Ok(())
    })
    .await?;
    let log = format!("{:?}", daemon.log());
    assert!(log.contains("not a regular file"), "{log}");
    assert!(log.contains(".x.draft"), "{log}");
    Ok(())
}

#[tokio::test]
async fn second_daemon_on_a_state_directory_executes_nothing() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let first = Daemon::start(&libvirtd.uri(), &[]).await?;
    eventually(LONG, async || {
        first.api("GET", "/v1/operations", "").map(drop)
    })
    .await?;
    let state = first.labels_file().with_file_name("");
    let directory = tempfile::tempdir()?;
    symlink(&state, directory.path().join("state"))?;
    let second = Daemon::start_in(directory, &libvirtd.uri(), &[]).await?;
    eventually(LONG, async || {
        let log = format!("{:?}", second.log());
        ensure!(log.contains("another virtnode process uses"), "{log}");
        ensure!(log.contains("hotplug is off"), "{log}");
        Ok(())
    })
    .await?;
    assert_eq!(second.get("/healthz")?.status, 200);
    let ready = second.get("/readyz")?;
    assert_eq!(ready.status, 503);
    let missing = "hotplug, which is off until the next start";
    ensure!(ready.text().contains(missing), "{}", ready.text());
    // The command refuses as well, though the first daemon's socket is elsewhere.
    let state = state.to_string_lossy();
    let direct = [
        "--state-directory",
        &*state,
        "hotplug",
        "vcpus",
        "vm",
        "2",
        "--direct",
    ];
    let (code, _, said) = run(&second.socket(), &direct)?;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("another virtnode process uses"), "{said}");
    Ok(())
}

/// A file descriptor leads to its directory like the mount of a container.
#[tokio::test]
async fn deleted_directory_of_libvirts_socket_ends_the_daemon() -> anyhow::Result<()> {
    let parent = tempfile::tempdir()?;
    let directory = parent.path().join("libvirt");
    fs::create_dir(&directory)?;
    let mounted = fs::File::open(&directory)?;
    let uri = format!(
        "qemu+unix:///system?socket=/proc/{}/fd/{}/libvirt-sock",
        std::process::id(),
        mounted.as_raw_fd()
    );
    let mut daemon = Daemon::start(&uri, &[]).await?;
    assert_eq!(daemon.get("/healthz")?.status, 200);
    fs::remove_dir(&directory)?;
    fs::create_dir(&directory)?;
    let status = daemon.ended().await?;
    assert!(!status.success(), "{status}");
    let log = format!("{:?}", daemon.log());
    ensure!(log.contains("was deleted on the host"), "{log}");
    Ok(())
}

#[tokio::test]
async fn removed_socket_is_bound_again() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    let answers = async || daemon.api("GET", "/v1/operations", "").map(drop);
    eventually(LONG, answers).await?;
    fs::remove_file(daemon.socket())?;
    eventually(LONG, answers).await?;
    let log = format!("{:?}", daemon.log());
    assert!(log.contains("bound it again"), "{log}");
    Ok(())
}

#[test]
fn operations_without_a_daemon_name_the_journal_that_they_list() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let state = directory.path().to_string_lossy();
    let arguments = ["--state-directory", &*state, "operations"];
    let (code, _, said) = run(Path::new("/no/such/socket"), &arguments)?;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("/no/such/socket does not exist"), "{said}");
    assert!(said.contains("does not exist either"), "{said}");
    let journal = directory.path().join("operations");
    fs::create_dir(&journal)?;
    let (code, out, said) = run(Path::new("/no/such/socket"), &arguments)?;
    assert_eq!(code, 0, "{said}");
    let listed = format!("listing the journal {} instead", journal.display());
    assert!(said.contains(&listed), "{said}");
    assert!(out.contains("no operations"), "{out}");
    Ok(())
}

/// A file system of its own for the state, which is really full. Needs root.
#[tokio::test]
async fn full_disk_rejects_operations_until_it_has_room() -> anyhow::Result<()> {
    let unshare = ["--mount", "--propagation", "private"];
    let probe = Command::new("unshare").args(unshare).arg("true").output()?;
    if !probe.status.success() {
        println!("no mount namespace can be created here: nothing was tried");
        return Ok(());
    }
    let libvirtd = Libvirtd::start()?;
    libvirtd.start_domain("vm")?;
    let directory = tempfile::tempdir()?;
    let state = directory.path().join("state");
    fs::create_dir(&state)?;
    let script = "mount -t tmpfs -o size=256k tmpfs \"$0\"; exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .args(unshare)
        .args(["sh", "-euc", script])
        .arg(&state)
        .args([env!("CARGO_BIN_EXE_virtnode"), "run"]);
    let daemon = Daemon::spawn(directory, command, &libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let root = format!("/proc/{}/root", daemon.pid()?);
    let fill = Path::new(&root).join(state.strip_prefix("/")?).join("fill");
    let mut file = fs::File::create(&fill)?;
    while file.write_all(&[0; 4096]).is_ok() {}

    let ask = || daemon.api("POST", "/v1/domains/vm/vcpus", "{\"count\": 2}");
    let answer = ask().unwrap_err().to_string();
    ensure!(answer.contains("cannot write the journal"), "{answer}");
    ensure!(daemon.get("/healthz")?.status == 200);
    let operations = daemon.api("GET", "/v1/operations", "")?;
    ensure!(!operations.to_string().contains("\"vm\""), "{operations}");

    drop(file);
    fs::remove_file(&fill)?;
    ask()?;
    Ok(())
}
