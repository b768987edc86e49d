//! Changes that operations of virtnode make, which are not external.

use std::cmp::Ordering;
use std::time::Duration;

use crate::hotplug::{Amount, ResourceKind};
use crate::units::Timestamp;

/// Time for which a guest may follow an operation after its verdict, as for operations themselves.
const LATE: Duration = Duration::from_secs(600);
/// The same after a proof: an observation may have been started before.
const LATE_PROVEN: Duration = Duration::from_secs(30);

/// The last operation on one resource of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnChange {
    /// `None` if the domain was not observed before.
    pub before: Option<Amount>,
    pub requested: Amount,
    /// `None` while the operation runs.
    pub finished: Option<Timestamp>,
    /// True if it ended as `Verified`: then nothing follows but what libvirt already has.
    pub proven: bool,
}

/// The last operations on a domain, one for each kind of resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnChanges(Vec<OwnChange>);

impl OwnChanges {
    /// Sets the last operation on its kind of resource.
    pub fn set(&mut self, change: OwnChange) {
        let kind = change.requested.kind();
        self.0.retain(|last| last.requested.kind() != kind);
        self.0.push(change);
    }

    /// Removes an operation that changed nothing.
    pub fn remove(&mut self, kind: ResourceKind) {
        self.0.retain(|last| last.requested.kind() != kind);
    }

    /// Removes operations whose late effects are no longer expected. Returns true if none is left.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        self.0.retain(|last| last.is_expected(now));
        self.0.is_empty()
    }

    /// True if an operation runs on the domain.
    pub(super) fn holds(&self) -> bool {
        self.0.iter().any(|last| last.finished.is_none())
    }

    /// True if an operation runs on this resource of the domain.
    pub(super) fn holds_kind(&self, kind: ResourceKind) -> bool {
        self.of(kind).is_some_and(|last| last.finished.is_none())
    }

    /// True if an operation explains an amount: it is the requested one, or on the way to it.
    pub(super) fn explains(&self, amount: Amount, now: Timestamp) -> bool {
        let Some(last) = self.of(amount.kind()).filter(|last| last.is_expected(now)) else {
            return false;
        };
        if last.proven {
            return amount == last.requested.without_guest();
        }
        let Some(before) = last.before else {
            return true;
        };
        let orders = (before.compare(amount), amount.compare(last.requested));
        match orders {
            (Some(first), Some(second)) => {
                first == Ordering::Equal || second == Ordering::Equal || first == second
            }
            _ => false,
        }
    }

    /// True if an operation asked the guest to release something lately.
    pub(super) fn explains_release(&self, kind: ResourceKind, now: Timestamp) -> bool {
        self.of(kind).is_some_and(|last| {
            let shrinks = last
                .before
                .is_none_or(|before| last.requested.compare(before) == Some(Ordering::Less));
            shrinks && last.is_expected(now)
        })
    }

    fn of(&self, kind: ResourceKind) -> Option<&OwnChange> {
        self.0.iter().find(|last| last.requested.kind() == kind)
    }
}

impl OwnChange {
    fn is_expected(&self, now: Timestamp) -> bool {
        let late = if self.proven { LATE_PROVEN } else { LATE };
        self.finished
            .is_none_or(|finished| now < finished.after(late))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpus(vcpus: u32) -> Amount {
        let online = None;
        Amount::Vcpus { vcpus, online }
    }

    #[test]
    fn late_effect_of_an_operation_is_explained_for_ten_minutes() {
        let at = Timestamp::from_millis;
        let mut own = OwnChanges::default();
        own.set(OwnChange {
            before: Some(vcpus(4)),
            requested: vcpus(2),
            finished: Some(at(0)),
            proven: false,
        });
        for (amount, explained) in [(4, true), (3, true), (2, true), (1, false), (5, false)] {
            let explains = own.explains(vcpus(amount), at(1));
            assert_eq!(explains, explained, "{amount}");
        }
        assert!(own.explains_release(ResourceKind::Vcpus, at(1)));
        assert!(!own.explains_release(ResourceKind::Memory, at(1)));
        assert!(!own.holds());
        assert!(!own.explains(vcpus(3), at(600_000)));
        assert!(own.expire(at(600_000)));
    }
}
