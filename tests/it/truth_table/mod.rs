//! The truth table of verified hotplug on real QEMU with real Linux guests. Each verdict is compared
//! with what the guest itself reports on its console.
//!
//! The rows of `guests.rs` also run on the hypervisor in memory, which keeps it correct. `killed.rs`
//! kills virtnode with -9 at each step. No row has a number of vCPUs that is not a multiple of the
//! granularity: x86, the architecture of the lab's guests, plugs single threads whatever the topology
//! (libvirt: `qemuValidateDefGetVcpuHotplugGranularity`). A test of the core covers it with the XML
//! of a pseries guest.

mod guests;
mod memory;
mod migration;
mod trouble;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;
use virtnode::daemon::Metrics;
use virtnode::executor::{AskedBy, Executor, OperationId, Options, Order, Record};
use virtnode::hotplug::{Amount, Evidence, HotplugRequest, Require, Verdict};
use virtnode::hypervisor::{ConnectionState, DomainBackend, Libvirt, LibvirtConfig};
use virtnode::journal::Journal;
use virtnode::units::Bytes;

use crate::support::guest::{Guest, GuestConfig, MorePossible};
use crate::support::libvirtd::Libvirtd;

/// Memory of a guest at boot.
const BOOT: &str = "512MiB";
const MORE: &str = "1GiB";

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(120);

/// A node: a libvirtd and an executor on it.
struct Node {
    libvirtd: Libvirtd,
    state: TempDir,
    executor: Arc<Executor<Libvirt>>,
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

    /// Aborts the executor, and starts another one on its journal.
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
        self.order(Order {
            timeout,
            ..order("guest", request)
        })
        .await
    }

    async fn order(&self, order: Order) -> OperationId {
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

    /// Waits until the executor observes CPUs that the guest leaves offline.
    async fn sees_offline(&self, id: &OperationId) {
        self.awaits(id, "online").await;
    }

    /// Waits until an operation awaits this.
    async fn awaits(&self, id: &OperationId, what: &str) {
        let awaited = |record: &Record| {
            let awaiting = record.awaiting.as_ref();
            record.is_done() || awaiting.is_some_and(|awaiting| awaiting.what.contains(what))
        };
        let record = self.becomes(id, awaited).await;
        assert!(!record.is_done(), "it did not wait for {what}: {record:#?}");
    }

    async fn ask(&self, request: HotplugRequest) -> Record {
        let id = self.submit(request).await;
        self.ends(&id).await
    }

    /// Returns libvirt's number of vCPUs.
    fn counted(&self) -> u32 {
        let count = self.libvirtd.virsh(&["vcpucount", "guest", "--live"]);
        count.unwrap().trim().parse().unwrap()
    }
}

async fn start(libvirtd: &Libvirtd, state: &Path) -> Arc<Executor<Libvirt>> {
    let config = LibvirtConfig::new(libvirtd.uri());
    let control = Arc::new(Libvirt::start(config, Metrics::new().hypervisor));
    let mut listening = control.health();
    let up = listening.wait_for(|state| matches!(state, ConnectionState::Up(_)));
    timeout(LONG, up).await.unwrap().unwrap();
    let journal = Journal::open(state).unwrap();
    Executor::start(control, journal, Options::default(), ()).unwrap()
}

fn order(domain: &str, request: HotplugRequest) -> Order {
    Order {
        domain: domain.parse().unwrap(),
        request,
        require: Require::Online,
        persistent: false,
        timeout: Duration::from_secs(30),
        idempotency_key: None,
        asked_by: AskedBy::Local { uid: 0 },
    }
}

fn vcpus(count: u32) -> HotplugRequest {
    let online = false;
    HotplugRequest::Vcpus { count, online }
}

fn memory(size: &str) -> HotplugRequest {
    let size: Bytes = size.parse().unwrap();
    HotplugRequest::Memory { size, force: false }
}

fn words(words: &str) -> GuestConfig<'_> {
    GuestConfig {
        words,
        ..GuestConfig::default()
    }
}

/// Asserts the verdict of a record.
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
    last_evidence(record, source);
}

/// Returns the last evidence from this source.
#[track_caller]
fn last_evidence<'r>(record: &'r Record, source: &str) -> &'r Evidence {
    let of_source = |piece: &&Evidence| piece.source.as_str() == source;
    let piece = record.evidence.iter().rfind(of_source);
    piece.unwrap_or_else(|| panic!("no {source} in {:#?}", record.evidence))
}
