//! The libvirt adapter against a real libvirtd: absent, killed, frozen, and in good health.

use std::future::Future;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use tokio::sync::watch;
use tokio::time::{interval, timeout};
use virtnode::capability::eim;
use virtnode::daemon::Metrics;
use virtnode::hypervisor::HypervisorMetrics;
use virtnode::hypervisor::{
    CallError, ConnectionState, DomainCapabilitiesQuery, Keepalive, Libvirt, LibvirtConfig,
    NodeSource,
};

use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(30);
/// Maximum duration of an answer that waits for no deadline.
const AT_ONCE: Duration = Duration::from_secs(10);

fn start(uri: &str, change: impl FnOnce(&mut LibvirtConfig)) -> (Libvirt, Arc<HypervisorMetrics>) {
    let mut config = LibvirtConfig::new(uri);
    change(&mut config);
    let metrics = Metrics::new().hypervisor;
    (Libvirt::start(config, Arc::clone(&metrics)), metrics)
}

/// Waits until the connection is up, or down.
async fn until(
    connection: &mut watch::Receiver<ConnectionState>,
    within: Duration,
    up: bool,
) -> ConnectionState {
    let wanted = |state: &ConnectionState| matches!(state, ConnectionState::Up(_)) == up;
    let state = timeout(within, connection.wait_for(wanted)).await;
    *state
        .expect("the connection changes in time")
        .expect("the adapter lives")
}

async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let started = Instant::now();
    (future.await, started.elapsed())
}

fn q35() -> DomainCapabilitiesQuery {
    DomainCapabilitiesQuery {
        arch: Some("x86_64".to_owned()),
        machine: Some("q35".to_owned()),
        virt_type: Some("qemu".to_owned()),
        expand_features: false,
        supported_features: false,
    }
}

#[tokio::test]
async fn each_document_equals_that_of_virsh() {
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |_| {});

    let versions = libvirt.versions().await.unwrap().unwrap();
    let said = libvirtd.virsh(&["version", "--daemon"]).unwrap();
    assert!(
        said.contains(&format!("Running against daemon: {}", versions.libvirt)),
        "{said}"
    );
    let qemu = versions.hypervisor.expect("QEMU has a version");
    assert!(
        said.contains(&format!("Running hypervisor: QEMU {qemu}")),
        "{said}"
    );

    let capabilities = libvirt.capabilities().await.unwrap();
    assert_eq!(
        capabilities.trim(),
        libvirtd.virsh(&["capabilities"]).unwrap().trim()
    );

    let plain = libvirt.domain_capabilities(q35()).await.unwrap();
    let domcapabilities = ["domcapabilities", "--machine", "q35", "--virttype", "qemu"];
    assert_eq!(
        plain.trim(),
        libvirtd.virsh(&domcapabilities).unwrap().trim()
    );

    // With flags that an old daemon does not have.
    let query = DomainCapabilitiesQuery {
        expand_features: true,
        supported_features: true,
        ..q35()
    };
    let expanded = libvirt.domain_capabilities(query).await.unwrap();
    assert!(expanded.starts_with("<domainCapabilities>"), "{expanded}");

    let cpu = "<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>";
    let baseline = libvirt.baseline_cpu(q35(), cpu.to_owned()).await.unwrap();
    assert!(
        baseline.contains("<feature policy='require' name='sse2'/>"),
        "{baseline}"
    );

    let domain = eim::dry_run_domain("qemu", "q35", true);
    let arguments = libvirt.native_arguments(domain).await.unwrap();
    assert!(eim::from_native_arguments(&arguments), "{arguments}");
    let domain = eim::dry_run_domain("qemu", "q35", false);
    let automatic = libvirt.native_arguments(domain).await;
    let added = automatic.is_ok_and(|arguments| eim::from_native_arguments(&arguments));
    let expected = eim::Eim::from_versions(versions.libvirt, versions.hypervisor);
    assert_eq!(added, expected == eim::Eim::Auto);

    assert_eq!(libvirt.running_domains().await.unwrap().domains, []);
    assert_eq!(metrics.connected.get(), 1);
    assert_eq!(metrics.reconnects.get(), 0);
    let answered = metrics
        .call_duration
        .with_label_values(&["domain-capabilities"]);
    assert_eq!(answered.get_sample_count(), 2);
}

#[tokio::test]
async fn rejected_call_carries_message_of_libvirt() {
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |_| {});

    let query = DomainCapabilitiesQuery {
        machine: Some("pc-nonsense-1.0".to_owned()),
        ..q35()
    };
    let error = libvirt.domain_capabilities(query).await.unwrap_err();
    assert!(matches!(error, CallError::Failed { .. }), "{error:?}");
    assert!(error.to_string().contains("pc-nonsense-1.0"), "{error}");

    let too_many = eim::dry_run_domain("qemu", "pc", false);
    let error = libvirt.native_arguments(too_many).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "67"),
        "{error:?}"
    );

    let query = DomainCapabilitiesQuery {
        machine: Some("q\x0035".to_owned()),
        ..q35()
    };
    let error = libvirt.domain_capabilities(query).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "8"),
        "{error:?}"
    );

    // None of these errors ends the connection.
    assert!(matches!(
        *libvirt.connection().borrow(),
        ConnectionState::Up(_)
    ));
    let failed = metrics
        .call_failures
        .with_label_values(&["native-arguments", "failed"]);
    assert_eq!(failed.get(), 1);
}

#[tokio::test]
async fn call_missing_in_driver_is_unsupported() {
    let (libvirt, metrics) = start("test:///default", |_| {});
    assert!(libvirt.capabilities().await.is_ok());
    let error = libvirt
        .native_arguments("<domain/>".to_owned())
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::Unsupported { .. }), "{error:?}");
    let error = libvirt
        .baseline_cpu(q35(), "<cpu/>".to_owned())
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::Unsupported { .. }), "{error:?}");
    let failed = metrics
        .call_failures
        .with_label_values(&["baseline-cpu", "unsupported"]);
    assert_eq!(failed.get(), 1);
}

#[tokio::test]
async fn definition_is_read_once_per_start_of_a_domain() {
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |_| {});
    libvirtd.start_domain("one").unwrap();
    libvirtd.start_domain("two").unwrap();

    let mut domains = libvirt.running_domains().await.unwrap().domains;
    domains.sort_by(|a, b| a.id.name.cmp(&b.id.name));
    let names: Vec<&str> = domains
        .iter()
        .map(|domain| domain.id.name.as_str())
        .collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(
        domains[0].id.uuid,
        libvirtd.virsh(&["domuuid", "one"]).unwrap().trim()
    );
    let requirements = domains[0].requirements.as_ref().unwrap();
    let machine = requirements.machine.as_deref().unwrap();
    assert!(machine.starts_with("pc-q35-"), "{machine}");
    let reads = || {
        metrics
            .call_duration
            .with_label_values(&["domain"])
            .get_sample_count()
    };
    assert_eq!(reads(), 2);

    // The definition is not read again,
    libvirtd.end_domain("two").unwrap();
    let again = libvirt.running_domains().await.unwrap().domains;
    assert_eq!(again, domains[..1]);
    assert_eq!(reads(), 2);

    // except after a new start.
    libvirtd.end_domain("one").unwrap();
    assert_eq!(libvirt.running_domains().await.unwrap().domains, []);
    libvirtd.start_domain("one").unwrap();
    let anew = libvirt.running_domains().await.unwrap().domains;
    assert_eq!(anew.len(), 1);
    assert_ne!(anew[0].id.uuid, domains[0].id.uuid);
    assert_eq!(reads(), 3);
}

#[tokio::test]
async fn libvirtd_started_later_is_connected() {
    let mut libvirtd = Libvirtd::new().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |_| {});
    let (answer, took) = timed(libvirt.capabilities()).await;
    let error = answer.unwrap_err();
    assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("libvirt-sock"), "{error}");
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(metrics.connected.get(), 0);

    libvirtd.restart().unwrap();
    let mut connection = libvirt.connection();
    until(&mut connection, LONG, true).await;
    assert!(libvirt.versions().await.is_ok());
    // The first connection does not count as a reconnect.
    assert_eq!(metrics.reconnects.get(), 0);
    assert_eq!(metrics.connected.get(), 1);
}

#[tokio::test]
async fn killed_libvirtd_is_reconnected_after_restart() {
    let mut libvirtd = Libvirtd::start().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |_| {});
    let mut connection = libvirt.connection();
    let first = until(&mut connection, LONG, true).await;

    for round in 1..=2 {
        libvirtd.kill().unwrap();
        until(&mut connection, LONG, false).await;
        assert_eq!(metrics.connected.get(), 0);
        let (answer, took) = timed(libvirt.versions()).await;
        let error = answer.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        assert!(took < AT_ONCE, "{took:?}");

        libvirtd.restart().unwrap();
        let (again, took) = timed(until(&mut connection, LONG, true)).await;
        println!("connected again {took:?} after libvirtd answered");
        assert_ne!(again, first);
        assert_eq!(metrics.reconnects.get(), round);
        assert!(libvirt.capabilities().await.is_ok());
    }
}

#[tokio::test]
async fn frozen_libvirtd_delays_no_caller_beyond_its_deadline() {
    const DEADLINE: Duration = Duration::from_millis(500);
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, metrics) = start(&libvirtd.uri(), |config| {
        config.call_deadline = DEADLINE;
        config.open_deadline = DEADLINE / 2;
    });
    let mut connection = libvirt.connection();
    until(&mut connection, LONG, true).await;

    libvirtd.freeze().unwrap();
    // All callers wait concurrently, and the only thread of the runtime stays free.
    let mut ticks = 0;
    let ticking = async {
        let mut tick = interval(Duration::from_millis(10));
        loop {
            tick.tick().await;
            ticks += 1;
        }
    };
    let calls = async {
        tokio::join!(
            timed(libvirt.capabilities()),
            timed(libvirt.versions()),
            timed(libvirt.running_domains()),
        )
    };
    let (one, two, three) = tokio::select! {
        answers = calls => answers,
        () = ticking => unreachable!(),
    };
    for (error, call) in [
        (one.0.unwrap_err(), "capabilities"),
        (two.0.unwrap_err(), "versions"),
        (three.0.unwrap_err(), "running-domains"),
    ] {
        let after = DEADLINE;
        assert_eq!(
            error,
            CallError::Overdue {
                call: call.into(),
                after
            }
        );
    }
    for took in [one.1, two.1, three.1] {
        assert!(took >= DEADLINE && took < AT_ONCE, "{took:?}");
    }
    assert!(ticks > 10, "{ticks}");
    let timeouts = metrics.call_timeouts.with_label_values(&["capabilities"]);
    assert_eq!(timeouts.get(), 1);
    until(&mut connection, LONG, false).await;

    // Calls to another hypervisor are not delayed.
    let (other, _) = start("test:///default", |_| {});
    assert!(other.capabilities().await.is_ok());

    // Only a limited number of late workers is replaced; further calls fail at once.
    eventually(LONG, async || {
        let (answer, took) = timed(libvirt.capabilities()).await;
        let error = answer.unwrap_err();
        ensure!(error.to_string().contains("have not returned"), "{error}");
        ensure!(took < DEADLINE / 2, "{took:?}");
        Ok(())
    })
    .await
    .unwrap();
    let opens = metrics.call_timeouts.with_label_values(&["open"]);
    assert!((1..=4).contains(&opens.get()), "{}", opens.get());

    libvirtd.thaw().unwrap();
    let (_, took) = timed(until(&mut connection, LONG, true)).await;
    println!("connected again {took:?} after it went on");
    eventually(LONG, async || Ok(libvirt.capabilities().await?))
        .await
        .unwrap();
    assert_eq!(metrics.connected.get(), 1);
}

#[tokio::test]
async fn frozen_libvirtd_is_detected_by_keepalive_without_a_call() {
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, _) = start(&libvirtd.uri(), |config| {
        config.keepalive = Keepalive {
            interval: Duration::from_secs(1),
            count: 1,
        };
    });
    let mut connection = libvirt.connection();
    until(&mut connection, LONG, true).await;
    libvirtd.freeze().unwrap();
    let (_, took) = timed(until(&mut connection, LONG, false)).await;
    println!("noticed {took:?} after it froze");
    libvirtd.thaw().unwrap();
    until(&mut connection, LONG, true).await;
}

#[tokio::test]
async fn dropped_connection_ends_its_threads() {
    let libvirtd = Libvirtd::start().unwrap();
    let (libvirt, _) = start(&libvirtd.uri(), |config| {
        config.call_deadline = Duration::from_millis(100);
        config.open_deadline = Duration::from_millis(100);
    });
    let mut connection = libvirt.connection();
    until(&mut connection, LONG, true).await;
    libvirtd.freeze().unwrap();
    for _ in 0..3 {
        assert!(libvirt.capabilities().await.is_err());
    }
    let ((), took) = timed(async { drop(libvirt) }).await;
    assert!(took < AT_ONCE, "{took:?}");
    libvirtd.thaw().unwrap();
    // Each thread holds a sender of this channel, so its end means that all threads have ended.
    let all_ended = async { while connection.changed().await.is_ok() {} };
    timeout(LONG, all_ended).await.unwrap();
}

#[tokio::test]
async fn unreachable_uri_yields_clear_error() {
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let socket = directory.path().join("refused");
    // A socket file without a listener.
    drop(UnixListener::bind(&socket).unwrap());
    let refused = format!("qemu+unix:///system?socket={}", socket.display());
    let absent = directory.path().join("absent");
    let absent = format!("qemu+unix:///system?socket={}", absent.display());
    for (uri, word) in [
        (refused.as_str(), "refused"),
        (absent.as_str(), "No such file"),
        // libvirt passes a scheme without a driver to a remote libvirt; over TCP to an invalid port
        // it reaches none, whatever runs on this machine.
        ("nonsense+tcp://127.0.0.1:1/system", "127.0.0.1:1"),
        ("qemu\0:///", "NUL"),
    ] {
        let (libvirt, metrics) = start(uri, |_| {});
        let error = libvirt.versions().await.unwrap_err();
        assert!(matches!(error, CallError::Unavailable(_)), "{error:?}");
        assert!(error.to_string().contains(word), "{uri:?}: {error}");
        assert_eq!(*libvirt.connection().borrow(), ConnectionState::Down);
        let failed = metrics
            .call_failures
            .with_label_values(&["versions", "unavailable"]);
        assert_eq!(failed.get(), 1);
    }
}
