//! The operations of virtnode itself, which change domains as well.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::domain::DomainRef;
use crate::hotplug::Verdict;
use crate::hotplug::external::{OwnChange, OwnChanges};
use crate::operation::{Record, State};
use crate::units::Timestamp;

/// The operations that run, and those that ended lately. The executor's listener keeps it up to date.
#[derive(Debug, Default)]
pub struct OwnOperations {
    domains: Mutex<HashMap<DomainRef, OwnChanges>>,
    changed: Notify,
}

impl OwnOperations {
    /// Records the state of an operation. Returns at once.
    pub fn record(&self, record: &Record) {
        let Some(domain) = record.domain.identity() else {
            return;
        };
        let finished = match record.state {
            State::Queued => return,
            State::Running => None,
            State::Done => Some(
                record
                    .corrected
                    .or(record.finished)
                    .unwrap_or(record.created),
            ),
        };
        let change = OwnChange {
            before: record.before,
            requested: record.requested,
            finished,
            proven: record.verdict == Some(Verdict::Verified),
        };
        let mut domains = self.lock();
        let changed_nothing = matches!(
            record.verdict,
            Some(Verdict::Infeasible | Verdict::DomainNotFound)
        ) || finished.is_some() && record.before.is_none();
        let own = domains.entry(domain.clone()).or_default();
        if changed_nothing {
            own.remove(record.requested.kind());
        } else {
            own.set(change);
        }
        drop(domains);
        self.changed.notify_one();
    }

    /// Waits until an operation changed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns the operations on a domain.
    pub(super) fn of(&self, domain: &DomainRef) -> OwnChanges {
        self.lock().get(domain).cloned().unwrap_or_default()
    }

    /// Returns the domains with operations, without those whose late effects are over.
    pub(super) fn domains(&self, now: Timestamp) -> Vec<(DomainRef, OwnChanges)> {
        let mut domains = self.lock();
        let all = domains.clone();
        domains.retain(|_, own| !own.expire(now));
        all.into_iter().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<DomainRef, OwnChanges>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
