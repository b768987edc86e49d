//! The imitated launchers themselves: they let in and keep out whom real ones do, die and return like
//! them, and their guests migrate and take vCPUs.

use std::fs;

use crate::support::guest::Host as _;
use crate::support::launchers::vm::{Vm, disk};
use crate::support::launchers::{Identity, LIBVIRT_SOCK, LauncherConfig, Launchers, QEMU, pod_uid};

const WITHOUT_RIGHTS: [Identity; 3] = [
    Identity { user: 0, group: 0 },
    Identity {
        user: QEMU,
        group: QEMU,
    },
    Identity {
        user: 65534,
        group: 0,
    },
];

#[tokio::test]
async fn user_107_in_group_0_without_capabilities_enters_and_root_does_not() {
    let node = Launchers::new().unwrap();
    let launcher = node.start(&pod_uid(1)).await.unwrap();
    let vm = Vm {
        namespace: "tenant-a",
        memory_mib: 16,
        ..Vm::default()
    };
    launcher.start_paused(&vm).unwrap();

    let broker = Identity {
        user: QEMU,
        group: 0,
    };
    let listed = broker.virsh(&launcher.uri(), &["list", "--name"]).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&listed.stdout).trim(),
        "tenant-a_web"
    );
    // libvirt takes the UUID from the sysinfo.
    let uuid = launcher.virsh(&["domuuid", "tenant-a_web"]).unwrap();
    assert_eq!(uuid.trim(), vm.uuid);
    for identity in WITHOUT_RIGHTS {
        let denied = identity.virsh(&launcher.uri(), &["list"]).unwrap();
        let error = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(!denied.status.success(), "{identity:?}");
        assert!(error.contains("Permission denied"), "{identity:?}: {error}");
    }
}

#[tokio::test]
async fn daemon_of_a_root_launcher_accepts_root_and_refuses_user_107() {
    let node = Launchers::new().unwrap();
    let pod = pod_uid(1);
    let config = LauncherConfig {
        user: 0,
        socket: LIBVIRT_SOCK,
        ..LauncherConfig::new(&pod)
    };
    let launcher = node.start_with(config).await.unwrap();
    let root = Identity { user: 0, group: 0 };
    let listed = root.virsh(&launcher.uri(), &["list", "--name"]).unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let other = Identity {
        user: QEMU,
        group: 0,
    };
    let denied = other.virsh(&launcher.uri(), &["list"]).unwrap();
    assert!(!denied.status.success());
}

#[tokio::test]
async fn daemon_dies_and_returns_while_its_domain_runs() {
    let node = Launchers::new().unwrap();
    let pods: Vec<String> = (1..=2).map(pod_uid).collect();
    let mut launchers = node.start_all(&pods).await.unwrap();
    let (mut launcher, other) = (launchers.remove(0), launchers.remove(0));
    let vm = Vm {
        name: "dies-and-returns",
        memory_mib: 16,
        ..Vm::default()
    };
    launcher.start_paused(&vm).unwrap();

    launcher.kill().unwrap();
    assert!(launcher.socket().exists());
    launcher.virsh(&["list"]).unwrap_err();
    launcher.restart().await.unwrap();
    launcher.terminate().unwrap();
    assert!(!launcher.socket().exists());
    launcher.restart().await.unwrap();
    launcher.freeze().unwrap();
    launcher.thaw().unwrap();
    let state = launcher.virsh(&["domstate", &vm.domain()]).unwrap();
    assert_eq!(state.trim(), "paused");

    let pod = node.pod(&pods[0]);
    // The script and the emulator name the files of this node.
    let processes = || count_processes(&pod.to_string_lossy()) + count_processes(&vm.domain());
    assert!(processes() >= 2);
    launcher.remove().unwrap();
    assert!(!pod.exists());
    assert_eq!(processes(), 0);
    other.virsh(&["list"]).unwrap();
}

#[tokio::test]
async fn guest_migrates_between_launchers_and_takes_a_vcpu() {
    let node = Launchers::new().unwrap();
    let pods: Vec<String> = (1..=2).map(pod_uid).collect();
    let launchers = node.start_all(&pods).await.unwrap();
    let [source, target] = &launchers[..] else {
        panic!("two launchers");
    };
    let vm = Vm {
        words: "lab.cpus=online",
        volumes: &["vol1"],
        ..Vm::default()
    };
    let guest = source.guest(&vm).await.unwrap();
    let domain = vm.domain();
    let volume = disk(source.directory(), "vol2", "vdb").unwrap();
    source.attach(&domain, &volume).unwrap();
    source.detach(&domain, &volume).unwrap();

    source.migrate(&domain, target).unwrap();
    source.virsh(&["domstate", &domain]).unwrap_err();
    target
        .virsh(&["setvcpus", &domain, "2", "--live", "--config"])
        .unwrap();
    guest.sees(|guest| guest.online == "0-1").await.unwrap();
}

/// Returns the number of processes with a text in their command line.
fn count_processes(text: &str) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let commands = processes.map(|process| fs::read(process.path().join("cmdline")));
    let commands = commands.map(Result::unwrap_or_default);
    let has_text = |command: &Vec<u8>| String::from_utf8_lossy(command).contains(text);
    commands.filter(has_text).count()
}
