//! The libvirt adapter on a private libvirtd: calls about domains, events, and stuck domains.

#![allow(clippy::print_stdout, reason = "what is measured is shown")]

use std::fs;
use std::future::Future;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::timeout;
use virtnode::daemon::Metrics;
use virtnode::domain::{AgentChannel, Domain, DomainState, IdSet};
use virtnode::executor::{AskedBy, Executor, Options, Order};
use virtnode::hotplug::{AcpiAnswer, Action, Event, GuestVcpus, HotplugRequest, Require, SlotKind};
use virtnode::hypervisor::{
    CallError, Change, ConnectionState, DomainBackend, DomainRef, DomainStats, Libvirt,
    LibvirtConfig, LiveDomain, Notice, Notices, ObservationQuery,
};
use virtnode::journal::Journal;
use virtnode::units::{Bytes, KiB};

use crate::support::backend::PLAIN;
use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig};
use crate::support::libvirtd::Libvirtd;
use crate::support::relay::{Hold, Relay, SET_VCPUS};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

fn start(libvirtd: &Libvirtd, change: impl FnOnce(&mut LibvirtConfig)) -> Libvirt {
    let mut config = LibvirtConfig::new(libvirtd.uri());
    change(&mut config);
    Libvirt::start(config, Metrics::new().hypervisor)
}

/// Subscribes, and waits until libvirt delivers events.
async fn listen(control: &Libvirt) -> Notices {
    let mut listening = control.health();
    let up = listening.wait_for(|state| matches!(state, ConnectionState::Up(_)));
    timeout(LONG, up).await.unwrap().unwrap();
    control.events()
}

/// Waits for a matching change of a domain.
async fn until(notices: &mut Notices, wanted: impl Fn(&DomainRef, &Change) -> bool) {
    let mut seen = Vec::new();
    let found = timeout(LONG, async {
        while let Some(notice) = notices.next().await {
            if let Notice::Change { domain, change, .. } = &notice
                && wanted(domain, change)
            {
                return;
            }
            seen.push(notice);
        }
        panic!("no more notices");
    });
    let found = found.await;
    found.unwrap_or_else(|_| panic!("it did not come, but {seen:#?}"));
}

async fn until_event(notices: &mut Notices, wanted: impl Fn(&Event) -> bool) {
    until(
        notices,
        |_, change| matches!(change, Change::Event(event) if wanted(event)),
    )
    .await;
}

async fn until_ost(notices: &mut Notices, kind: SlotKind, slot: u32, answer: AcpiAnswer) {
    until_event(notices, |event| {
        matches!(event, Event::Ost(ost)
            if ost.kind == kind && ost.slot == slot && ost.answer() == Some(answer))
    })
    .await;
}

async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let started = Instant::now();
    (future.await, started.elapsed())
}

fn ids(text: &str) -> IdSet {
    text.parse().unwrap()
}

fn mib(mib: u64) -> Bytes {
    Bytes::from_mib(mib).unwrap()
}

async fn live(control: &Libvirt, domain: &DomainRef) -> Result<LiveDomain, CallError> {
    control.observe(domain, PLAIN).await.live
}

async fn read(control: &Libvirt, domain: &DomainRef) -> Domain {
    live(control, domain).await.unwrap().domain
}

async fn statistics(control: &Libvirt, domain: &DomainRef) -> Option<DomainStats> {
    let query = ObservationQuery {
        statistics: true,
        ..PLAIN
    };
    control.observe(domain, query).await.statistics
}

/// Queries the guest agent, if the domain has one.
async fn agent(control: &Libvirt, domain: &DomainRef) -> Option<Result<GuestVcpus, CallError>> {
    let query = ObservationQuery {
        agent: Some(LONG),
        ..PLAIN
    };
    control.observe(domain, query).await.agent
}

fn set_vcpus(count: u32, persist: bool) -> Action {
    Action::SetVcpus { count, persist }
}

fn resize(alias: &str, mib: u64) -> Action {
    Action::ResizeVirtioMem {
        alias: alias.to_owned(),
        requested: KiB::new(mib * 1024).unwrap(),
        persist: false,
    }
}

fn dimm(alias: &str) -> Action {
    Action::AttachDimm {
        alias: alias.to_owned(),
        size: KiB::new(128 * 1024).unwrap(),
        node: Some(0),
        persist: false,
    }
}

fn online(ids: &str) -> Action {
    let ids = ids.parse().unwrap();
    Action::OnlineVcpus { ids }
}

#[tokio::test]
async fn events_and_observations_follow_each_change_of_a_guest() {
    let libvirtd = Libvirtd::start().unwrap();
    let control = start(&libvirtd, |_| {});
    let mut notices = listen(&control).await;
    let config = GuestConfig {
        name: "a 'guest' <&> \"co\"",
        persistent: true,
        ..GuestConfig::default()
    };
    let guest = Guest::start(&libvirtd, &config).await.unwrap();
    until(&mut notices, |domain, change| {
        domain.name == config.name && *change == Change::Started
    })
    .await;
    until(&mut notices, |_, change| {
        *change == Change::Agent { connected: true }
    })
    .await;
    let tainted = || {
        let info = libvirtd.virsh(&["dominfo", config.name]).unwrap();
        info.matches("tainted").count()
    };
    let before = tainted();

    // The definition.
    let id = control.find(config.name).await.unwrap();
    assert_eq!(id.name, config.name);
    assert_eq!(control.find(&id.uuid).await.unwrap(), id);
    let found = live(&control, &id).await.unwrap();
    assert_eq!((&found.id, found.persistent), (&id, true));
    let domain = found.domain;
    assert_eq!(
        (domain.state, domain.name.as_str()),
        (DomainState::Running, config.name)
    );
    assert_eq!(domain.vcpus.plugged(), 1);
    assert_eq!(domain.agent, AgentChannel::Connected);

    // The statistics, which all calls report alike.
    let stats = statistics(&control, &id).await.unwrap();
    assert_eq!((&stats.id, stats.state), (&id, DomainState::Running));
    assert!(stats.stats.vcpus[&0].time > Some(0), "{stats:?}");
    let all = control.statistics().await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].id, id);
    let total = Bytes::from(KiB::new(guest.witness().unwrap().total_kib).unwrap());
    eventually(LONG, async || {
        let statistics = statistics(&control, &id).await.context("no statistics")?;
        let balloon = statistics.stats.balloon;
        ensure!(balloon.total == Some(total), "{balloon:?}, not {total}");
        ensure!(balloon.updated > Some(0), "{balloon:?}");
        Ok(())
    })
    .await
    .unwrap();

    vcpus(&control, &mut notices, &id).await;
    let inactive = libvirtd
        .virsh(&["dumpxml", "--inactive", config.name])
        .unwrap();
    assert!(
        inactive.contains("<vcpu placement='static' current='2'>4</vcpu>"),
        "{inactive}"
    );
    memory(&control, &mut notices, &id).await;

    // No call has tainted the domain.
    assert_eq!(tainted(), before);

    // Pause, resume, reset and end.
    libvirtd.virsh(&["suspend", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Paused).await;
    assert_eq!(read(&control, &id).await.state, DomainState::Paused);
    libvirtd.virsh(&["resume", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Resumed).await;
    libvirtd.virsh(&["reset", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Reset).await;
    libvirtd.virsh(&["destroy", config.name]).unwrap();
    until_event(&mut notices, |event| {
        *event == Event::Stopped("destroyed".to_owned())
    })
    .await;
    assert_eq!(read(&control, &id).await.state, DomainState::ShutOff);
    for action in [set_vcpus(2, false), online("0")] {
        let error = control.apply(&id, &action).await.unwrap_err();
        assert!(matches!(error, CallError::NotRunning(_)), "{error:?}");
    }
    drop(guest);
    until(&mut notices, |_, change| *change == Change::Defined).await;
    let error = live(&control, &id).await.unwrap_err();
    assert!(matches!(error, CallError::NotFound(_)), "{error:?}");
}

/// Plugs vCPUs, brings them online, and unplugs them.
async fn vcpus(control: &Libvirt, notices: &mut Notices, id: &DomainRef) {
    let (plugged, took) = timed(control.apply(id, &set_vcpus(3, true))).await;
    plugged.unwrap();
    println!("plugged two vCPUs within {took:?}");
    until_ost(notices, SlotKind::Cpu, 1, AcpiAnswer::Added).await;
    until_ost(notices, SlotKind::Cpu, 2, AcpiAnswer::Added).await;
    assert_eq!(read(control, id).await.vcpus.plugged_ids(), ids("0-2"));
    let guest = agent(control, id).await.unwrap().unwrap();
    assert_eq!((guest.vcpus, guest.online), (ids("0-2"), ids("0")));
    control.apply(id, &online("1-2")).await.unwrap();
    let guest = agent(control, id).await.unwrap().unwrap();
    assert_eq!(guest.online, ids("0-2"));

    let error = control.apply(id, &set_vcpus(5, true)).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "8"),
        "{error:?}"
    );

    // The call delays only changes of its own domain. In software emulation libvirt times out
    // although QEMU has released the vCPU, and notices it at the second call.
    let two = set_vcpus(2, true);
    let unplug = async { timed(control.apply(id, &two)).await };
    let meanwhile = async {
        until_ost(notices, SlotKind::Cpu, 2, AcpiAnswer::Gone).await;
        timed(control.statistics()).await
    };
    let ((unplugged, held), (statistics, took)) = tokio::join!(unplug, meanwhile);
    println!("unplug {unplugged:?} after {held:?}; statistics meanwhile took {took:?}");
    assert_eq!(statistics.unwrap().len(), 1);
    if let Err(error) = unplugged {
        assert!(
            matches!(error, CallError::UnplugPending { .. }),
            "{error:?}"
        );
        assert!(took < held, "{took:?} of {held:?}");
        control.apply(id, &two).await.unwrap();
    }
    assert_eq!(read(control, id).await.vcpus.plugged_ids(), ids("0-1"));
}

/// Grows and shrinks a virtio-mem device, and plugs a DIMM.
async fn memory(control: &Libvirt, notices: &mut Notices, id: &DomainRef) {
    for size in [256, 0] {
        control.apply(id, &resize("ua-mem0", size)).await.unwrap();
        until_event(notices, |event| {
            matches!(event, Event::MemorySize { device, size: of } if device == "ua-mem0" && *of == mib(size))
        })
        .await;
        let device = read(control, id).await.memory.devices[0].clone();
        assert_eq!(device.current, Some(mib(size)));
    }
    let error = control.apply(id, &resize("ua-mem0", 3)).await.unwrap_err();
    assert!(matches!(error, CallError::Failed { .. }), "{error:?}");
    let error = control.apply(id, &resize("ua-none", 2)).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "99"),
        "{error:?}"
    );
    control.apply(id, &dimm("ua-dimm0")).await.unwrap();
    until_ost(notices, SlotKind::Dimm, 0, AcpiAnswer::Added).await;
    let devices = read(control, id).await.memory.devices;
    assert!(
        devices
            .iter()
            .any(|device| device.alias.as_deref() == Some("ua-dimm0")),
        "{devices:?}"
    );
}

#[tokio::test]
async fn unknown_domains_and_hostile_names_yield_errors() {
    let libvirtd = Libvirtd::start().unwrap();
    let control = start(&libvirtd, |_| {});
    libvirtd.start_domain("bare").unwrap();
    for name in [
        "",
        "nobody",
        "../../bare",
        "a/b",
        "a\nb",
        "'\"<&>;",
        "bare\0",
        "6f9f6bcb-5d8e-4a5a-9b0e-0d9a0e4e1c11",
        &"x".repeat(100_000),
    ] {
        let error = control.find(name).await.unwrap_err();
        assert!(
            matches!(error, CallError::NotFound(_)),
            "{name:?}: {error:?}"
        );
    }
    for uuid in ["6f9f6bcb-5d8e-4a5a-9b0e-0d9a0e4e1c11", "no uuid", "\0"] {
        let id = DomainRef::on_host("bare", uuid);
        assert!(live(&control, &id).await.is_err());
        assert!(control.apply(&id, &set_vcpus(1, false)).await.is_err());
    }
    let bare = control.find("bare").await.unwrap();
    for alias in ["", "'/><memory", "\0", "\n"] {
        let error = control.apply(&bare, &dimm(alias)).await.unwrap_err();
        assert!(
            matches!(error, CallError::Failed { .. }),
            "{alias:?}: {error:?}"
        );
        assert!(control.apply(&bare, &resize(alias, 2)).await.is_err());
    }

    // A domain without a channel for an agent, and one whose channel no agent has opened.
    let error = control.apply(&bare, &online("0")).await.unwrap_err();
    assert!(matches!(error, CallError::AgentSilent { .. }), "{error:?}");
    assert!(agent(&control, &bare).await.is_none());
    let silent = libvirtd.directory().join("silent.xml");
    let xml = "<domain type='qemu'><name>silent</name><memory unit='MiB'>16</memory>\
               <vcpu>1</vcpu><os><type machine='q35'>hvm</type></os><devices><channel type='unix'>\
               <target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>";
    fs::write(&silent, xml).unwrap();
    libvirtd
        .virsh(&["create", "--paused", &silent.to_string_lossy()])
        .unwrap();
    let silent = control.find("silent").await.unwrap();
    let error = control.apply(&silent, &online("0")).await.unwrap_err();
    assert!(matches!(error, CallError::AgentSilent { .. }), "{error:?}");
}

#[tokio::test]
async fn killed_libvirtd_delivers_events_again_after_restart() {
    let mut libvirtd = Libvirtd::start().unwrap();
    libvirtd.start_domain("d").unwrap();
    let control = start(&libvirtd, |_| {});
    let mut notices = listen(&control).await;
    let id = control.find("d").await.unwrap();
    live(&control, &id).await.unwrap();
    control.statistics().await.unwrap();

    for _ in 0..2 {
        libvirtd.kill().unwrap();
        let mut listening = control.health();
        let down = listening.wait_for(|state| *state == ConnectionState::Down);
        timeout(LONG, down).await.unwrap().unwrap();
        let error = live(&control, &id).await.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        let (answer, took) = timed(control.apply(&id, &set_vcpus(1, false))).await;
        let error = answer.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        assert!(took < LONG / 3, "{took:?}");

        libvirtd.restart().unwrap();
        let gap = async { while notices.next().await != Some(Notice::GAP) {} };
        timeout(LONG, gap).await.unwrap();
        assert_eq!(live(&control, &id).await.unwrap().id, id);
        assert!(control.apply(&id, &set_vcpus(1, false)).await.is_ok());
        assert_eq!(control.statistics().await.unwrap().len(), 1);
        libvirtd.virsh(&["resume", "d"]).unwrap();
        until_event(&mut notices, |event| *event == Event::Resumed).await;
        libvirtd.virsh(&["suspend", "d"]).unwrap();
        until_event(&mut notices, |event| *event == Event::Paused).await;
    }
    drop(control);
    let ended = async { while notices.next().await.is_some() {} };
    timeout(LONG, ended).await.unwrap();
}

/// A domain's emulator, stopped with `SIGSTOP`: libvirt waits for its answers.
struct Held(Pid);

impl Held {
    fn new(libvirtd: &Libvirtd, name: &str) -> anyhow::Result<Self> {
        let file = libvirtd
            .directory()
            .join(format!("run/libvirt/qemu/run/{name}.pid"));
        let pid = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        let pid = Pid::from_raw(pid.trim().parse()?);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGCONT).ok();
    }
}

#[tokio::test]
async fn stuck_domain_delays_only_its_own_calls() {
    const DEADLINE: Duration = Duration::from_secs(5);
    let libvirtd = Libvirtd::start().unwrap();
    let metrics = Metrics::new().hypervisor;
    let config = LibvirtConfig {
        change_deadline: DEADLINE,
        statistics_deadline: DEADLINE,
        ..LibvirtConfig::new(libvirtd.uri())
    };
    let control = Libvirt::start(config, Arc::clone(&metrics));
    libvirtd.start_firmware("stuck", 4).unwrap();
    for name in ["a", "b", "c"] {
        libvirtd.start_domain(name).unwrap();
    }
    let stuck = control.find("stuck").await.unwrap();
    let held = Held::new(&libvirtd, "stuck").unwrap();
    let call = async {
        let late = timed(control.apply(&stuck, &set_vcpus(2, false))).await;
        let next = timed(control.apply(&stuck, &set_vcpus(2, false))).await;
        (late, next)
    };
    let others = async {
        let mut longest = Duration::ZERO;
        for name in ["a", "b", "c"].repeat(10) {
            let id = control.find(name).await.unwrap();
            let work = async {
                control.apply(&id, &set_vcpus(1, false)).await.unwrap();
                statistics(&control, &id).await.unwrap();
                live(&control, &id).await.unwrap();
            };
            longest = longest.max(timed(work).await.1);
        }
        longest
    };
    let ((late, next), longest) = tokio::join!(call, others);
    println!("the others took {longest:?} at most");
    assert!(longest < DEADLINE, "{longest:?}");
    assert!(matches!(late.0, Err(CallError::Overdue { .. })), "{late:?}");
    assert!(late.1 < LONG, "{late:?}");
    // The late call still occupies the domain's turn.
    assert!(matches!(next.0, Err(CallError::Busy { .. })), "{next:?}");
    assert!(next.1 < LONG, "{next:?}");
    assert_eq!(
        metrics
            .call_timeouts
            .with_label_values(&["set-vcpus"])
            .get(),
        1
    );
    let busy = metrics
        .call_failures
        .with_label_values(&["set-vcpus", "busy"]);
    assert_eq!(busy.get(), 1);
    // libvirt reports its own figures and omits those of QEMU.
    let all = control.statistics().await.unwrap();
    assert_eq!(all.len(), 4);
    let stats = all.iter().find(|stats| stats.id == stuck).unwrap();
    assert_eq!(stats.state, DomainState::Running);

    drop(held);
    eventually(LONG, async || {
        Ok(control.apply(&stuck, &set_vcpus(2, false)).await?)
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn lock_held_by_another_client_is_busy_and_retried_when_libvirt_speaks_japanese() {
    let libvirtd = Libvirtd::start_in_japanese().unwrap();
    libvirtd.start_firmware("locked", 4).unwrap();
    let relay = Relay::start(&libvirtd).unwrap();
    let metrics = Metrics::new().hypervisor;
    let config = LibvirtConfig::new(relay.uri());
    let control = Arc::new(Libvirt::start(config, Arc::clone(&metrics)));
    listen(&control).await;
    let error = control.find("nobody").await.unwrap_err();
    assert!(matches!(error, CallError::NotFound(_)), "{error:?}");
    assert!(
        error.to_string().contains("ドメイン"),
        "not Japanese: {error}"
    );

    let state = TempDir::new().unwrap();
    let journal = Journal::open(state.path()).unwrap();
    let executor = Executor::start(control, journal, Options::default(), ()).unwrap();
    relay.hold(Hold::Request(SET_VCPUS));
    let order = Order {
        domain: "locked".parse().unwrap(),
        request: HotplugRequest::Vcpus {
            count: 2,
            online: false,
        },
        require: Require::Online,
        persistent: false,
        timeout: 2 * LONG,
        idempotency_key: None,
        asked_by: AskedBy::Local { uid: 0 },
    };
    let id = executor.submit(order).await.unwrap();
    eventually(LONG, async || {
        ensure!(relay.is_holding(), "no call to change the vCPUs");
        Ok(())
    })
    .await
    .unwrap();

    // Another client's call takes the domain's lock, and QEMU does not answer it.
    let held = Held::new(&libvirtd, "locked").unwrap();
    let mut other = Command::new("virsh")
        .args([
            "--quiet",
            "--connect",
            &libvirtd.uri(),
            "dommemstat",
            "locked",
        ])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually(LONG, async || {
        let control = libvirtd.virsh(&["domcontrol", "locked"])?;
        ensure!(control.contains("occupied"), "{control}");
        Ok(())
    })
    .await
    .unwrap();
    relay.release(true);

    let busy = metrics
        .call_failures
        .with_label_values(&["set-vcpus", "busy"]);
    eventually(LONG, async || {
        ensure!(busy.get() == 1, "the call has not returned");
        Ok(())
    })
    .await
    .unwrap();
    let record = executor.operation(&id).unwrap();
    assert!(!record.is_done(), "{record:#?}");

    drop(held);
    other.wait().unwrap();
    eventually(LONG, async || {
        let count = libvirtd.virsh(&["vcpucount", "locked", "--live"])?;
        ensure!(count.trim() == "2", "{count}");
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(relay.passed(SET_VCPUS), 2);
    executor.stop().await;
}

/// Returns the resident memory of this process in KiB.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Environment variable with the URI of libvirtd, for this test alone in its own process.
const ALONE: &str = "VIRTNODE_TEST_URI";

#[tokio::test]
async fn statistics_leave_no_memory_behind() {
    if let Ok(uri) = std::env::var(ALONE) {
        return measure_statistics(&uri).await;
    }
    let libvirtd = Libvirtd::start().unwrap();
    for name in ["a", "b", "c", "d"] {
        libvirtd.start_domain(name).unwrap();
    }
    // In this process the measurement would include other tests.
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "control::statistics_leave_no_memory_behind",
            "--nocapture",
        ])
        .env(ALONE, libvirtd.uri())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains("KiB more"), "{said}");
    print!("{said}");
}

async fn measure_statistics(uri: &str) {
    let control = Libvirt::start(LibvirtConfig::new(uri), Metrics::new().hypervisor);
    let id = control.find("a").await.unwrap();
    let ask = async |times: u32| {
        for call in 0..times {
            assert_eq!(control.statistics().await.unwrap().len(), 4);
            if call % 4 == 0 {
                statistics(&control, &id).await.unwrap();
            }
        }
    };
    ask(200).await;
    let before = resident_kib();
    let ((), took) = timed(ask(2000)).await;
    let more = resident_kib().saturating_sub(before);
    println!("2000 calls: {more} KiB more, {took:?}");
    assert!(more < 2048, "{more} KiB");
}
