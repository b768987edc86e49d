//! The changes of one domain: its baseline, its open watches, and when to look next.

mod compare;

use std::collections::BTreeSet;
use std::time::Duration;

use super::change::{ChangeNumber, ChangedResource, ExternalChange};
use super::detach::DetachWatch;
use super::own::OwnChanges;
use super::standstill::Standstill;
use super::target;
use super::watch::{AmountWatch, Judged};
use crate::domain::{AttachedDevice, AttachedKind, Domain, DomainState, Stats};
use crate::hotplug::{Agent, Contact, Event, Observation, Patience, ResourceKind, Verdict};
use crate::units::Timestamp;

/// Maximum number of devices of a domain that are watched at a time.
pub const MAX_DETACHES: usize = 8;
/// Maximum number of events that are kept for a change that is not noticed yet.
const MAX_EVENTS: usize = 64;
/// Time for which such an event is kept: libvirt shows a change a moment later.
const KEEP_EVENTS: Duration = Duration::from_secs(10);
/// Time from an event to the look: a change of several vCPUs sends one for each.
const GATHER: Duration = Duration::from_millis(100);
/// Minimum time between two looks at a domain, whatever its guest sends. It doubles up to the maximum
/// after [`FREE_LOOKS`] that found nothing, until there was none for [`IDLE_AFTER`].
const LOOK_PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
const FREE_LOOKS: u32 = 6;
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// Pauses after looks that failed.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Pauses after a question that the guest agent did not answer.
const AGENT_PAUSES: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// Maximum number of vCPUs of a domain that is watched: it bounds the memory of its observations.
const MAX_VCPUS: usize = 4096;

#[derive(Debug, Clone, Copy)]
pub struct ExternalOptions {
    /// Time for a guest to follow a change.
    pub grace: Duration,
    pub patience: Patience,
    /// True if the domain's clients change devices always in the definition as well, as KubeVirt does.
    /// Then a device that is in the running domain only is one that the guest has not released.
    pub defines_devices: bool,
}

/// The result of one look at a domain.
#[derive(Debug, Clone)]
pub struct LookResult {
    pub seen: Observation,
    /// The disks and interfaces of the running domain.
    pub attached: Vec<AttachedDevice>,
    /// Those of its definition, if it has one and it was read.
    pub defined: Option<Vec<AttachedDevice>>,
}

/// The changes of one domain that others make.
#[derive(Debug)]
pub struct DomainChanges {
    options: ExternalOptions,
    /// The last observation.
    last: Option<Observation>,
    /// Later statistics and agent, which replace those of `last` once an observation of the domain
    /// that was started after them shows no change.
    candidate: Option<(Timestamp, Stats, Agent)>,
    attached: Vec<AttachedDevice>,
    defined: Option<Vec<AttachedDevice>>,
    /// Events that may belong to a change that is not noticed yet.
    events: Vec<(Timestamp, Event)>,
    /// vCPUs that another client had the guest asked to release.
    leaving: BTreeSet<u32>,
    /// Those of earlier requests that libvirt still counts.
    left: BTreeSet<u32>,
    watches: Vec<AmountWatch>,
    detaches: Vec<DetachWatch>,
    standstill: Standstill,
    look_at: Option<Timestamp>,
    /// Time of the last reason for a look. A look that was started before does not settle it.
    wanted: Option<Timestamp>,
    reads_definition: bool,
    /// Time of the last change of the definition: an earlier look does not show it.
    redefined_at: Option<Timestamp>,
    looked: Option<Timestamp>,
    /// Number of looks in a row that found nothing.
    idle: u32,
    retry: Duration,
    agent: Option<SilentAgentPause>,
    news: Vec<(ChangeNumber, Option<ExternalChange>)>,
    numbers: ChangeNumber,
    has_ended: bool,
}

/// The pause after an agent did not answer.
#[derive(Debug, Clone)]
struct SilentAgentPause {
    why: String,
    until: Timestamp,
    pause: Duration,
}

impl DomainChanges {
    /// Starts with a domain that is first looked at then.
    pub fn new(options: ExternalOptions, first_look: Timestamp) -> Self {
        Self {
            options,
            last: None,
            candidate: None,
            attached: Vec::new(),
            defined: None,
            events: Vec::new(),
            leaving: BTreeSet::new(),
            left: BTreeSet::new(),
            watches: Vec::new(),
            detaches: Vec::new(),
            standstill: Standstill::default(),
            look_at: Some(first_look),
            wanted: None,
            reads_definition: true,
            redefined_at: None,
            looked: None,
            idle: 0,
            retry: RETRY_PAUSES.0,
            agent: None,
            news: Vec::new(),
            numbers: 0,
            has_ended: false,
        }
    }

    /// Returns the time of the next look; `None` if only an event causes one.
    pub fn next_look(&self, now: Timestamp) -> Option<Timestamp> {
        if self.standstill.is_held() || self.has_ended {
            return None;
        }
        let watches = self.watches.iter().map(|watch| watch.next_look(now));
        let detaches = self.detaches.iter().map(|watch| watch.next_look(now));
        let due = watches.chain(detaches).min();
        // After a failure the pause decides.
        let due = due.map(|due| match self.looked {
            Some(looked) => due.max(looked.after(LOOK_PAUSES.0)),
            None => due,
        });
        let retry = self.standstill.is_unreachable().then_some(self.look_at);
        retry.unwrap_or_else(|| due.into_iter().chain(self.look_at).min())
    }

    /// True if the next look needs the guest agent.
    pub fn asks_agent(&self, now: Timestamp) -> bool {
        let is_due = self.agent.as_ref().is_none_or(|agent| now >= agent.until);
        let is_wanted = self.last.is_none() || self.watch(ResourceKind::Vcpus).is_some();
        is_due && is_wanted
    }

    /// True if the next look needs the devices of the definition.
    pub fn asks_definition(&self) -> bool {
        self.reads_definition || !self.detaches.is_empty()
    }

    /// True if the domain ended: nothing more happens to it.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Returns the number of changes without a verdict.
    pub fn open(&self) -> usize {
        let watches = self.watches.iter().filter(|watch| watch.is_open()).count();
        let detaches = self.detaches.iter().filter(|watch| watch.is_open());
        watches + detaches.count()
    }

    /// Returns the changes that the guest has not taken.
    pub fn not_taken(&self) -> impl Iterator<Item = (ChangeNumber, &ExternalChange)> {
        let watches = self
            .watches
            .iter()
            .map(|watch| (watch.number, &watch.change));
        let detaches = self
            .detaches
            .iter()
            .map(|watch| (watch.number, &watch.change));
        watches
            .chain(detaches)
            .filter(|(_, change)| change.is_not_taken())
    }

    /// Takes the records that changed since the last call; `None` for one that is void.
    pub fn news(&mut self) -> Vec<(ChangeNumber, Option<ExternalChange>)> {
        std::mem::take(&mut self.news)
    }

    /// Takes note of virtnode's own operations. Must be called when they change, and before every other
    /// input.
    pub fn own(&mut self, now: Timestamp, own: &OwnChanges) {
        for kind in ResourceKind::ALL {
            if own.holds_kind(kind) {
                self.drop_watch(kind);
            }
        }
        let was_held = self.standstill.is_held();
        self.standstill.set_held(own.holds());
        self.set_clocks(now);
        if was_held && !own.holds() {
            self.look_soon(now);
        }
    }

    /// Takes an event of QEMU or libvirt.
    pub fn happened(&mut self, now: Timestamp, at: Timestamp, event: Event, own: &OwnChanges) {
        match &event {
            Event::Paused => self.standstill.set_paused(true),
            Event::Resumed => self.standstill.set_paused(false),
            Event::Reset => {
                self.standstill.boots(at);
                self.events.clear();
                for watch in &mut self.detaches {
                    watch.reset(at);
                }
            }
            Event::Stopped(_) => return self.stopped(at, event),
            _ => {}
        }
        self.set_clocks(now);
        for watch in &mut self.watches {
            watch.happened(at, event.clone());
        }
        if self.events.len() >= MAX_EVENTS {
            self.events.remove(0);
        }
        self.events.push((at, event.clone()));
        if let Some(leaving) = target::leaving_vcpu(&event) {
            self.leaves(now, at, leaving, own);
        }
        if let Event::UnplugFailed { device } = &event {
            self.refused(now, device);
        }
        self.judge(now);
        self.look_soon(now);
    }

    /// The domain was started (then it boots), migrated here or restored.
    pub fn started(&mut self, now: Timestamp, boots: bool) {
        let mut news = std::mem::take(&mut self.news);
        let numbers = self.numbers;
        self.end(now);
        news.append(&mut self.news);
        *self = Self {
            news,
            numbers: self.numbers.max(numbers),
            ..Self::new(self.options, now)
        };
        if boots {
            self.standstill.boots(now);
        }
    }

    /// The definition of the domain changed.
    pub fn redefined(&mut self, now: Timestamp) {
        self.reads_definition = true;
        self.redefined_at = Some(now);
        self.look_soon(now);
    }

    /// The guest agent connected or disconnected.
    pub fn agent_changed(&mut self, now: Timestamp, connected: bool) {
        if connected {
            self.standstill.has_booted();
            self.agent = None;
        }
        self.set_clocks(now);
        if !self.watches.is_empty() {
            self.look_soon(now);
        }
    }

    /// Events may have been lost: what is watched is looked at, and the rest is compared by
    /// [`Self::compared`].
    pub fn missed_events(&mut self, now: Timestamp) {
        self.standstill.set_unreachable(false);
        self.retry = RETRY_PAUSES.0;
        if self.last.is_none() || self.open() > 0 {
            self.look_soon(now);
        }
    }

    /// Compares the domain with statistics that were read then, and with the amounts and the agent of an
    /// observation by the monitor, if there is one.
    pub fn compared(
        &mut self,
        now: Timestamp,
        (at, stats, state): (Timestamp, &Stats, DomainState),
        details: Option<(Timestamp, &Domain, &Agent)>,
    ) {
        let Some(last) = &self.last else { return };
        let counted = stats.vcpu_count;
        let plugged = last.domain.vcpus.plugged();
        let mut differs = counted.is_some_and(|counted| counted != plugged);
        differs |= state.runs() == self.standstill.is_paused();
        if let Some((read, domain, _)) = details.filter(|(read, ..)| *read >= last.at) {
            for kind in ResourceKind::ALL {
                differs |= target::amount(kind, domain) != target::amount(kind, &last.domain);
            }
            differs |= self.has_other_devices(domain);
            let passed = self.candidate.as_ref().is_some_and(|(at, ..)| read >= *at);
            if !differs && passed {
                self.promote_candidate();
            }
        }
        if differs {
            self.look_soon(now);
        } else if self.candidate.is_none() {
            let agent = details.map_or(Agent::NotAsked, |(_, _, agent)| agent.clone());
            self.candidate = Some((at, stats.clone(), agent));
        }
    }

    /// True if a disk or interface of the domain is new, or one left.
    fn has_other_devices(&self, domain: &Domain) -> bool {
        let aliases = || {
            self.attached
                .iter()
                .filter_map(|device| device.alias.as_ref())
        };
        let is_there = |alias: &String| domain.devices.iter().any(|device| device.alias == *alias);
        let is_attached = |kind: &str| AttachedKind::ALL.iter().any(|k| k.as_str() == kind);
        let mut new = domain.devices.iter().filter(|device| {
            is_attached(&device.kind) && !aliases().any(|alias| *alias == device.alias)
        });
        !aliases().all(is_there) || new.next().is_some()
    }

    fn promote_candidate(&mut self) {
        if let (Some((_, stats, agent)), Some(last)) = (self.candidate.take(), &mut self.last) {
            last.stats = Some(stats);
            if matches!(agent, Agent::Answered(_)) {
                last.agent = agent;
            }
        }
    }

    /// The domain is not among the running ones: a look shows why.
    pub fn missing(&mut self, now: Timestamp) {
        self.look_soon(now);
    }

    /// Ends the changes without a verdict as unverifiable, because too many domains have some.
    pub fn overload(&mut self, now: Timestamp) {
        let message = "changes of too many domains had to be verified at the same time, so this one was \
                       not";
        let mut changes: Vec<(ChangeNumber, ExternalChange)> = Vec::new();
        self.watches.retain(|watch| {
            if watch.is_open() {
                changes.push((watch.number, watch.change.clone()));
            }
            !watch.is_open()
        });
        self.detaches.retain(|watch| {
            if watch.is_open() {
                changes.push((watch.number, watch.change.clone()));
            }
            !watch.is_open()
        });
        for (number, mut change) in changes {
            if !change.found {
                let verdict = Verdict::Unverifiable;
                change.conclude(verdict, message, Vec::new(), None, now);
                self.news.push((number, Some(change)));
            }
        }
    }

    /// True if the guest agent did not answer the last question.
    pub fn has_silent_agent(&self) -> bool {
        self.agent.is_some()
    }

    /// Takes a look that failed.
    pub fn unobserved(&mut self, now: Timestamp, contact: &Contact) {
        self.looked = Some(now);
        match contact {
            Contact::Absent => return self.end(now),
            Contact::Held => self.standstill.set_job(true),
            Contact::Unreachable(_) => self.standstill.set_unreachable(true),
        }
        self.set_clocks(now);
        self.look_at = Some(now.after(self.retry));
        self.retry = (self.retry * 2).min(RETRY_PAUSES.1);
    }

    /// Takes a look.
    pub fn observed(&mut self, now: Timestamp, look: LookResult, own: &OwnChanges) {
        let LookResult {
            mut seen,
            attached,
            defined,
        } = look;
        self.take_agent(now, &mut seen);
        if seen.domain.vcpus.each.len() > MAX_VCPUS {
            return self.end(now);
        }
        let restarted = self
            .last
            .as_ref()
            .is_some_and(|last| last.domain.id != seen.domain.id);
        if restarted {
            self.started(now, false);
        }
        if self
            .looked
            .is_none_or(|last| seen.at.since(last) > IDLE_AFTER)
        {
            self.idle = 0;
        }
        self.looked = Some(seen.at);
        if self.wanted.is_none_or(|wanted| wanted <= seen.at) {
            self.look_at = None;
        }
        self.retry = RETRY_PAUSES.0;
        self.standstill.observed(&seen);
        self.set_clocks(now);
        let first = self.last.is_none();
        let mut news = first;
        for kind in ResourceKind::ALL {
            news |= self.compare_amount(now, kind, &seen, own);
        }
        self.compare_devices(now, &seen, attached, defined);
        // The look that noticed a change of vCPUs did not ask the agent, so it proves nothing yet.
        let may_answer = seen.domain.agent.may_answer() && seen.domain.state.runs();
        let lacks_agent = seen.agent == Agent::NotAsked && may_answer;
        for watch in &mut self.watches {
            if !(lacks_agent && watch.change.resource == ChangedResource::Vcpus) {
                watch.observed(seen.clone());
            }
        }
        let keep_from = seen.at;
        self.events
            .retain(|(at, _)| at.after(KEEP_EVENTS) >= keep_from);
        let plugged = seen.domain.vcpus.plugged_ids();
        self.left.retain(|id| plugged.contains(*id));
        self.candidate = None;
        self.last = Some(seen);
        if first {
            self.find(own, now);
        }
        self.judge(now);
        let found = news || self.open() > 0;
        self.idle = if found {
            0
        } else {
            self.idle.saturating_add(1)
        };
    }

    /// Puts the last error of a silent agent in place of a question that was left out, and starts a pause
    /// after a silent one.
    fn take_agent(&mut self, now: Timestamp, seen: &mut Observation) {
        let may_answer = seen.domain.agent.may_answer() && seen.domain.state.runs();
        match (&seen.agent, &self.agent) {
            (Agent::NotAsked, Some(silent)) if may_answer && now < silent.until => {
                seen.agent = Agent::Silent(silent.why.clone());
            }
            (Agent::Silent(why), silent) => {
                let pause = silent.as_ref().map_or(AGENT_PAUSES.0, |silent| {
                    (silent.pause * 2).min(AGENT_PAUSES.1)
                });
                self.agent = Some(SilentAgentPause {
                    why: why.clone(),
                    until: now.after(pause),
                    pause,
                });
            }
            (Agent::Answered(_) | Agent::Refused(_), _) => self.agent = None,
            (Agent::NotAsked | Agent::NotQueried(_), _) => {}
        }
    }

    fn refused(&mut self, now: Timestamp, alias: &str) {
        let last = self.last.as_ref();
        let uuid = last.and_then(|last| last.domain.uuid.clone());
        for watch in &mut self.detaches {
            if watch.device.alias.as_deref() == Some(alias)
                && watch.refused(now, uuid.as_deref().unwrap_or_default())
            {
                self.news.push((watch.number, Some(watch.change.clone())));
            }
        }
    }

    fn stopped(&mut self, at: Timestamp, event: Event) {
        for watch in &mut self.watches {
            watch.happened(at, event.clone());
        }
        self.judge(at);
        self.end(at);
    }

    /// Ends all watches: the domain no longer runs.
    fn end(&mut self, now: Timestamp) {
        for watch in &mut self.watches {
            watch.is_absent(now);
        }
        self.judge(now);
        for mut watch in std::mem::take(&mut self.detaches) {
            if watch.is_open() {
                watch.ended(now);
                let change = (!watch.change.found).then_some(watch.change);
                self.news.push((watch.number, change));
            }
        }
        self.watches.clear();
        self.has_ended = true;
    }

    /// Judges every watch, and removes those that are over.
    fn judge(&mut self, now: Timestamp) {
        let mut index = 0;
        while let Some(watch) = self.watches.get_mut(index) {
            let was_open = watch.is_open();
            let judged = watch.judge(now);
            let (number, change) = (watch.number, &watch.change);
            // A state that was found is shown once it is known that the guest lacks something.
            let is_shown = !change.found || change.is_not_taken() || !was_open;
            if judged != Judged::Same && is_shown {
                self.news.push((number, Some(change.clone())));
            }
            if change.found && was_open && !watch.is_open() && !is_shown {
                self.watches.remove(index);
                continue;
            }
            if judged == Judged::Ended {
                self.watches.remove(index);
            } else {
                index += 1;
            }
        }
    }

    fn drop_watch(&mut self, kind: ResourceKind) {
        let resource = kind.into();
        if let Some(at) = self
            .watches
            .iter()
            .position(|watch| watch.change.resource == resource)
        {
            let watch = self.watches.swap_remove(at);
            if watch.is_open() {
                self.news.push((watch.number, None));
            }
        }
    }

    fn watch(&self, kind: ResourceKind) -> Option<&AmountWatch> {
        let resource = kind.into();
        let mut watches = self.watches.iter();
        watches.find(|watch| watch.change.resource == resource)
    }

    fn watch_mut(&mut self, kind: ResourceKind) -> Option<&mut AmountWatch> {
        let resource = kind.into();
        let mut watches = self.watches.iter_mut();
        watches.find(|watch| watch.change.resource == resource)
    }

    /// Reports an open watch, unless its state was found.
    fn report(&mut self, kind: ResourceKind) {
        let watch = self.watch(kind).filter(|watch| !watch.change.found);
        let news = watch.map(|watch| (watch.number, Some(watch.change.clone())));
        self.news.extend(news);
    }

    fn next_number(&mut self) -> ChangeNumber {
        self.numbers += 1;
        self.numbers
    }

    fn set_clocks(&mut self, now: Timestamp) {
        let runs = self.standstill.runs(now);
        for watch in &mut self.watches {
            watch.clock.set_running(now, runs);
        }
        for watch in &mut self.detaches {
            watch.clock.set_running(now, runs);
        }
    }

    /// Schedules a look shortly after an event.
    fn look_soon(&mut self, now: Timestamp) {
        let doubled = self.idle.saturating_sub(FREE_LOOKS).min(16);
        let pause = LOOK_PAUSES
            .0
            .saturating_mul(1 << doubled)
            .min(LOOK_PAUSES.1);
        let earliest = self.looked.map_or(now, |looked| looked.after(pause));
        self.wanted = Some(now);
        let at = now.after(GATHER).max(earliest);
        self.look_at = Some(self.look_at.map_or(at, |due| due.min(at)));
    }
}
