//! The reactions of the simulated hypervisor and its guest.

use super::*;
use crate::units::KiB;

impl World {
    pub(super) fn call(&mut self, action: &Action) {
        self.made.push(action.clone());
        if let Some(error) = self.fails.clone() {
            return self.later(self.call_takes, Effect::Return(Return::Failed(error)));
        }
        let mut how = (self.call_takes, Return::Done);
        match action {
            Action::SetVcpus { count, .. } => {
                let plugged = self.enabled();
                for id in (0..*count).filter(|id| !plugged.contains(id)) {
                    self.set_enabled(id, true);
                    self.qemu.insert(id);
                    self.times.insert(id, 0);
                    self.later(ms(30), Effect::GuestSeesCpu(id));
                }
                for id in plugged.into_iter().filter(|id| id >= count).rev() {
                    if !self.qemu.contains(&id) && self.rejects_repeats {
                        let text = "An error occurred, but the cause is unknown";
                        how.1 = Return::Failed(failed(text));
                        break;
                    }
                    if !self.qemu.contains(&id) {
                        self.set_enabled(id, false); // QEMU says it has no such device
                        continue;
                    }
                    self.later(ms(20), Effect::GuestEjects(id));
                    // libvirt waits for this vCPU and does not continue with the next.
                    let keeps = self.behavior.unresponsive || self.behavior.keeps == Some(id);
                    if self.misses_removals || keeps {
                        let error = CallError::UnplugPending {
                            call: "set-vcpus".into(),
                            text: "vcpu unplug request timed out. Unplug result must be manually \
                                   inspected in the domain"
                                .to_owned(),
                        };
                        how = (ms(5000), Return::Failed(error));
                        break;
                    }
                    how.0 += ms(100);
                }
            }
            Action::OnlineVcpus { ids } => {
                if self.behavior.stuck {
                    how.1 = Return::Failed(CallError::AgentSilent {
                        call: "set-guest-vcpus".into(),
                        text: "Input/output error".to_owned(),
                    });
                } else {
                    self.online.extend(ids.iter());
                }
            }
            Action::ResizeVirtioMem {
                alias, requested, ..
            } => {
                let device = self.domain.memory.devices.iter_mut();
                let mut device = device.filter(|device| device.alias.as_ref() == Some(alias));
                device.next().unwrap().requested = Some((*requested).into());
                self.later(ms(100), Effect::GuestResizes(alias.clone()));
            }
            Action::AttachDimm {
                alias, size, node, ..
            } => {
                let slot = u32::try_from(self.domain.memory.dimms().count()).unwrap();
                self.domain.memory.devices.push(MemoryDevice {
                    model: MemoryModel::Dimm,
                    alias: Some(alias.clone()),
                    size: (*size).into(),
                    requested: None,
                    current: None,
                    block: None,
                    node: *node,
                    slot: Some(slot),
                });
                self.later(ms(60), Effect::GuestSeesDimm(alias.clone()));
            }
            Action::SetStatsPeriod { seconds, .. } => {
                let had = self.domain.balloon.stats_period;
                self.domain.balloon.stats_period = Some(*seconds).filter(|seconds| *seconds > 0);
                if *seconds > 0 && self.behavior.reports_total {
                    // Without an earlier period QEMU asks at once, else a period later.
                    let first = had.map_or(self.call_takes, |_| Duration::from_secs(1));
                    let of_timer =
                        |(_, effect): &(_, Effect)| matches!(effect, Effect::ReportsTotal);
                    self.pending.retain(|pending| !of_timer(pending));
                    self.later(first, Effect::ReportsTotal);
                }
            }
        }
        self.later(how.0, Effect::Return(how.1));
    }

    pub(super) fn apply(&mut self, effect: Effect) {
        let runs = self.domain.state.runs() && !self.behavior.unresponsive && !self.gone;
        match effect {
            Effect::Return(how) => self.returned.push((self.now, how)),
            Effect::Scheduled(change) => self.change(change),
            Effect::ShowsBalloon(more) => self.held = self.held.saturating_add(more),
            Effect::ReportsTotal => {
                let Some(period) = self.domain.balloon.stats_period else {
                    return;
                };
                if runs {
                    self.reported = Some((self.total, seconds_of(self.now)));
                }
                self.later(Duration::from_secs(period.into()), Effect::ReportsTotal);
            }
            // A paused guest acts after it is resumed.
            effect if self.domain.state == DomainState::Paused => self.later(ms(50), effect),
            _ if !runs => {}
            Effect::GuestSeesCpu(id) => {
                let name = Some(format!("vcpu{id}"));
                if let Some(status) = self.behavior.refuses {
                    return self.ost(name, id, SlotKind::Cpu, 1, status);
                }
                // The guest answers success even if it drops the CPU.
                if self.has.len() < self.behavior.nr_cpus as usize {
                    self.has.insert(id);
                    if let Some(after) = self.behavior.onlines_after {
                        self.later(after, Effect::GuestOnlines(id));
                    }
                }
                self.ost(name, id, SlotKind::Cpu, 1, 0);
            }
            Effect::GuestOnlines(id) => {
                if self.has.contains(&id) && !self.behavior.stuck {
                    self.online.insert(id);
                }
            }
            Effect::GuestEjects(id) => {
                let name = format!("vcpu{id}");
                self.ost(Some(name.clone()), id, SlotKind::Cpu, 3, 0x84);
                if self.behavior.keeps == Some(id) {
                    return self.ost(Some(name), id, SlotKind::Cpu, 3, 0x82);
                }
                self.has.remove(&id);
                self.online.remove(&id);
                self.qemu.remove(&id);
                self.times.remove(&id);
                self.event(Event::DeviceDeleted {
                    device: None,
                    path: format!("/machine/peripheral/{name}/lapic"),
                });
                self.ost(None, id, SlotKind::Cpu, 3, 0);
                if !self.misses_removals {
                    self.set_enabled(id, false);
                }
            }
            Effect::GuestResizes(alias) => self.resize(&alias),
            Effect::GuestSeesDimm(alias) => {
                let size = self.domain.memory.device(&alias).unwrap().size;
                let status = self.behavior.refuses.unwrap_or(0);
                if status == 0 && self.behavior.blocks_online {
                    self.total = self.total.saturating_add(size);
                }
                self.ost(Some(alias), 0, SlotKind::Dimm, 1, status);
            }
        }
    }

    fn resize(&mut self, alias: &str) {
        if !self.behavior.virtio_mem {
            return;
        }
        let behavior = self.behavior.clone();
        let mut devices = self.domain.memory.devices.iter_mut();
        let device = devices
            .find(|device| device.alias.as_deref() == Some(alias))
            .unwrap();
        let (requested, current) = (device.asked(), device.plugged());
        let step = mib(128);
        let next = if requested > current {
            current
                .saturating_add(step)
                .min(requested)
                .min(behavior.takes_at_most)
        } else {
            current
                .saturating_sub(step)
                .max(requested)
                .max(behavior.pinned.min(current))
        };
        device.current = Some(next);
        if next == current {
            return;
        }
        if behavior.blocks_online {
            self.total = self.total.saturating_add(next).saturating_sub(current);
        }
        self.event(Event::MemorySize {
            device: alias.to_owned(),
            size: next,
        });
        self.later(ms(150), Effect::GuestResizes(alias.to_owned()));
    }

    fn change(&mut self, change: WorldChange) {
        match change {
            WorldChange::Destroy => {
                self.gone = true;
                self.event(Event::Stopped("destroyed".to_owned()));
            }
            WorldChange::Pause => {
                self.domain.state = DomainState::Paused;
                self.event(Event::Paused);
            }
            WorldChange::Resume => {
                self.domain.state = DomainState::Running;
                self.event(Event::Resumed);
            }
            WorldChange::Reset => {
                self.event(Event::Reset);
                // The guest finds all CPUs that QEMU has, and boots as many as it has room for.
                let room = self.behavior.nr_cpus as usize;
                self.has = self.qemu.iter().copied().take(room).collect();
                self.online = self.has.clone();
                self.reported = None;
            }
            WorldChange::AgentDies => self.behavior.agent = false,
            WorldChange::LosesLibvirt => {
                self.lost = true;
                let error = CallError::Unavailable("Connection reset".to_owned());
                self.returned.push((self.now, Return::Failed(error)));
            }
            WorldChange::FindsLibvirt => self.lost = false,
            WorldChange::FreesMemory => {
                self.behavior.pinned = Bytes::ZERO;
                self.later(ms(10), Effect::GuestResizes("ua-mem0".to_owned()));
            }
            WorldChange::Hangs => self.behavior.unresponsive = true,
            WorldChange::Resizes(requested) => {
                self.domain.memory.devices[0].requested = Some(requested);
                self.later(ms(100), Effect::GuestResizes("ua-mem0".to_owned()));
            }
            WorldChange::Inflates(more) => {
                self.total = self.total.saturating_sub(more);
                self.later(ms(1000), Effect::ShowsBalloon(more));
            }
            WorldChange::Runs(id) => *self.times.entry(id).or_default() += 50,
            WorldChange::Claims(count) => self.claims = Some(count),
            WorldChange::AnotherSets(count) => {
                let persist = false;
                self.by_another(&Action::SetVcpus { count, persist });
            }
            WorldChange::AnotherResizes(size) => {
                let alias = "ua-mem0".to_owned();
                let requested = KiB::try_from(size).unwrap();
                let persist = false;
                self.by_another(&Action::ResizeVirtioMem {
                    alias,
                    requested,
                    persist,
                });
            }
            WorldChange::Onlines(id) => self.apply(Effect::GuestOnlines(id)),
        }
    }

    fn by_another(&mut self, action: &Action) {
        let (made, pending) = (self.made.len(), self.pending.len());
        self.call(action);
        self.made.truncate(made);
        // The other client gets the answer.
        let mut index = 0;
        self.pending.retain(|(_, effect)| {
            index += 1;
            index <= pending || !matches!(effect, Effect::Return(_))
        });
    }
}
