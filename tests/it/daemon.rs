//! The daemon against a real libvirtd: the published labels, and libvirtd absent, killed or frozen.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

/// Returns an attribute in a line of libvirt's indented output.
fn attribute<'l>(line: &'l str, name: &str) -> Option<&'l str> {
    let (_, rest) = line.split_once(&format!(" {name}='"))?;
    rest.split_once('\'').map(|(value, _)| value)
}

/// Returns the text of a one-line element.
fn text<'l>(line: &'l str, element: &str) -> Option<&'l str> {
    let rest = line.trim().strip_prefix(&format!("<{element}"))?;
    rest.split_once('>')?
        .1
        .strip_suffix(&format!("</{element}>"))
}

#[tokio::test]
async fn labels_match_the_output_of_virsh() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    daemon.ready().await?;
    let labels = daemon.labels()?;
    let named = |prefix: &str| -> BTreeSet<&str> {
        labels
            .keys()
            .filter_map(|key| key.strip_prefix(&format!("{prefix}/")))
            .collect()
    };

    let capabilities = libvirtd.virsh(&["capabilities"])?;
    let native = capabilities
        .split("<arch name='x86_64'>")
        .nth(1)
        .context("no x86_64 guest")?;
    let native = native.split("</arch>").next().unwrap_or_default();
    let machines: Vec<&str> = native
        .lines()
        .filter(|line| line.trim().starts_with("<machine"))
        .collect();
    ensure!(machines.len() > 10, "{native}");
    let mut canonical = BTreeSet::new();
    let mut deprecated = BTreeSet::new();
    for line in machines {
        let name = text(line, "machine").context("a machine without a name")?;
        match attribute(line, "canonical") {
            Some(real) => {
                assert_eq!(labels[&format!("machine-alias.virtnode.io/{name}")], real);
            }
            None => {
                canonical.insert(name);
            }
        }
        if attribute(line, "deprecated") == Some("yes") {
            deprecated.insert(name);
        }
        let listed: u32 = attribute(line, "maxCpus").context("no maximum")?.parse()?;
        if let Some(published) = labels.get(&format!("machine.virtnode.io/{name}")) {
            let published: u32 = published.parse()?;
            assert!(published <= listed, "{name}: {published} of {listed}");
            if !name.starts_with("pc-q35") {
                assert_eq!(published, listed.min(255), "{name}");
            }
        }
    }
    assert_eq!(named("machine.virtnode.io"), canonical);
    assert_eq!(named("machine-deprecated.virtnode.io"), deprecated);

    let query = ["domcapabilities", "--machine", "q35", "--virttype", "qemu"];
    let document = libvirtd.virsh(&query)?;
    let usable: BTreeSet<&str> = document
        .lines()
        .filter(|line| attribute(line, "usable") == Some("yes"))
        .filter_map(|line| text(line, "model"))
        .collect();
    ensure!(!usable.is_empty(), "{document}");
    assert_eq!(named("cpu-model.virtnode.io"), usable);
    let host_model = document
        .lines()
        .find(|line| line.contains("<model fallback="));
    assert_eq!(
        host_model.and_then(|line| text(line, "model")),
        Some(&*labels["virtnode.io/host-model"])
    );

    let host_model = format!(
        "<cpu>{}</cpu>",
        document
            .split("<mode name='host-model' supported='yes'>")
            .nth(1)
            .and_then(|rest| rest.split("</mode>").next())
            .context("no host model")?
    );
    let file = daemon.labels_file().with_file_name("cpu.xml");
    fs::write(&file, host_model)?;
    let file = file.to_str().context("a path")?;
    let baseline = [
        "hypervisor-cpu-baseline",
        "--features",
        "--virttype",
        "qemu",
        "--machine",
        "q35",
        file,
    ];
    let baseline = libvirtd.virsh(&baseline)?;
    let features: BTreeSet<&str> = baseline
        .lines()
        .filter(|line| attribute(line, "policy") == Some("require"))
        .filter_map(|line| attribute(line, "name"))
        .collect();
    ensure!(!features.is_empty(), "{baseline}");
    assert_eq!(named("cpu-feature.virtnode.io"), features);
    Ok(())
}

#[tokio::test]
async fn killed_libvirtd_removes_no_label() -> anyhow::Result<()> {
    let mut libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let before = daemon.labels()?;
    libvirtd.kill()?;
    eventually(LONG, async || {
        ensure!(
            daemon.metric("virtnode_hypervisor_connected")? == 0.0,
            "still connected"
        );
        let failures =
            "virtnode_probe_failures_total{reason=\"unavailable\",source=\"capabilities\"}";
        ensure!(daemon.metric(failures)? >= 2.0, "no failed probe yet");
        Ok(())
    })
    .await?;
    assert_eq!(daemon.labels()?, before);
    assert_eq!(daemon.get("/healthz")?.status, 200);
    assert_eq!(
        daemon.get("/readyz")?.status,
        200,
        "an outage does not make the daemon unready"
    );
    libvirtd.restart()?;
    eventually(Duration::from_secs(2), async || {
        ensure!(
            daemon.metric("virtnode_hypervisor_connected")? == 1.0,
            "not connected yet"
        );
        Ok(())
    })
    .await?;
    ensure!(daemon.metric("virtnode_hypervisor_reconnects_total")? >= 1.0);
    let successes = "virtnode_probe_last_success_timestamp_seconds{source=\"capabilities\"}";
    let reconnected = daemon.metric(successes)?;
    eventually(LONG, async || {
        ensure!(daemon.metric(successes)? > reconnected, "no new probe yet");
        Ok(())
    })
    .await?;
    assert_eq!(daemon.labels()?, before);
    Ok(())
}

#[tokio::test]
async fn frozen_libvirtd_does_not_block_health_checks() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let arguments = ["--probe-interval", "1", "--call-deadline", "1"];
    let daemon = Daemon::start(&libvirtd.uri(), &arguments).await?;
    daemon.ready().await?;
    let before = daemon.labels()?;
    libvirtd.freeze()?;
    eventually(LONG, async || {
        // Each of these is answered while a call is waiting.
        assert_eq!(daemon.get("/healthz")?.status, 200);
        let timeouts = "virtnode_hypervisor_call_timeouts_total{call=\"versions\"}";
        ensure!(daemon.metric(timeouts)? >= 1.0, "no timeout yet");
        Ok(())
    })
    .await?;
    assert_eq!(daemon.labels()?, before);
    libvirtd.thaw()?;
    let successes = "virtnode_probe_last_success_timestamp_seconds{source=\"domains\"}";
    let thawed = daemon.metric(successes)?;
    eventually(LONG, async || {
        ensure!(
            daemon.metric(successes)? > thawed,
            "no successful probe yet"
        );
        Ok(())
    })
    .await?;
    assert_eq!(daemon.labels()?, before);
    Ok(())
}

#[tokio::test]
async fn without_libvirt_host_labels_are_published_until_it_starts() -> anyhow::Result<()> {
    let mut libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    eventually(LONG, async || {
        ensure!(
            daemon.labels()?.contains_key("virtnode.io/iommu"),
            "no label of the host yet"
        );
        Ok(())
    })
    .await?;
    let answer = daemon.get("/readyz")?;
    assert_eq!(answer.status, 503);
    assert!(
        answer.text().contains("first full probe"),
        "{}",
        answer.text()
    );
    assert!(
        answer.text().contains("no connection to libvirt"),
        "{}",
        answer.text()
    );
    let machine = |key: &String| key.starts_with("machine.virtnode.io/");
    assert!(!daemon.labels()?.keys().any(machine));
    libvirtd.restart()?;
    daemon.ready().await?;
    assert!(daemon.labels()?.keys().any(machine));
    // The doctor's findings depend on the machine.
    let is_doctors = |line: &serde_json::Value| line["check"].is_string();
    let warnings = daemon
        .log()
        .iter()
        .filter(|line| line["level"] == "WARN" && !is_doctors(line))
        .count();
    assert!(warnings <= 8, "a warning per attempt: {:?}", daemon.log());
    Ok(())
}

#[tokio::test]
async fn labels_survive_the_daemon_and_an_edited_file_is_restored() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let before = daemon.labels()?;
    fs::write(daemon.labels_file(), "{}")?;
    eventually(LONG, async || {
        ensure!(daemon.labels()? == before, "not restored yet");
        Ok(())
    })
    .await?;
    let (status, directory) = daemon.stop().await?;
    assert_eq!(status.code(), Some(0));
    assert!(directory.path().join("state/labels.json").exists());

    // The next daemon removes a label that libvirt no longer yields, after two probes.
    let file = directory.path().join("state/labels.json");
    let text = fs::read_to_string(&file)?;
    let old = "machine.virtnode.io/pc-q35-1.7";
    fs::write(
        &file,
        text.replacen(
            "\"labels\": {",
            &format!("\"labels\": {{\"{old}\": \"255\","),
            1,
        ),
    )?;
    let daemon = Daemon::start_in(directory, &libvirtd.uri(), &["--probe-interval", "1"]).await?;
    let removed = "virtnode_label_changes_total{action=\"removed\"}";
    eventually(LONG, async || {
        ensure!(daemon.metric(removed)? == 1.0, "not removed yet");
        Ok(())
    })
    .await?;
    let probes = "virtnode_probe_attempts_total{source=\"capabilities\"}";
    assert!(daemon.metric(probes)? >= 2.0, "removed after one probe");
    eventually(LONG, async || {
        ensure!(daemon.labels()? == before, "still in the file");
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn scrapes_call_no_libvirt_and_are_limited() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "3600"]).await?;
    daemon.ready().await?;
    let calls = daemon.libvirt_calls()?;
    assert!(calls > 0.0);
    for _ in 0..50 {
        assert_eq!(daemon.get("/metrics")?.status, 200);
    }
    assert_eq!(daemon.libvirt_calls()?, calls, "a scrape called libvirt");

    let plain = daemon.get("/metrics")?;
    assert!(
        plain
            .head
            .to_lowercase()
            .contains("text/plain; version=0.0.4"),
        "{}",
        plain.head
    );
    let zipped = daemon.request(
        "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
    )?;
    assert!(
        zipped
            .head
            .to_lowercase()
            .contains("content-encoding: gzip"),
        "{}",
        zipped.head
    );
    assert!(zipped.body.len() < plain.body.len() / 3);

    let huge = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    assert_eq!(daemon.request(&huge)?.status, 431);
    // The client gets the answer although it keeps sending.
    let mut rejected = TcpStream::connect(daemon.address())?;
    rejected.write_all(&huge.as_bytes()[..40_000])?;
    let mut answer = [0; 12];
    rejected.read_exact(&mut answer)?;
    assert_eq!(&answer, b"HTTP/1.1 431");
    for _ in 0..100 {
        rejected.write_all(&huge.as_bytes()[..1000])?;
    }
    rejected.shutdown(Shutdown::Write)?;
    rejected.read_to_end(&mut Vec::new())?;
    assert_eq!(daemon.get("/nothing")?.status, 404);
    let post =
        "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(daemon.request(post)?.status, 405);
    Ok(())
}

#[tokio::test]
async fn slow_clients_do_not_exclude_others() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::new()?;
    let daemon = Daemon::start(&libvirtd.uri(), &[]).await?;
    let address = daemon.address();
    // More than the maximum number of connections. None finishes its request.
    let mut slow = Vec::new();
    for _ in 0..80 {
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n")?;
        slow.push(stream);
    }
    assert_eq!(daemon.get("/healthz")?.status, 200);
    drop(slow);
    Ok(())
}
