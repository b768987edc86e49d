//! Changes that another client makes: on real guests of the host's libvirt with a daemon, in launchers,
//! and on the hypervisor in memory in virtual time. `src/hotplug/external_tests.rs` has the rules.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use virtnode::daemon::Metrics;
use virtnode::domain::PauseReason;
use virtnode::executor::{AskedBy, Executor, Listener, Options, Order, Record};
use virtnode::external::{ExternalChanges, ExternalRecord, OwnOperations, ServiceOptions};
use virtnode::hotplug::external::ExternalAction;
use virtnode::hotplug::{Action, HotplugRequest, Patience, Require, Verdict};
use virtnode::hypervisor::DomainBackend;
use virtnode::journal::Journal;
use virtnode::monitor::Monitor;

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::fake_domains::{Cpus, FakeControl, FakeGuest};
use crate::support::guest::{Guest, GuestConfig, Host as _};
use crate::support::launchers::vm::{Vm, disk};
use crate::support::launchers::{Launchers, pod_uid};
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// Starts a daemon that verifies changes with a short grace period, and has this configuration besides.
async fn daemon(uri: &str, more: &str) -> anyhow::Result<(Daemon, TempDir)> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.yaml");
    let changes = "externalChanges: {enabled: true, graceSeconds: 12}\n";
    fs::write(&config, format!("{changes}{more}"))?;
    let daemon = Daemon::start(uri, &["--config", &config.to_string_lossy()]).await?;
    Ok((daemon, directory))
}

/// Waits until so many agents were asked: the baseline of each domain is known after the first look.
async fn looked_at(daemon: &Daemon, agents: f64) -> anyhow::Result<()> {
    eventually(LONG, async || {
        let looks = "virtnode_hypervisor_call_duration_seconds_count{call=\"guest-vcpus\"}";
        ensure!(daemon.metric(looks)? >= 2.0 * agents, "not looked at yet");
        Ok(())
    })
    .await
}

fn changes(daemon: &Daemon) -> anyhow::Result<Vec<Value>> {
    let answer = daemon.api("GET", "/v1/external-changes", "")?;
    Ok(answer["changes"].as_array().context("a list")?.clone())
}

/// Waits for the verdict of the newest change of a domain.
async fn verdict_of(
    daemon: &Daemon,
    domain: &str,
    resource: &str,
    expected: &str,
) -> anyhow::Result<Value> {
    eventually(LONG, async || {
        let all = changes(daemon)?;
        let of_domain =
            |change: &&Value| change["domain"]["name"] == domain && change["resource"] == resource;
        let newest = all.iter().find(of_domain);
        let newest = newest.with_context(|| format!("no change of {domain}: {all:?}"))?;
        ensure!(newest["verdict"] == expected, "{newest:#}");
        Ok(newest.clone())
    })
    .await
}

fn not_taken(domain: &str, resource: &str) -> String {
    format!(
        "virtnode_domain_change_not_taken{{domain=\"{domain}\",name=\"{domain}\",namespace=\"\",\
         resource=\"{resource}\"}}"
    )
}

fn counted(resource: &str, action: &str, verdict: &str) -> String {
    format!(
        "virtnode_external_changes_total{{action=\"{action}\",resource=\"{resource}\",\
         verdict=\"{verdict}\"}}"
    )
}

/// A running domain without an operating system: it stays in its firmware and releases nothing.
fn start_without_guest(libvirtd: &Libvirtd, name: &str) -> anyhow::Result<String> {
    let file = libvirtd.directory().join(format!("{name}.img"));
    fs::File::create(&file)?.set_len(1 << 20)?;
    std::os::unix::fs::chown(&file, Some(65534), Some(65534)).ok();
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/><alias name='ua-vol1'/></disk>",
        file.display()
    );
    let ports = format!(
        "<controller type='pci' index='0' model='pcie-root'/>{}",
        "<controller type='pci' model='pcie-root-port'/>".repeat(4)
    );
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type machine='q35'>hvm</type></os><features><acpi/><apic/></features>\
         <devices>{ports}{disk}<controller type='usb' model='none'/></devices></domain>"
    );
    let definition = libvirtd.directory().join(format!("{name}.xml"));
    fs::write(&definition, xml)?;
    libvirtd.virsh(&["define", &definition.to_string_lossy()])?;
    libvirtd.virsh(&["start", name])?;
    Ok(disk)
}

#[tokio::test]
async fn changes_by_virsh_are_verified_on_real_guests() -> anyhow::Result<()> {
    let libvirtd = Libvirtd::start()?;
    let takes = GuestConfig {
        name: "takes",
        words: "lab.cpus=online lab.blocks=online",
        maximum: 8,
        ..GuestConfig::default()
    };
    let narrow = GuestConfig {
        name: "narrow",
        words: "nr_cpus=1 lab.virtio_mem=no",
        maximum: 8,
        ..GuestConfig::default()
    };
    let leaves = GuestConfig {
        name: "leaves",
        maximum: 8,
        ..GuestConfig::default()
    };
    let (taking, narrow, leaving) = tokio::join!(
        Guest::start(&libvirtd, &takes),
        Guest::start(&libvirtd, &narrow),
        Guest::start(&libvirtd, &leaves)
    );
    let (taking, _narrow, leaving) = (taking?, narrow?, leaving?);
    let disk = start_without_guest(&libvirtd, "stuck")?;
    let (daemon, _directory) = daemon(&libvirtd.uri(), "").await?;
    looked_at(&daemon, 3.0).await?;

    for (name, count) in [("takes", "3"), ("narrow", "3"), ("leaves", "2")] {
        libvirtd.virsh(&["setvcpus", name, count, "--live"])?;
    }
    taking.sees(|guest| guest.online == "0-2").await?;
    let change = verdict_of(&daemon, "takes", "vcpus", "Verified").await?;
    assert_eq!(change["action"], "plug");
    assert_eq!(change["requested"]["vcpus"], 3);
    let change = verdict_of(&daemon, "narrow", "vcpus", "GuestRefused").await?;
    assert_eq!(change["diagnosis"]["code"], "nr-cpus");
    verdict_of(&daemon, "leaves", "vcpus", "GuestOffline").await?;
    assert!(daemon.metric(&not_taken("narrow", "vcpus"))? > 0.0);
    daemon.metric(&not_taken("takes", "vcpus")).unwrap_err();
    assert_eq!(daemon.metric(&counted("vcpus", "plug", "Verified"))?, 1.0);

    // Memory, by virtio-mem with and without a driver.
    for name in ["takes", "narrow"] {
        let resize = ["--alias", "ua-mem0", "--requested-size", "512MiB", "--live"];
        libvirtd.virsh(&[&["update-memory-device", name][..], &resize].concat())?;
    }
    let change = verdict_of(&daemon, "takes", "memory", "Verified").await?;
    assert_eq!(change["requested"]["memory"], "1GiB");
    let change = verdict_of(&daemon, "narrow", "memory", "GuestSilent").await?;
    assert_eq!(change["diagnosis"]["code"], "no-virtio-mem-driver");

    // A paused guest: only statistics show the change, and there is no verdict before it runs again.
    libvirtd.virsh(&["suspend", "takes"])?;
    libvirtd.virsh(&["setvcpus", "takes", "4", "--live"])?;
    eventually(LONG, async || {
        let all = changes(&daemon)?;
        let newest = all.first().context("none")?;
        ensure!(newest["requested"]["vcpus"] == 4, "{newest:#}");
        ensure!(newest["verdict"].is_null(), "{newest:#}");
        Ok(())
    })
    .await?;
    libvirtd.virsh(&["resume", "takes"])?;
    verdict_of(&daemon, "takes", "vcpus", "Verified").await?;

    // A reset guest boots with its vCPUs.
    libvirtd.virsh(&["reset", "leaves"])?;
    leaving.sees(|guest| guest.online == "0-1").await?;
    let change = verdict_of(&daemon, "leaves", "vcpus", "Verified").await?;
    assert!(!change["corrected"].is_null(), "{change:#}");

    // A detach as KubeVirt calls it, from a guest that does not answer.
    let file = libvirtd.directory().join("disk.xml");
    fs::write(&file, &disk)?;
    let detach = [
        "detach-device",
        "stuck",
        &file.to_string_lossy(),
        "--live",
        "--config",
    ];
    libvirtd.virsh(&detach)?;
    let change = verdict_of(&daemon, "stuck", "disk", "GuestSilent").await?;
    assert_eq!(change["device"], "vda (ua-vol1)");
    assert!(daemon.metric(&not_taken("stuck", "disk"))? > 0.0);
    let (code, text, _) = run(&daemon.socket(), &["operations", "--external"])?;
    assert_eq!(code, 0);
    for expected in [
        "detach disk",
        "1 → 3",
        "GuestRefused",
        "detach-device-alias",
        "nr_cpus=",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    libvirtd.virsh(&["reset", "stuck"])?;
    verdict_of(&daemon, "stuck", "disk", "Verified").await?;

    // An operation of virtnode is none.
    let before = changes(&daemon)?.len();
    let body = "{\"count\": 5, \"timeoutSeconds\": 60}";
    daemon.api("POST", "/v1/domains/takes/vcpus", body)?;
    eventually(LONG, async || {
        let all = daemon.api("GET", "/v1/operations", "")?;
        ensure!(all["operations"][0]["verdict"] == "Verified", "{all:#}");
        Ok(())
    })
    .await?;
    let statistics = "virtnode_hypervisor_call_duration_seconds_count{call=\"all-domain-stats\"}";
    let read = daemon.metric(statistics)?;
    eventually(LONG, async || {
        ensure!(daemon.metric(statistics)? > read + 1.0, "not read again");
        Ok(())
    })
    .await?;
    assert_eq!(changes(&daemon)?.len(), before);
    libvirtd.virsh(&["destroy", "stuck"])?;
    libvirtd.virsh(&["undefine", "stuck"])?;
    Ok(())
}

/// A service on connections of its own.
struct Verifier<C> {
    metrics: Arc<Metrics>,
    own: Arc<OwnOperations>,
    stop: CancellationToken,
    backend: Arc<C>,
}

impl<C: DomainBackend> Verifier<C> {
    fn start(backend: Arc<C>, grace: Duration) -> Self {
        let metrics = Arc::new(Metrics::new());
        let monitor = Monitor::new(Arc::clone(&backend), Arc::clone(&metrics.inventory));
        let own = Arc::<OwnOperations>::default();
        let options = ServiceOptions {
            grace,
            patience: Patience::default(),
        };
        let service = ExternalChanges::new(
            Arc::clone(&backend),
            options,
            monitor.sightings(),
            Arc::clone(&own),
            Arc::clone(&metrics.external),
        );
        let stop = CancellationToken::new();
        tokio::spawn(monitor.run(stop.clone()));
        tokio::spawn(service.run(stop.clone()));
        Self {
            metrics,
            own,
            stop,
            backend,
        }
    }

    fn changes(&self) -> Vec<ExternalRecord> {
        self.metrics.external.log.records()
    }

    /// Waits for the verdict of the newest change of a domain.
    async fn verdict(&self, domain: &str, expected: Verdict) -> anyhow::Result<ExternalRecord> {
        eventually(LONG, async || {
            let all = self.changes();
            let newest = all.iter().find(|record| record.domain.name == domain);
            let newest = newest.with_context(|| format!("no change of {domain}: {all:#?}"))?;
            ensure!(newest.change.verdict == Some(expected), "{newest:#?}");
            Ok(newest.clone())
        })
        .await
    }

    async fn set_vcpus(&self, domain: &str, count: u32) {
        let domain = self.backend.find(domain).await.unwrap();
        let persist = false;
        let action = Action::SetVcpus { count, persist };
        self.backend.apply(&domain, &action).await.ok();
    }
}

impl<C> Drop for Verifier<C> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn changes_in_launchers_are_verified_as_kubevirt_makes_them() {
    let node = Launchers::new().unwrap();
    let pods: Vec<String> = (1..=2).map(pod_uid).collect();
    let launchers = node.start_all(&pods).await.unwrap();
    let [source, target] = &launchers[..] else {
        panic!("two launchers");
    };
    let takes = Vm {
        namespace: "tenant-a",
        name: "takes",
        words: "lab.cpus=online",
        ..Vm::default()
    };
    let narrow = Vm {
        namespace: "tenant-b",
        name: "narrow",
        // It has no driver for the removal of PCI devices.
        words: "nr_cpus=1 pcie_ports=compat acpiphp.disable=1",
        uuid: "6f9b2ad6-6b68-4c6c-9e7e-0d1f2c3b4a59",
        volumes: &["vol1"],
        ..Vm::default()
    };
    let (taking, narrowed) = tokio::join!(source.guest(&takes), source.guest(&narrow));
    let (taking, _narrowed) = (taking.unwrap(), narrowed.unwrap());

    let directory = format!("directory: {}", node.pods().display());
    let launchers = format!("launchers: {{enabled: true, {directory}}}\nconnect: none\n");
    let (daemon, _directory) = daemon("none", &launchers).await.unwrap();
    looked_at(&daemon, 2.0).await.unwrap();
    for vm in [&takes, &narrow] {
        let domain = vm.domain();
        source.migrate(&domain, target).unwrap();
        let more = ["setvcpus", &domain, "3", "--live", "--config"];
        target.virsh(&more).unwrap();
    }
    let domain = takes.domain();
    let change = verdict_of(&daemon, &domain, "vcpus", "Verified")
        .await
        .unwrap();
    assert!(change["found"].is_null(), "{change:#}");
    taking.sees(|guest| guest.online == "0-2").await.unwrap();
    let domain = narrow.domain();
    let change = verdict_of(&daemon, &domain, "vcpus", "GuestRefused")
        .await
        .unwrap();
    assert!(change["found"].is_null(), "{change:#}");
    assert_eq!(
        change["domain"]["connection"],
        format!("launcher:{}", pods[1])
    );
    let series = |domain: &str, namespace: &str, name: &str, resource: &str| {
        format!(
            "virtnode_domain_change_not_taken{{domain=\"{domain}\",name=\"{name}\",\
             namespace=\"{namespace}\",resource=\"{resource}\"}}"
        )
    };
    let refused = series(&domain, "tenant-b", "narrow", "vcpus");
    assert_eq!(daemon.metric(&refused).unwrap(), 1.0);

    // A disk of a guest that does not answer.
    let volume = disk(target.directory(), "vol1", "vda").unwrap();
    target.detach(&domain, &volume).unwrap();
    verdict_of(&daemon, &domain, "disk", "GuestSilent")
        .await
        .unwrap();
    let lacking = series(&domain, "tenant-b", "narrow", "disk");
    assert_eq!(daemon.metric(&lacking).unwrap(), 1.0);
    let (code, text, _) = run(&daemon.socket(), &["operations", "--external"]).unwrap();
    assert_eq!(code, 0);
    assert!(text.contains("tenant-b/narrow"), "{text}");

    // A restarted daemon finds both again, and counts neither.
    drop(daemon);
    let (daemon, _directory) = self::daemon("none", &launchers).await.unwrap();
    let found = verdict_of(&daemon, &domain, "disk", "GuestSilent")
        .await
        .unwrap();
    assert_eq!(found["found"], true);
    assert_eq!(
        daemon
            .metric(&counted("disk", "detach", "GuestSilent"))
            .unwrap(),
        0.0
    );
    assert_eq!(daemon.metric(&lacking).unwrap(), 1.0);
}

fn guest(cpus: Cpus) -> FakeGuest {
    FakeGuest {
        cpus,
        ..FakeGuest::default()
    }
}

#[tokio::test(start_paused = true)]
async fn guest_in_memory_is_verified_and_a_second_one_is_not() {
    let control = FakeControl::new();
    control.add("takes", guest(Cpus::Onlines));
    control.add("drops", guest(Cpus::ThrowsAway));
    let verifier = Verifier::start(control, Duration::from_secs(60));
    tokio::time::sleep(Duration::from_secs(5)).await;
    verifier.set_vcpus("takes", 3).await;
    verifier.set_vcpus("drops", 3).await;
    let change = verifier.verdict("takes", Verdict::Verified).await.unwrap();
    let change = change.change;
    let took = change.finished.unwrap().since(change.noticed);
    assert!(took < Duration::from_secs(2), "{took:?}");
    verifier
        .verdict("drops", Verdict::GuestRefused)
        .await
        .unwrap();
    let lacking = verifier.metrics.external.log.not_taken();
    assert_eq!(lacking.borrow().len(), 1);
    // The end of the domain ends that.
    verifier.backend.destroy("drops");
    eventually(LONG, async || {
        ensure!(lacking.borrow().is_empty(), "still there");
        Ok(())
    })
    .await
    .unwrap();
    let actions: Vec<_> = verifier.changes().iter().map(|r| r.change.action).collect();
    assert_eq!(actions, [ExternalAction::Plug; 2]);
}

#[tokio::test(start_paused = true)]
async fn change_in_a_gap_of_the_events_is_found_by_statistics() {
    let control = FakeControl::new();
    control.add("takes", guest(Cpus::Onlines));
    let verifier = Verifier::start(control, Duration::from_secs(60));
    tokio::time::sleep(Duration::from_secs(5)).await;
    verifier.backend.loses_events();
    verifier.set_vcpus("takes", 2).await;
    verifier.verdict("takes", Verdict::Verified).await.unwrap();
    // A paused guest has no events either.
    verifier.backend.pause("takes", PauseReason::User);
    verifier.set_vcpus("takes", 3).await;
    eventually(LONG, async || {
        let open = verifier.changes();
        ensure!(open[0].change.verdict.is_none(), "{open:#?}");
        Ok(())
    })
    .await
    .unwrap();
}

/// Passes every operation on.
struct Reporter(Arc<OwnOperations>);

impl Listener for Reporter {
    fn changed(&self, record: &Record) {
        self.0.record(record);
    }

    fn concluded_after(&self, _: Duration) {}

    fn journal_failed(&self) {}
}

#[tokio::test(start_paused = true)]
async fn operation_of_virtnode_is_not_an_external_change() {
    let control = FakeControl::new();
    control.add("ours", guest(Cpus::KeepsThem));
    let verifier = Verifier::start(control, Duration::from_secs(60));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let state = TempDir::new().unwrap();
    let executor = Executor::start(
        Arc::clone(&verifier.backend),
        Journal::open(state.path()).unwrap(),
        Options::default(),
        Reporter(Arc::clone(&verifier.own)),
    )
    .unwrap();
    for count in [3, 2] {
        let order = Order {
            domain: "ours".parse().unwrap(),
            request: HotplugRequest::Vcpus {
                count,
                online: false,
            },
            require: Require::Online,
            persistent: false,
            timeout: Duration::from_secs(20),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        let id = executor.submit(order).await.unwrap();
        let mut record = executor.watch(&id).unwrap();
        record.wait_for(Record::is_done).await.unwrap();
    }
    // The guest follows a minute after the verdict.
    tokio::time::sleep(Duration::from_secs(60)).await;
    verifier.backend.somebody_unplugs("ours", 2);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(verifier.changes(), []);
    executor.stop().await;
}

#[tokio::test(start_paused = true)]
async fn agent_is_asked_only_while_a_change_is_watched() {
    let control = FakeControl::new();
    control.add(
        "silent",
        FakeGuest {
            agent_hangs: true,
            ..guest(Cpus::Silent)
        },
    );
    control.add("takes", guest(Cpus::Onlines));
    let verifier = Verifier::start(control, Duration::from_secs(60));
    tokio::time::sleep(Duration::from_secs(5)).await;
    verifier.set_vcpus("silent", 3).await;
    // A guest that never answers delays no other.
    verifier.set_vcpus("takes", 3).await;
    let change = verifier.verdict("takes", Verdict::Verified).await.unwrap();
    let change = change.change;
    let took = change.finished.unwrap().since(change.noticed);
    assert!(took < Duration::from_secs(3), "{took:?}");
    verifier
        .verdict("silent", Verdict::GuestSilent)
        .await
        .unwrap();
}
