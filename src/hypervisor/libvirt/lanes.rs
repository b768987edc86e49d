//! The lane in use, and those that are late and were given up.
//!
//! A thread inside libvirt cannot be ended, so the number of late ones is bounded: when it is
//! reached no call is made until one of them returns, and every call is answered at once.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use super::call::{gone, job};
use super::lane::{Activity, Job, Lane};
use super::link::Link;
use super::session::Session;
use crate::hypervisor::CallError;

/// How many threads may be inside libvirt beyond their time, beside the one in use. libvirtd
/// itself serves five calls of one client at a time (`max_client_requests`).
const MOST_LATE: usize = 4;

pub(super) struct Lanes {
    link: Link,
    current: Mutex<Arc<Lane>>,
    late: Arc<AtomicUsize>,
}

impl Lanes {
    pub(super) fn new(link: Link) -> Self {
        let late = Arc::new(AtomicUsize::new(0));
        let first = start(VecDeque::new(), &link, &late);
        Self {
            current: Mutex::new(first),
            link,
            late,
        }
    }

    fn current(&self) -> MutexGuard<'_, Arc<Lane>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a call on the lane in use and waits for its answer, at most until the deadline.
    pub(super) async fn call<T, W>(&self, call: &'static str, work: W) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&mut Session) -> Result<T, CallError> + Send + 'static,
    {
        let (job, answer) = job(call, work, ());
        let id = job.id;
        let deadline = self.link.config().call_deadline;
        let (outcome, took) = match self.submit(job) {
            Err(refused) => (Err(refused), Duration::ZERO),
            Ok(()) => match timeout(deadline, answer).await {
                Ok(answer) => answer.unwrap_or_else(|_| (Err(gone()), Duration::ZERO)),
                Err(_) => (Err(self.give_up(id, call)), deadline),
            },
        };
        self.link.call_ended(call, took, &outcome);
        outcome
    }

    /// Has the job run, after those that were submitted before.
    ///
    /// # Errors
    /// `Unavailable` when too many calls have not come back.
    fn submit(&self, job: Job) -> Result<(), CallError> {
        let mut current = self.current();
        if self.is_late(current.activity()) && !self.replace(&mut current) {
            return Err(CallError::Unavailable(format!(
                "{} calls have not come back; no more are made until one does",
                MOST_LATE + 1
            )));
        }
        current.push(job);
        Ok(())
    }

    /// Nobody waits for this job any more. What to tell the caller, and another lane for those
    /// who come after.
    fn give_up(&self, id: u64, call: &'static str) -> CallError {
        let config = self.link.config();
        let mut current = self.current();
        let (activity, was_queued) = current.withdraw(id);
        let is_its_own = matches!(activity, Activity::Calling(calling, _) if calling == id);
        if is_its_own || self.is_late(activity) {
            self.replace(&mut current);
        }
        match activity {
            Activity::Opening(since) if was_queued && self.is_late(activity) => {
                CallError::Unavailable(format!(
                    "libvirt has not answered to a new connection for {:.1?}",
                    since.elapsed()
                ))
            }
            _ => CallError::Overdue {
                call: call.into(),
                after: config.call_deadline,
            },
        }
    }

    fn is_late(&self, activity: Activity) -> bool {
        let config = self.link.config();
        match activity {
            Activity::Idle => false,
            Activity::Opening(since) => since.elapsed() >= config.open_deadline,
            Activity::Calling(_, since) => since.elapsed() >= config.call_deadline,
            Activity::Ended => true,
        }
    }

    /// Retires the lane in use and starts another, which takes over the waiting jobs; `false`,
    /// and nothing happened, when there are too many late ones.
    fn replace(&self, current: &mut Arc<Lane>) -> bool {
        if self.late.load(Ordering::Acquire) >= MOST_LATE {
            return false;
        }
        // Counted down again by its thread. Not before: a thread that ended by itself, which
        // takes a panic, was never late.
        let activity = current.activity();
        if activity != Activity::Ended {
            self.late.fetch_add(1, Ordering::AcqRel);
        }
        if let Activity::Opening(since) = activity {
            let late: Result<(), _> = Err(CallError::Overdue {
                call: "open".into(),
                after: self.link.config().open_deadline,
            });
            self.link.call_ended("open", since.elapsed(), &late);
            if let Err(reason) = &late {
                self.link.still_down(reason);
            }
        }
        let jobs = current.retire();
        self.link.give_up(&"libvirt did not answer a call in time");
        *current = start(jobs, &self.link, &self.late);
        true
    }
}

impl Drop for Lanes {
    /// The threads end by themselves, as soon as they are not inside libvirt: nobody waits.
    fn drop(&mut self) {
        self.current().retire();
    }
}

fn start(jobs: VecDeque<Job>, link: &Link, late: &Arc<AtomicUsize>) -> Arc<Lane> {
    let lane = Arc::new(Lane::new(jobs));
    let late = Arc::clone(late);
    // A thread that could not be started leaves its jobs to the lane that replaces this one.
    Lane::start(&lane, link, move |was_retired| {
        if was_retired {
            late.fetch_sub(1, Ordering::AcqRel);
        }
    });
    lane
}
