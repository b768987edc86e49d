//! The contract of a hypervisor backend: calls, events and verdicts. Each test runs on the hypervisor
//! in memory, and on a real libvirt with real QEMU and Linux guests. If the two differ, the one in
//! memory is wrong.
//!
//! `truth_table/guests.rs` has the behaviors of guests, on both as well. The rest of the truth table
//! has what only a real hypervisor can show, such as a freeze, a kill or a restart. `executor.rs` has
//! what requires virtual time, such as waiting orders and crashes at any time.

use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};
use virtnode::domain::{DomainState, Job, PauseReason};
use virtnode::executor::{AskedBy, Executor, OperationId, Options, Order, Record};
use virtnode::hotplug::{AcpiAnswer, Action, Event, HotplugRequest, Require, SlotKind, Verdict};
use virtnode::hypervisor::{
    CallError, Change, DomainBackend, DomainRef, LiveDomain, Notice, Notices, ObservationQuery,
};
use virtnode::journal::Journal;
use virtnode::units::KiB;

use crate::support::backend::{Backend, EVERYTHING, InMemory, NAME, PLAIN, Real, Witness};
use crate::support::fake_domains::{Blocks, Cpus, FakeGuest};

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy)]
pub(crate) enum On {
    Memory,
    Libvirt,
}

fn vcpus(count: u32) -> HotplugRequest {
    let online = false;
    HotplugRequest::Vcpus { count, online }
}

pub(crate) fn guest(cpus: Cpus, blocks: Blocks) -> FakeGuest {
    FakeGuest {
        cpus,
        blocks,
        ..FakeGuest::default()
    }
}

pub(crate) fn without_agent(cpus: Cpus) -> FakeGuest {
    FakeGuest {
        agent: false,
        ..guest(cpus, Blocks::Onlines)
    }
}

/// A node: an executor on a backend.
pub(crate) struct Node<C> {
    executor: Arc<Executor<C>>,
    _state: TempDir,
}

impl<C: DomainBackend> Node<C> {
    pub(crate) fn new<B: Backend<Control = C>>(backend: &B, options: Options) -> Self {
        let state = TempDir::new().unwrap();
        let journal = Journal::open(state.path()).unwrap();
        let control = Arc::clone(backend.control());
        Self {
            executor: Executor::start(control, journal, options, ()).unwrap(),
            _state: state,
        }
    }

    pub(crate) async fn submit(
        &self,
        request: HotplugRequest,
        within: u64,
        require: Require,
    ) -> OperationId {
        let order = Order {
            domain: NAME.parse().unwrap(),
            request,
            require,
            persistent: false,
            timeout: Duration::from_secs(within),
            idempotency_key: None,
            asked_by: AskedBy::Local { uid: 0 },
        };
        self.executor.submit(order).await.unwrap()
    }

    pub(crate) async fn becomes(
        &self,
        id: &OperationId,
        wanted: impl Fn(&Record) -> bool,
    ) -> Record {
        let mut records = self.executor.watch(id).unwrap();
        let record = timeout(LONG, records.wait_for(|record| wanted(record))).await;
        record.unwrap().unwrap().clone()
    }

    pub(crate) async fn ask(&self, request: HotplugRequest, within: u64) -> Record {
        let id = self.submit(request, within, Require::Online).await;
        self.becomes(&id, Record::is_done).await
    }
}

#[rstest]
#[tokio::test]
async fn job_delays_changes_and_is_named(#[values(On::Memory, On::Libvirt)] on: On) {
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
    let id = control.find(NAME).await.unwrap();
    assert_eq!(live(control, &id).await.unwrap().job, None);

    backend.begins_job().await;
    let held = live(control, &id).await.unwrap();
    assert_eq!(
        (held.job, held.reason),
        (Some(Job::Save), Some(PauseReason::Save))
    );
    // An infeasible request is rejected at once, job or not.
    let limit = node.ask(vcpus(5), 60).await;
    assert_eq!(limit.verdict, Some(Verdict::Infeasible), "{limit:#?}");
    let began = Instant::now();
    let busy = node.ask(vcpus(2), 4).await;
    assert_eq!(busy.verdict, Some(Verdict::Busy), "{busy:#?}");
    let message = busy.message.unwrap();
    assert!(
        message.contains("a save of the domain to a file")
            && message.contains("nothing was changed"),
        "{message}"
    );
    assert!(began.elapsed() >= Duration::from_secs(4));

    // A waiting operation continues when the job ends.
    let waits = node.submit(vcpus(2), 100, Require::Online).await;
    node.becomes(&waits, |record| {
        let awaiting = record.awaiting.as_ref();
        awaiting.is_some_and(|awaiting| awaiting.what.contains("a save"))
    })
    .await;
    backend.ends_job().await;
    let record = node.becomes(&waits, Record::is_done).await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    guest.uses("0-1").await;
}

#[rstest]
#[tokio::test]
async fn qemu_is_queried_directly_only_with_deep_verify(#[values(On::Memory, On::Libvirt)] on: On) {
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
        let id = node.submit(vcpus(count), 60, Require::Acknowledged).await;
        let record = node.becomes(&id, Record::is_done).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
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
    let id = control.find(NAME).await.unwrap();
    let answers = control.observe(&id, EVERYTHING).await.answers.unwrap();
    let mut added: Vec<_> = answers
        .iter()
        .filter(|ost| ost.kind == SlotKind::Cpu && ost.answer() == Some(AcpiAnswer::Added))
        .map(|ost| ost.slot)
        .collect();
    added.sort_unstable();
    assert_eq!(added, [1, 2]);
}

#[rstest]
#[tokio::test]
async fn calls_and_events_match_their_contract(#[values(On::Memory, On::Libvirt)] on: On) {
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
        let error = control.find(nobody).await.unwrap_err();
        assert_eq!(error.code(), "domain-not-found", "{error}");
    }
    let like = guest(Cpus::LeavesOffline, Blocks::Onlines);
    let guest = backend.guest(&like).await;
    let id = control.find(NAME).await.unwrap();
    assert_eq!(control.find(&id.uuid).await.unwrap(), id);
    let mut notices = control.events();

    // A plug of vCPUs: the call returns, and the guest answers.
    control.apply(&id, &set_vcpus(3)).await.unwrap();
    for slot in [1, 2] {
        hears(&mut notices, |event| {
            matches!(event, Event::Ost(ost) if ost.kind == SlotKind::Cpu && ost.slot == slot
                && ost.answer() == Some(AcpiAnswer::Added))
        })
        .await;
    }
    let query = ObservationQuery {
        agent: Some(LONG),
        ..PLAIN
    };
    let agent = control.observe(&id, query).await.agent.unwrap().unwrap();
    assert_eq!((agent.vcpus.len(), agent.online.len()), (3, 1));
    let ids = "1-2".parse().unwrap();
    control
        .apply(&id, &Action::OnlineVcpus { ids })
        .await
        .unwrap();
    guest.uses("0-2").await;
    let error = control.apply(&id, &set_vcpus(5)).await.unwrap_err();
    assert!(
        matches!(&error, CallError::Failed { code, .. } if code == "8"),
        "{error:?}"
    );

    // An unplug: QEMU releases the vCPU. In software emulation libvirt notices it only at the
    // second call.
    let unplugged = control.apply(&id, &set_vcpus(2)).await;
    hears(&mut notices, |event| {
        matches!(event, Event::Ost(ost) if ost.slot == 2 && ost.answer() == Some(AcpiAnswer::Gone))
    })
    .await;
    if let Err(error) = unplugged {
        assert_eq!(error.code(), "unplug-pending", "{error}");
        control.apply(&id, &set_vcpus(2)).await.unwrap();
    }
    let query = ObservationQuery {
        statistics: true,
        ..PLAIN
    };
    let statistics = control.observe(&id, query).await.statistics.unwrap();
    assert_eq!(statistics.stats.vcpus.len(), 2);
    assert_eq!(control.statistics().await.unwrap().len(), 1);

    // Memory: the guest's driver plugs it.
    let half = KiB::new(512 * 1024).unwrap();
    let resize = Action::ResizeVirtioMem {
        alias: "ua-mem0".to_owned(),
        requested: half,
        persist: false,
    };
    control.apply(&id, &resize).await.unwrap();
    hears(&mut notices, |event| {
        matches!(event, Event::MemorySize { device, size } if device == "ua-mem0" && *size == half.into())
    })
    .await;
    // A DIMM.
    let dimm = |mib: u64| Action::AttachDimm {
        alias: "ua-dimm".to_owned(),
        size: KiB::new(mib * 1024).unwrap(),
        node: Some(0),
        persist: false,
    };
    let error = control.apply(&id, &dimm(129)).await.unwrap_err();
    assert!(error.to_string().contains("0x200000"), "{error}");
    control.apply(&id, &dimm(128)).await.unwrap();
    hears(&mut notices, |event| {
        matches!(event, Event::Ost(ost) if ost.kind == SlotKind::Dimm
            && ost.device.as_deref() == Some("ua-dimm") && ost.answer() == Some(AcpiAnswer::Added))
    })
    .await;

    // Pause, and the end of the domain.
    guest.pause(true);
    let held = live(&control, &id).await.unwrap();
    assert_eq!(
        (held.domain.state, held.reason),
        (DomainState::Paused, Some(PauseReason::User))
    );
    guest.pause(false);
    let held = live(&control, &id).await.unwrap();
    assert_eq!(
        (held.domain.state, held.reason),
        (DomainState::Running, None)
    );
    guest.destroy();
    hears(&mut notices, |event| {
        *event == Event::Stopped("destroyed".to_owned())
    })
    .await;
    let error = live(&control, &id).await.unwrap_err();
    assert_eq!(error.code(), "domain-not-found", "{error}");
}

fn set_vcpus(count: u32) -> Action {
    let persist = false;
    Action::SetVcpus { count, persist }
}

async fn live<C: DomainBackend>(control: &Arc<C>, id: &DomainRef) -> Result<LiveDomain, CallError> {
    control.observe(id, PLAIN).await.live
}

/// Waits for a matching event.
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
