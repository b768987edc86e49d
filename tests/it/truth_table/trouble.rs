//! Faults during an operation, and many operations at once.

use std::thread;

use nix::sys::signal::Signal;

use super::*;
use crate::support::eventually;
use crate::support::nbd::FailingDisk;

#[tokio::test]
async fn domain_destroyed_during_operation_is_not_running() {
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
async fn guest_reset_during_operation_boots_with_its_vcpus() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=offline")).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.libvirtd.virsh(&["reset", "guest"]).unwrap();
    // The guest boots with all plugged vCPUs.
    is(&node.ends(&id).await, Verdict::Verified);
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
}

#[tokio::test]
async fn libvirtd_frozen_during_operation_only_delays_verdict() {
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
async fn restart_of_virtnode_and_libvirtd_repeats_no_call() {
    let mut node = Node::start().await;
    let config = words("lab.cpus=online lab.after=4");
    // Not dropped here, because `node` is borrowed mutably below: the guest ends with libvirtd.
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

/// A saved domain ends, and continues when it is restored; a crashed emulator ends its guest.
#[tokio::test]
async fn domain_saved_or_crashed_during_operation_is_not_running() {
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
    // The restored guest prints nothing on its console, so its agent is queried.
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
async fn panic_of_the_guests_kernel_is_not_running() {
    let node = Node::start().await;
    let config = GuestConfig {
        panic: true,
        ..words("lab.cpus=offline")
    };
    let guest = node.guest(config).await;
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    let panic = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger";
    // The agent ends with the kernel, often before it answers.
    guest.runs("/bin/busybox", &["sh", "-c", panic]).ok();
    let record = node.ends(&id).await;
    is(&record, Verdict::DomainNotRunning);
    says(&record, "crashed");
    assert!(record.finished < Some(record.deadline));
}

#[tokio::test]
async fn guest_shutdown_during_operation_is_not_running() {
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

/// Such a pause does not end by itself: the operation does not wait, and its message has the remedy.
#[tokio::test]
async fn domain_paused_by_io_error_is_rejected_with_remedy() {
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
    // The firmware reads the disk to find a boot loader.
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

/// On x86 each thread can be plugged separately, whatever the topology.
#[tokio::test]
async fn each_thread_of_a_core_is_plugged_by_itself() {
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
async fn concurrent_requests_for_one_domain_run_in_order() {
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

/// One of 20 emulators is stopped. The other domains get their verdicts before it continues, and
/// before any deadline.
#[tokio::test]
async fn stuck_domain_delays_none_of_nineteen_others() {
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
