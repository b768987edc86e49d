//! Waiting lines: one is served at a time in each, first come first served.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Queues by name; a line that nobody stands in is none.
#[derive(Debug, Default)]
pub(super) struct Queues {
    lines: Mutex<HashMap<String, Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    served: u64,
    waiting: BTreeMap<u64, Arc<Notify>>,
}

/// A place in a line. Who drops it leaves.
#[derive(Debug)]
pub(super) struct Ticket {
    lines: Arc<Queues>,
    line: String,
    ticket: u64,
    called: Arc<Notify>,
}

impl Queues {
    /// Takes a place: behind who is served and those with smaller tickets, before the others.
    pub(super) fn join(self: &Arc<Self>, line: &str, ticket: u64) -> Ticket {
        let called = Arc::new(Notify::new());
        self.lock()
            .entry(line.to_owned())
            .and_modify(|line| drop(line.waiting.insert(ticket, Arc::clone(&called))))
            .or_insert_with(|| Queue {
                served: ticket,
                waiting: BTreeMap::new(),
            });
        Ticket {
            lines: Arc::clone(self),
            line: line.to_owned(),
            ticket,
            called,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// Whether it is this one's turn.
    pub(super) fn is_served(&self) -> bool {
        let lines = self.lines.lock();
        lines
            .get(&self.line)
            .is_some_and(|line| line.served == self.ticket)
    }

    /// Returns when it is this one's turn.
    pub(super) async fn turn(&self) {
        while !self.is_served() {
            self.called.notified().await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut lines = self.lines.lock();
        let Some(line) = lines.get_mut(&self.line) else {
            return;
        };
        if line.served != self.ticket {
            line.waiting.remove(&self.ticket);
            return;
        }
        match line.waiting.pop_first() {
            Some((next, called)) => {
                line.served = next;
                called.notify_one();
            }
            None => drop(lines.remove(&self.line)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_came_first_is_served_first() {
        let lines = Arc::new(Queues::default());
        let third = lines.join("vm", 3);
        let fifth = lines.join("vm", 5);
        let fourth = lines.join("vm", 4);
        let other = lines.join("other", 9);
        third.turn().await;
        other.turn().await;
        assert!(!fourth.is_served() && !fifth.is_served());
        drop(third);
        fourth.turn().await;
        assert!(!fifth.is_served());
        drop(fourth);
        fifth.turn().await;
        let sixth = lines.join("vm", 6);
        drop(sixth);
        drop((fifth, other));
        assert!(lines.lock().is_empty());
    }
}
