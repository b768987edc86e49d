//! What comes between, and many at once.

use std::thread;

use nix::sys::signal::Signal;

use super::*;
use crate::support::eventually;
use crate::support::nbd::FailingDisk;

#[tokio::test]
async fn destroyed_in_the_middle() {
    let node = Node::start().await;
    let _guest = node.guest(words("lab.cpus=offline")).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.libvirtd.virsh(&["destroy", "guest"]).unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::DomainNotRunning);
    assert!(record.finished < Some(record.deadline));
}

#[tokio::test]
async fn rebooted_in_the_middle() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=offline")).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.libvirtd.virsh(&["reset", "guest"]).unwrap();
    // It boots with all that is plugged.
    is(&node.ends(&id).await, Verdict::Verified);
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
}

#[tokio::test]
async fn libvirtd_stands_still_in_the_middle() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online lab.after=4")).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.libvirtd.freeze().unwrap();
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
    node.libvirtd.thaw().unwrap();
    is(&node.ends(&id).await, Verdict::Verified);
}

#[tokio::test]
async fn virtnode_and_libvirtd_start_anew_in_the_middle() {
    let mut node = Node::start().await;
    let config = words("lab.cpus=online lab.after=4");
    // The guest outlives its node's borrowers: it ends with the libvirtd.
    std::mem::forget(Guest::start(&node.libvirtd, &config).await.unwrap());
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.start_anew().await;
    node.libvirtd.kill().unwrap();
    node.libvirtd.restart().unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::Verified);
    let calls = record
        .evidence
        .iter()
        .filter(|piece| piece.source.as_str() == "hypervisor-call");
    assert_eq!(calls.count(), 1, "{record:#?}");
}

/// A domain that is saved ends, and goes on where it was when it is restored; an emulator that
/// crashes takes its guest with it.
#[tokio::test]
async fn saved_or_crashed_in_the_middle() {
    let node = Node::start().await;
    let _guest = node.guest(words("lab.cpus=offline")).await;
    let file = node.libvirtd.directory().join("home/saved");
    let file = file.to_string_lossy();
    let id = node.submit(vcpus(2)).await;
    node.sees_offline(&id).await;
    node.libvirtd.virsh(&["save", "guest", &file]).unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::DomainNotRunning);
    says(&record, "saved to a file");
    is(&node.ask(vcpus(3)).await, Verdict::DomainNotFound);

    node.libvirtd.virsh(&["restore", &file]).unwrap();
    // The guest says nothing new on its console: its agent is its witness.
    let agent_is_back = async || {
        let vcpus = node.libvirtd.virsh(&["guestvcpus", "guest"])?;
        anyhow::ensure!(vcpus.contains("0-1"), "{vcpus}");
        Ok(())
    };
    eventually(LONG, agent_is_back).await.unwrap();
    assert_eq!(node.counted(), 2);
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    let kill = Signal::SIGKILL;
    node.libvirtd.signal_emulator("guest", kill).unwrap();
    is(&node.ends(&id).await, Verdict::DomainNotRunning);
}

#[tokio::test]
async fn shut_off_by_the_guest_itself_in_the_middle() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=offline")).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    guest.runs("/bin/busybox", &["poweroff", "-f"]).unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::DomainNotRunning);
    says(&record, "shut down");
    assert!(record.finished < Some(record.deadline));
}

/// It cannot go on by itself: nobody waits for that, and the message says what to do.
#[tokio::test]
async fn paused_by_a_disk_that_cannot_be_read() {
    let node = Node::start().await;
    let socket = node.libvirtd.directory().join("disk");
    let disk = FailingDisk::serve(&socket).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>guest</name><memory unit='MiB'>32</memory>\
         <vcpu current='1'>2</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <features><acpi/><apic/></features><devices><disk type='network' device='disk'>\
         <driver name='qemu' type='raw' error_policy='stop' rerror_policy='stop'/>\
         <source protocol='nbd'><host transport='unix' socket='{}'/></source>\
         <target dev='vda' bus='virtio'/><readonly/></disk></devices></domain>",
        socket.display()
    );
    node.libvirtd.create(&xml).unwrap();
    let paused = async || {
        let state = node.libvirtd.virsh(&["domstate", "guest", "--reason"])?;
        anyhow::ensure!(state.contains("I/O error"), "{state}");
        Ok(())
    };
    // Its firmware looks there for something to boot.
    eventually(LONG, paused).await.unwrap();
    let record = node.ask(vcpus(2)).await;
    is(&record, Verdict::DomainNotRunning);
    says(
        &record,
        "paused by an I/O error of one of its disks: see which disk it is",
    );
    assert_eq!(node.counted(), 1);

    disk.repair();
    node.libvirtd.virsh(&["resume", "guest"]).unwrap();
    let accepted = Order {
        require: Require::Accepted,
        ..order("guest", vcpus(2))
    };
    let id = node.order(accepted).await;
    is(&node.ends(&id).await, Verdict::Verified);
}

/// On x86 each thread can be plugged by itself, whatever the topology.
#[tokio::test]
async fn cores_with_two_threads() {
    let node = Node::start().await;
    node.libvirtd.start_firmware("guest", 8).unwrap();
    for count in [2, 5] {
        let accepted = Order {
            require: Require::Accepted,
            ..order("guest", vcpus(count))
        };
        let id = node.order(accepted).await;
        is(&node.ends(&id).await, Verdict::Verified);
        assert_eq!(node.counted(), count);
    }
}

#[tokio::test]
async fn two_requests_for_one_domain_at_once() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online")).await;
    let first = node.submit(vcpus(4)).await;
    let second = node.submit(vcpus(3)).await;
    let (first, second) = (node.ends(&first).await, node.ends(&second).await);
    is(&first, Verdict::Verified);
    is(&second, Verdict::Verified);
    assert!(first.finished <= second.started);
    assert_eq!(first.after, second.before);
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
}

/// One of 20 emulators stands still. The others have their verdicts before it goes on, and before
/// any deadline.
#[tokio::test]
async fn twenty_domains_at_once_with_one_of_them_stuck() {
    const OTHERS: u32 = 19;
    let node = Node::start().await;
    let names: Vec<String> = (0..=OTHERS).map(|number| format!("vm{number}")).collect();
    thread::scope(|scope| {
        for names in names.chunks(5) {
            let libvirtd = &node.libvirtd;
            scope.spawn(move || {
                for name in names {
                    libvirtd.start_firmware(name, 4).unwrap();
                }
            });
        }
    });
    let (stuck, others) = names.split_first().unwrap();
    let ask = async |name: &str| {
        let request = order(name, vcpus(3));
        node.order(Order {
            require: Require::Accepted,
            timeout: LONG,
            ..request
        })
        .await
    };
    node.libvirtd
        .signal_emulator(stuck, Signal::SIGSTOP)
        .unwrap();
    let first = ask(stuck).await;
    let mut ids = Vec::new();
    for name in others {
        ids.push(ask(name).await);
    }
    for id in &ids {
        is(&node.ends(id).await, Verdict::Verified);
    }
    let still = node.executor.operation(&first).unwrap();
    assert!(!still.is_done(), "{still:#?}");
    node.libvirtd
        .signal_emulator(stuck, Signal::SIGCONT)
        .unwrap();
    is(&node.ends(&first).await, Verdict::Verified);
}
