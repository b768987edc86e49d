//! The contract: what a hypervisor and its guests do, and what comes of it. Each row is asked of
//! the hypervisor in memory and of a real libvirt with real QEMU and Linux guests. Where the two
//! differ, the one in memory is wrong.
//!
//! What only a real one can show (frozen, killed, restarted …) is in `truth_table.rs`; what needs
//! time that passes at once (orders that wait, crashes at every moment) is in `executor.rs`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use rstest::rstest;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};
use virtnode::domain::{DomainState, Job, Reason};
use virtnode::executor::{AskedBy, Executor, OperationId, Options, Order, Record};
use virtnode::hotplug::{Answer, Event, HotplugRequest, Require, SlotKind, Verdict};
use virtnode::hypervisor::{Change, DomainControl, HypervisorError, Notice, Notices, Scope};
use virtnode::journal::Journal;
use virtnode::units::{Bytes, KiB};

use crate::support::backend::{Backend, InMemory, NAME, Real, Witness};
use crate::support::eventually;
use crate::support::fake_domains::{Blocks, Cpus, FakeGuest};
use crate::support::guest::MorePossible;

/// For what has no deadline of its own; only a failing test waits so long.
const LONG: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy)]
enum On {
    Memory,
    Libvirt,
}

/// One thing asked for, and what comes of it.
struct Step {
    request: HotplugRequest,
    verdict: Verdict,
    within: u64,
    says: &'static str,
    proof: &'static [&'static str],
    uses: Option<&'static str>,
    /// How much more the guest has than when it booted, in MiB.
    more: Option<u64>,
}

impl Step {
    /// There must be a verdict within so many seconds.
    fn within(self, within: u64) -> Self {
        Self { within, ..self }
    }

    /// The message or the diagnosis says so.
    fn says(self, says: &'static str) -> Self {
        Self { says, ..self }
    }

    /// There is evidence of these kinds.
    fn by(self, proof: &'static [&'static str]) -> Self {
        Self { proof, ..self }
    }

    /// The guest says itself that it uses these CPUs.
    fn uses(self, cpus: &'static str) -> Self {
        let uses = Some(cpus);
        Self { uses, ..self }
    }

    /// The guest says itself that it has so much more than at boot.
    fn more(self, mib: u64) -> Self {
        let more = Some(mib);
        Self { more, ..self }
    }
}

fn step(request: HotplugRequest, verdict: Verdict) -> Step {
    Step {
        request,
        verdict,
        within: 60,
        says: "",
        proof: &[],
        uses: None,
        more: None,
    }
}

fn vcpus(count: u32, verdict: Verdict) -> Step {
    let online = false;
    step(HotplugRequest::Vcpus { count, online }, verdict)
}

fn onlined(count: u32, verdict: Verdict) -> Step {
    let online = true;
    step(HotplugRequest::Vcpus { count, online }, verdict)
}

fn memory(mib: u64, verdict: Verdict) -> Step {
    let size = Bytes::from_mib(mib).unwrap();
    step(HotplugRequest::Memory { size }, verdict)
}

fn guest(cpus: Cpus, blocks: Blocks) -> FakeGuest {
    FakeGuest {
        cpus,
        blocks,
        ..FakeGuest::default()
    }
}

fn without_agent(cpus: Cpus) -> FakeGuest {
    FakeGuest {
        agent: false,
        ..guest(cpus, Blocks::Onlines)
    }
}

fn with_memory(memory: MorePossible) -> FakeGuest {
    FakeGuest {
        memory,
        ..guest(Cpus::Onlines, Blocks::Onlines)
    }
}

use Verdict::{GuestOffline, GuestRefused, GuestSilent, Infeasible, PartiallyApplied, Verified};

#[rstest]
#[case::onlines_with_an_agent(guest(Cpus::Onlines, Blocks::Onlines), vec![
    vcpus(0, Infeasible).says("at least 1"),
    vcpus(5, Infeasible).says("maximum of 4"),
    memory(513, Infeasible).says("blocks of 2MiB"),
    memory(256, Infeasible).says("booted with"),
    memory(8192, Infeasible).says("maxMemory").uses("0").more(0),
    vcpus(3, Verified).by(&["guest-agent", "acpi-ost", "hypervisor-call"]).uses("0-2"),
    vcpus(3, Verified).by(&["guest-agent"]),
    vcpus(1, Verified).by(&["guest-agent"]).uses("0"),
    memory(1024, Verified).by(&["virtio-mem", "balloon-stats"]).more(512),
    memory(512, Verified).by(&["virtio-mem"]).more(0),
])]
#[case::onlines_without_an_agent(without_agent(Cpus::Onlines), vec![
    vcpus(3, Verified).by(&["vcpu-time", "acpi-ost"]).uses("0-2"),
    vcpus(2, Verified).by(&["acpi-ost"]).uses("0-1"),
])]
#[case::leaves_offline_with_an_agent(guest(Cpus::LeavesOffline, Blocks::LeavesOffline), vec![
    vcpus(3, GuestOffline).says("udev").by(&["guest-agent", "acpi-ost"]).uses("0"),
    onlined(3, Verified).uses("0-2"),
    memory(1024, GuestOffline).says("auto_online_blocks").more(0),
])]
#[case::leaves_offline_without_an_agent(without_agent(Cpus::LeavesOffline), vec![
    vcpus(3, GuestOffline).says("have not been running").uses("0"),
])]
#[case::throws_away_with_an_agent(guest(Cpus::ThrowsAway, Blocks::NoDriver), vec![
    vcpus(3, GuestRefused).says("nr_cpus").by(&["guest-agent", "acpi-ost"]).uses("0"),
    memory(1024, GuestSilent).within(10).says("virtio_mem").more(0),
])]
#[case::throws_away_without_an_agent(without_agent(Cpus::ThrowsAway), vec![
    vcpus(3, GuestOffline).says("nr_cpus").by(&["acpi-ost"]).uses("0"),
])]
#[case::still_in_its_firmware(FakeGuest { memory: MorePossible::No, ..without_agent(Cpus::Silent) }, vec![
    vcpus(2, GuestSilent).within(8).says("has booted"),
])]
#[case::keeps_its_cpus(guest(Cpus::KeepsThem, Blocks::Onlines), vec![
    vcpus(3, Verified).uses("0-2"),
    vcpus(2, GuestRefused).says("Offline failed").by(&["acpi-ost"]).uses("0-2"),
])]
#[case::keeps_half_of_its_memory(guest(Cpus::Onlines, Blocks::GivesHalfBack), vec![
    memory(1024, Verified).more(512),
    memory(512, PartiallyApplied).says("cannot move"),
])]
#[case::dimms(with_memory(MorePossible::Dimms), vec![
    memory(641, Infeasible).says("blocks of 2MiB"),
    memory(1024, Verified).by(&["acpi-ost", "balloon-stats"]).more(512),
    memory(512, Infeasible).says("DIMMs stay"),
    memory(1024 + 64, GuestOffline).says("detach the DIMM (alias ua-virtnode-dimm1)").more(512),
])]
#[case::dimms_left_offline(FakeGuest { memory: MorePossible::Dimms, ..guest(Cpus::Onlines, Blocks::LeavesOffline) }, vec![
    memory(1024, GuestOffline).says("auto_online_blocks").more(0),
])]
#[case::no_more_memory(with_memory(MorePossible::No), vec![
    memory(1024, Infeasible).says("no <maxMemory>"),
])]
#[tokio::test]
async fn a_guest_gets_the_verdict_that_is_true(
    #[case] guest: FakeGuest,
    #[case] steps: Vec<Step>,
    #[values(On::Memory, On::Libvirt)] on: On,
) {
    match on {
        On::Memory => row::<InMemory>(guest, steps).await,
        On::Libvirt => row::<Real>(guest, steps).await,
    }
}

async fn row<B: Backend>(like: FakeGuest, steps: Vec<Step>) {
    let backend = B::start().await;
    let node = Node::new(&backend, Options::default());
    let guest = backend.guest(&like).await;
    let boot = (like.cpus != Cpus::Silent).then(|| guest.total());
    for Step {
        request,
        verdict,
        within,
        says,
        proof,
        uses,
        more,
    } in steps
    {
        let record = node.ask(request, within).await;
        assert_eq!(record.verdict, Some(verdict), "{record:#?}");
        let text = format!("{:?} {:?}", record.message, record.diagnosis);
        assert!(text.contains(says), "no '{says}' in {text}");
        let sources: Vec<_> = record.evidence.iter().map(|e| e.source.as_str()).collect();
        for source in proof {
            assert!(sources.contains(source), "no {source} in {record:#?}");
        }
        let called = sources.contains(&"hypervisor-call");
        assert!(!called || verdict != Infeasible, "{record:#?}");
        if let Some(cpus) = uses {
            guest.uses(cpus).await;
            guest.keeps().await;
        }
        if let (Some(more), Some(boot)) = (more, boot) {
            let (least, most) = (more - more / 16, more + 20);
            let at_least = boot.saturating_add(Bytes::from_mib(least).unwrap());
            let at_most = boot.saturating_add(Bytes::from_mib(most).unwrap());
            // It says so a moment later.
            eventually(LONG, async || {
                let total = guest.total();
                ensure!(total >= at_least && total <= at_most, "{boot} → {total}");
                Ok(())
            })
            .await
            .unwrap();
        }
    }
}

/// A node: an executor on a backend.
struct Node<C> {
    executor: Arc<Executor<C>>,
    _state: TempDir,
}

impl<C: DomainControl> Node<C> {
    fn new<B: Backend<Control = C>>(backend: &B, options: Options) -> Self {
        let state = TempDir::new().unwrap();
        let journal = Journal::open(state.path()).unwrap();
        let control = Arc::clone(backend.control());
        Self {
            executor: Executor::start(control, journal, options, ()).unwrap(),
            _state: state,
        }
    }

    async fn submit(&self, request: HotplugRequest, within: u64, require: Require) -> OperationId {
        let order = Order {
            domain: NAME.parse().unwrap(),
            request,
            require,
            timeout: Duration::from_secs(within),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        self.executor.submit(order).await.unwrap()
    }

    async fn becomes(&self, id: &OperationId, wanted: impl Fn(&Record) -> bool) -> Record {
        let mut records = self.executor.watch(id).unwrap();
        let record = timeout(LONG, records.wait_for(|record| wanted(record))).await;
        record.unwrap().unwrap().clone()
    }

    async fn ask(&self, request: HotplugRequest, within: u64) -> Record {
        let id = self.submit(request, within, Require::Online).await;
        self.becomes(&id, Record::is_done).await
    }
}

#[rstest]
#[tokio::test]
async fn a_job_holds_changes_and_is_named(#[values(On::Memory, On::Libvirt)] on: On) {
    match on {
        On::Memory => job::<InMemory>().await,
        On::Libvirt => job::<Real>().await,
    }
}

async fn job<B: Backend>() {
    let backend = B::start().await;
    let node = Node::new(&backend, Options::default());
    let guest = backend.guest(&guest(Cpus::Onlines, Blocks::Onlines)).await;
    let control = backend.control();
    let id = control.find_domain(NAME).await.unwrap();
    assert_eq!(control.domain(&id).await.unwrap().job, None);

    backend.begins_job().await;
    let held = control.domain(&id).await.unwrap();
    assert_eq!((held.job, held.reason), (Some(Job::Save), Some(Reason::Save)));
    // What can never be done is said at once all the same.
    let limit = node.ask(vcpus(5, Infeasible).request, 60).await;
    assert_eq!(limit.verdict, Some(Infeasible), "{limit:#?}");
    let began = Instant::now();
    let busy = node.ask(vcpus(2, Verdict::Busy).request, 4).await;
    assert_eq!(busy.verdict, Some(Verdict::Busy), "{busy:#?}");
    let message = busy.message.unwrap();
    assert!(
        message.contains("a save of the domain to a file")
            && message.contains("nothing was changed"),
        "{message}"
    );
    assert!(began.elapsed() >= Duration::from_secs(4));

    // One that waits goes on when the job is over.
    let waits = node
        .submit(vcpus(2, Verified).request, 100, Require::Online)
        .await;
    node.becomes(&waits, |record| {
        let awaiting = record.awaiting.as_ref();
        awaiting.is_some_and(|awaiting| awaiting.what.contains("a save"))
    })
    .await;
    backend.ends_job().await;
    let record = node.becomes(&waits, Record::is_done).await;
    assert_eq!(record.verdict, Some(Verified), "{record:#?}");
    guest.uses("0-1").await;
}

#[rstest]
#[tokio::test]
async fn qemu_is_asked_past_libvirt_only_where_that_is_wanted(
    #[values(On::Memory, On::Libvirt)] on: On,
) {
    match on {
        On::Memory => deep::<InMemory>().await,
        On::Libvirt => deep::<Real>().await,
    }
}

async fn deep<B: Backend>() {
    let backend = B::start().await;
    let guest = backend.guest(&without_agent(Cpus::LeavesOffline)).await;
    let acknowledged = async |options, count| {
        let node = Node::new(&backend, options);
        let request = vcpus(count, Verified).request;
        let id = node.submit(request, 60, Require::Acknowledged).await;
        let record = node.becomes(&id, Record::is_done).await;
        assert_eq!(record.verdict, Some(Verified), "{record:#?}");
    };
    acknowledged(Options::default(), 2).await;
    assert!(!guest.is_tainted());
    let options = Options {
        deep_verify: true,
        ..Options::default()
    };
    acknowledged(options, 3).await;
    assert!(guest.is_tainted());
    let control = backend.control();
    let id = control.find_domain(NAME).await.unwrap();
    let answers = control.acpi_answers(&id).await.unwrap();
    let mut added: Vec<_> = answers
        .iter()
        .filter(|ost| ost.kind == SlotKind::Cpu && ost.answer() == Some(Answer::Added))
        .map(|ost| ost.slot)
        .collect();
    added.sort_unstable();
    assert_eq!(added, [1, 2]);
}

#[rstest]
#[tokio::test]
async fn calls_and_events_are_what_they_are(#[values(On::Memory, On::Libvirt)] on: On) {
    match on {
        On::Memory => calls::<InMemory>().await,
        On::Libvirt => calls::<Real>().await,
    }
}

async fn calls<B: Backend>() {
    let backend = B::start().await;
    let control = Arc::clone(backend.control());
    for nobody in [
        "nobody",
        "a '/..\" <&>",
        "00000000-0000-4000-8000-00000000ffff",
    ] {
        let error = control.find_domain(nobody).await.unwrap_err();
        assert_eq!(error.code(), "domain-not-found", "{error}");
    }
    let like = guest(Cpus::LeavesOffline, Blocks::Onlines);
    let guest = backend.guest(&like).await;
    let id = control.find_domain(NAME).await.unwrap();
    assert_eq!(control.find_domain(&id.uuid).await.unwrap(), id);
    let mut notices = control.notices();

    // vCPUs up: the call comes back, and the guest answers.
    control.set_vcpus(&id, 3, Scope::Live).await.unwrap();
    for slot in [1, 2] {
        hears(&mut notices, |event| {
            matches!(event, Event::Ost(ost) if ost.kind == SlotKind::Cpu && ost.slot == slot
                && ost.answer() == Some(Answer::Added))
        })
        .await;
    }
    let said = control.guest_vcpus(&id).await.unwrap();
    assert_eq!((said.vcpus.len(), said.online.len()), (3, 1));
    control
        .set_guest_vcpus(&id, &"1-2".parse().unwrap(), true)
        .await
        .unwrap();
    guest.uses("0-2").await;
    let error = control.set_vcpus(&id, 5, Scope::Live).await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::Failed { number: 8, .. }),
        "{error:?}"
    );

    // Down: QEMU lets it go, libvirt does not notice in software emulation, and agrees when it
    // is asked again.
    let unplugged = control.set_vcpus(&id, 2, Scope::Live).await;
    hears(&mut notices, |event| {
        matches!(event, Event::Ost(ost) if ost.slot == 2 && ost.answer() == Some(Answer::Gone))
    })
    .await;
    if let Err(error) = unplugged {
        assert_eq!(error.code(), "unplug-pending", "{error}");
        control.set_vcpus(&id, 2, Scope::Live).await.unwrap();
    }
    assert_eq!(
        control.domain_stats(&id).await.unwrap().stats.vcpus.len(),
        2
    );

    // Memory: the driver takes it.
    let half = KiB::new(512 * 1024).unwrap();
    control
        .resize_virtio_mem(&id, "ua-mem0", half)
        .await
        .unwrap();
    hears(&mut notices, |event| {
        matches!(event, Event::MemorySize { device, size } if device == "ua-mem0" && *size == half.into())
    })
    .await;
    // A DIMM in and out.
    let dimm = |kib: u64| {
        format!(
            "<memory model='dimm'><target><size unit='KiB'>{kib}</size><node>0</node></target>\
             <alias name='ua-dimm'/></memory>"
        )
    };
    let error = control
        .attach_device(&id, &dimm(129 * 1024), Scope::Live)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("0x200000"), "{error}");
    control
        .attach_device(&id, &dimm(128 * 1024), Scope::Live)
        .await
        .unwrap();
    hears(&mut notices, |event| {
        matches!(event, Event::Ost(ost) if ost.kind == SlotKind::Dimm
            && ost.device.as_deref() == Some("ua-dimm") && ost.answer() == Some(Answer::Added))
    })
    .await;
    control
        .detach_device(&id, "ua-dimm", Scope::Live)
        .await
        .unwrap();
    hears(&mut notices, |event| {
        matches!(event, Event::DeviceDeleted { device: Some(device), .. } if device == "ua-dimm")
    })
    .await;
    let error = control
        .detach_device(&id, "ua-none", Scope::Live)
        .await
        .unwrap_err();
    assert!(matches!(error, HypervisorError::Failed { .. }), "{error:?}");

    // Held, and the end.
    guest.pause(true);
    let held = control.domain(&id).await.unwrap();
    assert_eq!((held.state, held.reason), (DomainState::Paused, Some(Reason::User)));
    guest.pause(false);
    let held = control.domain(&id).await.unwrap();
    assert_eq!((held.state, held.reason), (DomainState::Running, None));
    guest.destroy();
    hears(&mut notices, |event| {
        *event == Event::Stopped("destroyed".to_owned())
    })
    .await;
    let error = control.domain(&id).await.unwrap_err();
    assert_eq!(error.code(), "domain-not-found", "{error}");
}

/// Waits for an event that is as wanted.
async fn hears(notices: &mut Notices, wanted: impl Fn(&Event) -> bool) {
    let heard = timeout(LONG, async {
        loop {
            match notices.next().await {
                Some(Notice::Change {
                    change: Change::Event(event),
                    ..
                }) if wanted(&event) => return,
                Some(_) => {}
                None => panic!("no more notices"),
            }
        }
    });
    heard.await.unwrap();
}
