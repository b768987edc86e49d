//! Tenants that harm others if they can: agents that answer only libvirt's synchronization, and
//! domains that cannot be read. On a real libvirtd, with the real daemon.

#![allow(clippy::print_stdout, reason = "measurements")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::future::try_join_all;
use serde_json::Value;

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig, MorePossible};
use crate::support::libvirtd::Libvirtd;

/// Only a failing test waits this long.
const LONG: Duration = Duration::from_secs(180);
const HOSTILE: [&str; 6] = ["bad1", "bad2", "bad3", "bad4", "bad5", "bad6"];

fn hostile(name: &str) -> GuestConfig<'_> {
    GuestConfig {
        name,
        words: "lab.agent=sync",
        memory: MorePossible::No,
        ..GuestConfig::default()
    }
}

/// Runs a hotplug of vCPUs in the background.
fn start_hotplug(daemon: &Daemon, name: &str, count: &str) -> anyhow::Result<Child> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    command
        .env_clear()
        .arg("--socket")
        .arg(daemon.socket())
        .args(["hotplug", "vcpus", name, count, "--timeout", "20"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// Returns the findings of a check about a domain.
fn finding(daemon: &Daemon, uri: &str, check: &str, domain: &str) -> anyhow::Result<Option<Value>> {
    let address = daemon.address().to_string();
    let arguments = [
        "--connect",
        uri,
        "--listen",
        &address,
        "doctor",
        "--output",
        "json",
    ];
    let (_, out, err) = run(&daemon.socket(), &arguments)?;
    let report: Value = serde_json::from_str(&out).with_context(|| err)?;
    let findings = report["findings"].as_array().context("no findings")?;
    let is_wanted = |finding: &&Value| finding["check"] == check && finding["domain"] == domain;
    Ok(findings.iter().find(is_wanted).cloned())
}

/// A hotplug of the healthy guest is verified by its agent's word, soon.
fn healthy_guest_is_verified(daemon: &Daemon, count: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    let hotplug = ["hotplug", "vcpus", "good", count, "--output", "json"];
    let (code, out, err) = run(&daemon.socket(), &hotplug)?;
    let took = began.elapsed();
    println!("{count} vCPUs of the healthy guest: exit code {code} after {took:?}");
    ensure!(code == 0, "{out}{err}");
    let record: Value = serde_json::from_str(&out)?;
    assert_eq!(record["verdict"], "Verified", "{out}");
    let evidence = record["evidence"].as_array().context("no evidence")?;
    let by_agent = |piece: &&Value| piece["source"] == "guest-agent";
    let last = evidence.iter().rfind(by_agent).context("no agent")?;
    let detail = last["detail"].as_str().context("no detail")?;
    assert!(detail.starts_with("has 0-"), "{out}");
    // A call of another guest may be in the way once.
    assert!(took < Duration::from_secs(12), "{took:?}: {out}");
    Ok(())
}

#[tokio::test]
async fn agents_that_answer_only_guest_sync_cost_other_guests_nothing() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let good = GuestConfig {
        name: "good",
        words: "lab.cpus=online",
        memory: MorePossible::No,
        ..GuestConfig::default()
    };
    let configs: Vec<_> = HOSTILE.iter().map(|name| hostile(name)).collect();
    let bad = try_join_all(configs.iter().map(|config| Guest::start(&libvirtd, config))).await?;
    let _good = Guest::start(&libvirtd, &good).await?;

    let mut daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let online = "virtnode_domain_vcpus{connection=\"host\",domain=\"good\",state=\"online\"}";
    for (count, restart) in [("2", false), ("3", true)] {
        if restart {
            let (_, state) = daemon.stop().await?;
            daemon = Daemon::start_in(state, &libvirtd.uri(), &["--probe-interval", "1"]).await?;
            daemon.ready().await?;
        }
        // An operation on each of the others, all at the same time.
        let others = HOSTILE.map(|name| start_hotplug(&daemon, name, count));
        let mut others: Vec<Child> = others.into_iter().collect::<anyhow::Result<_>>()?;
        let outcome = healthy_guest_is_verified(&daemon, count);
        for other in &mut others {
            other.wait()?;
        }
        outcome?;
        eventually(LONG, async || {
            let shown = daemon.metric(online)?;
            ensure!(shown == count.parse::<f64>()?, "{shown} online");
            Ok(())
        })
        .await?;
    }
    let began = Instant::now();
    let uri = libvirtd.uri();
    assert_eq!(finding(&daemon, &uri, "guest-agent", "good")?, None);
    println!("doctor after {:?}", began.elapsed());
    let found = finding(&daemon, &uri, "guest-agent", "bad1")?.context("no finding")?;
    let what = found["what"].as_str().context("no text")?;
    assert!(
        what.starts_with("its guest agent does not answer"),
        "{what}"
    );

    // Another client finds libvirt's own timeout in place, so its call waits without a limit, unless
    // it comes during a question of the daemon, whose timeout or lock of the agent it then meets.
    eventually(LONG, async || {
        let call = ["--quiet", "--connect", &uri, "guestvcpus", "bad1"];
        let waits = Command::new("timeout")
            .args(["8", "virsh"])
            .args(call)
            .stderr(Stdio::null())
            .status()?;
        ensure!(waits.code() == Some(124), "{waits}");
        Ok(())
    })
    .await?;
    drop(bad);
    Ok(())
}

#[tokio::test]
async fn blocked_agent_command_is_named_with_its_setting() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let config = GuestConfig {
        name: "blocked",
        words: "lab.block=guest-get-vcpus",
        memory: MorePossible::No,
        ..GuestConfig::default()
    };
    let guest = Guest::start(&libvirtd, &config).await?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let found = finding(&daemon, &libvirtd.uri(), "guest-agent", "blocked")?;
    let found = found.context("no finding")?;
    println!("{found:#}");
    let what = found["what"].as_str().context("no text")?;
    assert!(
        what.starts_with("its guest agent answers, and rejects guest-get-vcpus"),
        "{what}"
    );
    let remedy = found["remedy"]["text"].as_str().context("no remedy")?;
    assert!(
        remedy.contains("block-rpcs") && remedy.contains("BLACKLIST_RPC"),
        "{remedy}"
    );

    // The guest leaves its CPUs offline, and only its agent could say so.
    let hotplug = [
        "hotplug",
        "vcpus",
        "blocked",
        "2",
        "--timeout",
        "15",
        "--output",
        "json",
    ];
    let (code, out, err) = run(&daemon.socket(), &hotplug)?;
    assert_eq!(code, 3, "{out}{err}");
    let record: Value = serde_json::from_str(&out)?;
    let remedy = record["diagnosis"]["remedy"]
        .as_str()
        .context("no remedy")?;
    assert!(
        remedy.contains("guest-get-vcpus") && remedy.contains("block-rpcs"),
        "{out}"
    );
    assert!(out.contains("guest-get-vcpus rejected: "), "{out}");
    guest.sees(|witness| witness.present == "0-1").await?;
    Ok(())
}

/// Metadata that nests deeply, which is skipped, and metadata that libvirt cannot send.
#[tokio::test]
async fn unreadable_domain_delays_neither_labels_nor_readiness_and_is_named() -> anyhow::Result<()>
{
    let libvirtd = Libvirtd::start()?;
    let nested = format!("{}{}", "<t:a>".repeat(70), "</t:a>".repeat(70));
    let large = "x".repeat(2 << 20);
    let domain = |name: &str, metadata: &str| {
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
             <metadata>{metadata}</metadata><os><type machine='q35'>hvm</type></os></domain>"
        )
    };
    let deep = domain("deep", &format!("<t:t xmlns:t='http://t'>{nested}</t:t>"));
    libvirtd.create(&deep).map_err(anyhow::Error::msg)?;
    libvirtd
        .create(&domain("large", ""))
        .map_err(anyhow::Error::msg)?;
    let uri = libvirtd.uri();
    let daemon = Daemon::start(&uri, &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let labels = daemon.labels()?;
    let (_, state) = daemon.stop().await?;

    for part in ["a", "b", "c"] {
        let file = libvirtd.directory().join(format!("metadata-{part}"));
        fs::write(&file, format!("<m>{large}</m>"))?;
        set_metadata(&uri, part, &file)?;
    }
    let error = libvirtd
        .virsh(&["dumpxml", "large"])
        .unwrap_err()
        .to_string();
    println!(
        "virsh dumpxml: {}",
        error.lines().next().unwrap_or_default()
    );

    // A new daemon becomes ready, with all labels.
    let daemon = Daemon::start_in(state, &uri, &["--probe-interval", "1"]).await?;
    let began = Instant::now();
    daemon.ready().await?;
    println!("ready after {:?}", began.elapsed());
    assert_eq!(daemon.labels()?, labels);
    eventually(LONG, async || {
        for (series, wanted) in [
            ("virtnode_domains_unreadable", 1.0),
            ("virtnode_domains{state=\"running\"}", 1.0),
            (
                "virtnode_doctor_findings{check=\"domains\",severity=\"warning\"}",
                1.0,
            ),
        ] {
            let shown = daemon.metric(series)?;
            ensure!(shown == wanted, "{series} is {shown}");
        }
        ensure!(daemon.metric("virtnode_probe_attempts_total{source=\"domains\"}")? >= 4.0);
        Ok(())
    })
    .await?;
    let failures: f64 = daemon
        .get("/metrics")?
        .text()
        .lines()
        .filter(|line| line.starts_with("virtnode_probe_failures_total"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    assert_eq!(failures, 0.0);
    let lines = daemon.log();
    let named: Vec<_> = lines
        .iter()
        .filter(|line| line["domain"] == "large")
        .collect();
    assert_eq!(named.len(), 1, "{named:#?}");
    let found = finding(&daemon, &uri, "domains", "large")?.context("no finding")?;
    let what = found["what"].as_str().context("no text")?;
    assert!(what.starts_with("its definition cannot be read"), "{what}");
    assert_eq!(finding(&daemon, &uri, "domains", "deep")?, None);

    libvirtd.end_domain("large")?;
    eventually(LONG, async || {
        let unreadable = daemon.metric("virtnode_domains_unreadable")?;
        ensure!(unreadable == 0.0, "{unreadable}");
        Ok(())
    })
    .await
}

/// Sets part of a domain's metadata from a file, which is too large for an argument.
fn set_metadata(uri: &str, part: &str, file: &Path) -> anyhow::Result<()> {
    let output = Command::new("virsh")
        .args(["--quiet", "--connect", uri, "metadata", "large", "--live"])
        .args(["--uri", &format!("http://{part}"), "--key", part, "--edit"])
        .env("EDITOR", format!("cp {}", file.display()))
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{part}: {error}");
    Ok(())
}
