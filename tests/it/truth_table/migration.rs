//! Operations on a domain that migrates to another node: a second libvirtd on the same machine.

use super::*;
use crate::support::eventually;

/// Bandwidth of 1 MiB/s, at which a migration does not end by itself.
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

/// First the migration is aborted, then it ends while the operation awaits evidence, and at last the
/// domain migrates back while an operation waits for its turn.
#[tokio::test]
async fn migration_during_or_before_an_operation_decides_its_verdict() {
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
    // The journal has the same record, and a new request here does not find the domain.
    assert_eq!(node.executor.operation(&id), Some(record));
    is(&node.ask(vcpus(2)).await, Verdict::DomainNotFound);
    // The domain runs on the other node with its vCPUs.
    let record = there.ask(vcpus(3)).await;
    is(&record, Verdict::Verified);
    // By its agent, or by vCPU time if the agent is not connected again yet.
    says(&record, "3 vCPUs plugged already, all 3 ");

    let migration = others.migrate("guest", &node.libvirtd, &SLOWLY).unwrap();
    begins(&there).await;
    let id = there.submit_within(vcpus(4), LONG).await;
    there
        .awaits(&id, "a migration of the domain to another node")
        .await;
    // libvirt drops a speed that is set before the migration has really started.
    let faster = async || {
        others.virsh(&["migrate-setspeed", "guest", "4096"]).ok();
        let record = there.executor.operation(&id).unwrap();
        anyhow::ensure!(record.is_done(), "{record:#?}");
        Ok(record)
    };
    let record = eventually(LONG, faster).await.unwrap();
    is(&record, Verdict::DomainNotRunning);
    // Observed during or after the migration: the definition still exists here.
    says(&record, " to another node");
    migration.ends().await.unwrap();
    assert_eq!(node.counted(), 3);
}
