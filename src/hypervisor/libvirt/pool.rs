//! Lanes for calls that a domain can hold up: each such call has one for itself.
//!
//! One call at a time for each domain, in the order in which they came. A call that does not come
//! back keeps its lane, and with it the domain's turn: a domain that is stuck costs one lane and
//! holds up nobody else. So there are never more threads inside libvirt than the pool has lanes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::call::{gone, job};
use super::lane::{Activity, Lane};
use super::link::Link;
use super::session::Session;
use crate::hypervisor::{CallError, DomainRef};

pub(super) struct Pool {
    link: Link,
    size: usize,
    free: Arc<Semaphore>,
    idle: Arc<Mutex<Idle>>,
    /// The turns of the domains that have a call made or waiting, by UUID.
    turns: Mutex<HashMap<String, Weak<Semaphore>>>,
}

#[derive(Default)]
struct Idle {
    lanes: Vec<Arc<Lane>>,
    /// The pool is no more: what comes back is not kept.
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of at most `size` lanes, which are started when they are needed.
    pub(super) fn new(link: Link, size: usize) -> Self {
        Self {
            link,
            size,
            free: Arc::new(Semaphore::new(size)),
            idle: Arc::default(),
            turns: Mutex::default(),
        }
    }

    /// Makes a call about a domain and waits for its answer, at most until the deadline: for its
    /// turn, for a lane, and for libvirt.
    pub(super) async fn call<T, W>(
        &self,
        call: &'static str,
        domain: &DomainRef,
        work: W,
    ) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&mut Session) -> Result<T, CallError> + Send + 'static,
    {
        let after = self.link.config().call_deadline;
        let deadline = Instant::now() + after;
        let (outcome, took) = match self.seat(call, domain, deadline).await {
            Err(busy) => (Err(busy), after),
            Ok(seat) => {
                let lane = Arc::clone(&seat.lane);
                let (job, answer) = job(call, work, seat);
                lane.push(job);
                if lane.activity() == Activity::Ended {
                    // No thread could be started: nobody will do it, and the caller is told so.
                    drop(lane.retire());
                }
                match timeout_at(deadline, answer).await {
                    Ok(answer) => answer.unwrap_or_else(|_| (Err(gone()), Duration::ZERO)),
                    Err(_) => (Err(late(call, after, lane.activity())), after),
                }
            }
        };
        self.link.call_ended(call, took, &outcome);
        outcome
    }

    /// Waits for the domain's turn, then for a lane.
    async fn seat(
        &self,
        call: &'static str,
        domain: &DomainRef,
        deadline: Instant,
    ) -> Result<Seat, CallError> {
        let busy = |text| CallError::Busy {
            call: call.into(),
            text,
        };
        let turn = timeout_at(deadline, self.turn(domain).acquire_owned())
            .await
            .map_err(|_| busy("an earlier call for this domain has not come back".to_owned()))?
            .map_err(never_closed)?;
        let permit = timeout_at(deadline, Arc::clone(&self.free).acquire_owned())
            .await
            .map_err(|_| {
                busy(format!(
                    "calls for {} other domains have not come back",
                    self.size
                ))
            })?
            .map_err(never_closed)?;
        Ok(Seat {
            lane: self.lane(),
            idle: Arc::clone(&self.idle),
            _permits: [turn, permit],
        })
    }

    fn turn(&self, domain: &DomainRef) -> Arc<Semaphore> {
        let mut turns = lock(&self.turns);
        if let Some(turn) = turns.get(&domain.uuid).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Semaphore::new(1));
        turns.insert(domain.uuid.clone(), Arc::downgrade(&turn));
        turn
    }

    /// The lane that was used last, or a new one.
    fn lane(&self) -> Arc<Lane> {
        let mut idle = lock(&self.idle);
        while let Some(lane) = idle.lanes.pop() {
            if lane.activity() != Activity::Ended {
                return lane;
            }
        }
        drop(idle);
        let lane = Arc::new(Lane::new(VecDeque::new()));
        let ended = Arc::downgrade(&lane);
        Lane::start(&lane, &self.link, move |_| {
            // What it has not done is not done any more; its callers are told.
            if let Some(lane) = ended.upgrade() {
                drop(lane.retire());
            }
        });
        lane
    }
}

impl Drop for Pool {
    /// The threads end by themselves, as soon as they are not inside libvirt: nobody waits.
    fn drop(&mut self) {
        let mut idle = lock(&self.idle);
        idle.closed = true;
        let lanes = std::mem::take(&mut idle.lanes);
        drop(idle);
        for lane in lanes {
            lane.retire();
        }
    }
}

/// The right to use a lane for a domain.
struct Seat {
    lane: Arc<Lane>,
    idle: Arc<Mutex<Idle>>,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut idle = lock(&self.idle);
        if idle.closed {
            self.lane.retire();
        } else {
            idle.lanes.push(Arc::clone(&self.lane));
        }
    }
}

/// What to tell who waited too long.
fn late(call: &'static str, after: Duration, activity: Activity) -> CallError {
    match activity {
        Activity::Opening(since) => CallError::Unavailable(format!(
            "libvirt has not answered to a new connection for {:.1?}",
            since.elapsed()
        )),
        _ => CallError::Overdue {
            call: call.into(),
            after,
        },
    }
}

fn never_closed(_: AcquireError) -> CallError {
    gone()
}
