//! The records of changes by other clients, for readers: the local API, metrics, the API server.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::domain::DomainRef;
use crate::hotplug::Verdict;
use crate::hotplug::external::{ChangeNumber, ChangedResource, ExternalAction, ExternalChange};
use crate::operation::{OperationId, TargetDomain};
use crate::units::Timestamp;

/// Maximum number of records: a record is below 16 KiB.
const MAX_RECORDS: usize = 128;
/// Maximum number of records of one domain, so that none displaces all others.
const MAX_OF_DOMAIN: usize = 8;

/// A change by another client. Its shape is a contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalRecord {
    pub id: OperationId,
    pub domain: TargetDomain,
    #[serde(flatten)]
    pub change: ExternalChange,
}

/// A change that the guest of a running domain has not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotTaken {
    pub domain: DomainRef,
    pub resource: ChangedResource,
    pub action: ExternalAction,
    pub device: Option<String>,
    pub verdict: Verdict,
    pub message: String,
    /// Time of the verdict.
    pub since: Timestamp,
}

/// Records in memory, the newest last. They end with the process.
#[derive(Debug)]
pub struct ChangeLog {
    records: Mutex<VecDeque<(DomainRef, ChangeNumber, ExternalRecord)>>,
    by_domain: Mutex<BTreeMap<DomainRef, Vec<NotTaken>>>,
    not_taken: watch::Sender<Arc<[NotTaken]>>,
}

impl Default for ChangeLog {
    fn default() -> Self {
        Self {
            records: Mutex::default(),
            by_domain: Mutex::default(),
            not_taken: watch::Sender::new(Arc::from([])),
        }
    }
}

impl ChangeLog {
    /// Returns the records, the newest first.
    pub fn records(&self) -> Vec<ExternalRecord> {
        let records = self.lock_records();
        records
            .iter()
            .rev()
            .map(|(.., record)| record.clone())
            .collect()
    }

    /// Returns what guests have not taken, sorted by domain, with its changes.
    pub fn not_taken(&self) -> watch::Receiver<Arc<[NotTaken]>> {
        self.not_taken.subscribe()
    }

    /// Adds or replaces the record of a change, or removes that of a void one.
    pub(super) fn update(
        &self,
        domain: &DomainRef,
        number: ChangeNumber,
        change: Option<ExternalChange>,
    ) {
        let mut records = self.lock_records();
        let known = records
            .iter()
            .position(|(of, known, _)| of == domain && *known == number);
        let Some(change) = change else {
            known.and_then(|at| records.remove(at));
            return;
        };
        if let Some((.., record)) = known.and_then(|at| records.get_mut(at)) {
            record.change = change;
            return;
        }
        let of_domain = |(of, ..): &&(DomainRef, ChangeNumber, ExternalRecord)| of == domain;
        if records.iter().filter(of_domain).count() >= MAX_OF_DOMAIN {
            let oldest = records.iter().position(|(of, ..)| of == domain);
            oldest.and_then(|at| records.remove(at));
        } else if records.len() >= MAX_RECORDS {
            records.pop_front();
        }
        let millis = u64::try_from(change.noticed.as_millis()).unwrap_or(0);
        let record = ExternalRecord {
            id: OperationId::new(millis, fastrand::u32(..)),
            domain: domain.into(),
            change,
        };
        records.push_back((domain.clone(), number, record));
    }

    /// Numbers of an ended domain are used again, so its records are no longer updated.
    pub(super) fn close(&self, domain: &DomainRef) {
        for (of, number, _) in self.lock_records().iter_mut() {
            if of == domain {
                *number = ChangeNumber::MAX;
            }
        }
        self.set_not_taken(domain, Vec::new());
    }

    /// Replaces what the guest of a domain has not taken.
    pub fn set_not_taken(&self, domain: &DomainRef, changes: Vec<NotTaken>) {
        let mut by_domain = self
            .by_domain
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = if changes.is_empty() {
            by_domain.remove(domain)
        } else {
            by_domain.insert(domain.clone(), changes)
        };
        if before.as_ref() != by_domain.get(domain) {
            let all: Vec<NotTaken> = by_domain.values().flatten().cloned().collect();
            self.not_taken.send_replace(all.into());
        }
    }

    fn lock_records(&self) -> MutexGuard<'_, VecDeque<(DomainRef, ChangeNumber, ExternalRecord)>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
