//! What a guest does with its memory, and what cures it: real guests, and the remedies followed as
//! they are printed.

use anyhow::ensure;
use virtnode::hotplug::Diagnosis;

use super::*;
use crate::support::eventually;
use crate::support::guest::Statistics;

fn forced(size: &str) -> HotplugRequest {
    HotplugRequest::Memory {
        size: size.parse().unwrap(),
        force: true,
    }
}

fn diagnosis(record: &Record) -> &Diagnosis {
    let diagnosis = record.diagnosis.as_ref();
    diagnosis.unwrap_or_else(|| panic!("no diagnosis in {record:#?}"))
}

/// Runs a command of a remedy in the guest.
fn runs(guest: &Guest<'_>, command: &str) {
    guest.runs("/bin/busybox", &["sh", "-c", command]).unwrap();
}

/// Returns the command between two texts of a remedy.
fn command<'r>(remedy: &'r str, start: &str, end: &str) -> &'r str {
    let from = remedy.find(start).unwrap_or_else(|| panic!("{remedy}"));
    let command = &remedy[from..];
    &command[..command.find(end).unwrap_or_else(|| panic!("{remedy}"))]
}

/// The live definition has a balloon with this statistics period, or none.
fn has_period(node: &Node, period: Option<u32>) {
    let xml = node.libvirtd.virsh(&["dumpxml", "guest"]).unwrap();
    match period {
        Some(period) => assert!(
            xml.contains(&format!("<stats period='{period}'/>")),
            "{xml}"
        ),
        None => assert!(!xml.contains("<stats period"), "{xml}"),
    }
}

#[tokio::test]
async fn statistics_are_switched_on_for_an_operation_and_put_back() {
    for (statistics, period) in [(Statistics::Off, None), (Statistics::Every(60), Some(60))] {
        let node = Node::start().await;
        let config = GuestConfig {
            statistics,
            ..words("lab.blocks=offline")
        };
        let guest = node.guest(config).await;
        // Less than the period.
        let request = memory(MORE);
        let id = node.submit_within(request, Duration::from_secs(25)).await;
        let record = node.ends(&id).await;
        is(&record, Verdict::GuestOffline);
        has_period(&node, period);
        let info = node.libvirtd.virsh(&["dominfo", "guest"]).unwrap();
        assert!(!info.contains("custom monitor"), "{info}");
        let calls = record.evidence.iter();
        let calls = calls.filter(|piece| piece.source.as_str() == "hypervisor-call");
        assert_eq!(calls.count(), 3, "{record:#?}");

        let remedy = &diagnosis(&record).remedy;
        runs(&guest, command(remedy, "grep -l offline", "; for later"));
        let all = |total: u64| total > 900_000;
        guest.sees(|guest| all(guest.total_kib)).await.unwrap();
        // Another operation has the same verdict as the guest.
        is(&node.ask(memory(MORE)).await, Verdict::Verified);
        has_period(&node, period);
    }
}

#[tokio::test]
async fn balloon_driver_that_the_remedy_loads_proves_the_memory() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.balloon=no lab.blocks=online")).await;
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::Unverifiable);
    let remedy = &diagnosis(&record).remedy;
    assert_eq!(diagnosis(&record).code, "no-source");
    runs(&guest, command(remedy, "modprobe virtio_balloon", ")"));
    let reports = async || {
        let stats = node.libvirtd.virsh(&["dommemstat", "guest"])?;
        ensure!(stats.contains("available "), "{stats}");
        Ok(())
    };
    eventually(LONG, reports).await.unwrap();
    is(&node.ask(memory(MORE)).await, Verdict::Verified);
}

#[tokio::test]
async fn balloon_that_the_remedy_adds_proves_the_memory() {
    let node = Node::start().await;
    let config = GuestConfig {
        statistics: Statistics::NoBalloon,
        persistent: true,
        ..words("lab.blocks=online")
    };
    let _guest = node.guest(config).await;
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::Unverifiable);
    let remedy = &diagnosis(&record).remedy;
    let added = command(remedy, "<memballoon", " for ");
    let replaced = command(remedy, "<memballoon model='none'/>", " in its");
    let virsh = |arguments: &[&str]| node.libvirtd.virsh(arguments).unwrap();
    let xml = virsh(&["dumpxml", "guest", "--inactive"]);
    assert!(xml.contains(replaced), "{xml}");
    let file = node.libvirtd.directory().join("with-balloon.xml");
    std::fs::write(&file, xml.replace(replaced, added)).unwrap();
    virsh(&["define", &file.to_string_lossy()]);
    virsh(&["destroy", "guest"]);
    virsh(&["start", "guest"]);
    let has_agent = async || node.libvirtd.virsh(&["guestvcpus", "guest"]).map(drop);
    eventually(LONG, has_agent).await.unwrap();
    is(&node.ask(memory(MORE)).await, Verdict::Verified);
}

#[tokio::test]
async fn statistics_are_put_back_after_a_restart_in_the_middle() {
    let mut node = Node::start().await;
    let config = GuestConfig {
        statistics: Statistics::Off,
        ..words("lab.blocks=offline")
    };
    // The guest outlives its node's borrowers: it ends with the libvirtd.
    std::mem::forget(Guest::start(&node.libvirtd, &config).await.unwrap());
    let id = node.submit(memory(MORE)).await;
    node.awaits(&id, "online").await;
    has_period(&node, Some(1));
    node.start_anew().await;
    is(&node.ends(&id).await, Verdict::GuestOffline);
    has_period(&node, None);
}

#[tokio::test]
async fn balloon_that_holds_what_was_plugged_has_one_verdict_and_a_remedy() {
    for possible in [MorePossible::VirtioMem, MorePossible::Dimms] {
        let node = Node::start().await;
        let config = GuestConfig {
            memory: possible,
            ..words("lab.blocks=online")
        };
        let guest = node.guest(config).await;
        is(&node.ask(memory(MORE)).await, Verdict::Verified);
        // Of virtio-mem devices libvirt takes no account here.
        let (target, rest) = match possible {
            MorePossible::Dimms => ("512MiB", 440_000),
            _ => ("200MiB", 640_000),
        };
        node.libvirtd
            .virsh(&["setmem", "guest", target, "--live"])
            .unwrap();
        guest.sees(|guest| guest.total_kib < rest).await.unwrap();
        let mut codes = Vec::new();
        for _ in 0..2 {
            let record = node.ask(memory(MORE)).await;
            is(&record, Verdict::GuestOffline);
            codes.push(diagnosis(&record).clone());
        }
        assert!(codes.iter().all(|diagnosis| diagnosis.code == "balloon"));
        let remedy = command(&codes[0].remedy, "setmem", " (KiB");
        let words: Vec<&str> = remedy.split_whitespace().collect();
        node.libvirtd.virsh(&words).unwrap();
        guest.sees(|guest| guest.total_kib > 900_000).await.unwrap();
        is(&node.ask(memory(MORE)).await, Verdict::Verified);
    }
}

#[tokio::test]
async fn guest_that_reserved_memory_at_boot_is_not_held_to_it() {
    let node = Node::start().await;
    let guest = node
        .guest(words("lab.blocks=online crashkernel=256M"))
        .await;
    assert!(guest.witness().unwrap().total_kib < 200_000);
    for _ in 0..2 {
        is(&node.ask(memory(MORE)).await, Verdict::Verified);
    }
    is(&node.ask(memory("1536MiB")).await, Verdict::Verified);
}

#[tokio::test]
async fn shrink_below_what_the_guest_uses_is_refused_and_its_crash_is_told() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.blocks=online")).await;
    is(&node.ask(memory("1536MiB")).await, Verdict::Verified);
    runs(
        &guest,
        "mkdir /big; mount -t tmpfs -o size=2g tmpfs /big; dd if=/dev/zero of=/big/f bs=1M count=900",
    );
    let filled = async || {
        let stats = node.libvirtd.virsh(&["dommemstat", "guest"])?;
        let usable = stats.lines().find_map(|line| line.strip_prefix("usable "));
        let usable: u64 = usable.unwrap_or_default().parse()?;
        ensure!(usable < 500_000, "{stats}");
        Ok(())
    };
    eventually(LONG, filled).await.unwrap();
    let refused = node.ask(memory(BOOT)).await;
    is(&refused, Verdict::Infeasible);
    for word in ["of its total left", "it uses", "ask for", "--force"] {
        says(&refused, word);
    }
    assert_eq!(refused.before, refused.after);

    let record = node.ask(forced(BOOT)).await;
    let code = &diagnosis(&record).code;
    assert!(
        ["guest-reset", "guest-not-reporting"].contains(&code.as_str()),
        "{record:#?}"
    );
    says(&record, "it had used");
}

#[tokio::test]
async fn dimm_that_is_too_large_to_describe_is_told_with_steps_that_work() {
    let node = Node::start().await;
    let config = GuestConfig {
        memory: MorePossible::Dimms,
        ..words("lab.blocks=online")
    };
    let guest = node.guest(config).await;
    // 1/64 of 3.5 GiB are 56 MiB.
    runs(
        &guest,
        "mkdir /big; mount -t tmpfs tmpfs -o size=400m /big; dd if=/dev/zero of=/big/f bs=1M count=335",
    );
    let filled = async || {
        let stats = node.libvirtd.virsh(&["dommemstat", "guest"])?;
        let usable = stats.lines().find_map(|line| line.strip_prefix("usable "));
        let usable: u64 = usable.unwrap_or_default().parse()?;
        ensure!(usable < 54_000, "{stats}");
        Ok(())
    };
    eventually(LONG, filled).await.unwrap();
    let record = node.ask(memory("4GiB")).await;
    let warned = |piece: &&Evidence| {
        piece
            .detail
            .starts_with("warning: the guest's kernel needs")
    };
    assert!(
        record.evidence.iter().any(|piece| warned(&piece)),
        "{record:#?}"
    );
}

#[tokio::test]
async fn change_by_another_client_is_told_with_the_amount_and_accuses_no_guest() {
    let node = Node::start().await;
    let _guest = node
        .guest(words("lab.cpus=offline lab.blocks=offline"))
        .await;
    let id = node.submit(memory("1536MiB")).await;
    node.awaits(&id, "online").await;
    let device = [
        "update-memory-device",
        "guest",
        "--live",
        "--alias",
        "ua-mem0",
    ];
    let other = [&device[..], &["--requested-size", "256MiB"]].concat();
    node.libvirtd.virsh(&other).unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::HypervisorError);
    assert_eq!(diagnosis(&record).code, "changed-by-another-client");
    says(&record, "768MiB");
    assert!(record.finished.unwrap() < record.deadline, "{record:#?}");

    let id = node.submit(vcpus(2)).await;
    node.awaits(&id, "online").await;
    node.libvirtd
        .virsh(&["setvcpus", "guest", "3", "--live"])
        .unwrap();
    let record = node.ends(&id).await;
    is(&record, Verdict::HypervisorError);
    assert_eq!(diagnosis(&record).code, "changed-by-another-client");
    says(&record, "3");
}
