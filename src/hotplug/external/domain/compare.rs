//! Comparison of a domain with its baseline: what changed starts or extends a watch.

use std::cmp::Ordering;

use super::{DomainChanges, LOOK_PAUSES, MAX_DETACHES};
use crate::domain::AttachedDevice;
use crate::hotplug::external::change::{ChangeNumber, ExternalAction};
use crate::hotplug::external::clock::GraceClock;
use crate::hotplug::external::detach::DetachWatch;
use crate::hotplug::external::own::OwnChanges;
use crate::hotplug::external::target::{self, LeavingVcpu};
use crate::hotplug::external::watch::AmountWatch;
use crate::hotplug::{Amount, HotplugRequest, Observation, Plan, ResourceKind};
use crate::units::Timestamp;

impl DomainChanges {
    /// Starts or extends the watch of a changed amount. Returns true if the amount changed.
    pub(super) fn compare_amount(
        &mut self,
        now: Timestamp,
        kind: ResourceKind,
        seen: &Observation,
        own: &OwnChanges,
    ) -> bool {
        let Some(last) = &self.last else { return false };
        let was = target::amount(kind, &last.domain);
        let is = target::amount(kind, &seen.domain);
        if was == is {
            return false;
        }
        if own.explains(is, now) {
            self.drop_watch(kind);
            return true;
        }
        let before = &self.before(kind).unwrap_or(last).domain;
        let plan = target::plan(kind, before, &seen.domain);
        let request = target::request(is);
        if let Some(watch) = self.watch(kind).filter(|watch| watch.is_open()) {
            // libvirt noticed what the guest released.
            if watch.target() == is {
                return true;
            }
            let at = seen.at;
            if let Some(watch) = self.watch_mut(kind) {
                watch.set_target(request, plan, was, at);
            }
            self.report(kind);
            return true;
        }
        let events = self.events.iter().filter(|(at, _)| *at >= last.at);
        let (had, has) = (&last.domain, &seen.domain);
        let caused = events.filter(|(_, event)| target::is_caused_by(kind, had, has, event));
        let at = caused
            .map(|(at, _)| *at)
            .min()
            .unwrap_or(seen.at)
            .min(seen.at);
        let before = last.clone();
        self.start_watch(now, (request, Some((plan, was))), before, at, false);
        true
    }

    /// Returns the observation before an open change.
    fn before(&self, kind: ResourceKind) -> Option<&Observation> {
        let watch = self.watch(kind).filter(|watch| watch.is_open())?;
        Some(watch.before())
    }

    fn start_watch(
        &mut self,
        now: Timestamp,
        (request, target): (HotplugRequest, Option<(Plan, Amount)>),
        before: Observation,
        at: Timestamp,
        found: bool,
    ) {
        let kind = request.kind();
        self.drop_watch(kind);
        let clock = GraceClock::new(self.options.grace, now, self.standstill.runs(now));
        let number = self.next_number();
        let patience = self.options.patience;
        let mut watch =
            AmountWatch::new(number, request.clone(), before, at, clock, patience, found);
        if let Some((plan, was)) = target {
            watch.set_target(request, plan, was, at);
        }
        for (happened, event) in &self.events {
            if *happened >= at {
                watch.happened(*happened, event.clone());
            }
        }
        self.watches.push(watch);
        self.report(kind);
    }

    /// A vCPU leaves, which older libvirts do not show.
    pub(super) fn leaves(
        &mut self,
        now: Timestamp,
        at: Timestamp,
        vcpu: LeavingVcpu,
        own: &OwnChanges,
    ) {
        let kind = ResourceKind::Vcpus;
        let Some(last) = &self.last else { return };
        let is_plugged = last.domain.vcpus.plugged_ids().contains(vcpu.id);
        if self.standstill.is_held() || own.explains_release(kind, now) || !is_plugged {
            return;
        }
        let open = self
            .watch(kind)
            .filter(|watch| watch.is_open() && watch.change.action == ExternalAction::Unplug);
        let before = open.map_or(last, |watch| watch.before()).clone();
        let unplugs = open.is_some();
        if !unplugs {
            self.left.append(&mut self.leaving);
            // A vCPU that was kept or not noticed is asked for again; other events come twice.
            if vcpu.is_request {
                self.left.remove(&vcpu.id);
            }
        }
        if self.left.contains(&vcpu.id) || !self.leaving.insert(vcpu.id) {
            return;
        }
        let leaving = u32::try_from(self.leaving.len()).unwrap_or(u32::MAX);
        let count = before.domain.vcpus.plugged().saturating_sub(leaving);
        if count == 0 {
            return;
        }
        let was = target::amount(kind, &before.domain);
        let (request, plan) = (target::vcpus_request(count), target::vcpus_plan(count));
        if !unplugs {
            self.start_watch(now, (request, Some((plan, was))), before, at, false);
            return;
        }
        let is_less = |watch: &&mut AmountWatch| {
            let wanted = request.amount().compare(watch.target());
            wanted == Some(Ordering::Less)
        };
        if let Some(watch) = self.watch_mut(kind).filter(is_less) {
            watch.set_target(request, plan, was, at);
            self.report(kind);
        }
    }

    /// Watches what the guest of a domain lacks that is seen for the first time.
    pub(super) fn find(&mut self, own: &OwnChanges, now: Timestamp) {
        let Some(last) = self.last.clone() else {
            return;
        };
        for kind in ResourceKind::ALL {
            let amount = target::amount(kind, &last.domain);
            if target::lacks(kind, &last) && !own.explains(amount, now) {
                let at = last.at;
                self.start_watch(now, (target::request(amount), None), last.clone(), at, true);
            }
        }
    }

    pub(super) fn compare_devices(
        &mut self,
        now: Timestamp,
        seen: &Observation,
        attached: Vec<AttachedDevice>,
        defined: Option<Vec<AttachedDevice>>,
    ) {
        let is_current = self.redefined_at.is_none_or(|at| seen.at >= at);
        let first = self.defined.is_none();
        let has = |list: &[AttachedDevice], device: &AttachedDevice| {
            list.iter().any(|other| other.is(device))
        };
        // Released.
        for device in std::mem::take(&mut self.attached) {
            if !has(&attached, &device) {
                self.released(now, &device);
            }
        }
        if let Some(defined) = defined {
            self.reads_definition &= !is_current;
            for device in &attached {
                let was_defined = self.defined.as_ref().is_some_and(|old| has(old, device));
                let is_pending = !has(&defined, device)
                    && (was_defined || first && self.options.defines_devices);
                let is_watched = self.detaches.iter().any(|watch| watch.device.is(device));
                if is_pending && !is_watched && self.detaches.len() < MAX_DETACHES {
                    self.start_detach(now, seen.at, device.clone(), first);
                }
            }
            let again: Vec<ChangeNumber> = self
                .detaches
                .iter()
                .filter(|watch| has(&defined, &watch.device))
                .map(|watch| watch.number)
                .collect();
            for number in again {
                self.detaches.retain(|watch| watch.number != number);
                self.news.push((number, None));
            }
            self.defined = Some(defined);
        } else if !seen.persistent {
            self.reads_definition &= !is_current;
            self.defined = None;
        } else if self.reads_definition {
            // The domain was started since this look began.
            self.look_at = Some(now.after(LOOK_PAUSES.0));
        }
        self.attached = attached;
        let uuid = seen.domain.uuid.clone().unwrap_or_default();
        for watch in &mut self.detaches {
            if watch.still_there(seen.at, now, &uuid) {
                self.news.push((watch.number, Some(watch.change.clone())));
            }
        }
    }

    fn start_detach(&mut self, now: Timestamp, at: Timestamp, device: AttachedDevice, found: bool) {
        let clock = GraceClock::new(self.options.grace, now, self.standstill.runs(now));
        let number = self.next_number();
        let watch = DetachWatch::new(number, device, at, clock, found);
        if !found {
            self.news.push((number, Some(watch.change.clone())));
        }
        self.detaches.push(watch);
    }

    /// A device left the running domain.
    fn released(&mut self, now: Timestamp, device: &AttachedDevice) {
        let at = self
            .detaches
            .iter()
            .position(|watch| watch.device.is(device));
        let mut watch = match at {
            Some(at) => self.detaches.swap_remove(at),
            None => {
                let clock = GraceClock::new(self.options.grace, now, true);
                DetachWatch::new(self.next_number(), device.clone(), now, clock, false)
            }
        };
        let was_open = watch.is_open();
        watch.released(now);
        let is_void = watch.change.found && was_open;
        let change = (!is_void).then_some(watch.change);
        self.news.push((watch.number, change));
    }
}
