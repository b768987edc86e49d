//! `virtnode hotplug` and `virtnode operations` against a real libvirtd, with a daemon and without.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig};
use crate::support::libvirtd::Libvirtd;

#[tokio::test]
async fn unknown_domain_is_reported_and_recorded_in_the_journal() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let socket = daemon.socket();
    let hotplug = ["hotplug", "vcpus", "no/such \"vm\"", "2", "--timeout", "20"];
    let (code, out, err) = run(&socket, &hotplug)?;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(
        err.contains(r#"domain "no/such \"vm\"" is not running here"#),
        "{err}"
    );

    let (code, out, err) = run(&socket, &["operations", "--output", "json"])?;
    assert_eq!((code, err.as_str()), (0, ""));
    let listed: Value = serde_json::from_str(&out)?;
    let operation = &listed["operations"][0];
    assert_eq!(operation["verdict"], "DomainNotFound", "{out}");
    assert_eq!(operation["domain"]["name"], "no/such \"vm\"");

    // A second executor would resume the daemon's operations.
    let direct = ["hotplug", "memory", "vm", "2Gi", "--direct"];
    let (code, _, err) = run(&socket, &direct)?;
    assert_eq!(code, 1);
    assert!(err.contains("omit --direct"), "{err}");
    let results = "virtnode_hotplug_results_total{action=\"unknown\",resource=\"vcpus\",verdict=\"DomainNotFound\"}";
    assert_eq!(daemon.metric(results)?, 1.0);

    let (status, directory) = daemon.stop().await?;
    assert!(status.success());
    assert!(!socket.exists());
    // Without a daemon the journal itself is read.
    let state = directory.path().join("state");
    let state = state.to_str().context("a path")?;
    let (code, out, _) = run(&socket, &["operations", "--state-directory", state])?;
    assert_eq!(code, 0);
    assert!(out.contains("DomainNotFound"), "{out}");
    Ok(())
}

#[tokio::test]
async fn without_daemon_hotplug_needs_direct() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("virtnode.sock");
    let (code, out, err) = run(&socket, &["hotplug", "vcpus", "vm", "2"])?;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("start the daemon") && err.contains("--direct"),
        "{err}"
    );

    let state = directory.path().to_str().context("a path")?;
    let uri = libvirtd.uri();
    let direct = [
        "hotplug",
        "vcpus",
        "vm",
        "2",
        "--direct",
        "--timeout",
        "20",
        "--output",
        "json",
        "--connect",
        &uri,
        "--state-directory",
        state,
    ];
    let (code, out, err) = run(&socket, &direct)?;
    assert_eq!(code, 1, "{err}");
    let record: Value = serde_json::from_str(&out)?;
    assert_eq!(record["verdict"], "DomainNotFound", "{out}");
    let (_, out, _) = run(&socket, &["operations", "--state-directory", state])?;
    assert!(out.contains("DomainNotFound"), "{out}");
    Ok(())
}

#[test]
fn invalid_arguments_are_exit_code_2() -> anyhow::Result<()> {
    let nowhere = Path::new("/nonexistent/virtnode.sock");
    for (arguments, says) in [
        (vec!["memory", "vm", "2 GB"], "binary unit"),
        (vec!["memory", "vm", "-1"], "negative"),
        (vec!["memory", "vm", "1e9Gi"], "not a size"),
        (vec!["memory", "vm", "1024"], "no unit"),
        (vec!["vcpus", "vm", "-1"], "-1"),
        (vec!["vcpus", "vm", "two"], "two"),
        (vec!["vcpus", "a\nb", "2"], "line break"),
        (vec!["vcpus", "", "2"], "1 to 255 characters"),
        (
            vec!["vcpus", "vm", "2", "--require", "proof"],
            "level of proof",
        ),
        (vec!["vcpus", "vm", "2", "--timeout", "0"], "from 1 to 3600"),
    ] {
        let (code, out, err) = run(nowhere, &[&["hotplug"], &arguments[..]].concat())?;
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(says), "{arguments:?}: {err}");
    }
    Ok(())
}

/// The verdict does not wait for the deadline.
#[tokio::test]
async fn absent_or_frozen_libvirt_yields_hypervisor_unavailable_soon() -> anyhow::Result<()> {
    let mut libvirtd = Libvirtd::start()?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("virtnode.sock");
    let state = directory.path().to_str().context("a path")?;
    let uri = libvirtd.uri();
    let hotplug = ["hotplug", "vcpus", "vm", "2", "--timeout", "600"];
    let direct = ["--direct", "--connect", &uri, "--state-directory", state];
    let direct = [&hotplug[..], &direct[..]].concat();
    let ends_soon = |arguments: &[&str], socket: &Path| -> anyhow::Result<()> {
        let began = Instant::now();
        let (code, out, err) = run(socket, arguments)?;
        assert_eq!(code, 5, "{out}{err}");
        assert!(out.starts_with("HypervisorUnavailable: "), "{out}");
        assert!(out.contains("nothing was changed"), "{out}");
        assert!(began.elapsed() < Duration::from_secs(60), "{out}");
        Ok(())
    };
    libvirtd.freeze()?;
    ends_soon(&direct, &socket)?;
    libvirtd.thaw()?;

    let daemon = Daemon::start(&uri, &[]).await?;
    daemon.ready().await?;
    libvirtd.kill()?;
    ends_soon(&hotplug, &daemon.socket())?;
    daemon.stop().await?;
    ends_soon(&direct, &socket)
}

#[tokio::test]
async fn memory_is_plugged_and_unplugged_and_a_terminal_shows_progress() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let config = GuestConfig {
        name: "vm1",
        words: "lab.blocks=online_movable lab.cpus=offline",
        ..GuestConfig::default()
    };
    let guest = Guest::start(&libvirtd, &config).await?;
    let before = guest.witness()?.total_kib;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let socket = daemon.socket();
    for (size, least, most) in [("1GiB", 490, 530), ("512Mi", 0, 20)] {
        let (code, out, err) = run(&socket, &["hotplug", "memory", "vm1", size])?;
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        assert!(out.starts_with("Verified: "), "{out}");
        // The guest reports it a moment later.
        let more = |total: u64| total.saturating_sub(before) / 1024;
        guest
            .sees(|guest| (least..=most).contains(&more(guest.total_kib)))
            .await?;
    }
    let (code, out, _) = run(&socket, &["hotplug", "memory", "vm1", "513MiB"])?;
    assert_eq!(code, 4, "{out}");

    // The same on a terminal: `script` makes one.
    let typescript = |command: &str| -> anyhow::Result<(i32, String)> {
        let program = env!("CARGO_BIN_EXE_virtnode");
        let command = format!("{program} --socket {} {command}", socket.display());
        let output = Command::new("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .stdin(Stdio::null())
            .output()
            .context("this test needs script (package bsdutils)")?;
        let code = output.status.code().context("killed")?;
        Ok((code, String::from_utf8(output.stdout)?))
    };
    let (code, out) = typescript("hotplug vcpus vm1 2")?;
    assert_eq!(code, 3, "{out}");
    let lines: Vec<&str> = out.split("\r\u{1b}[2K").collect();
    let awaited = lines.iter().find(|line| line.contains("online"));
    let awaited = awaited.with_context(|| format!("no progress: {out:?}"))?;
    assert!(
        !awaited.contains('\n') && awaited.chars().count() <= 100,
        "{awaited:?}"
    );
    // The progress is cleared, and the report remains.
    let last = lines.last().context("lines")?;
    assert!(last.starts_with("GuestOffline: "), "{out:?}");
    Ok(())
}

#[tokio::test]
async fn daemon_changes_vcpus_of_a_real_guest() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    // The guest leaves new vCPUs offline.
    let config = GuestConfig {
        name: "vm1",
        ..GuestConfig::default()
    };
    let _guest = Guest::start(&libvirtd, &config).await?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let socket = daemon.socket();

    let (code, out, err) = run(&socket, &["hotplug", "vcpus", "vm1", "2"])?;
    assert_eq!(code, 3, "{out}{err}");
    assert!(out.starts_with("GuestOffline: "), "{out}");
    assert!(out.contains("Remedy:"), "{out}");
    let (code, out, err) = run(&socket, &["hotplug", "vcpus", "vm1", "3", "--online"])?;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.starts_with("Verified: "), "{out}");
    let (code, out, err) = run(&socket, &["hotplug", "vcpus", "vm1", "9"])?;
    assert_eq!(code, 4, "{out}{err}");

    eventually(Duration::from_secs(60), async || {
        for (series, wanted) in [
            ("virtnode_domain_vcpus{connection=\"host\",domain=\"vm1\",state=\"maximum\"}", 4.0),
            ("virtnode_domain_vcpus{connection=\"host\",domain=\"vm1\",state=\"plugged\"}", 3.0),
            ("virtnode_domain_vcpus{connection=\"host\",domain=\"vm1\",state=\"online\"}", 3.0),
            ("virtnode_domains{state=\"running\"}", 1.0),
            ("virtnode_hotplug_results_total{action=\"plug\",resource=\"vcpus\",verdict=\"Verified\"}", 1.0),
        ] {
            ensure!(daemon.metric(series)? == wanted, "{series}");
        }
        Ok(())
    })
    .await
}
