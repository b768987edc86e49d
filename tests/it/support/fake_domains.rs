//! A hypervisor in memory, with guests that behave like those of `tests/lab` on a real one.
//!
//! Time is tokio's, so that a test can use virtual time.

mod control;
mod description;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep};
use virtnode::domain::{DomainState, IdSet, Job, PauseReason};
use virtnode::hotplug::{Event, Ost, SlotKind};
use virtnode::hypervisor::{CallError, Change, ConnectionState, DomainRef, Notice};
use virtnode::units::Bytes;

use self::description::Started;
use super::guest::{MorePossible, Statistics};

/// Duration of a query.
const QUESTION: Duration = Duration::from_millis(2);
/// Duration of a plug in libvirt.
const PLUG: Duration = Duration::from_millis(30);
/// Time until a guest answers.
const GUEST: Duration = Duration::from_millis(100);
/// libvirt's timeout for an agent that does not answer.
const AGENT_ANSWER: Duration = Duration::from_secs(3);
/// libvirt's timeout for an unplug.
const UNPLUG: Duration = Duration::from_secs(5);
const MIB: u64 = 1 << 20;
const BOOT: u64 = 512 * MIB;
/// libvirt's timeout for its lock on a domain.
const LOCK: Duration = Duration::from_secs(30);
/// Granularity of a DIMM in QEMU, and in Linux.
const DIMM: u64 = 2 * MIB;
const LINUX_BLOCK: u64 = 128 * MIB;

/// Behavior of a guest at a plug or unplug of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cpus {
    /// Brings them online by itself.
    Onlines,
    /// Leaves them offline until it is requested to bring them online.
    LeavesOffline,
    /// Confirms all and drops all but the first (`nr_cpus=1`).
    ThrowsAway,
    /// Does not answer: it is still in its firmware.
    Silent,
    /// Brings them online, and releases none.
    KeepsThem,
}

/// Behavior of a guest at a plug or unplug of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// Brings the memory online.
    Onlines,
    /// Plugs it and leaves it offline.
    LeavesOffline,
    /// Has no driver.
    NoDriver,
    /// Plugs all, and returns only half.
    GivesHalfBack,
}

/// Result of a call that changes the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Calls {
    /// The call is carried out.
    Work,
    /// The call never returns.
    Hang,
    /// libvirt answers with this error.
    Fail(CallError),
    /// The connection breaks during the call.
    Break {
        /// True if the call was carried out before.
        done: bool,
    },
}

/// Configuration and behavior of a guest.
#[derive(Debug, Clone)]
pub(crate) struct FakeGuest {
    pub(crate) cpus: Cpus,
    pub(crate) blocks: Blocks,
    pub(crate) calls: Calls,
    pub(crate) agent: bool,
    /// True if its agent accepts requests and never answers.
    pub(crate) agent_hangs: bool,
    pub(crate) vcpus: u32,
    pub(crate) memory: MorePossible,
    pub(crate) statistics: Statistics,
}

impl Default for FakeGuest {
    fn default() -> Self {
        Self {
            cpus: Cpus::Onlines,
            blocks: Blocks::Onlines,
            calls: Calls::Work,
            agent: true,
            agent_hangs: false,
            vcpus: 1,
            memory: MorePossible::VirtioMem,
            statistics: Statistics::Every(1),
        }
    }
}

/// A domain in memory.
#[derive(Debug, Clone)]
struct FakeDomain {
    guest: FakeGuest,
    uuid: String,
    number: u32,
    state: DomainState,
    /// Reason for the pause, if it is paused.
    reason: Option<PauseReason>,
    /// vCPUs according to libvirt, in QEMU, present in the guest, and online in the guest.
    by_libvirt: u32,
    in_qemu: u32,
    present: IdSet,
    online: IdSet,
    online_since: BTreeMap<u32, Instant>,
    /// virtio-mem.
    requested: u64,
    taken: u64,
    total: u64,
    /// DIMMs by slot: alias and size.
    dimms: BTreeMap<u32, (String, u64)>,
    /// The job on the domain.
    job: Option<Job>,
    /// The guest's last ACPI answers, as QEMU records them.
    answers: Vec<Ost>,
    tainted: bool,
    /// The statistics period; 0 if there is none.
    period: u32,
    /// The total and the time of the last report, while there is no period.
    report: (u64, u64),
}

/// The hypervisor.
pub(crate) struct FakeControl {
    domains: Mutex<BTreeMap<String, FakeDomain>>,
    notices: broadcast::Sender<Notice>,
    connection: watch::Sender<ConnectionState>,
    log: Mutex<Vec<(Instant, String)>>,
    /// Notified when a call that changes a domain begins.
    called: Notify,
    started: Started,
    /// True if QEMU's events are not delivered.
    deaf: AtomicBool,
    me: Weak<Self>,
}

impl FakeControl {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            domains: Mutex::default(),
            notices: broadcast::Sender::new(1024),
            connection: watch::Sender::new(ConnectionState::Up(1)),
            log: Mutex::default(),
            called: Notify::new(),
            started: Started::now(),
            deaf: AtomicBool::new(false),
            me: me.clone(),
        })
    }

    /// Starts a domain.
    pub(crate) fn add(&self, name: &str, guest: FakeGuest) {
        let mut domains = self.domains();
        let number = u32::try_from(domains.len()).unwrap() + 1;
        let ids: IdSet = (0..guest.vcpus).collect();
        let now = Instant::now();
        let domain = FakeDomain {
            uuid: format!("00000000-0000-4000-8000-{number:012}"),
            number,
            state: DomainState::Running,
            reason: None,
            by_libvirt: guest.vcpus,
            in_qemu: guest.vcpus,
            present: ids.clone(),
            online_since: ids.iter().map(|id| (id, now)).collect(),
            online: ids,
            requested: 0,
            taken: 0,
            total: BOOT - 100 * MIB,
            dimms: BTreeMap::new(),
            job: None,
            answers: Vec::new(),
            tainted: false,
            period: match guest.statistics {
                Statistics::Every(period) => period,
                Statistics::Off | Statistics::NoBalloon => 0,
            },
            // The driver reports once when it starts.
            report: (BOOT - 100 * MIB, self.started.wall_clock()),
            guest,
        };
        domains.insert(name.to_owned(), domain);
    }

    /// Returns the calls that changed a domain, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().map(|(_, call)| call.clone()).collect()
    }

    /// Waits until the next call that changes a domain begins.
    pub(crate) async fn called(&self) {
        self.called.notified().await;
    }

    /// Returns the number of vCPUs that the guest reports as online.
    pub(crate) fn online(&self, name: &str) -> u32 {
        self.domains()[name].online.len()
    }

    /// Returns the guest's CPUs, online or offline.
    pub(crate) fn present(&self, name: &str) -> IdSet {
        self.domains()[name].present.clone()
    }

    /// Changes the behavior of a guest.
    pub(crate) fn behaves(&self, name: &str, change: impl FnOnce(&mut FakeGuest)) {
        let mut domains = self.domains();
        change(&mut domains.get_mut(name).unwrap().guest);
    }

    /// Has the guest bring all its CPUs online.
    pub(crate) fn brings_online(&self, name: &str) {
        let mut domains = self.domains();
        domains.get_mut(name).unwrap().bring_online();
    }

    /// Unplugs vCPUs as another client; libvirt notices.
    pub(crate) fn somebody_unplugs(&self, name: &str, count: u32) {
        let ids: IdSet = (0..count).collect();
        self.change(name, |domain| {
            (domain.in_qemu, domain.by_libvirt) = (count, count);
            (domain.present, domain.online) = (ids.clone(), ids);
        });
    }

    /// Starts or ends a job on the domain.
    pub(crate) fn does(&self, name: &str, job: Option<Job>) {
        self.change(name, |domain| domain.job = job);
    }

    /// Returns the guest's total memory.
    pub(crate) fn total(&self, name: &str) -> Bytes {
        Bytes::new(self.domains()[name].total)
    }

    /// True if a query bypassed libvirt.
    pub(crate) fn is_tainted(&self, name: &str) -> bool {
        self.domains()[name].tainted
    }

    /// Stops the delivery of QEMU's events.
    pub(crate) fn loses_events(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// Resumes a domain.
    pub(crate) fn resume(&self, name: &str) {
        self.change(name, |domain| {
            (domain.state, domain.reason) = (DomainState::Running, None);
        });
    }

    /// Ends a domain.
    pub(crate) fn destroy(&self, name: &str) {
        self.ends(name, "destroyed");
    }

    /// Ends a domain for this reason. The event follows a moment later: libvirt's events and answers
    /// use different connections.
    pub(crate) fn ends(&self, name: &str, why: &str) {
        let domain = self.domains().remove(name).unwrap();
        let (me, name, why) = (self.me.upgrade().unwrap(), name.to_owned(), why.to_owned());
        tokio::spawn(async move {
            sleep(GUEST).await;
            me.tell(&name, &domain, Event::Stopped(why));
        });
    }

    /// Resets a guest: it boots with all plugged vCPUs.
    pub(crate) fn reset(&self, name: &str) {
        let mut domains = self.domains();
        let domain = domains.get_mut(name).unwrap();
        domain.present = (0..domain.in_qemu).collect();
        domain.bring_online();
        let domain = domain.clone();
        drop(domains);
        self.tell(name, &domain, Event::Reset);
    }

    /// Pauses a domain.
    pub(crate) fn pause(&self, name: &str, by: PauseReason) {
        self.change(name, |domain| {
            (domain.state, domain.reason) = (DomainState::Paused, Some(by));
        });
    }

    /// Disconnects or reconnects.
    pub(crate) fn connect(&self, up: bool) {
        let connection = if up {
            ConnectionState::Up(2)
        } else {
            ConnectionState::Down
        };
        self.connection.send_replace(connection);
        // Without a subscriber this fails, which is no problem.
        self.notices.send(Notice::GAP).ok();
    }

    fn domains(&self) -> MutexGuard<'_, BTreeMap<String, FakeDomain>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, name: &str, domain: &FakeDomain, event: Event) {
        let notice = Notice::Change {
            domain: DomainRef::on_host(name, domain.uuid.clone()),
            at: Instant::now().into_std(),
            change: Change::Event(event),
        };
        if !self.deaf.load(Ordering::Relaxed) {
            self.notices.send(notice).ok();
        }
    }

    fn ost(&self, name: &str, domain: &FakeDomain, id: u32, source: u32, status: u32) {
        let gone = source == 3 && status == 0;
        let ost = Ost {
            device: (!gone).then(|| format!("vcpu{id}")),
            slot: id,
            kind: SlotKind::Cpu,
            source,
            status,
        };
        self.answer(name, domain, ost);
    }

    fn answer(&self, name: &str, domain: &FakeDomain, ost: Ost) {
        self.change(name, |domain| {
            let of_another = |answer: &Ost| (answer.kind, answer.slot) != (ost.kind, ost.slot);
            domain.answers.retain(of_another);
            domain.answers.push(ost.clone());
        });
        self.tell(name, domain, Event::Ost(ost));
    }

    async fn question(&self) -> Result<(), CallError> {
        sleep(QUESTION).await;
        match *self.connection.borrow() {
            ConnectionState::Up(_) => Ok(()),
            ConnectionState::Down | ConnectionState::Absent => {
                Err(CallError::Unavailable("it is gone".to_owned()))
            }
        }
    }

    fn find_ref(&self, domain: &DomainRef) -> Result<(String, FakeDomain), CallError> {
        let domains = self.domains();
        let found = domains.iter().find(|(_, have)| have.uuid == domain.uuid);
        found
            .map(|(name, have)| (name.clone(), have.clone()))
            .ok_or_else(|| CallError::NotFound(domain.name.clone()))
    }

    /// Records a call and applies the configured result. Returns the name of a domain whose call is
    /// carried out, and the error that follows it.
    async fn begin(
        &self,
        call: String,
        domain: &DomainRef,
    ) -> Result<(String, Option<CallError>), CallError> {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((Instant::now(), call));
        self.called.notify_one();
        self.question().await?;
        let (name, have) = self.find_ref(domain)?;
        if have.job.is_some_and(Job::holds_changes) {
            self.lock(&name).await?;
        }
        let lost = CallError::Unavailable("the connection broke".to_owned());
        match have.guest.calls {
            Calls::Work => Ok((name, None)),
            Calls::Hang => std::future::pending().await,
            Calls::Fail(error) => Err(error),
            Calls::Break { done: true } => Ok((name, Some(lost))),
            Calls::Break { done: false } => Err(lost),
        }
    }

    /// Waits for the lock on the domain like libvirt.
    async fn lock(&self, name: &str) -> Result<(), CallError> {
        let until = Instant::now() + LOCK;
        loop {
            let held = |domain: &mut FakeDomain| domain.job.is_some_and(Job::holds_changes);
            match self.change(name, held) {
                None => return Err(CallError::NotFound(name.to_owned())),
                Some(false) => return Ok(()),
                Some(true) if Instant::now() >= until => {
                    return Err(CallError::Busy {
                        call: "set-vcpus".into(),
                        text: "cannot acquire state change lock".to_owned(),
                    });
                }
                Some(true) => sleep(GUEST).await,
            }
        }
    }

    fn change<T>(&self, name: &str, change: impl FnOnce(&mut FakeDomain) -> T) -> Option<T> {
        self.domains().get_mut(name).map(change)
    }

    /// Plugs vCPUs, to which the guest reacts.
    async fn plug(&self, name: &str, count: u32) {
        sleep(PLUG).await;
        let before = self.change(name, |domain| {
            let before = domain.in_qemu;
            (domain.in_qemu, domain.by_libvirt) = (count, count);
            before
        });
        let Some(before) = before else { return };
        let Ok((_, domain)) = self.find_by_name(name) else {
            return;
        };
        if domain.guest.cpus == Cpus::Silent || domain.state != DomainState::Running {
            return;
        }
        for id in before..count {
            self.change(name, |domain| {
                if domain.guest.cpus != Cpus::ThrowsAway {
                    domain.present.insert(id);
                }
                if matches!(domain.guest.cpus, Cpus::Onlines | Cpus::KeepsThem) {
                    domain.bring_online();
                }
            });
            self.ost(name, &domain, id, 1, 0);
        }
    }

    /// Unplugs vCPUs one after another like libvirt, which reports a timeout although the guest
    /// released the vCPU, and notices at the next call.
    async fn unplug(&self, name: &str, count: u32) -> Result<(), CallError> {
        let timed_out = || CallError::UnplugPending {
            call: "set-vcpus".into(),
            text: "vcpu unplug request timed out".to_owned(),
        };
        loop {
            let Ok((_, domain)) = self.find_by_name(name) else {
                return Err(CallError::NotFound(name.to_owned()));
            };
            if domain.by_libvirt <= count {
                return Ok(());
            }
            if domain.by_libvirt > domain.in_qemu {
                self.change(name, |domain| domain.by_libvirt -= 1);
                continue;
            }
            let id = domain.in_qemu - 1;
            let asked = Instant::now();
            sleep(GUEST).await;
            self.ost(name, &domain, id, 3, 0x84);
            match domain.guest.cpus {
                Cpus::KeepsThem => self.ost(name, &domain, id, 3, 0x82),
                Cpus::Silent => {}
                _ => {
                    self.change(name, |domain| {
                        domain.in_qemu = id;
                        let gone: IdSet = [id].into_iter().collect();
                        domain.present = domain.present.without(&gone);
                        domain.online = domain.online.without(&gone);
                    });
                    let path = format!("/machine/peripheral/vcpu{id}/lapic");
                    let deleted = Event::DeviceDeleted { device: None, path };
                    self.tell(name, &domain, deleted);
                    self.ost(name, &domain, id, 3, 0);
                }
            }
            tokio::time::sleep_until(asked + UNPLUG).await;
            return Err(timed_out());
        }
    }

    fn find_by_name(&self, name: &str) -> Result<(String, FakeDomain), CallError> {
        let domains = self.domains();
        let found = domains.get(name).cloned();
        found
            .map(|domain| (name.to_owned(), domain))
            .ok_or_else(|| CallError::NotFound(name.to_owned()))
    }
}
