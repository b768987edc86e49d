//! The lab itself: a guest does what its words say, and says what it sees.

use crate::support::guest::{Guest, GuestConfig};
use crate::support::libvirtd::Libvirtd;

const MIB: u64 = 1024;

#[tokio::test]
async fn a_guest_does_as_it_is_told() {
    let libvirtd = Libvirtd::start().unwrap();
    let takes = GuestConfig {
        name: "takes",
        words: "lab.cpus=online lab.blocks=online",
        ..GuestConfig::default()
    };
    let ignores = GuestConfig {
        name: "ignores",
        words: "nr_cpus=1 lab.virtio_mem=no lab.agent=no",
        ..GuestConfig::default()
    };
    let (takes, ignores) = tokio::join!(
        Guest::start(&libvirtd, &takes),
        Guest::start(&libvirtd, &ignores)
    );
    let (takes, ignores) = (takes.unwrap(), ignores.unwrap());
    let before = [takes.witness().unwrap(), ignores.witness().unwrap()];

    for guest in ["takes", "ignores"] {
        libvirtd.virsh(&["setvcpus", guest, "3"]).unwrap();
        let resize = ["--alias", "ua-mem0", "--requested-size", "512MiB"];
        let resize = [&["update-memory-device", guest][..], &resize].concat();
        libvirtd.virsh(&resize).unwrap();
    }
    let grown = takes
        .sees(|sees| sees.online == "0-2" && sees.total_kib > before[0].total_kib + 500 * MIB)
        .await
        .unwrap();
    assert_eq!(grown.present, "0-2");
    assert_eq!(ignores.witness().unwrap(), before[1]);
    let vcpus = libvirtd.virsh(&["guestvcpus", "takes"]).unwrap();
    assert!(vcpus.contains("0-2"), "{vcpus}");
    libvirtd.virsh(&["guestvcpus", "ignores"]).unwrap_err();
}
