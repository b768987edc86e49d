//! What becomes of memory.

use super::*;

#[tokio::test]
async fn virtio_mem_with_blocks_onlined_comes_and_goes() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.blocks=online_movable")).await;
    let before = guest.witness().unwrap().total_kib;
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::Verified);
    has_evidence(&record, "virtio-mem");
    has_evidence(&record, "balloon-stats");
    guest
        .sees(|guest| guest.total_kib > before + 500 * MIB)
        .await
        .unwrap();

    let record = node.ask(memory(BOOT)).await;
    is(&record, Verdict::Verified);
    guest
        .sees(|guest| guest.total_kib < before + 20 * MIB)
        .await
        .unwrap();
}

#[tokio::test]
async fn virtio_mem_that_cannot_all_be_given_back() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.blocks=online lab.pin=yes")).await;
    let before = guest.witness().unwrap().total_kib;
    is(&node.ask(memory(MORE)).await, Verdict::Verified);
    guest.says("lab: pinned").await.unwrap();

    let id = node
        .submit_within(memory(BOOT), Duration::from_secs(60))
        .await;
    let record = node.ends(&id).await;
    is(&record, Verdict::PartiallyApplied);
    says(&record, "cannot move");
    let Some(Extent::Memory { memory, .. }) = record.after else {
        panic!("{record:#?}");
    };
    let boot: Bytes = BOOT.parse().unwrap();
    let left = memory.saturating_sub(boot);
    assert!(left > Bytes::ZERO && memory < MORE.parse().unwrap());
    says(&record, &format!("{left} are left"));
    // By the guest's own word it has kept as much.
    let kept = left.get() / 1024;
    guest
        .sees(|guest| guest.total_kib.abs_diff(before + kept) < 20 * MIB)
        .await
        .unwrap();
}

#[tokio::test]
async fn virtio_mem_with_blocks_left_offline() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.blocks=offline")).await;
    let before = guest.witness().unwrap();
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::GuestOffline);
    says(&record, "auto_online_blocks");
    assert_eq!(guest.witness().unwrap(), before);
}

#[tokio::test]
async fn no_virtio_mem_driver() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.virtio_mem=no")).await;
    let before = guest.witness().unwrap();
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::GuestSilent);
    says(&record, "virtio_mem");
    says(&record, "5.8");
    assert_eq!(guest.witness().unwrap(), before);
}

#[tokio::test]
async fn no_virtio_mem_device_and_slots_for_dimms() {
    let node = Node::start().await;
    let config = GuestConfig {
        memory: MorePossible::Dimms,
        ..words("lab.blocks=online")
    };
    let guest = node.guest(config).await;
    let before = guest.witness().unwrap().total_kib;
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::Verified);
    guest
        .sees(|guest| guest.total_kib > before + 480 * MIB)
        .await
        .unwrap();
}

#[tokio::test]
async fn no_maximum_of_memory() {
    let node = Node::start().await;
    let config = GuestConfig {
        memory: MorePossible::No,
        ..GuestConfig::default()
    };
    // What it does is of no matter: it need not even have booted.
    let _guest = Guest::boot(&node.libvirtd, &config).unwrap();
    let record = node.ask(memory(MORE)).await;
    is(&record, Verdict::Infeasible);
    says(&record, "maxMemory");
}
