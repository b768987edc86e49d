//! Domains through libvirt, on a private libvirtd: every call, the events, and what is stuck.

#![allow(clippy::print_stdout, reason = "what is measured is shown")]

use std::fs;
use std::future::Future;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout;
use virtnode::daemon::Metrics;
use virtnode::domain::{AgentChannel, Domain, DomainState, IdSet};
use virtnode::hotplug::{AcpiAnswer, Event, SlotKind};
use virtnode::hypervisor::{
    CallError, Change, Connection, DomainBackend, DomainRef, Libvirt, LibvirtConfig, Notice,
    Notices, Scope,
};
use virtnode::units::{Bytes, KiB};

use crate::support::eventually;
use crate::support::guest::{Guest, GuestConfig};
use crate::support::libvirtd::Libvirtd;

/// For what has no deadline of its own; only a failing test waits so long.
const LONG: Duration = Duration::from_secs(60);

fn start(libvirtd: &Libvirtd, change: impl FnOnce(&mut LibvirtConfig)) -> Libvirt {
    let mut config = LibvirtConfig::new(libvirtd.uri());
    change(&mut config);
    Libvirt::start(config, Metrics::new().hypervisor)
}

/// Waits until events are told, and subscribes.
async fn listen(control: &Libvirt) -> Notices {
    let mut listening = control.listening();
    let up = listening.wait_for(|state| matches!(state, Connection::Up(_)));
    timeout(LONG, up).await.unwrap().unwrap();
    control.notices()
}

/// Waits for a change of a domain that is as wanted.
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

/// The live XML of a domain, read.
async fn read(control: &Libvirt, domain: &DomainRef) -> Domain {
    let live = control.domain(domain).await.unwrap();
    Domain::parse("live", live.xml.as_bytes(), live.state).unwrap()
}

#[tokio::test]
async fn a_guest_is_watched_and_changed() {
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

    // What it is.
    let id = control.find_domain(config.name).await.unwrap();
    assert_eq!(id.name, config.name);
    assert_eq!(control.find_domain(&id.uuid).await.unwrap(), id);
    let live = control.domain(&id).await.unwrap();
    assert_eq!(live.id, id);
    assert_eq!((live.state, live.persistent), (DomainState::Running, true));
    let domain = read(&control, &id).await;
    assert_eq!(domain.vcpus.plugged(), 1);
    assert_eq!(domain.agent, AgentChannel::Connected);

    // Its statistics: all ways tell the same.
    let stats = control.domain_stats(&id).await.unwrap();
    assert_eq!((&stats.id, stats.state), (&id, DomainState::Running));
    assert!(stats.stats.vcpus[&0].time > Some(0), "{stats:?}");
    let all = control.all_domain_stats().await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].id, id);
    let total = Bytes::from(KiB::new(guest.witness().unwrap().total_kib).unwrap());
    eventually(LONG, async || {
        let balloon = control.memory_stats(&id).await?;
        ensure!(balloon.total == Some(total), "{balloon:?}, not {total}");
        ensure!(balloon.updated > Some(0), "{balloon:?}");
        let bulk = control.domain_stats(&id).await?.stats.balloon;
        ensure!(bulk.total == Some(total), "{bulk:?}, not {total}");
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

    // Nothing of it has tainted the domain.
    assert_eq!(tainted(), before);

    // Its life.
    libvirtd.virsh(&["suspend", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Paused).await;
    assert_eq!(
        control.domain(&id).await.unwrap().state,
        DomainState::Paused
    );
    libvirtd.virsh(&["resume", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Resumed).await;
    libvirtd.virsh(&["reset", config.name]).unwrap();
    until_event(&mut notices, |event| *event == Event::Reset).await;
    libvirtd.virsh(&["destroy", config.name]).unwrap();
    until_event(&mut notices, |event| {
        *event == Event::Stopped("destroyed".to_owned())
    })
    .await;
    assert_eq!(
        control.domain(&id).await.unwrap().state,
        DomainState::ShutOff
    );
    for outcome in [
        control.set_vcpus(&id, 2, Scope::Live).await,
        control.memory_stats(&id).await.map(drop),
        control.guest_vcpus(&id).await.map(drop),
    ] {
        let error = outcome.unwrap_err();
        assert!(matches!(error, CallError::NotRunning(_)), "{error:?}");
    }
    drop(guest);
    until(&mut notices, |_, change| *change == Change::Defined).await;
    let error = control.domain(&id).await.unwrap_err();
    assert!(matches!(error, CallError::NotFound(_)), "{error:?}");
}

/// vCPUs up, online, and down.
async fn vcpus(control: &Libvirt, notices: &mut Notices, id: &DomainRef) {
    control
        .set_agent_timeout(id, Duration::from_millis(4500))
        .await
        .unwrap();
    let scope = Scope::of(true);
    let (plugged, took) = timed(control.set_vcpus(id, 3, scope)).await;
    plugged.unwrap();
    println!("plugged two vCPUs within {took:?}");
    until_ost(notices, SlotKind::Cpu, 1, AcpiAnswer::Added).await;
    until_ost(notices, SlotKind::Cpu, 2, AcpiAnswer::Added).await;
    assert_eq!(read(control, id).await.vcpus.plugged_ids(), ids("0-2"));
    let said = control.guest_vcpus(id).await.unwrap();
    assert_eq!((said.vcpus, said.online), (ids("0-2"), ids("0")));
    control
        .set_guest_vcpus(id, &ids("1-2"), true)
        .await
        .unwrap();
    assert_eq!(control.guest_vcpus(id).await.unwrap().online, ids("0-2"));

    let error = control.set_vcpus(id, 5, scope).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "8"),
        "{error:?}"
    );

    // What the change holds up is its own domain's changes, nothing else. In software emulation
    // libvirt gives up waiting for what QEMU has done, and agrees when asked again.
    let unplug = async { timed(control.set_vcpus(id, 2, scope)).await };
    let meanwhile = async {
        until_ost(notices, SlotKind::Cpu, 2, AcpiAnswer::Gone).await;
        let reads = async {
            control.domain_stats(id).await.unwrap();
            control.all_domain_stats().await.unwrap();
            control.guest_vcpus(id).await.unwrap().online
        };
        timed(reads).await
    };
    let ((unplugged, held), (online, took)) = tokio::join!(unplug, meanwhile);
    println!("unplug {unplugged:?} after {held:?}; reads meanwhile took {took:?}");
    assert_eq!(online, ids("0-1"));
    if let Err(error) = unplugged {
        assert!(
            matches!(error, CallError::UnplugPending { .. }),
            "{error:?}"
        );
        assert!(took < held, "{took:?} of {held:?}");
        control.set_vcpus(id, 2, scope).await.unwrap();
    }
    assert_eq!(read(control, id).await.vcpus.plugged_ids(), ids("0-1"));
}

/// A virtio-mem device larger, and a DIMM in and out.
async fn memory(control: &Libvirt, notices: &mut Notices, id: &DomainRef) {
    let requested = |mib: u64| KiB::new(mib * 1024).unwrap();
    control
        .resize_virtio_mem(id, "ua-mem0", requested(256))
        .await
        .unwrap();
    until_event(notices, |event| {
        matches!(event, Event::MemorySize { device, size } if device == "ua-mem0" && *size == mib(256))
    })
    .await;
    let device = read(control, id).await.memory.devices[0].clone();
    assert_eq!(device.current, Some(mib(256)));
    let error = control
        .resize_virtio_mem(id, "ua-mem0", requested(3))
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::Failed { .. }), "{error:?}");
    let error = control
        .resize_virtio_mem(id, "ua-none", requested(2))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "99"),
        "{error:?}"
    );
    // The same by hand, for what has no call of its own.
    let xml = control.domain(id).await.unwrap().xml;
    let device = &xml[xml.find("<memory model='virtio-mem'").unwrap()..];
    let device = device.split_inclusive("</memory>").next().unwrap();
    let device = device.replace(">262144</requested>", ">0</requested>");
    control
        .update_device(id, &device, Scope::Live)
        .await
        .unwrap();
    until_event(notices, |event| {
        matches!(event, Event::MemorySize { device, size } if device == "ua-mem0" && *size == Bytes::ZERO)
    })
    .await;

    let dimm = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target>\
                <alias name='ua-dimm0'/></memory>";
    control.attach_device(id, dimm, Scope::Live).await.unwrap();
    until_ost(notices, SlotKind::Dimm, 0, AcpiAnswer::Added).await;
    control
        .detach_device(id, "ua-dimm0", Scope::Live)
        .await
        .unwrap();
    until_event(notices, |event| {
        matches!(event, Event::DeviceDeleted { device: Some(device), .. } if device == "ua-dimm0")
    })
    .await;
    eventually(LONG, async || {
        let xml = control.domain(id).await?.xml;
        ensure!(!xml.contains("ua-dimm0"), "{xml}");
        Ok(())
    })
    .await
    .unwrap();
    let error = control
        .detach_device(id, "ua-dimm0", Scope::Live)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "1" || code == "99"),
        "{error:?}"
    );
}

#[tokio::test]
async fn names_and_domains_that_are_not_there_do_no_harm() {
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
        let error = control.find_domain(name).await.unwrap_err();
        assert!(
            matches!(error, CallError::NotFound(_)),
            "{name:?}: {error:?}"
        );
    }
    for uuid in ["6f9f6bcb-5d8e-4a5a-9b0e-0d9a0e4e1c11", "no uuid", "\0"] {
        let id = DomainRef::on_host("bare", uuid);
        assert!(control.domain(&id).await.is_err());
        assert!(control.set_vcpus(&id, 1, Scope::Live).await.is_err());
    }
    let bare = control.find_domain("bare").await.unwrap();
    for text in ["", "<memory", "\0", "<memory model='\n'/>"] {
        let error = control
            .attach_device(&bare, text, Scope::Live)
            .await
            .unwrap_err();
        assert!(
            matches!(error, CallError::Failed { .. }),
            "{text:?}: {error:?}"
        );
        assert!(
            control
                .detach_device(&bare, text, Scope::Live)
                .await
                .is_err()
        );
    }

    // No channel for an agent; and a channel with nobody at its end.
    let error = control.guest_vcpus(&bare).await.unwrap_err();
    assert!(matches!(error, CallError::AgentSilent { .. }), "{error:?}");
    let silent = libvirtd.directory().join("silent.xml");
    let xml = "<domain type='qemu'><name>silent</name><memory unit='MiB'>16</memory>\
               <vcpu>1</vcpu><os><type machine='q35'>hvm</type></os><devices><channel type='unix'>\
               <target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>";
    fs::write(&silent, xml).unwrap();
    libvirtd
        .virsh(&["create", "--paused", &silent.to_string_lossy()])
        .unwrap();
    let silent = control.find_domain("silent").await.unwrap();
    for outcome in [
        control.guest_vcpus(&silent).await.map(drop),
        control.set_guest_vcpus(&silent, &ids("0"), true).await,
    ] {
        let error = outcome.unwrap_err();
        assert!(matches!(error, CallError::AgentSilent { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn events_are_told_again_after_libvirtd_was_killed() {
    let mut libvirtd = Libvirtd::start().unwrap();
    libvirtd.start_domain("d").unwrap();
    let control = start(&libvirtd, |_| {});
    let mut notices = listen(&control).await;
    let id = control.find_domain("d").await.unwrap();
    // So that each kind of lane has a connection that is lost.
    control.memory_stats(&id).await.unwrap();
    control.domain_stats(&id).await.unwrap();
    control.all_domain_stats().await.unwrap();

    for _ in 0..2 {
        libvirtd.kill().unwrap();
        let mut listening = control.listening();
        let down = listening.wait_for(|state| *state == Connection::Down);
        timeout(LONG, down).await.unwrap().unwrap();
        let error = control.domain(&id).await.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        let (answer, took) = timed(control.memory_stats(&id)).await;
        let error = answer.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        assert!(took < LONG / 3, "{took:?}");

        libvirtd.restart().unwrap();
        let gap = async { while notices.next().await != Some(Notice::Gap) {} };
        timeout(LONG, gap).await.unwrap();
        assert_eq!(control.domain(&id).await.unwrap().id, id);
        assert!(control.memory_stats(&id).await.is_ok());
        assert_eq!(control.all_domain_stats().await.unwrap().len(), 1);
        libvirtd.virsh(&["resume", "d"]).unwrap();
        until_event(&mut notices, |event| *event == Event::Resumed).await;
        libvirtd.virsh(&["suspend", "d"]).unwrap();
        until_event(&mut notices, |event| *event == Event::Paused).await;
    }
    drop(control);
    let ended = async { while notices.next().await.is_some() {} };
    timeout(LONG, ended).await.unwrap();
}

/// A domain's emulator, held with `SIGSTOP`: libvirt waits for its answers.
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
    for name in ["stuck", "a", "b", "c"] {
        libvirtd.start_domain(name).unwrap();
    }
    let stuck = control.find_domain("stuck").await.unwrap();
    let held = Held::new(&libvirtd, "stuck").unwrap();
    let call = async {
        let late = timed(control.memory_stats(&stuck)).await;
        let next = timed(control.memory_stats(&stuck)).await;
        (late, next)
    };
    let others = async {
        let mut longest = Duration::ZERO;
        for name in ["a", "b", "c"].repeat(10) {
            let id = control.find_domain(name).await.unwrap();
            let work = async {
                control.memory_stats(&id).await.unwrap();
                control.set_vcpus(&id, 1, Scope::Live).await.unwrap();
                control.domain_stats(&id).await.unwrap();
                control.domain(&id).await.unwrap();
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
    // The domain's turn is still taken.
    assert!(matches!(next.0, Err(CallError::Busy { .. })), "{next:?}");
    assert!(next.1 < LONG, "{next:?}");
    assert_eq!(
        metrics
            .call_timeouts
            .with_label_values(&["memory-stats"])
            .get(),
        1
    );
    let busy = metrics
        .call_failures
        .with_label_values(&["memory-stats", "busy"]);
    assert_eq!(busy.get(), 1);
    // What libvirt knows by itself it tells, and leaves the rest out.
    let stats = control.domain_stats(&stuck).await.unwrap();
    assert_eq!(stats.state, DomainState::Paused);
    assert_eq!(control.all_domain_stats().await.unwrap().len(), 4);

    drop(held);
    eventually(LONG, async || Ok(control.memory_stats(&stuck).await?))
        .await
        .unwrap();
}

/// The memory of this process that is in use, in KiB.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Says to this test that it is alone in its process, and where libvirtd is.
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
    // Other tests would be measured with it.
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
    let id = control.find_domain("a").await.unwrap();
    let ask = async |times: u32| {
        for call in 0..times {
            assert_eq!(control.all_domain_stats().await.unwrap().len(), 4);
            if call % 4 == 0 {
                control.domain_stats(&id).await.unwrap();
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
