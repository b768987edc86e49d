//! The doctor on running domains: real guests on a real libvirtd, with the command and the daemon's
//! metric, and unresponsive domains in memory.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::time::Instant;
use virtnode::config::LabelOrigin;
use virtnode::doctor::checks::observed::Daemon as Seen;
use virtnode::doctor::{DoctorScope, observe_node};
use virtnode::hotplug::Agent;
use virtnode::label::Policy;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::fake_domains::{FakeControl, FakeGuest};
use crate::support::guest::{Guest, GuestConfig};
use crate::support::hypervisor::InMemory;
use crate::support::libvirtd::Libvirtd;

/// Only a failing test waits this long.
const LONG: Duration = Duration::from_secs(180);

struct Doctor<'d> {
    uri: String,
    daemon: &'d Daemon,
}

impl Doctor<'_> {
    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
        command
            .env_clear()
            .args([
                "--connect",
                &self.uri,
                "--listen",
                &self.daemon.address().to_string(),
            ])
            .arg("--socket")
            .arg(self.daemon.socket());
        command
    }

    fn diagnose(&self) -> anyhow::Result<Value> {
        let output = self
            .command()
            .args(["doctor", "--output", "json"])
            .output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "no JSON; standard error: {}",
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    /// Returns the finding of a check about a domain, or null.
    fn finding(&self, check: &str, domain: &str) -> anyhow::Result<Value> {
        let diagnosis = self.diagnose()?;
        let found = diagnosis["findings"]
            .as_array()
            .context("no findings")?
            .iter()
            .find(|finding| finding["check"] == check && finding["domain"] == domain);
        Ok(found.cloned().unwrap_or_default())
    }

    /// Runs the first command of a remedy, with this build's `virtnode`.
    fn apply_remedy(&self, finding: &Value) -> anyhow::Result<()> {
        let printed = &finding["remedy"]["commands"][0];
        let printed = printed
            .as_str()
            .with_context(|| format!("no command in {finding:#}"))?;
        let mut command = match printed.strip_prefix("virtnode ") {
            Some(arguments) => {
                let mut command = self.command();
                command.args(arguments.split(' '));
                command
            }
            None => {
                let mut command = Command::new("sh");
                command.args(["-c", printed]);
                command
            }
        };
        let output = command.output()?;
        ensure!(
            output.status.success(),
            "{printed}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

/// Returns a deprecated machine type of this QEMU.
fn deprecated_machine(libvirtd: &Libvirtd) -> anyhow::Result<String> {
    let capabilities = libvirtd.virsh(&["capabilities"])?;
    let line = capabilities.lines().map(str::trim).find(|line| {
        line.contains("deprecated='yes'")
            && (line.contains(">pc-q35-") || line.contains(">pc-i440fx-"))
    });
    let line = line.context("no machine type of this QEMU is deprecated")?;
    let name = line
        .split('>')
        .nth(1)
        .and_then(|rest| rest.split('<').next());
    Ok(name.context("a machine type without a name")?.to_owned())
}

/// Starts a domain without a guest: it stays in its firmware.
fn start(libvirtd: &Libvirtd, name: &str, machine: &str, devices: &str) -> anyhow::Result<()> {
    let file = libvirtd.directory().join("firmware.xml");
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type></os>\
         <devices>{devices}</devices></domain>"
    );
    fs::write(&file, xml)?;
    libvirtd.virsh(&["define", &file.to_string_lossy()])?;
    libvirtd.virsh(&["start", name])?;
    Ok(())
}

#[tokio::test]
async fn findings_about_real_guests_are_resolved_by_their_remedies() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let small = GuestConfig {
        name: "small",
        words: "nr_cpus=1 lab.virtio_mem=no",
        ..GuestConfig::default()
    };
    let idle = GuestConfig {
        name: "idle",
        ..GuestConfig::default()
    };
    let (small, idle) = tokio::try_join!(
        Guest::start(&libvirtd, &small),
        Guest::start(&libvirtd, &idle)
    )?;
    let machine = deprecated_machine(&libvirtd)?;
    start(&libvirtd, "old", &machine, "")?;
    // The name must not reach a shell; the domain has a controller for a channel.
    let mute = "mute; exit 1";
    start(&libvirtd, mute, "q35", "<controller type='virtio-serial'/>")?;
    libvirtd.virsh(&["setvcpus", "small", "3", "--live"])?;
    libvirtd.virsh(&["setvcpus", "idle", "2", "--live"])?;
    libvirtd.virsh(&[
        "update-memory-device",
        "small",
        "--live",
        "--alias",
        "ua-mem0",
        "--requested-size",
        "512MiB",
    ])?;
    let sees = "the guest has its second CPU";
    idle.sees(|witness| witness.present == "0-1")
        .await
        .context(sees)?;

    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let doctor = Doctor {
        uri: libvirtd.uri(),
        daemon: &daemon,
    };

    let found = doctor.finding("vcpus-online", "small")?;
    assert_eq!(found["what"], "libvirt counts 3 vCPUs, but its guest has 1");
    assert_eq!(found["remedy"]["place"], "guest");
    let found = doctor.finding("virtio-mem", "small")?;
    let what = "ua-mem0: requested 512MiB, plugged 0B, no longer growing";
    assert_eq!(found["what"], what);
    let offline = doctor.finding("vcpus-online", "idle")?;
    assert_eq!(offline["what"], "2 vCPUs are plugged, but its guest uses 1");
    assert_eq!(doctor.finding("virtio-mem", "idle")?, Value::Null);
    let absent = doctor.finding("guest-agent", mute)?;
    assert_eq!(absent["what"], "it has no channel for a guest agent");
    let deprecated = doctor.finding("machine-types", "old")?;
    assert_eq!(
        deprecated["what"],
        format!("its machine type {machine} is deprecated")
    );

    // The daemon's metric shows the same.
    let series =
        |check: &str| format!("virtnode_doctor_findings{{check=\"{check}\",severity=\"warning\"}}");
    eventually(LONG, async || {
        for (check, count) in [
            ("vcpus-online", 2.0),
            ("virtio-mem", 1.0),
            ("machine-types", 1.0),
            ("guest-agent", 2.0),
            ("probe-age", 0.0),
        ] {
            let have = daemon.metric(&series(check))?;
            ensure!(have == count, "{check}: {have}");
        }
        let connected = "virtnode_doctor_findings{check=\"libvirt-connection\",severity=\"ok\"}";
        ensure!(daemon.metric(connected)? == 1.0, "libvirt");
        Ok(())
    })
    .await?;

    doctor.apply_remedy(&offline)?;
    idle.sees(|witness| witness.online == "0-1").await?;
    assert_eq!(doctor.finding("vcpus-online", "idle")?, Value::Null);
    doctor.apply_remedy(&absent)?;
    let found = doctor.finding("guest-agent", mute)?;
    // libvirt reports an agent that never connected and one that does not answer by one number.
    let what = found["what"].as_str().unwrap_or_default();
    assert!(
        what.starts_with("its guest agent does not answer"),
        "{what}"
    );
    // A domain without a controller gets the channel at its next start.
    let absent = doctor.finding("guest-agent", "old")?;
    doctor.apply_remedy(&absent)?;
    assert_eq!(doctor.finding("guest-agent", "old")?, absent);
    doctor.apply_remedy(&deprecated)?;
    libvirtd.virsh(&["destroy", "old"])?;
    libvirtd.virsh(&["start", "old"])?;
    assert_eq!(doctor.finding("machine-types", "old")?, Value::Null);
    let found = doctor.finding("guest-agent", "old")?;
    let what = "the guest has not opened the guest agent's channel";
    assert_eq!(found["what"], what);
    small.witness()?;
    Ok(())
}

#[tokio::test]
async fn lost_libvirt_is_an_error_and_the_other_checks_still_report() -> anyhow::Result<()> {
    let mut libvirtd = Libvirtd::start()?;
    let daemon = Daemon::start(&libvirtd.uri(), &["--probe-interval", "1"]).await?;
    daemon.ready().await?;
    let doctor = Doctor {
        uri: libvirtd.uri(),
        daemon: &daemon,
    };
    let series = |severity: &str| {
        format!("virtnode_doctor_findings{{check=\"libvirt-connection\",severity=\"{severity}\"}}")
    };
    let shows = async |severity: &str| {
        eventually(LONG, async || {
            ensure!(daemon.metric(&series(severity))? == 1.0, "not {severity}");
            Ok(())
        })
        .await
    };
    shows("ok").await?;
    libvirtd.kill()?;
    shows("error").await?;
    assert_eq!(daemon.metric(&series("ok"))?, 0.0);
    let output = doctor
        .command()
        .args(["doctor", "--output", "json"])
        .output()?;
    assert_eq!(output.status.code(), Some(1));
    let diagnosis: Value = serde_json::from_slice(&output.stdout)?;
    let is = |check: &str, severity: &str| {
        let mut findings = diagnosis["findings"].as_array().into_iter().flatten();
        findings.any(|f| f["check"] == check && f["severity"] == severity)
    };
    assert!(is("libvirt-connection", "error"), "{diagnosis:#}");
    assert!(
        is("hugepages", "ok") || is("hugepages", "error"),
        "{diagnosis:#}"
    );
    // The daemon is running and its last readings are recent.
    assert!(is("probe-age", "ok"), "{diagnosis:#}");
    libvirtd.restart()?;
    shows("ok").await
}

#[tokio::test]
async fn frozen_libvirt_is_reported_within_the_call_deadline() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    libvirtd.freeze()?;
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .args([
            "doctor",
            "-o",
            "json",
            "--call-deadline",
            "2",
            "--connect",
            &libvirtd.uri(),
        ])
        .args([
            "--listen",
            "127.0.0.1:1",
            "--socket",
            "/nonexistent/virtnode.sock",
        ])
        .output();
    libvirtd.thaw()?;
    let output = output?;
    assert_eq!(output.status.code(), Some(1));
    let diagnosis: Value = serde_json::from_slice(&output.stdout)?;
    let mut findings = diagnosis["findings"].as_array().into_iter().flatten();
    let connection = findings.find(|finding| finding["check"] == "libvirt-connection");
    assert_eq!(connection.context("no finding")?["severity"], "error");
    Ok(())
}

/// Three of twenty agents never answer. The other domains are still observed, and the total time is
/// that of one timeout.
#[tokio::test(start_paused = true)]
async fn stuck_agents_do_not_delay_other_domains() -> anyhow::Result<()> {
    let control = FakeControl::new();
    for number in 0..20 {
        let guest = FakeGuest {
            agent_hangs: number % 7 == 0,
            ..FakeGuest::default()
        };
        control.add(&format!("vm-{number:02}"), guest);
    }
    let scope = DoctorScope {
        root: Path::new("/nonexistent").to_owned(),
        uri: Some("qemu:///system".to_owned()),
        policy: Policy::default(),
        label_origin: LabelOrigin::Libvirt,
        documents: Path::new("/nonexistent").to_owned(),
    };
    let began = Instant::now();
    let hypervisor = Arc::new(InMemory::debian_13());
    let observed = observe_node(&scope, hypervisor, &*control, Seen::None).await;
    let took = began.elapsed();
    let domains = observed.domains.map_err(anyhow::Error::msg)?;
    let mut silent = Vec::new();
    for seen in &domains {
        let look = seen
            .details
            .as_ref()
            .map_err(|why| anyhow::anyhow!("{why}"))?;
        match &look.agent {
            Agent::Answered(_) => {}
            Agent::Silent(_) => silent.push(seen.name.as_str()),
            other => anyhow::bail!("{}: {other:?}", seen.name),
        }
    }
    assert_eq!(domains.len(), 20);
    assert_eq!(silent, ["vm-00", "vm-07", "vm-14"]);
    assert!(took < Duration::from_secs(10), "{took:?}");
    Ok(())
}
