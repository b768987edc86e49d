//! The operations that the executor knows, in memory.

use std::collections::{BTreeMap, HashMap};

use tokio::sync::watch;

use super::SubmitError;
use crate::hotplug::{Earlier, Require};
use crate::journal::Entry;
use crate::operation::{AskedBy, OperationId, Order, Record};
use crate::units::Timestamp;

#[derive(Debug)]
struct Slot {
    order: Order,
    record: watch::Sender<Record>,
}

/// All operations by identifier, and by requester and idempotency key.
#[derive(Debug, Default)]
pub(super) struct Registry {
    slots: BTreeMap<OperationId, Slot>,
    keys: HashMap<(AskedBy, String), OperationId>,
    last_sequence: u64,
    last_millis: u64,
}

/// Result of registering an order.
pub(super) enum Registered {
    /// A new operation, with its sequence number.
    New(Box<Record>, u64),
    /// An equal order was registered under the same idempotency key.
    Existing(OperationId),
}

impl Registry {
    pub(super) fn register(
        &mut self,
        order: &Order,
        now: Timestamp,
        max_open: usize,
    ) -> Result<Registered, SubmitError> {
        let key = key_of(order);
        if let Some(id) = key.as_ref().and_then(|key| self.keys.get(key)) {
            let slot = self.slots.get(id);
            return if slot.is_some_and(|slot| slot.order == *order) {
                Ok(Registered::Existing(id.clone()))
            } else {
                Err(SubmitError::KeyReused(id.clone()))
            };
        }
        if self.open() >= max_open {
            return Err(SubmitError::TooMany(max_open));
        }
        // Identifiers are unique and in order even within a millisecond.
        let millis = u64::try_from(now.as_millis()).unwrap_or(0);
        self.last_millis = millis.max(self.last_millis + 1);
        let id = OperationId::new(self.last_millis, fastrand::u32(..));
        let record = Record::new(id, order, now);
        let sequence = self.add(order.clone(), record.clone());
        Ok(Registered::New(Box::new(record), sequence))
    }

    /// Restores an operation from the journal and returns its sequence number.
    pub(super) fn restore(&mut self, entry: &Entry) -> u64 {
        let digits = entry.record.id.as_str().get(..12).unwrap_or_default();
        let millis = u64::from_str_radix(digits, 16).unwrap_or(0);
        self.last_millis = self.last_millis.max(millis);
        self.add(entry.order.clone(), entry.record.clone())
    }

    fn add(&mut self, order: Order, record: Record) -> u64 {
        if let Some(key) = key_of(&order) {
            self.keys.insert(key, record.id.clone());
        }
        let id = record.id.clone();
        let record = watch::Sender::new(record);
        self.slots.insert(id, Slot { order, record });
        self.last_sequence += 1;
        self.last_sequence
    }

    pub(super) fn remove(&mut self, id: &OperationId) {
        let Some(slot) = self.slots.remove(id) else {
            return;
        };
        if let Some(key) = key_of(&slot.order) {
            self.keys.remove(&key);
        }
    }

    pub(super) fn set(&self, record: &Record) {
        if let Some(slot) = self.slots.get(&record.id) {
            slot.record.send_replace(record.clone());
        }
    }

    pub(super) fn get(&self, id: &OperationId) -> Option<Record> {
        self.slots.get(id).map(|slot| slot.record.borrow().clone())
    }

    pub(super) fn watch(&self, id: &OperationId) -> Option<watch::Receiver<Record>> {
        self.slots.get(id).map(|slot| slot.record.subscribe())
    }

    /// Returns the result of the last operation with a verdict on the same domain and for the same
    /// kind of resource, if it required that the guest uses it.
    pub(super) fn earlier(&self, record: &Record) -> Option<Earlier> {
        let domain = record.domain.identity()?;
        let kind = record.request.kind();
        let slots = self.slots.values().rev();
        let of_domain = slots.filter(|slot| {
            let earlier = slot.record.borrow();
            let is_judged = earlier.id != record.id && earlier.is_done();
            is_judged
                && earlier.request.kind() == kind
                && earlier.domain.identity().as_ref() == Some(&domain)
        });
        let last = of_domain
            .filter(|slot| slot.order.require == Require::Online)
            .find(|slot| slot.record.borrow().after.is_some())?;
        let last = last.record.borrow();
        Some(Earlier {
            verdict: last.verdict?,
            after: last.after?,
        })
    }

    pub(super) fn newest_first(&self) -> Vec<Record> {
        let slots = self.slots.values().rev();
        slots.map(|slot| slot.record.borrow().clone()).collect()
    }

    pub(super) fn find_by_key(&self, asked_by: &AskedBy, key: &str) -> Option<OperationId> {
        let key = (asked_by.clone(), key.to_owned());
        self.keys.get(&key).cloned()
    }

    /// Returns the operations that have a verdict, oldest first.
    pub(super) fn finished(&self) -> Vec<OperationId> {
        let done = |slot: &&Slot| slot.record.borrow().is_done();
        let slots = self.slots.values().filter(done);
        slots.map(|slot| slot.record.borrow().id.clone()).collect()
    }

    fn open(&self) -> usize {
        let open = |slot: &&Slot| !slot.record.borrow().is_done();
        self.slots.values().filter(open).count()
    }
}

fn key_of(order: &Order) -> Option<(AskedBy, String)> {
    let key = order.idempotency_key.clone()?;
    Some((order.asked_by.clone(), key))
}
