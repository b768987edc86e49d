//! The broker between launchers and clients without rights: `virtnode sockets` as user 107 without
//! capabilities, clients as nobody, and real libvirt behind it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Output;
use std::time::Duration;

use anyhow::ensure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtnode::sockets::procedures::{READ, REMOTE};

use crate::support::daemon::{Daemon, run};
use crate::support::eventually;
use crate::support::guest::Host as _;
use crate::support::launchers::broker::Broker;
use crate::support::launchers::vm::Vm;
use crate::support::launchers::{Identity, Launchers, VIRTQEMUD_SOCK, pod_uid};
use crate::support::relay::Relay;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

const NOBODY: Identity = Identity {
    user: 65534,
    group: 65534,
};

/// Procedures in the list that only virsh sends.
const OF_VIRSH: [u32; 12] = [2, 3, 16, 22, 59, 110, 149, 150, 200, 202, 317, 361];

fn small(name: &str) -> Vm<'_> {
    Vm {
        name,
        memory_mib: 16,
        ..Vm::default()
    }
}

/// Runs virsh as nobody.
fn virsh(uri: &str, arguments: &[&str]) -> Output {
    NOBODY.virsh(uri, arguments).unwrap()
}

fn reads(uri: &str, arguments: &[&str]) -> String {
    let output = virsh(uri, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn nobody_reads_through_the_broker_and_changes_nothing() {
    let node = Launchers::new().unwrap();
    let pods = [pod_uid(1), pod_uid(2)];
    let launchers = node.start_all(&pods).await.unwrap();
    let vm = small("web");
    let domain = vm.domain();
    launchers[0].start_paused(&vm).unwrap();
    let broker = Broker::start(&node, &[]).await.unwrap();
    let uri = broker.uri(&pods[0]).await.unwrap();
    let denied = virsh(&launchers[0].uri(), &["list"]);
    assert!(!denied.status.success(), "nobody needs the broker");

    assert_eq!(reads(&uri, &["list", "--name"]).trim(), domain);
    assert_eq!(reads(&uri, &["domstate", &domain]).trim(), "paused");
    assert!(reads(&uri, &["dumpxml", &domain]).contains("http://kubevirt.io"));
    assert!(reads(&uri, &["domstats", &domain]).contains("vcpu.current=1"));
    assert_eq!(
        reads(&uri, &["vcpucount", &domain, "--live", "--current"]).trim(),
        "1"
    );
    assert!(reads(&uri, &["domcapabilities"]).contains("<domainCapabilities>"));
    let theirs = broker.uri(&pods[1]).await.unwrap();
    assert_eq!(reads(&theirs, &["list", "--name"]).trim(), "");

    let device = node.pods().join("device.xml");
    fs::write(&device, "<memballoon model='none'/>").unwrap();
    let exec = r#"{"execute":"guest-exec","arguments":{"path":"/bin/sh"}}"#;
    for (command, name) in [
        (&["setvcpus", &domain, "2", "--live"][..], "199"),
        (&["setmem", &domain, "8192"], "204"),
        (&["destroy", &domain], "procedure"),
        (&["undefine", &domain], "procedure"),
        (&["resume", &domain], "28"),
        (&["qemu-agent-command", &domain, exec], "0x20008087"),
        (
            &["qemu-monitor-command", &domain, "--hmp", "quit"],
            "0x20008087",
        ),
        (
            &["migrate", "--live", &domain, "--desturi", &theirs],
            "procedure",
        ),
        (
            &["dumpxml", "--security-info", &domain],
            "DOMAIN_GET_XML_DESC",
        ),
        (
            &["domcapabilities", "--emulatorbin", "/bin/true"],
            "DOMAIN_CAPABILITIES",
        ),
        (&["screenshot", &domain, "/dev/null"], "211"),
    ] {
        let before = broker.log().matches("message refused").count();
        let output = virsh(&uri, command);
        assert!(!output.status.success(), "{command:?}");
        // The client sees its connection end when the line is written, or a moment before.
        let line = eventually(LONG, async || {
            let log = broker.log();
            let mut lines = log.lines().filter(|line| line.contains("message refused"));
            let line = lines.nth(before).map(str::to_owned);
            line.ok_or_else(|| anyhow::anyhow!("{command:?} was not refused: {output:?}"))
        });
        let line = line.await.unwrap();
        assert!(line.contains(name), "{command:?}: {line}");
    }
    let live = launchers[0].virsh(&["vcpucount", &domain, "--live", "--current"]);
    assert_eq!(live.unwrap().trim(), "1");
    let state = launchers[0].virsh(&["domstate", &domain]).unwrap();
    assert_eq!(state.trim(), "paused");
}

#[tokio::test]
async fn client_cannot_have_the_daemon_execute_a_command_as_its_transport() {
    let node = Launchers::new().unwrap();
    let pod = pod_uid(1);
    let launcher = node.start(&pod).await.unwrap();
    let broker = Broker::start(&node, &[]).await.unwrap();
    let served = broker.uri(&pod).await.unwrap();
    let proof = launcher.directory().join("common/executed");
    let script = launcher.directory().join("common/script");
    fs::write(
        &script,
        format!("#!/bin/sh\necho yes >{}\n", proof.display()),
    )
    .unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let through = |uri: &str| {
        let (_, socket) = uri.split_once("socket=").unwrap();
        let name = format!("qemu%2Bext://host/session%3Fcommand={}", script.display());
        format!("qemu+unix:///session?name={name}&socket={socket}")
    };
    // libvirt itself does that for whoever may connect.
    let direct = Identity {
        user: 107,
        group: 0,
    };
    direct.virsh(&through(&launcher.uri()), &["list"]).unwrap();
    eventually(LONG, async || Ok(fs::remove_file(&proof)?))
        .await
        .unwrap();

    let output = virsh(&through(&served), &["list"]);
    assert!(!output.status.success());
    eventually(LONG, async || {
        let log = broker.log();
        ensure!(log.contains("CONNECT_OPEN with arguments"), "{log}");
        Ok(())
    })
    .await
    .unwrap();
    assert!(!proof.exists());
}

#[tokio::test]
async fn changes_are_limited_to_vcpus_of_the_running_domain() {
    let node = Launchers::new().unwrap();
    let pod = pod_uid(1);
    let launcher = node.start(&pod).await.unwrap();
    let vm = small("web");
    let domain = vm.domain();
    launcher.start_paused(&vm).unwrap();
    let broker = Broker::start(&node, &["--allow-changes"]).await.unwrap();
    let uri = broker.uri(&pod).await.unwrap();

    reads(&uri, &["setvcpus", &domain, "2", "--live"]);
    for command in [
        &["setvcpus", &domain, "3", "--live", "--config"][..],
        &["setvcpus", &domain, "1", "--guest"],
        &["destroy", &domain],
    ] {
        assert!(!virsh(&uri, command).status.success(), "{command:?}");
    }
    let count = |which: &str| launcher.virsh(&["vcpucount", &domain, which, "--current"]);
    assert_eq!(count("--live").unwrap().trim(), "2");
    assert_eq!(count("--config").unwrap().trim(), "1");
}

#[tokio::test]
async fn sockets_follow_the_launchers_and_links_are_not_served() {
    let node = Launchers::new().unwrap();
    let pods = [pod_uid(1), pod_uid(2)];
    let mut launchers = node.start_all(&pods).await.unwrap();
    let stale = node.pods().with_file_name("served");
    fs::create_dir(&stale).unwrap();
    fs::set_permissions(&stale, fs::Permissions::from_mode(0o777)).unwrap();
    drop(UnixListener::bind(stale.join(format!("{}.sock", pod_uid(9)))).unwrap());
    // A tenant's pod with a link to another's socket.
    let hostile = pod_uid(3);
    let volume = node.volume(&hostile, "libvirt-runtime").unwrap();
    symlink(launchers[0].socket(), volume.join(VIRTQEMUD_SOCK)).unwrap();

    let broker = Broker::start(&node, &[]).await.unwrap();
    let uri = broker.uri(&pods[0]).await.unwrap();
    broker.uri(&pods[1]).await.unwrap();
    eventually(LONG, async || {
        let log = broker.log();
        ensure!(
            log.contains(&hostile) && log.contains("a symbolic link"),
            "{log}"
        );
        Ok(())
    })
    .await
    .unwrap();
    assert!(!broker.socket(&hostile).exists() && !broker.socket(&pod_uid(9)).exists());

    // A client sees the death of the daemon, and its return as a new socket.
    let inode = || fs::metadata(broker.socket(&pods[0])).map(|file| file.ino());
    let before = inode().unwrap();
    launchers[0].kill().unwrap();
    assert!(!virsh(&uri, &["list"]).status.success());
    launchers[0].restart().await.unwrap();
    eventually(LONG, async || {
        ensure!(inode()? != before, "the same socket");
        Ok(())
    })
    .await
    .unwrap();
    reads(&uri, &["list"]);

    let second = launchers.remove(1);
    second.remove().unwrap();
    eventually(LONG, async || {
        ensure!(!broker.socket(&pods[1]).exists(), "served still");
        Ok(())
    })
    .await
    .unwrap();
    kill(
        Pid::from_raw(broker.pid().try_into().unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    eventually(LONG, async || {
        ensure!(
            fs::read_dir(broker.directory())?.count() == 0,
            "sockets left"
        );
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn stopped_or_hostile_launcher_delays_no_other_and_sends_no_long_message() {
    let node = Launchers::new().unwrap();
    let pods = [pod_uid(1), pod_uid(2)];
    let mut launchers = node.start_all(&pods).await.unwrap();
    // It answers each request with a header that announces 2 MiB, and then with zeros.
    let hostile = pod_uid(3);
    let volume = node.volume(&hostile, "libvirt-runtime").unwrap();
    // A socket's address may have 107 bytes.
    let path = launchers[0].directory().join("common/hostile");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    fs::rename(&path, volume.join(VIRTQEMUD_SOCK)).unwrap();
    let answers = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.read_exact(&mut [0; 28]).unwrap();
        let words: [u32; 7] = [2 << 20, REMOTE, 1, 66, 1, 0, 0];
        let header: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        client.write_all(&header).unwrap();
        // The broker closes the connection.
        client.write_all(&vec![0; 4 << 20]).ok();
    });
    let broker = Broker::start(&node, &[]).await.unwrap();
    let uri = broker.uri(&pods[1]).await.unwrap();
    broker.uri(&pods[0]).await.unwrap();
    launchers[0].freeze().unwrap();

    // Connections to the stopped daemon, beyond the maximum.
    let words: [u32; 7] = [28, REMOTE, 1, 66, 0, 0, 0];
    let question: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let waiting: Vec<UnixStream> = (0..9)
        .map(|_| {
            let mut client = UnixStream::connect(broker.socket(&pods[0])).unwrap();
            client.write_all(&question).ok();
            client
        })
        .collect();
    logs(&broker, "too many connections").await;
    reads(&uri, &["list"]);

    broker.uri(&hostile).await.unwrap();
    let mut client = UnixStream::connect(broker.socket(&hostile)).unwrap();
    client.write_all(&question).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).ok();
    assert!(answer.is_empty(), "{answer:?}");
    answers.join().unwrap();
    logs(&broker, "length of 2097152 bytes").await;
    reads(&uri, &["list"]);
    launchers[0].thaw().unwrap();
    drop(waiting);
}

/// Waits until the broker's log contains a text.
async fn logs(broker: &Broker, text: &str) {
    let logged = eventually(LONG, async || {
        let log = broker.log();
        ensure!(log.contains(text), "{log}");
        Ok(())
    });
    logged.await.unwrap();
}

/// The procedures that the daemon sends are those in the list, but for the ones of virsh. Reading
/// the vCPUs of a guest includes its agent.
#[tokio::test]
async fn daemon_sends_the_listed_procedures_and_is_never_refused() {
    let node = Launchers::new().unwrap();
    let pod = pod_uid(1);
    let launcher = node.start(&pod).await.unwrap();
    let vm = Vm::default();
    let _guest = launcher.guest(&vm).await.unwrap();
    let broker = Broker::start(&node, &[]).await.unwrap();
    let uri = broker.uri(&pod).await.unwrap();
    let relay = Relay::before(&uri, launcher.directory().join("common/relay")).unwrap();

    let daemon = Daemon::start(relay.uri(), &["--publish", "none"])
        .await
        .unwrap();
    daemon.ready().await.unwrap();
    let domain = vm.domain();
    // It has one already, so there is nothing to change.
    let command = ["hotplug", "vcpus", &domain, "1"];
    let (code, out, err) = run(&daemon.socket(), &command).unwrap();
    assert_eq!(code, 0, "{out}{err}");
    assert!(
        out.contains("guest-agent") || out.contains("agent"),
        "{out}"
    );

    let read: Vec<u32> = READ
        .iter()
        .filter(|procedure| procedure.program == REMOTE)
        .map(|procedure| procedure.number)
        .collect();
    let sent = relay.procedures();
    let unlisted: Vec<&u32> = sent
        .iter()
        .filter(|number| !read.contains(number))
        .collect();
    assert_eq!(unlisted, [] as [&u32; 0]);
    let unused = read
        .iter()
        .filter(|number| !sent.contains(number) && !OF_VIRSH.contains(number));
    assert_eq!(
        unused.collect::<Vec<_>>(),
        [] as [&u32; 0],
        "sent: {sent:?}"
    );
    assert!(!broker.log().contains("refused"), "{}", broker.log());
}
