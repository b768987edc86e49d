//! The vCPUs that left each domain since its emulator started.
//!
//! Observations of operations, and the events of all domains while the process runs, are added; the
//! journal keeps them over restarts. Changes by other clients while virtnode is not running are
//! noticed if the number of vCPUs differs afterward.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::domain::DomainRef;
use crate::hotplug::{Event, Observation, VcpuLife};
use crate::hypervisor::{Change, Notice, Notices};

#[derive(Debug, Default)]
pub(super) struct VcpuLives(Mutex<HashMap<DomainRef, VcpuLife>>);

impl VcpuLives {
    /// Adds every event until there are no more.
    pub(super) async fn follow(&self, mut notices: Notices) {
        while let Some(notice) = notices.next().await {
            let Notice::Change { domain, change, .. } = notice else {
                continue;
            };
            match change {
                Change::Started | Change::Arrived | Change::Event(Event::Stopped(_)) => {
                    self.lock().remove(&domain);
                }
                Change::Event(event @ (Event::DeviceDeleted { .. } | Event::Ost(_))) => {
                    self.lock().entry(domain).or_default().happened(&event);
                }
                _ => {}
            }
        }
    }

    pub(super) fn observe(&self, domain: &DomainRef, seen: &Observation) {
        let mut lives = self.lock();
        lives.entry(domain.clone()).or_default().observe(seen);
    }

    pub(super) fn released(&self, domain: &DomainRef) -> u32 {
        self.lock().get(domain).map_or(0, VcpuLife::released)
    }

    /// Returns what the journal keeps of a domain.
    pub(super) fn get(&self, domain: &DomainRef) -> Option<VcpuLife> {
        self.lock().get(domain).cloned()
    }

    /// Restores a domain's vCPUs from the journal. A later entry replaces an earlier one.
    pub(super) fn restore(&self, domain: DomainRef, life: VcpuLife) {
        self.lock().insert(domain, life);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DomainRef, VcpuLife>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
