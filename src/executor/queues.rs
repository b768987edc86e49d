//! First-come, first-served queues, one for each key.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Per-key FIFO queues. A queue is removed when its last ticket is dropped.
#[derive(Debug)]
pub(super) struct Queues<K> {
    queues: Mutex<HashMap<K, Queue>>,
}

impl<K> Default for Queues<K> {
    fn default() -> Self {
        Self {
            queues: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// Sequence number of the ticket whose turn it is.
    served: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
}

/// A place in a queue. Dropping it leaves the queue and serves the next ticket.
#[derive(Debug)]
pub(super) struct Ticket<K: Eq + Hash> {
    queues: Arc<Queues<K>>,
    key: K,
    sequence: u64,
    turn: Arc<Notify>,
}

impl<K: Eq + Hash + Clone> Queues<K> {
    /// Joins a queue behind the ticket that is served and those with smaller sequence numbers.
    pub(super) fn join(self: &Arc<Self>, key: K, sequence: u64) -> Ticket<K> {
        let turn = Arc::new(Notify::new());
        self.lock()
            .entry(key.clone())
            .and_modify(|queue| drop(queue.waiting.insert(sequence, Arc::clone(&turn))))
            .or_insert_with(|| Queue {
                served: sequence,
                waiting: BTreeMap::new(),
            });
        Ticket {
            queues: Arc::clone(self),
            key,
            sequence,
            turn,
        }
    }
}

impl<K> Queues<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Ticket<K> {
    pub(super) fn is_served(&self) -> bool {
        let queues = self.queues.lock();
        let queue = queues.get(&self.key);
        queue.is_some_and(|queue| queue.served == self.sequence)
    }

    /// Waits until this ticket is served.
    pub(super) async fn turn(&self) {
        while !self.is_served() {
            self.turn.notified().await;
        }
    }
}

impl<K: Eq + Hash> Drop for Ticket<K> {
    fn drop(&mut self) {
        let mut queues = self.queues.lock();
        let Some(queue) = queues.get_mut(&self.key) else {
            return;
        };
        if queue.served != self.sequence {
            queue.waiting.remove(&self.sequence);
            return;
        }
        match queue.waiting.pop_first() {
            Some((next, turn)) => {
                queue.served = next;
                turn.notify_one();
            }
            None => drop(queues.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tickets_are_served_in_order_of_sequence() {
        let queues = Arc::new(Queues::default());
        let third = queues.join("vm", 3);
        let fifth = queues.join("vm", 5);
        let fourth = queues.join("vm", 4);
        let other = queues.join("other", 9);
        third.turn().await;
        other.turn().await;
        assert!(!fourth.is_served() && !fifth.is_served());
        drop(third);
        fourth.turn().await;
        assert!(!fifth.is_served());
        drop(fourth);
        fifth.turn().await;
        let sixth = queues.join("vm", 6);
        drop(sixth);
        drop((fifth, other));
        assert!(queues.lock().is_empty());
    }
}
