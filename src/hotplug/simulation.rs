//! A hypervisor and a guest in memory and virtual time, modeled on measurements, and a loop that
//! keeps a history and follows [`judge`].

mod behaviour;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::*;
use crate::domain::{
    AgentChannel, Balloon, BalloonStats, CallError, Domain, DomainCpu, DomainState, GuestNumaCell,
    IdSet, Memory, MemoryDevice, MemoryModel, PauseReason, Stats, Vcpu, VcpuStats, Vcpus,
};
use crate::units::Bytes;

/// Interval between observations.
const OBSERVATION_INTERVAL: Duration = Duration::from_millis(200);

pub(super) fn mib(mib: u64) -> Bytes {
    Bytes::from_mib(mib).unwrap()
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The behavior of a guest.
#[derive(Debug, Clone)]
pub(super) struct GuestBehavior {
    /// Time after which the guest brings CPUs online by itself.
    pub(super) onlines_after: Option<Duration>,
    /// Maximum number of CPUs. The guest confirms further ones and drops them.
    pub(super) nr_cpus: u32,
    /// CPUs stay offline, whatever is requested.
    pub(super) stuck: bool,
    /// The guest notices nothing: it is in its firmware, has no ACPI, or hangs.
    pub(super) unresponsive: bool,
    /// The guest rejects CPUs and DIMMs with this status.
    pub(super) refuses: Option<u32>,
    /// The guest does not release this CPU.
    pub(super) keeps: Option<u32>,
    pub(super) agent: bool,
    /// The agent's answer in place of the guest's CPUs.
    pub(super) agent_trouble: Option<Agent>,
    pub(super) virtio_mem: bool,
    pub(super) blocks_online: bool,
    /// virtio-mem memory that cannot be returned.
    pub(super) pinned: Bytes,
    /// Maximum virtio-mem memory that the guest takes.
    pub(super) takes_at_most: Bytes,
    /// The balloon driver reports statistics.
    pub(super) reports_total: bool,
}

impl Default for GuestBehavior {
    fn default() -> Self {
        Self {
            onlines_after: None,
            nr_cpus: 1000,
            stuck: false,
            unresponsive: false,
            refuses: None,
            keeps: None,
            agent: true,
            agent_trouble: None,
            virtio_mem: true,
            blocks_online: true,
            pinned: Bytes::ZERO,
            takes_at_most: mib(1 << 20),
            reports_total: true,
        }
    }
}

#[derive(Debug, Clone)]
enum Effect {
    Return(Return),
    GuestSeesCpu(u32),
    GuestOnlines(u32),
    GuestEjects(u32),
    GuestResizes(String),
    GuestSeesDimm(String),
    ReportsTotal,
    /// libvirt has the size of the balloon.
    ShowsBalloon(Bytes),
    Scheduled(WorldChange),
}

/// A change at a given time.
#[derive(Debug, Clone)]
pub(super) enum WorldChange {
    Destroy,
    Pause,
    Resume,
    Reset,
    AgentDies,
    LosesLibvirt,
    FindsLibvirt,
    FreesMemory,
    /// The guest's kernel stops, and nobody notices.
    Hangs,
    /// Another client asks the guest for another amount of its first virtio-mem device.
    Resizes(Bytes),
    /// The balloon takes memory from the guest. QEMU reports its size a second later.
    Inflates(Bytes),
    Onlines(u32),
    /// A vCPU runs for a moment, with or without the guest's system.
    Runs(u32),
    /// Another client sets the number of vCPUs.
    AnotherSets(u32),
    /// Another client sets the requested size of the virtio-mem device.
    AnotherResizes(Bytes),
    /// The agent begins to claim CPUs up to this number.
    Claims(u32),
}

#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) now: Timestamp,
    pub(super) domain: Domain,
    pub(super) behavior: GuestBehavior,
    pub(super) paused_by: PauseReason,
    pub(super) persistent: bool,
    /// Scope of the requests.
    pub(super) scope: Scope,
    pub(super) monitor_events: bool,
    pub(super) counts_time: bool,
    /// libvirt up to 12.3 does not notice that a vCPU was released.
    pub(super) misses_removals: bool,
    /// libvirt 9.0 does not notice even when the call is repeated.
    pub(super) rejects_repeats: bool,
    pub(super) host: Host,
    /// The agent claims CPUs up to this number.
    pub(super) claims: Option<u32>,
    pub(super) made: Vec<Action>,
    /// The error of every call.
    pub(super) fails: Option<CallError>,
    /// Time until a call returns.
    pub(super) call_takes: Duration,
    qemu: BTreeSet<u32>,
    pub(super) has: BTreeSet<u32>,
    pub(super) online: BTreeSet<u32>,
    times: BTreeMap<u32, u64>,
    pub(super) total: Bytes,
    /// The memory that the guest cannot do without, if it reports that.
    pub(super) used: Option<Bytes>,
    /// The memory that the balloon holds, as libvirt has it.
    held: Bytes,
    reported: Option<(Bytes, u64)>,
    gone: bool,
    lost: bool,
    pending: Vec<(Timestamp, Effect)>,
    happened: Vec<(Timestamp, Event)>,
    returned: Vec<(Timestamp, Return)>,
}

impl World {
    /// A guest with `vcpus` of 4 vCPUs, 512 MiB, and a virtio-mem device of 2 GiB.
    pub(super) fn new(vcpus: u32, behavior: GuestBehavior) -> Self {
        let device = MemoryDevice {
            model: MemoryModel::VirtioMem,
            alias: Some("ua-mem0".to_owned()),
            size: mib(2048),
            requested: Some(Bytes::ZERO),
            current: Some(Bytes::ZERO),
            block: Some(mib(2)),
            node: Some(0),
            slot: None,
        };
        let domain = Domain {
            name: "vm".to_owned(),
            uuid: None,
            id: Some(1),
            virt_type: "qemu".to_owned(),
            state: DomainState::Running,
            arch: Some("x86_64".to_owned()),
            machine: Some("pc-q35-10.0".to_owned()),
            acpi: true,
            cpu: DomainCpu::default(),
            vcpus: Vcpus {
                maximum: 4,
                each: (0..4)
                    .map(|id| Vcpu {
                        id,
                        enabled: id < vcpus,
                        hotpluggable: id > 0,
                        order: None,
                    })
                    .collect(),
            },
            memory: Memory {
                boot: mib(512),
                balloon: Some(mib(512)),
                maximum: Some(mib(4096)),
                slots: 4,
                cells: vec![GuestNumaCell {
                    id: 0,
                    cpus: "0-3".parse().unwrap(),
                    memory: mib(512),
                }],
                devices: vec![device],
                huge_pages: false,
            },
            balloon: Balloon {
                present: true,
                stats_period: Some(1),
            },
            agent: if behavior.agent {
                AgentChannel::Connected
            } else {
                AgentChannel::Disconnected
            },
            devices: Vec::new(),
        };
        let now = Timestamp::from_millis(1_795_260_000_000);
        let mut world = Self {
            now,
            domain,
            paused_by: PauseReason::User,
            persistent: false,
            scope: Scope::Live,
            monitor_events: true,
            counts_time: true,
            misses_removals: true,
            rejects_repeats: false,
            host: Host::default(),
            claims: None,
            made: Vec::new(),
            fails: None,
            call_takes: ms(50),
            qemu: (0..vcpus).collect(),
            has: (0..vcpus).collect(),
            online: (0..vcpus).collect(),
            times: (0..vcpus).map(|id| (id, 3_000)).collect(),
            total: mib(404),
            used: None,
            held: Bytes::ZERO,
            reported: None,
            gone: false,
            lost: false,
            pending: Vec::new(),
            happened: Vec::new(),
            returned: Vec::new(),
            behavior,
        };
        if world.behavior.reports_total {
            world.reported = Some((world.total, seconds_of(now)));
            world.later(ms(1000), Effect::ReportsTotal);
        }
        world
    }

    /// Replaces the virtio-mem device by slots for DIMMs.
    pub(super) fn with_dimms(mut self) -> Self {
        self.domain.memory.devices.clear();
        self
    }

    /// Changes what the guest's kernel leaves of the boot memory.
    pub(super) fn with_total(mut self, total: Bytes) -> Self {
        self.total = total;
        self.reported = Some((total, seconds_of(self.now)));
        self
    }

    /// Changes the period of the statistics. The last report is that of the driver's start.
    pub(super) fn with_period(mut self, period: Option<u32>) -> Self {
        self.domain.balloon.stats_period = period;
        self.now = self.now.after(ms(60_000));
        self.pending.clear();
        if let Some(period) = period {
            self.reported = Some((self.total, seconds_of(self.now)));
            self.later(Duration::from_secs(period.into()), Effect::ReportsTotal);
        }
        self
    }

    /// Schedules a change.
    pub(super) fn at(mut self, after: Duration, change: WorldChange) -> Self {
        self.later(after, Effect::Scheduled(change));
        self
    }

    fn later(&mut self, after: Duration, effect: Effect) {
        self.pending.push((self.now.after(after), effect));
    }

    fn event(&mut self, event: Event) {
        self.happened.push((self.now, event));
    }

    fn ost(&mut self, device: Option<String>, slot: u32, kind: SlotKind, source: u32, status: u32) {
        self.event(Event::Ost(Ost {
            device,
            slot,
            kind,
            source,
            status,
        }));
    }

    fn enabled(&self) -> BTreeSet<u32> {
        self.domain.vcpus.plugged_ids().iter().collect()
    }

    fn set_enabled(&mut self, id: u32, enabled: bool) {
        self.domain.vcpus.each[id as usize].enabled = enabled;
    }

    pub(super) fn observe(&self) -> Observation {
        let trouble = self.behavior.agent_trouble.clone();
        let agent = trouble.unwrap_or_else(|| {
            match (
                self.behavior.agent,
                self.domain.state.runs() && !self.behavior.unresponsive,
            ) {
                (false, _) => Agent::NotAsked,
                (true, false) => Agent::Silent("Guest agent is not responding".to_owned()),
                (true, true) if self.claims.is_some() => Agent::Answered(GuestVcpus {
                    vcpus: (0..self.claims.unwrap_or(0)).collect(),
                    online: (0..self.claims.unwrap_or(0)).collect(),
                }),
                (true, true) => Agent::Answered(GuestVcpus {
                    vcpus: self.has.iter().copied().collect(),
                    online: self.online.iter().copied().collect(),
                }),
            }
        });
        let times = self.enabled().into_iter().map(|id| {
            let millis = self.times.get(&id).copied().unwrap_or(0);
            let ticks = millis / 10 * 10_000_000;
            let time = self.counts_time.then_some(ticks);
            (id, VcpuStats { time, exits: None })
        });
        let balloon = BalloonStats {
            current: Some(self.domain.memory.plugged().saturating_sub(self.held)),
            total: self.reported.map(|(total, _)| total),
            usable: self
                .reported
                .zip(self.used)
                .map(|((total, _), used)| total.saturating_sub(used)),
            updated: Some(self.reported.map_or(0, |(_, at)| at)),
        };
        Observation {
            at: self.now,
            answered: AnswerTimes::default(),
            domain: self.domain.clone(),
            reason: (self.domain.state == DomainState::Paused).then_some(self.paused_by),
            persistent: self.persistent,
            stats: Some(Stats {
                vcpu_count: Some(self.domain.vcpus.plugged()),
                vcpus: times.collect(),
                balloon,
            }),
            agent,
            job: None,
            answers: None,
        }
    }

    /// Takes the events since the last call.
    pub(super) fn events(&mut self) -> Vec<(Timestamp, Event)> {
        let events = std::mem::take(&mut self.happened);
        let is_heard = |event: &Event| self.monitor_events || matches!(event, Event::Stopped(_));
        events
            .into_iter()
            .filter(|(_, event)| is_heard(event))
            .collect()
    }

    /// Returns the reason why the domain cannot be observed.
    pub(super) fn contact(&self) -> Option<Contact> {
        match (self.gone, self.lost) {
            (true, _) => Some(Contact::Absent),
            (_, true) => Some(Contact::Unreachable("Connection refused".to_owned())),
            _ => None,
        }
    }

    /// Advances time.
    pub(super) fn pass(&mut self, until: Timestamp) {
        while self.now < until {
            let next = self.pending.iter().map(|(at, _)| *at).min();
            let step = next.map_or(until, |next| next.clamp(self.now, until));
            let span = u64::try_from(step.since(self.now).as_millis()).unwrap();
            if self.domain.state.runs() && !self.gone {
                for id in &self.online {
                    *self.times.entry(*id).or_default() += span / 10;
                }
            }
            self.now = step;
            let (due, rest): (Vec<_>, _) = std::mem::take(&mut self.pending)
                .into_iter()
                .partition(|(at, _)| *at <= self.now);
            self.pending = rest;
            for (_, effect) in due {
                self.apply(effect);
            }
            if step == until && next.is_none_or(|next| next > until) {
                return;
            }
        }
    }

    fn report(&mut self, history: &mut History) {
        for (at, event) in std::mem::take(&mut self.happened) {
            // libvirt reports the end of a domain, QEMU everything else.
            if self.monitor_events || matches!(event, Event::Stopped(_)) {
                history.happened(at, event);
            }
        }
        for (at, how) in std::mem::take(&mut self.returned) {
            if history.running_call().is_some() {
                history.returned(at, how);
            }
        }
        match (self.gone, self.lost) {
            (true, _) => history.out_of_contact(self.now, Contact::Absent),
            (_, true) => {
                let why = Contact::Unreachable("Connection refused".to_owned());
                history.out_of_contact(self.now, why);
            }
            _ => history.observed(self.observe()),
        }
    }

    /// Carries out a request like an executor.
    pub(super) fn carry_out(&mut self, request: HotplugRequest, terms: Terms) -> Ended {
        let before = self.observe();
        let plan = match preflight(&request, self.scope, &before, &self.host) {
            Preflight::Ready(plan) => plan,
            Preflight::Rejected(rejection) => return Ended::Rejected(rejection),
            Preflight::Unexplained(rejection) => return Ended::Rejected(rejection),
            Preflight::Blocked(why) => panic!("blocked by {why}"),
        };
        let mut history = History::new(request, terms, plan, before, self.monitor_events);
        let outcome = self.run(&mut history);
        Ended::Judged(Box::new((outcome, history)))
    }

    /// Continues until the next step matches.
    pub(super) fn run_until(&mut self, history: &mut History, wanted: impl Fn(&Step) -> bool) {
        while !wanted(&judge(history, self.now)) {
            self.pass(self.now.after(OBSERVATION_INTERVAL));
            self.report(history);
        }
    }

    /// Continues until there is a verdict.
    pub(super) fn run(&mut self, history: &mut History) -> Outcome {
        for _ in 0..10_000 {
            match judge(history, self.now) {
                Step::Done(outcome) => return *outcome,
                Step::Call(action) => {
                    history.called(self.now, action.clone());
                    self.call(&action);
                }
                Step::Wait { until, .. } => {
                    assert!(until > self.now, "asked to wait for the past");
                    assert!(until <= history.terms.deadline, "asked to wait too long");
                    // A real event would end the wait; frequent observations do here.
                    self.pass(until.min(self.now.after(OBSERVATION_INTERVAL)));
                    self.report(history);
                }
            }
        }
        panic!("no verdict: {history:?}");
    }

    /// Repeats an earlier call.
    pub(super) fn repeat_call(&mut self, number: usize) {
        let action = self.made[number].clone();
        self.call(&action);
    }

    /// Advances time after a verdict and judges again.
    pub(super) fn judge_later(&mut self, history: &mut History, after: Duration) -> Outcome {
        let until = self.now.after(after);
        while self.now < until {
            self.pass(self.now.after(OBSERVATION_INTERVAL));
            self.report(history);
        }
        match judge(history, self.now) {
            Step::Done(outcome) => *outcome,
            step => panic!("the deadline is over, and still {step:?}"),
        }
    }

    pub(super) fn vcpus(&mut self, count: u32) -> Ended {
        let terms = self.terms(Require::Online, 30);
        self.carry_out(
            HotplugRequest::Vcpus {
                count,
                online: false,
            },
            terms,
        )
    }

    pub(super) fn memory(&mut self, size: Bytes) -> Ended {
        let terms = self.terms(Require::Online, 60);
        self.carry_out(HotplugRequest::Memory { size, force: false }, terms)
    }

    pub(super) fn terms(&self, require: Require, seconds: u64) -> Terms {
        Terms {
            require,
            deadline: self.now.after(Duration::from_secs(seconds)),
            patience: Patience::default(),
        }
    }

    /// True if the guest uses `count` vCPUs and the hypervisor has as many.
    pub(super) fn guest_uses(&self, count: u32) -> bool {
        self.online.len() == count as usize && self.enabled().len() == count as usize
    }
}

fn seconds_of(moment: Timestamp) -> u64 {
    u64::try_from(moment.as_seconds()).unwrap()
}

#[derive(Debug)]
pub(super) enum Ended {
    Rejected(Rejection),
    Judged(Box<(Outcome, History)>),
}

impl Ended {
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            Self::Rejected(rejection) => rejection.verdict(),
            Self::Judged(judged) => judged.0.verdict,
        }
    }

    pub(super) fn outcome(&self) -> &Outcome {
        match self {
            Self::Rejected(rejection) => panic!("{rejection}"),
            Self::Judged(judged) => &judged.0,
        }
    }

    pub(super) fn into_history(self) -> History {
        match self {
            Self::Rejected(rejection) => panic!("{rejection}"),
            Self::Judged(judged) => judged.1,
        }
    }

    pub(super) fn diagnosis(&self) -> &str {
        let diagnosis = self.outcome().diagnosis.as_ref();
        diagnosis.map_or("none", |diagnosis| &diagnosis.code)
    }

    pub(super) fn took(&self, world: &World) -> Duration {
        match self {
            Self::Rejected(_) => Duration::ZERO,
            Self::Judged(judged) => world.now.since(judged.1.before.at),
        }
    }
}

/// An error that has no variant of its own.
pub(super) fn failed(text: &str) -> CallError {
    CallError::Failed {
        call: "set-vcpus".into(),
        code: "1".to_owned(),
        text: text.to_owned(),
    }
}

pub(super) fn ids(text: &str) -> IdSet {
    text.parse().unwrap()
}

/// A guest that brings CPUs online by itself.
pub(super) fn onlines() -> GuestBehavior {
    GuestBehavior {
        onlines_after: Some(ms(100)),
        ..GuestBehavior::default()
    }
}

/// The same guest without an agent.
pub(super) fn without_agent(behavior: GuestBehavior) -> GuestBehavior {
    GuestBehavior {
        agent: false,
        ..behavior
    }
}

/// Returns the sources of the evidence, each once.
pub(super) fn sources(ended: &Ended) -> Vec<Source> {
    let evidence = &ended.outcome().evidence;
    let mut sources: Vec<Source> = evidence.iter().map(|piece| piece.source).collect();
    sources.sort_unstable();
    sources.dedup();
    sources
}
