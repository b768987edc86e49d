//! The executor and its journal on an in-memory backend, in simulated time.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tempfile::TempDir;
use tokio::time::Instant;
use virtnode::domain::{Job, PauseReason};
use virtnode::executor::{
    AskedBy, Executor, OperationId, Options, Order, Record, State, SubmitError,
};
use virtnode::hotplug::{HotplugRequest, Require, Verdict};
use virtnode::hypervisor::CallError;
use virtnode::journal::Journal;
use virtnode::units::Bytes;

use crate::support::eventually;
use crate::support::fake_domains::{Blocks, Calls, Cpus, FakeControl, FakeGuest};

struct Node {
    control: Arc<FakeControl>,
    executor: Arc<Executor<FakeControl>>,
    state: TempDir,
}

impl Node {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let (control, state) = (FakeControl::new(), TempDir::new().unwrap());
        let executor = start(&control, state.path(), options);
        Self {
            control,
            executor,
            state,
        }
    }

    /// Drops the executor and starts another on the same journal.
    async fn restart(&mut self) {
        self.executor.stop().await;
        self.executor = start(&self.control, self.state.path(), Options::default());
    }

    async fn ask(&self, order: Order) -> Record {
        let id = self.executor.submit(order).await.unwrap();
        self.ends(&id).await
    }

    /// Waits for the verdict and returns the record.
    async fn ends(&self, id: &OperationId) -> Record {
        self.becomes(id, Record::is_done).await
    }

    async fn becomes(&self, id: &OperationId, wanted: impl Fn(&Record) -> bool) -> Record {
        let mut records = self.executor.watch(id).unwrap();
        records
            .wait_for(|record| wanted(record))
            .await
            .unwrap()
            .clone()
    }
}

fn start(control: &Arc<FakeControl>, state: &Path, options: Options) -> Arc<Executor<FakeControl>> {
    let journal = Journal::open(state).unwrap();
    Executor::start(Arc::clone(control), journal, options, ()).unwrap()
}

fn order(domain: &str, request: HotplugRequest) -> Order {
    Order {
        domain: domain.parse().unwrap(),
        request,
        require: Require::Online,
        persistent: false,
        timeout: Duration::from_secs(60),
        idempotency_key: None,
        asked_by: AskedBy::Local { uid: 1000 },
    }
}

fn vcpus(domain: &str, count: u32) -> Order {
    let online = false;
    order(domain, HotplugRequest::Vcpus { count, online })
}

fn memory(domain: &str, mib: u64) -> Order {
    let size = Bytes::from_mib(mib).unwrap();
    order(domain, HotplugRequest::Memory { size, force: false })
}

fn guest(cpus: Cpus, agent: bool) -> FakeGuest {
    FakeGuest {
        cpus,
        agent,
        ..FakeGuest::default()
    }
}

#[tokio::test(start_paused = true)]
async fn guest_behavior_determines_the_verdict() {
    let node = Node::new();
    for (cpus, agent, verdict) in [
        (Cpus::Onlines, true, Verdict::Verified),
        (Cpus::Onlines, false, Verdict::Verified),
        (Cpus::LeavesOffline, true, Verdict::GuestOffline),
        (Cpus::LeavesOffline, false, Verdict::GuestOffline),
        (Cpus::ThrowsAway, true, Verdict::GuestRefused),
        (Cpus::ThrowsAway, false, Verdict::GuestOffline),
        (Cpus::Silent, false, Verdict::GuestSilent),
    ] {
        let name = format!("{cpus:?}-{agent}");
        node.control.add(&name, guest(cpus, agent));
        let record = node.ask(vcpus(&name, 3)).await;
        assert_eq!(record.verdict, Some(verdict), "{name}: {record:#?}");
        let used = node.control.online(&name);
        assert_eq!(used == 3, verdict == Verdict::Verified, "{name}");
    }
    for (blocks, verdict) in [
        (Blocks::Onlines, Verdict::Verified),
        (Blocks::LeavesOffline, Verdict::GuestOffline),
        (Blocks::NoDriver, Verdict::GuestSilent),
    ] {
        let name = format!("{blocks:?}");
        let behaves = FakeGuest {
            blocks,
            ..FakeGuest::default()
        };
        node.control.add(&name, behaves);
        let record = node.ask(memory(&name, 1024)).await;
        assert_eq!(record.verdict, Some(verdict), "{name}: {record:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn online_request_brings_vcpus_online() {
    let node = Node::new();
    node.control.add("vm", guest(Cpus::LeavesOffline, true));
    let (count, online) = (3, true);
    let record = node
        .ask(order("vm", HotplugRequest::Vcpus { count, online }))
        .await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    assert_eq!(
        node.control.calls(),
        ["set-vcpus vm 3", "set-guest-vcpus vm 1-2"]
    );
}

#[tokio::test(start_paused = true)]
async fn memory_plug_and_unplug_are_verified() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.add(
        "half",
        FakeGuest {
            blocks: Blocks::GivesHalfBack,
            ..FakeGuest::default()
        },
    );
    for name in ["vm", "half"] {
        assert_eq!(
            node.ask(memory(name, 1024)).await.verdict,
            Some(Verdict::Verified)
        );
    }
    let back = node.ask(memory("vm", 512)).await;
    assert_eq!(back.verdict, Some(Verdict::Verified), "{back:#?}");
    let half = node.ask(memory("half", 512)).await;
    assert_eq!(half.verdict, Some(Verdict::PartiallyApplied), "{half:#?}");
    assert!(half.message.unwrap().contains("256MiB"));
}

#[tokio::test(start_paused = true)]
async fn unplug_unnoticed_by_libvirt_is_settled_by_another_call() {
    let node = Node::new();
    let three = FakeGuest {
        vcpus: 3,
        ..FakeGuest::default()
    };
    node.control.add("vm", three);
    let record = node.ask(vcpus("vm", 1)).await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    assert!(
        node.control.calls().len() <= 4,
        "{:?}",
        node.control.calls()
    );
}

#[tokio::test(start_paused = true)]
async fn operations_on_one_domain_run_in_order_of_submission() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    let mut ids = Vec::new();
    for count in [2, 4, 3] {
        ids.push(node.executor.submit(vcpus("vm", count)).await.unwrap());
    }
    let uuid = "00000000-0000-4000-8000-000000000001";
    ids.push(node.executor.submit(vcpus(uuid, 2)).await.unwrap());
    for id in &ids {
        let record = node.ends(id).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
        assert_eq!(record.domain.name, "vm");
    }
    let mut calls = node.control.calls();
    calls.dedup();
    assert_eq!(
        calls,
        [
            "set-vcpus vm 2",
            "set-vcpus vm 4",
            "set-vcpus vm 3",
            "set-vcpus vm 2"
        ]
    );
    let newest_first: Vec<_> = node.executor.operations();
    let newest_first: Vec<_> = newest_first.iter().map(|record| &record.id).collect();
    ids.reverse();
    assert_eq!(newest_first, ids.iter().collect::<Vec<_>>());
}

/// Without KVM, QEMU aborts when more vCPUs were started in its life than its maximum.
#[tokio::test(start_paused = true)]
async fn emulated_domain_is_not_asked_to_plug_vcpus_again() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    for count in [4, 2] {
        let record = node.ask(vcpus("vm", count)).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    }
    let calls = node.control.calls();
    let record = node.ask(vcpus("vm", 3)).await;
    assert_eq!(record.verdict, Some(Verdict::Infeasible), "{record:#?}");
    let message = record.message.unwrap();
    assert!(message.contains("2 of them were unplugged"), "{message}");
    assert_eq!(node.control.calls(), calls);
}

#[tokio::test(start_paused = true)]
async fn stuck_domain_does_not_delay_other_domains() {
    let node = Node::new();
    let stuck = FakeGuest {
        calls: Calls::Hang,
        ..FakeGuest::default()
    };
    node.control.add("stuck", stuck);
    let began = Instant::now();
    let first = node.executor.submit(vcpus("stuck", 2)).await.unwrap();
    let behind = Order {
        timeout: Duration::from_secs(20),
        ..vcpus("stuck", 3)
    };
    let behind = node.executor.submit(behind).await.unwrap();
    let mut others = Vec::new();
    for number in 0..19 {
        let name = format!("vm{number}");
        node.control.add(&name, FakeGuest::default());
        others.push(node.executor.submit(vcpus(&name, 3)).await.unwrap());
    }
    for id in &others {
        let record = node.ends(id).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    }
    assert!(began.elapsed() < Duration::from_secs(2));
    let behind = node.ends(&behind).await;
    assert_eq!(behind.verdict, Some(Verdict::Busy), "{behind:#?}");
    assert!(began.elapsed() < Duration::from_secs(21));
    let first = node.ends(&first).await;
    assert_eq!(first.verdict, Some(Verdict::Pending), "{first:#?}");
    assert!(began.elapsed() < Duration::from_secs(61));
}

#[tokio::test(start_paused = true)]
async fn infeasible_request_ends_without_a_call() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.add("held", FakeGuest::default());
    node.control.pause("held", PauseReason::User);
    for (order, verdict) in [
        (vcpus("vm", 5), Verdict::Infeasible),
        (vcpus("vm", 0), Verdict::Infeasible),
        (memory("vm", 513), Verdict::Infeasible),
        (memory("vm", 9000), Verdict::Infeasible),
        (vcpus("held", 2), Verdict::DomainNotRunning),
        (vcpus("nobody", 2), Verdict::DomainNotFound),
        (vcpus("a '/..\" <&>", 2), Verdict::DomainNotFound),
    ] {
        let record = node.ask(order).await;
        assert_eq!(record.verdict, Some(verdict), "{record:#?}");
        assert!(!record.message.unwrap().is_empty());
    }
    assert!(node.control.calls().is_empty());
}

/// A job pauses a domain for a while; a user or a failed disk pauses it until someone intervenes.
#[tokio::test(start_paused = true)]
async fn paused_domain_is_awaited_only_if_it_resumes_by_itself() {
    let node = Node::new();
    for (by, says) in [
        (PauseReason::User, "paused by a user: resume it first"),
        (PauseReason::IoError, "virsh domblkerror"),
        (PauseReason::FromSnapshot, "revert to a snapshot"),
        (
            PauseReason::Unknown,
            "for a reason that libvirt does not report",
        ),
    ] {
        let name = format!("{by:?}");
        node.control.add(&name, FakeGuest::default());
        node.control.pause(&name, by);
        let began = Instant::now();
        let record = node.ask(vcpus(&name, 3)).await;
        assert_eq!(record.verdict, Some(Verdict::DomainNotRunning));
        let message = record.message.unwrap();
        assert!(message.contains(says), "no '{says}' in {message}");
        // libvirt gets a moment to report the reason.
        let unknown = by == PauseReason::Unknown;
        let at_most = Duration::from_secs(if unknown { 5 } else { 1 });
        assert!(began.elapsed() < at_most, "{message}");
    }
    for by in [
        PauseReason::Save,
        PauseReason::Migration,
        PauseReason::StartingUp,
    ] {
        let name = format!("{by:?}");
        node.control.add(&name, FakeGuest::default());
        node.control.pause(&name, by);
        let held = Order {
            timeout: Duration::from_secs(20),
            ..vcpus(&name, 3)
        };
        let held = node.ask(held).await;
        assert_eq!(held.verdict, Some(Verdict::Busy), "{held:#?}");
        let message = held.message.unwrap();
        let says = format!("paused {by}, to run again: nothing was changed");
        assert!(message.ends_with(&says), "no '{says}' in {message}");
        let waits = node.executor.submit(vcpus(&name, 3)).await.unwrap();
        node.becomes(&waits, |record| {
            let awaiting = record.awaiting.as_ref();
            awaiting.is_some_and(|awaiting| awaiting.what.contains("to run again"))
        })
        .await;
        node.control.resume(&name);
        let record = node.ends(&waits).await;
        assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    }
    assert_eq!(node.control.calls().len(), 3);
}

/// The domain existed at submission, so the verdict names why it ended.
#[tokio::test(start_paused = true)]
async fn domain_migrated_before_its_turn_yields_the_stop_reason() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.does("vm", Some(Job::MigrationOut));
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    let waits = |record: &Record| {
        let awaiting = record.awaiting.as_ref();
        awaiting.is_some_and(|awaiting| awaiting.what.contains("a migration"))
    };
    node.becomes(&id, waits).await;
    node.control.ends("vm", "migrated to another node");
    let record = node.ends(&id).await;
    assert_eq!(record.verdict, Some(Verdict::DomainNotRunning));
    assert_eq!(
        record.message.as_deref(),
        Some("the domain ended before the first call: migrated to another node")
    );
    assert!(node.control.calls().is_empty());
}

#[tokio::test(start_paused = true)]
async fn domain_stopped_or_reset_during_an_operation_yields_a_verdict() {
    let node = Node::new();
    for name in ["destroyed", "reset"] {
        node.control.add(name, guest(Cpus::LeavesOffline, true));
    }
    let began = Instant::now();
    let destroyed = node.executor.submit(vcpus("destroyed", 3)).await.unwrap();
    let reset = node.executor.submit(vcpus("reset", 3)).await.unwrap();
    for id in [&destroyed, &reset] {
        node.becomes(id, |record| {
            let awaiting = record.awaiting.as_ref();
            awaiting.is_some_and(|awaiting| awaiting.what.contains("online"))
        })
        .await;
    }
    node.control.destroy("destroyed");
    node.control.reset("reset");
    let destroyed = node.ends(&destroyed).await;
    assert_eq!(destroyed.verdict, Some(Verdict::DomainNotRunning));
    assert_eq!(
        destroyed.message.as_deref(),
        Some("the domain ended during the operation: destroyed")
    );
    let reset = node.ends(&reset).await;
    assert_eq!(reset.verdict, Some(Verdict::Verified), "{reset:#?}");
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn unavailable_hypervisor_is_awaited_for_one_restart() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.connect(false);
    let began = Instant::now();
    let never = node.ask(vcpus("vm", 2)).await;
    assert_eq!(never.verdict, Some(Verdict::HypervisorUnavailable));
    let message = never.message.unwrap();
    assert!(
        message.contains("it is gone; nothing was changed"),
        "{message}"
    );
    assert!(began.elapsed() < Duration::from_secs(6));
    let id = node.executor.submit(vcpus("vm", 2)).await.unwrap();
    node.becomes(&id, |record| record.awaiting.is_some()).await;
    node.control.connect(true);
    let record = node.ends(&id).await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
}

#[tokio::test(start_paused = true)]
async fn job_started_after_the_call_is_named() {
    let node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.does("vm", Some(Job::Backup));
    // libvirt allows changes during a backup.
    let record = node.ask(vcpus("vm", 2)).await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    node.control.called().await;
    node.control.does("vm", Some(Job::MigrationOut));
    let record = node.ends(&id).await;
    assert_eq!(record.verdict, Some(Verdict::Busy), "{record:#?}");
    let message = record.message.unwrap();
    assert!(
        message.contains("a migration of the domain to another node"),
        "{message}"
    );
}

/// Without QEMU's events and without an agent, only deep_verify finds the guest's answers.
#[tokio::test(start_paused = true)]
async fn acpi_answers_from_qemu_replace_missed_events() {
    for (deep_verify, verdict) in [(false, Verdict::GuestSilent), (true, Verdict::Verified)] {
        let options = Options {
            deep_verify,
            ..Options::default()
        };
        let node = Node::with(options);
        node.control.add("vm", guest(Cpus::LeavesOffline, false));
        node.control.loses_events();
        let order = Order {
            require: Require::Acknowledged,
            ..vcpus("vm", 3)
        };
        let record = node.ask(order).await;
        assert_eq!(record.verdict, Some(verdict), "{record:#?}");
        assert_eq!(node.control.is_tainted("vm"), deep_verify);
    }
}

#[tokio::test(start_paused = true)]
async fn libvirt_error_is_reported_verbatim() {
    let node = Node::new();
    let error = CallError::Failed {
        call: "set-vcpus".into(),
        code: "1".to_owned(),
        text: "it is Monday".to_owned(),
    };
    let fails = FakeGuest {
        calls: Calls::Fail(error),
        ..FakeGuest::default()
    };
    node.control.add("vm", fails);
    let record = node.ask(vcpus("vm", 2)).await;
    assert_eq!(
        record.verdict,
        Some(Verdict::HypervisorError),
        "{record:#?}"
    );
    assert_eq!(record.hypervisor_error.as_deref(), Some("it is Monday"));
}

#[tokio::test(start_paused = true)]
async fn call_with_lost_answer_is_repeated_only_if_it_had_no_effect() {
    let node = Node::new();
    for (name, done, verdict, calls) in [
        ("done", true, Verdict::Verified, 1),
        ("never", false, Verdict::HypervisorError, 3),
    ] {
        let breaks = FakeGuest {
            calls: Calls::Break { done },
            ..FakeGuest::default()
        };
        node.control.add(name, breaks);
        let before = node.control.calls().len();
        let record = node.ask(vcpus(name, 3)).await;
        assert_eq!(record.verdict, Some(verdict), "{record:#?}");
        assert_eq!(node.control.calls().len() - before, calls, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn connection_lost_during_a_call_is_reported() {
    let node = Node::new();
    let breaks = FakeGuest {
        calls: Calls::Break { done: true },
        ..FakeGuest::default()
    };
    node.control.add("vm", breaks);
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    let online = eventually(Duration::from_secs(30), async || {
        let online = node.control.online("vm");
        ensure!(online == 3, "{online} online");
        Ok(())
    });
    online.await.unwrap();
    node.control.connect(false);
    let record = node.ends(&id).await;
    assert_eq!(
        record.verdict,
        Some(Verdict::HypervisorUnavailable),
        "{record:#?}"
    );
    // The call had taken effect, which a later observation shows.
    node.control.connect(true);
    let verified = |record: &Record| record.verdict == Some(Verdict::Verified);
    let record = node.becomes(&id, verified).await;
    assert!(record.corrected.is_some());
    assert_eq!(node.control.calls().len(), 1);
}

/// The executor is dropped after various times, and another resumes from its journal.
#[tokio::test(start_paused = true)]
async fn verdict_that_cannot_be_written_is_kept_over_restarts() {
    let mut node = Node::new();
    node.control.add("vm", FakeGuest::default());
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    // As on a full disk, the draft cannot be created.
    let journal = node.state.path().join("operations");
    let draft = journal.join(format!(".{id}.draft"));
    fs::create_dir(&draft).unwrap();
    let first = node.ends(&id).await;
    assert_eq!(first.verdict, Some(Verdict::Infeasible));
    for _ in 0..2 {
        node.restart().await;
        let again = node.executor.operation(&id).unwrap();
        assert_eq!(
            (again.verdict, again.finished),
            (first.verdict, first.finished)
        );
        assert!(node.control.calls().is_empty(), "it is not executed later");
    }
    fs::remove_dir(&draft).unwrap();
    node.restart().await;
    node.restart().await;
    let written = node.executor.operation(&id).unwrap();
    assert_eq!(
        (written.verdict, written.finished),
        (first.verdict, first.finished)
    );
    let files: Vec<_> = fs::read_dir(&journal).unwrap().collect();
    assert_eq!(files.len(), 1, "{files:?}");
}

#[tokio::test(start_paused = true)]
async fn restart_at_any_time_repeats_no_call() {
    for millis in (0..200).step_by(4) {
        let mut node = Node::new();
        node.control.add("vm", FakeGuest::default());
        let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(millis)).await;
        node.restart().await;
        let record = node.ends(&id).await;
        assert_eq!(
            record.verdict,
            Some(Verdict::Verified),
            "after {millis} ms: {record:#?}"
        );
        assert_eq!(node.control.online("vm"), 3);
        // This includes a stop between the journal write and the call, which is then made later.
        assert_eq!(
            node.control.calls(),
            ["set-vcpus vm 3"],
            "after {millis} ms"
        );
        node.restart().await;
        assert_eq!(node.executor.operation(&id), Some(record));
    }
}

#[tokio::test(start_paused = true)]
async fn unfinished_operation_is_observed_after_its_deadline() {
    let mut node = Node::new();
    node.control.add("vm", guest(Cpus::LeavesOffline, true));
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    node.control.called().await;
    node.executor.stop().await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    node.control.brings_online("vm");
    node.restart().await;
    let record = node.ends(&id).await;
    assert_eq!(record.verdict, Some(Verdict::Verified), "{record:#?}");
    assert_eq!(node.control.calls(), ["set-vcpus vm 3"]);
}

#[tokio::test(start_paused = true)]
async fn restart_resumes_following_an_operation_with_a_verdict() {
    let mut node = Node::new();
    for name in ["vm", "changed", "old"] {
        node.control.add(name, guest(Cpus::LeavesOffline, true));
    }
    let mut ids = Vec::new();
    for (name, count) in [("vm", 2), ("vm", 3), ("changed", 3), ("old", 3)] {
        let id = node.executor.submit(vcpus(name, count)).await.unwrap();
        let record = node.ends(&id).await;
        assert_eq!(record.verdict, Some(Verdict::GuestOffline), "{record:#?}");
        ids.push(id);
    }
    node.executor.stop().await;
    for name in ["vm", "changed"] {
        node.control.brings_online(name);
    }
    node.restart().await;
    for id in [&ids[1], &ids[2]] {
        let verified = |record: &Record| record.verdict == Some(Verdict::Verified);
        let record = node.becomes(id, verified).await;
        assert!(record.corrected.is_some(), "{record:#?}");
    }
    // The first operation on "vm" was not its last; no other call was made.
    let first = node.executor.operation(&ids[0]).unwrap();
    assert_eq!(first.verdict, Some(Verdict::GuestOffline));
    assert_eq!(node.control.calls().len(), 4);

    // A restart does not extend the time for following.
    tokio::time::sleep(Options::default().follow).await;
    node.control.brings_online("old");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let old = node.executor.operation(&ids[3]).unwrap();
    assert_eq!(old.verdict, Some(Verdict::GuestOffline));
}

#[tokio::test(start_paused = true)]
async fn operation_overdue_at_restart_is_not_started() {
    let mut node = Node::new();
    node.control.add("vm", FakeGuest::default());
    node.control.connect(false);
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    node.executor.stop().await;
    // The wall clock does not advance here, so the test moves the deadline into the past.
    let file = node.state.path().join(format!("operations/{id}.json"));
    let text = std::fs::read_to_string(&file).unwrap();
    let mut entry: serde_json::Value = serde_json::from_str(&text).unwrap();
    entry["entry"]["record"]["deadline"] = entry["entry"]["record"]["created"].clone();
    std::fs::write(&file, entry.to_string()).unwrap();
    node.control.connect(true);
    node.restart().await;
    let record = node.ends(&id).await;
    assert_eq!(record.verdict, Some(Verdict::HypervisorUnavailable));
    assert!(record.message.unwrap().contains("was not running"));
    assert!(node.control.calls().is_empty());
}

#[tokio::test(start_paused = true)]
async fn equal_idempotency_key_returns_the_same_operation() {
    let mut node = Node::new();
    node.control.add("vm", FakeGuest::default());
    let keyed = |count| Order {
        idempotency_key: Some("once".to_owned()),
        ..vcpus("vm", count)
    };
    let id = node.executor.submit(keyed(3)).await.unwrap();
    assert_eq!(node.executor.submit(keyed(3)).await, Ok(id.clone()));
    let reused = Err(SubmitError::KeyReused(id.clone()));
    assert_eq!(node.executor.submit(keyed(2)).await, reused);
    node.ends(&id).await;
    node.restart().await;
    assert_eq!(node.executor.submit(keyed(3)).await, Ok(id.clone()));
    let other = Order {
        asked_by: AskedBy::Local { uid: 1001 },
        ..keyed(2)
    };
    assert_ne!(node.executor.submit(other).await, Ok(id));
}

#[tokio::test(start_paused = true)]
async fn orders_above_the_limit_are_rejected() {
    let options = Options {
        max_open: 3,
        ..Options::default()
    };
    let node = Node::with(options);
    let stuck = FakeGuest {
        calls: Calls::Hang,
        ..FakeGuest::default()
    };
    node.control.add("vm", stuck);
    for _ in 0..3 {
        node.executor.submit(vcpus("vm", 2)).await.unwrap();
    }
    let refused = node.executor.submit(vcpus("vm", 2)).await;
    assert_eq!(refused, Err(SubmitError::TooMany(3)));
    node.executor.stop().await;
    let refused = node.executor.submit(vcpus("vm", 2)).await;
    assert_eq!(refused, Err(SubmitError::Stopping));
}

#[tokio::test(start_paused = true)]
async fn unreadable_records_are_moved_aside_and_the_oldest_removed() {
    let mut node = Node::new();
    node.executor.stop().await;
    let operations = node.state.path().join("operations");
    let torn = operations.join("00000000000000000001.json");
    std::fs::write(&torn, "{\"version\":1,").unwrap();
    std::fs::write(operations.join("notes.txt"), "not ours").unwrap();
    std::fs::write(operations.join(".00000000000000000001.draft"), "{").unwrap();
    node.restart().await;
    let files = || {
        let files = std::fs::read_dir(&operations).unwrap();
        let name = |file: std::io::Result<std::fs::DirEntry>| {
            file.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<String> = files.map(name).collect();
        names.sort();
        names
    };
    assert_eq!(
        files(),
        ["notes.txt", "unreadable-00000000000000000001.json.0"]
    );
    for _ in 0..1005 {
        node.ask(vcpus("nobody", 2)).await;
    }
    assert_eq!(node.executor.operations().len(), 1000);
    assert_eq!(files().len(), 1002);
}

#[tokio::test(start_paused = true)]
async fn record_names_what_it_awaits_and_keeps_its_format() {
    let node = Node::new();
    node.control.add("vm", guest(Cpus::LeavesOffline, true));
    let id = node.executor.submit(vcpus("vm", 3)).await.unwrap();
    let record = node
        .becomes(&id, |record| {
            record.state == State::Running && record.awaiting.is_some()
        })
        .await;
    let json = serde_json::to_value(&record).unwrap();
    assert_eq!(json["state"], "running");
    assert_eq!(json["askedBy"]["uid"], 1000);
    assert_eq!(json["request"]["vcpus"]["count"], 3);
    assert!(json["awaiting"]["since"].as_str().unwrap().ends_with('Z'));
    let json = serde_json::to_value(node.ends(&id).await).unwrap();
    assert_eq!(json["state"], "done");
    assert_eq!(json["verdict"], "GuestOffline");
    assert_eq!(json["requested"]["vcpus"], 3);
    assert_eq!(json["before"]["online"], 1);
    assert!(!json["diagnosis"]["remedy"].as_str().unwrap().is_empty());
    serde_json::from_value::<Record>(json).unwrap();
}
