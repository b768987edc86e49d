//! What comes of operations when their domain goes to another node; here that is another libvirtd
//! on the same machine.

use super::*;
use crate::support::eventually;

/// So slow (1 MiB a second) that it goes on until it is told otherwise.
const SLOWLY: [&str; 2] = ["--bandwidth", "1"];

/// Waits until a migration has begun.
async fn begins(node: &Node) {
    let begun = async || {
        let job = node.libvirtd.virsh(&["domjobinfo", "guest"])?;
        anyhow::ensure!(job.contains("Outgoing migration"), "{job}");
        Ok(())
    };
    eventually(LONG, begun).await.unwrap();
}

/// First it stays after all, then it goes while evidence is awaited, and in the end it comes back
/// while an operation waits for its turn.
#[tokio::test]
async fn migrated_in_the_middle_and_before_its_turn() {
    let (node, there) = (Node::start().await, Node::start().await);
    let guest = node.guest(words("lab.cpus=online lab.virtio_mem=no")).await;
    let others = &there.libvirtd;

    let migration = node.libvirtd.migrate("guest", others, &SLOWLY).unwrap();
    begins(&node).await;
    let id = node.submit_within(vcpus(3), LONG).await;
    node.awaits(&id, "a migration of the domain to another node")
        .await;
    assert_eq!(node.counted(), 1);
    node.libvirtd.virsh(&["domjobabort", "guest"]).unwrap();
    is(&node.ends(&id).await, Verdict::Verified);
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
    migration.ends().await.unwrap_err();

    let id = node.submit_within(memory(MORE), LONG).await;
    node.awaits(&id, "the guest to take memory").await;
    let migration = node.libvirtd.migrate("guest", others, &["--persistent"]);
    let record = node.ends(&id).await;
    is(&record, Verdict::DomainNotRunning);
    says(&record, "during the operation: migrated to another node");
    assert!(record.finished < Some(record.deadline));
    migration.unwrap().ends().await.unwrap();
    // The journal says so too, and asking here again says what is so.
    assert_eq!(node.executor.operation(&id), Some(record));
    is(&node.ask(vcpus(2)).await, Verdict::DomainNotFound);
    // It runs on over there, with what it has taken.
    let record = there.ask(vcpus(3)).await;
    is(&record, Verdict::Verified);
    // By its agent, or by vCPU time where that is not connected again yet.
    says(&record, "3 vCPUs plugged already, all 3 ");

    let migration = others.migrate("guest", &node.libvirtd, &SLOWLY).unwrap();
    begins(&there).await;
    let id = there.submit_within(vcpus(4), LONG).await;
    there
        .awaits(&id, "a migration of the domain to another node")
        .await;
    // What is said of its speed before it has begun in earnest is forgotten.
    let faster = async || {
        others.virsh(&["migrate-setspeed", "guest", "4096"]).ok();
        let record = there.executor.operation(&id).unwrap();
        anyhow::ensure!(record.is_done(), "{record:#?}");
        Ok(record)
    };
    let record = eventually(LONG, faster).await.unwrap();
    is(&record, Verdict::DomainNotRunning);
    // Whether it was seen to go, or seen to be gone: its definition is still here.
    says(&record, " to another node");
    migration.ends().await.unwrap();
    assert_eq!(node.counted(), 3);
}
