//! The truth table of verified hotplug, row by row, on real QEMU with real Linux guests: the
//! verdict is what really happened in the guest, whose own word on its console is the witness.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::timeout;
use virtnode::executor::{AskedBy, Executor, OperationId, Options, Order, Record};
use virtnode::hotplug::{HotplugRequest, Require, Verdict};
use virtnode::hypervisor::{Connection, ControlConfig, DomainControl, LibvirtControl};
use virtnode::journal::Journal;
use virtnode::telemetry::Metrics;
use virtnode::units::Bytes;

use crate::support::guest::{Guest, GuestConfig, MorePossible};
use crate::support::libvirtd::Libvirtd;

/// What a guest has in all before anything is added.
const BOOT: &str = "512MiB";
const MORE: &str = "1GiB";
const MIB: u64 = 1024;

/// For what has no deadline of its own; only a failing test waits so long.
const LONG: Duration = Duration::from_secs(120);

/// A node: a libvirtd and an executor on it.
struct Node {
    libvirtd: Libvirtd,
    state: TempDir,
    executor: Arc<Executor<LibvirtControl>>,
}

impl Node {
    async fn start() -> Self {
        let libvirtd = Libvirtd::start().unwrap();
        let state = TempDir::new().unwrap();
        let executor = start(&libvirtd, state.path()).await;
        Self {
            libvirtd,
            state,
            executor,
        }
    }

    /// Ends the executor in the middle of whatever it does, and starts another on its journal.
    async fn start_anew(&mut self) {
        self.executor.stop().await;
        self.executor = start(&self.libvirtd, self.state.path()).await;
    }

    async fn guest(&self, config: GuestConfig<'_>) -> Guest<'_> {
        Guest::start(&self.libvirtd, &config).await.unwrap()
    }

    async fn submit(&self, request: HotplugRequest) -> OperationId {
        self.submit_within(request, Duration::from_secs(30)).await
    }

    async fn submit_within(&self, request: HotplugRequest, timeout: Duration) -> OperationId {
        let order = Order {
            domain: "guest".parse().unwrap(),
            request,
            require: Require::Online,
            timeout,
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        self.executor.submit(order).await.unwrap()
    }

    async fn ends(&self, id: &OperationId) -> Record {
        self.becomes(id, Record::is_done).await
    }

    async fn becomes(&self, id: &OperationId, wanted: impl Fn(&Record) -> bool) -> Record {
        let mut records = self.executor.watch(id).unwrap();
        let record = timeout(LONG, records.wait_for(|record| wanted(record))).await;
        record.unwrap().unwrap().clone()
    }

    /// The record when the guest is seen to have CPUs that it does not use.
    async fn sees_offline(&self, id: &OperationId) {
        self.becomes(id, |record| {
            let awaiting = record.awaiting.as_ref();
            awaiting.is_some_and(|awaiting| awaiting.what.contains("online"))
        })
        .await;
    }

    async fn ask(&self, request: HotplugRequest) -> Record {
        let id = self.submit(request).await;
        self.ends(&id).await
    }

    /// How many vCPUs libvirt counts.
    fn counted(&self) -> u32 {
        let count = self.libvirtd.virsh(&["vcpucount", "guest", "--live"]);
        count.unwrap().trim().parse().unwrap()
    }
}

async fn start(libvirtd: &Libvirtd, state: &Path) -> Arc<Executor<LibvirtControl>> {
    let config = ControlConfig::new(libvirtd.uri());
    let control = Arc::new(LibvirtControl::start(config, &Arc::new(Metrics::new())));
    let mut listening = control.listening();
    let up = listening.wait_for(|state| matches!(state, Connection::Up(_)));
    timeout(LONG, up).await.unwrap().unwrap();
    let journal = Journal::open(state).unwrap();
    Executor::start(control, journal, Options::default(), ()).unwrap()
}

fn vcpus(count: u32) -> HotplugRequest {
    let online = false;
    HotplugRequest::Vcpus { count, online }
}

fn memory(size: &str) -> HotplugRequest {
    let size: Bytes = size.parse().unwrap();
    HotplugRequest::Memory { size }
}

fn words(words: &str) -> GuestConfig<'_> {
    GuestConfig {
        words,
        ..GuestConfig::default()
    }
}

/// The record has this verdict, or the test fails with all of it.
#[track_caller]
fn is(record: &Record, verdict: Verdict) {
    assert_eq!(record.verdict, Some(verdict), "{record:#?}");
}

#[track_caller]
fn says(record: &Record, word: &str) {
    let text = format!("{:?} {:?}", record.message, record.diagnosis);
    assert!(text.contains(word), "no '{word}' in {text}");
}

#[track_caller]
fn has_evidence(record: &Record, source: &str) {
    let has = record
        .evidence
        .iter()
        .any(|piece| piece.source.as_str() == source);
    assert!(has, "no {source} in {:#?}", record.evidence);
}

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
    is(&node.ask(vcpus(2)).await, Verdict::DomainNotRunning);
    assert_eq!(node.counted(), 1);
}

#[tokio::test]
async fn refuses_to_give_a_cpu_up() {
    let node = Node::start().await;
    let guest = node.guest(words("lab.cpus=online lab.deadline=3")).await;
    is(&node.ask(vcpus(3)).await, Verdict::Verified);
    guest.says("lab: 3 deadline tasks").await.unwrap();

    let began = Instant::now();
    let record = node.ask(vcpus(2)).await;
    let took = began.elapsed();
    is(&record, Verdict::GuestRefused);
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!(guest.witness().unwrap().online, "0-2");
}

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

#[tokio::test]
async fn destroyed_in_the_middle() {
    let node = Node::start().await;
    let _guest = node.guest(words("lab.cpus=offline")).await;
    let began = Instant::now();
    let id = node.submit(vcpus(3)).await;
    node.sees_offline(&id).await;
    node.libvirtd.virsh(&["destroy", "guest"]).unwrap();
    is(&node.ends(&id).await, Verdict::DomainNotRunning);
    assert!(began.elapsed() < Duration::from_secs(10));
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
async fn still_in_its_firmware() {
    let node = Node::start().await;
    let file = node.libvirtd.directory().join("firmware.xml");
    // There is nothing to boot from.
    let xml = "<domain type='qemu'><name>guest</name><memory unit='MiB'>32</memory>\
               <vcpu current='1'>2</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
               <features><acpi/><apic/></features></domain>";
    std::fs::write(&file, xml).unwrap();
    node.libvirtd
        .virsh(&["create", &file.to_string_lossy()])
        .unwrap();
    let id = node.submit_within(vcpus(2), Duration::from_secs(8)).await;
    is(&node.ends(&id).await, Verdict::GuestSilent);
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
