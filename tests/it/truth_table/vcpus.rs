//! What becomes of vCPUs.

use super::*;
use crate::support::eventually;

#[tokio::test]
async fn onlines_by_itself_with_an_agent_and_lets_them_go_again() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online")).await;

    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::Verified);
    has_evidence(&record, "guest-agent");
    has_evidence(&record, "acpi-ost");
    guest.sees(|guest| guest.online == "0-2").await.unwrap();

    let again = node.ask(vcpus(3)).await;
    is(&again, Verdict::Verified);
    assert!(
        !again
            .evidence
            .iter()
            .any(|piece| piece.source.as_str() == "hypervisor-call")
    );

    for (count, sees) in [(2, "0-1"), (1, "0")] {
        let record = node.ask(vcpus(count)).await;
        is(&record, Verdict::Verified);
        guest.sees(|guest| guest.online == sees).await.unwrap();
        assert_eq!(node.counted(), count);
    }
}

#[tokio::test]
async fn onlines_by_itself_without_an_agent() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online lab.agent=no")).await;
    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::Verified);
    has_evidence(&record, "vcpu-time");
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
}

#[tokio::test]
async fn present_but_offline_with_an_agent_until_it_is_asked_to_online_them() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=offline")).await;
    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::GuestOffline);
    says(&record, "online");
    assert_eq!(guest.witness().unwrap().online, "0");

    let (count, online) = (3, true);
    let record = node.ask(HotplugRequest::Vcpus { count, online }).await;
    is(&record, Verdict::Verified);
    guest.sees(|guest| guest.online == "0-2").await.unwrap();
}

#[tokio::test]
async fn present_but_offline_without_an_agent() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=offline lab.agent=no")).await;
    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::GuestOffline);
    says(&record, "have not been running");
    assert_eq!(guest.witness().unwrap().online, "0");
}

#[tokio::test]
async fn booted_with_nr_cpus_and_an_agent() {
    let node = Node::start().await;
    let guest = node.guest(words("nr_cpus=1 lab.cpus=online")).await;
    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::GuestRefused);
    says(&record, "nr_cpus");
    says(&record, "NR_CPUS");
    assert_eq!(guest.witness().unwrap().present, "0");
}

#[tokio::test]
async fn booted_with_nr_cpus_and_no_agent() {
    let node = Node::start().await;
    let guest = node
        .guest(words("nr_cpus=1 lab.cpus=online lab.agent=no"))
        .await;
    let record = node.ask(vcpus(3)).await;
    is(&record, Verdict::GuestOffline);
    assert_eq!(guest.witness().unwrap().present, "0");
}

#[tokio::test]
async fn paused_and_limits_that_change_nothing() {
    let node = Node::start().await;
    let _guest = node.guest(words("lab.cpus=online")).await;
    for request in [
        vcpus(5),
        vcpus(0),
        memory("513MiB"),
        memory("8GiB"),
        memory("256MiB"),
    ] {
        let record = node.ask(request).await;
        is(&record, Verdict::Infeasible);
    }
    assert_eq!(node.counted(), 1);
    node.libvirtd.virsh(&["suspend", "guest"]).unwrap();
    let record = node.ask(vcpus(2)).await;
    is(&record, Verdict::DomainNotRunning);
    says(&record, "paused by a user");
    assert_eq!(node.counted(), 1);
}

/// The verdict comes with the guest's answer: libvirt waits for 5 s more and then says only that
/// it timed out.
#[tokio::test]
async fn refuses_to_give_a_cpu_up_and_lets_it_go_later() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online lab.deadline=3")).await;
    is(&node.ask(vcpus(3)).await, Verdict::Verified);
    guest.says("lab: 3 deadline tasks").await.unwrap();

    let id = node.submit(vcpus(2)).await;
    let record = node.ends(&id).await;
    is(&record, Verdict::GuestRefused);
    says(&record, "busy");
    let libvirts_word = record.hypervisor_error.as_ref();
    assert_eq!(libvirts_word, None, "before libvirt gave up");
    let refused = last_evidence(&record, "acpi-ost").time;
    let took = record.finished.unwrap().since(refused);
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(guest.witness().unwrap().online, "0-2");

    // Now it could, and somebody else asks it to. libvirt does not notice that it does.
    guest.runs("/bin/busybox", &["killall", "sleep"]).unwrap();
    let asked_again = async || {
        node.libvirtd.virsh(&["setvcpus", "guest", "2"]).ok();
        let sees = guest.witness()?;
        anyhow::ensure!(sees.online == "0-1", "{sees:?}");
        Ok(())
    };
    eventually(LONG, asked_again).await.unwrap();
    let verified = |record: &Record| record.verdict == Some(Verdict::Verified);
    let record = node.becomes(&id, verified).await;
    assert!(record.corrected > record.finished, "{record:#?}");
    assert_eq!(node.counted(), 2);
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
async fn still_in_its_firmware() {
    let node = Node::start().await;
    node.libvirtd.start_firmware("guest", 4).unwrap();
    let id = node.submit_within(vcpus(2), Duration::from_secs(8)).await;
    is(&node.ends(&id).await, Verdict::GuestSilent);
}
