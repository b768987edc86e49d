//! A hypervisor in memory, with guests that behave as those of `tests/lab` do on a real one.
//!
//! Time is tokio's, so that a test can let it pass at once.

mod control;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep};
use virtnode::domain::{BalloonStats, DomainState, IdSet, Job, PauseReason, Stats, VcpuStats};
use virtnode::hotplug::{Event, Ost, SlotKind};
use virtnode::hypervisor::{CallError, Change, ConnectionState, DomainRef, Notice};
use virtnode::units::Bytes;

use super::guest::MorePossible;

/// How long a question takes.
const QUESTION: Duration = Duration::from_millis(2);
/// How long libvirt takes to plug.
const PLUG: Duration = Duration::from_millis(30);
/// How long a guest takes to answer.
const GUEST: Duration = Duration::from_millis(100);
/// How long libvirt waits for an unplug.
const UNPLUG: Duration = Duration::from_secs(5);
const MIB: u64 = 1 << 20;
const BOOT: u64 = 512 * MIB;
/// How long libvirt waits for what else is being done to a domain.
const LOCK: Duration = Duration::from_secs(30);
/// What QEMU wants DIMMs to be a multiple of, and what Linux does.
const DIMM: u64 = 2 * MIB;
const LINUX_BLOCK: u64 = 128 * MIB;

/// What a guest does with vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cpus {
    /// Brings them online by itself.
    Onlines,
    /// Leaves them offline until it is told.
    LeavesOffline,
    /// Says yes and throws all but the first away (`nr_cpus=1`).
    ThrowsAway,
    /// Says nothing: still in its firmware.
    Silent,
    /// Takes them, and lets none go.
    KeepsThem,
}

/// What a guest does with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// Brings it online.
    Onlines,
    /// Takes it and leaves it offline.
    LeavesOffline,
    /// Has no driver.
    NoDriver,
    /// Takes all, gives only half back.
    GivesHalfBack,
}

/// What a call to change the domain meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Calls {
    /// It is carried out.
    Work,
    /// It never comes back, nor do questions about the domain's memory.
    Hang,
    /// libvirt answers with this error.
    Fail(CallError),
    /// The connection breaks in the middle; before it did, the call was carried out or not.
    Break {
        /// Whether it was.
        done: bool,
    },
}

/// What a guest is like.
#[derive(Debug, Clone)]
pub(crate) struct FakeGuest {
    pub(crate) cpus: Cpus,
    pub(crate) blocks: Blocks,
    pub(crate) calls: Calls,
    pub(crate) agent: bool,
    /// Whether its agent takes questions and never answers.
    pub(crate) agent_hangs: bool,
    pub(crate) vcpus: u32,
    pub(crate) memory: MorePossible,
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
    /// Why it is paused, if it is.
    reason: Option<PauseReason>,
    /// What libvirt counts, what QEMU has, what the guest has and uses.
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
    /// What is being done to it.
    job: Option<Job>,
    /// The guest's last answers, as QEMU remembers them.
    answers: Vec<Ost>,
    tainted: bool,
}

/// The hypervisor.
pub(crate) struct FakeControl {
    domains: Mutex<BTreeMap<String, FakeDomain>>,
    notices: broadcast::Sender<Notice>,
    connection: watch::Sender<ConnectionState>,
    log: Mutex<Vec<(Instant, String)>>,
    /// Told when a call to change something begins.
    called: Notify,
    started: Instant,
    /// Whether QEMU's events reach nobody.
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
            started: Instant::now(),
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
            guest,
        };
        domains.insert(name.to_owned(), domain);
    }

    /// What has been called to change something, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().map(|(_, call)| call.clone()).collect()
    }

    /// Returns when the next call to change something has begun.
    pub(crate) async fn called(&self) {
        self.called.notified().await;
    }

    /// How many vCPUs the guest uses, by its own word.
    pub(crate) fn online(&self, name: &str) -> u32 {
        self.domains()[name].online.len()
    }

    /// The CPUs that the guest has, used or not.
    pub(crate) fn present(&self, name: &str) -> IdSet {
        self.domains()[name].present.clone()
    }

    /// Changes what a guest does from now on.
    pub(crate) fn behaves(&self, name: &str, change: impl FnOnce(&mut FakeGuest)) {
        let mut domains = self.domains();
        change(&mut domains.get_mut(name).unwrap().guest);
    }

    /// The guest brings everything online that it has.
    pub(crate) fn brings_online(&self, name: &str) {
        let mut domains = self.domains();
        domains.get_mut(name).unwrap().bring_online();
    }

    /// Somebody else unplugs vCPUs, and libvirt notices.
    pub(crate) fn somebody_unplugs(&self, name: &str, count: u32) {
        let ids: IdSet = (0..count).collect();
        self.change(name, |domain| {
            (domain.in_qemu, domain.by_libvirt) = (count, count);
            (domain.present, domain.online) = (ids.clone(), ids);
        });
    }

    /// Something else is done to the domain, or not any more.
    pub(crate) fn does(&self, name: &str, job: Option<Job>) {
        self.change(name, |domain| domain.job = job);
    }

    /// What the guest's own total is.
    pub(crate) fn total(&self, name: &str) -> Bytes {
        Bytes::new(self.domains()[name].total)
    }

    /// Whether QEMU was asked past libvirt.
    pub(crate) fn is_tainted(&self, name: &str) -> bool {
        self.domains()[name].tainted
    }

    /// From now on nobody hears of QEMU's events.
    pub(crate) fn loses_events(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// Lets a guest's processors run again.
    pub(crate) fn resume(&self, name: &str) {
        self.change(name, |domain| {
            (domain.state, domain.reason) = (DomainState::Running, None);
        });
    }

    /// Ends a domain.
    pub(crate) fn destroy(&self, name: &str) {
        self.ends(name, "destroyed");
    }

    /// Ends a domain, for that reason, which is told a moment after it is gone: libvirt's events
    /// and answers come by different connections.
    pub(crate) fn ends(&self, name: &str, why: &str) {
        let domain = self.domains().remove(name).unwrap();
        let (me, name, why) = (self.me.upgrade().unwrap(), name.to_owned(), why.to_owned());
        tokio::spawn(async move {
            sleep(GUEST).await;
            me.tell(&name, &domain, Event::Stopped(why));
        });
    }

    /// Resets a guest: it boots with all that is plugged.
    pub(crate) fn reset(&self, name: &str) {
        let mut domains = self.domains();
        let domain = domains.get_mut(name).unwrap();
        domain.present = (0..domain.in_qemu).collect();
        domain.bring_online();
        let domain = domain.clone();
        drop(domains);
        self.tell(name, &domain, Event::Reset);
    }

    /// Holds a guest's processors.
    pub(crate) fn pause(&self, name: &str, by: PauseReason) {
        self.change(name, |domain| {
            (domain.state, domain.reason) = (DomainState::Paused, Some(by));
        });
    }

    /// Breaks the connection, or makes it again.
    pub(crate) fn connect(&self, up: bool) {
        let connection = if up {
            ConnectionState::Up(2)
        } else {
            ConnectionState::Down
        };
        self.connection.send_replace(connection);
        // Nobody listens: nobody minds.
        self.notices.send(Notice::Gap).ok();
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
            ConnectionState::Down => Err(CallError::Unavailable("it is gone".to_owned())),
        }
    }

    fn find_ref(&self, domain: &DomainRef) -> Result<(String, FakeDomain), CallError> {
        let domains = self.domains();
        let found = domains.iter().find(|(_, have)| have.uuid == domain.uuid);
        found
            .map(|(name, have)| (name.clone(), have.clone()))
            .ok_or_else(|| CallError::NotFound(domain.name.clone()))
    }

    /// Notes a call, and does what calls meet with this domain; says whether it is carried out,
    /// and whether it fails afterwards.
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

    /// Waits as libvirt does while something else is being done to the domain.
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

    /// The guest is told of new vCPUs.
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

    /// The guest is asked to let vCPUs go, one after another, as libvirt does; libvirt takes what
    /// the guest did for a timeout, and finds out when it is told again.
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

impl FakeDomain {
    fn bring_online(&mut self) {
        let now = Instant::now();
        for id in self.present.iter() {
            self.online_since.entry(id).or_insert(now);
        }
        self.online = self.present.clone();
    }

    fn id(&self, name: &str) -> DomainRef {
        DomainRef::on_host(name, self.uuid.clone())
    }

    /// The live XML, of what matters.
    fn xml(&self, name: &str) -> String {
        let channel = if self.guest.agent {
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' \
                 state='connected'/></channel>"
        } else {
            ""
        };
        let boot = BOOT / 1024;
        let virtio_mem = self.guest.memory == MorePossible::VirtioMem;
        let (maximum, cpu) = match self.guest.memory {
            MorePossible::No => (String::new(), String::new()),
            _ => (
                "<maxMemory slots='4' unit='KiB'>4194304</maxMemory>".to_owned(),
                format!(
                    "<cpu><numa><cell id='0' cpus='0-3' memory='{boot}' unit='KiB'/></numa></cpu>"
                ),
            ),
        };
        let mut devices = if virtio_mem {
            format!(
                "<memory model='virtio-mem'><target><size unit='KiB'>2097152</size>\
                 <node>0</node><block unit='KiB'>2048</block>\
                 <requested unit='KiB'>{}</requested><current unit='KiB'>{}</current></target>\
                 <alias name='ua-mem0'/></memory>",
                self.requested / 1024,
                self.taken / 1024,
            )
        } else {
            String::new()
        };
        for (slot, (alias, size)) in &self.dimms {
            let size = size / 1024;
            write!(
                devices,
                "<memory model='dimm'><target><size unit='KiB'>{size}</size><node>0</node></target>\
                 <alias name='{alias}'/><address type='dimm' slot='{slot}'/></memory>"
            )
            .unwrap();
        }
        let dimms: u64 = self.dimms.values().map(|(_, size)| size / 1024).sum();
        let yes_no = |yes| if yes { "yes" } else { "no" };
        let vcpu = |id: u32| {
            let (enabled, hotpluggable) = (yes_no(id < self.by_libvirt), yes_no(id > 0));
            format!("<vcpu id='{id}' enabled='{enabled}' hotpluggable='{hotpluggable}'/>")
        };
        let vcpus: String = (0..4).map(vcpu).collect();
        format!(
            "<domain type='qemu' id='{}'><name>{name}</name><uuid>{}</uuid>\
             {maximum}<memory unit='KiB'>{}</memory><vcpu current='{}'>4</vcpu>\
             <vcpus>{vcpus}</vcpus><os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>\
             <features><acpi/></features>\
             {cpu}<devices>{devices}{channel}\
             <memballoon model='virtio'><stats period='1'/></memballoon></devices></domain>",
            self.number,
            self.uuid,
            boot + dimms + if virtio_mem { 2_097_152 } else { 0 },
            self.by_libvirt,
        )
    }

    fn plugged_dimms(&self) -> u64 {
        self.dimms.values().map(|(_, size)| size).sum()
    }

    fn stats(&self, started: Instant) -> Stats {
        let now = Instant::now();
        let ran = |id: u32| {
            let since = self.online_since.get(&id);
            let since = since.filter(|_| self.online.contains(id));
            let ran = since.map_or(Duration::ZERO, |since| now - *since);
            // in ticks of 10 ms, as libvirt counts
            u64::try_from(ran.as_millis()).unwrap() / 10 * 10_000_000
        };
        let told = (now - started).as_secs() + 1_000_000_000_000;
        Stats {
            vcpus: (0..self.by_libvirt)
                .map(|id| {
                    let stats = VcpuStats {
                        time: Some(ran(id)),
                        exits: None,
                    };
                    (id, stats)
                })
                .collect(),
            balloon: BalloonStats {
                current: Some(Bytes::new(BOOT + self.taken + self.plugged_dimms())),
                total: Some(Bytes::new(self.total)),
                usable: None,
                updated: Some(told),
            },
        }
    }
}
