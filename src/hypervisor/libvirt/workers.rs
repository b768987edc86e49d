//! The threads that call libvirt, shared by all connections of the process.
//!
//! ```text
//! acquire (async) ──▶ Permits ──▶ start(job) ──▶ an idle thread, or a new one
//!                        │                            │ idle for WORKER_IDLE: the thread ends
//!                        └── released when the job returns, or when it is late
//! ```
//!
//! A call blocks its thread and cannot be cancelled. So a call that is late releases its permits
//! while its thread is still inside libvirt, and another thread replaces the worker. The number of
//! such threads is bounded: beyond [`LATE_WORKERS`] a late call keeps its permits.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::{LATE_WORKERS, WAITING_WORKERS, WORKER_IDLE, WORKERS};

type Job = Box<dyn FnOnce() + Send>;

/// A pool of worker threads. Clones share the threads; the threads end after the last clone.
#[derive(Clone)]
pub struct Workers(Arc<Pool>);

struct Pool {
    all: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    late: AtomicUsize,
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    wake: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

/// The right to occupy a worker; released when dropped.
pub(super) type Permits = Vec<OwnedSemaphorePermit>;

impl Default for Workers {
    fn default() -> Self {
        Self::new()
    }
}

impl Workers {
    /// Returns a pool without threads: they are started when there are jobs.
    pub fn new() -> Self {
        Self(Arc::new(Pool {
            all: Arc::new(Semaphore::new(WORKERS)),
            waiting: Arc::new(Semaphore::new(WAITING_WORKERS)),
            late: AtomicUsize::new(0),
            queue: Arc::default(),
        }))
    }

    /// Waits until a worker is free, in order of arrival. `None` never happens while the pool
    /// lives: its semaphores are not closed.
    pub(super) async fn acquire(&self, waits_for_domain: bool) -> Option<Permits> {
        let mut permits = Vec::new();
        if waits_for_domain {
            permits.push(Arc::clone(&self.0.waiting).acquire_owned().await.ok()?);
        }
        permits.push(Arc::clone(&self.0.all).acquire_owned().await.ok()?);
        Some(permits)
    }

    /// Runs a job on a worker thread at once. If no thread can be started the job is dropped.
    pub(super) fn start(&self, job: impl FnOnce() + Send + 'static) {
        let queue = &self.0.queue;
        let mut state = queue.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() {
            queue.wake.notify_one();
            return;
        }
        drop(state);
        let worker = Arc::clone(queue);
        let thread = thread::Builder::new().name("libvirt-worker".to_owned());
        if let Err(error) = thread.spawn(move || worker.work()) {
            tracing::error!(%error, "cannot start a thread for calls to libvirt");
            drop(queue.lock().jobs.pop_back());
        }
    }

    /// Counts a late call; false if there are too many of them to replace its worker.
    pub(super) fn add_late(&self) -> bool {
        let add = |late| (late < LATE_WORKERS).then_some(late + 1);
        let late = &self.0.late;
        late.fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .is_ok()
    }

    /// Counts the return of a late call.
    pub(super) fn remove_late(&self) {
        self.0.late.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.wake.notify_all();
    }
}

impl Queue {
    /// The lock is never held during a job.
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs jobs until there are none for [`WORKER_IDLE`], or the pool is dropped.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            if state.closed {
                return;
            }
            state.idle += 1;
            let (woken, waited) = self
                .wake
                .wait_timeout(state, WORKER_IDLE)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn jobs_run_side_by_side() {
        let workers = Workers::new();
        let (send, receive) = mpsc::channel();
        let (first, second) = (mpsc::channel::<()>(), mpsc::channel::<()>());
        let done = send.clone();
        workers.start(move || {
            // The other job must run meanwhile.
            first.1.recv().ok();
            done.send(1).ok();
        });
        workers.start(move || {
            first.0.send(()).ok();
            drop(second);
            send.send(2).ok();
        });
        let mut ran: Vec<i32> = receive.iter().take(2).collect();
        ran.sort_unstable();
        assert_eq!(ran, [1, 2]);
    }

    #[tokio::test]
    async fn calls_that_wait_for_domains_leave_a_worker_to_others() {
        let workers = Workers::new();
        let mut held = Vec::new();
        for _ in 0..WAITING_WORKERS {
            held.push(workers.acquire(true).await);
        }
        let moment = Duration::from_millis(20);
        assert!(timeout(moment, workers.acquire(true)).await.is_err());
        let rest = workers.acquire(false).await;
        assert!(timeout(moment, workers.acquire(false)).await.is_err());
        drop((held, rest));
        assert!(workers.acquire(true).await.is_some());
    }

    #[test]
    fn late_calls_are_bounded() {
        let workers = Workers::new();
        for _ in 0..LATE_WORKERS {
            assert!(workers.add_late());
        }
        assert!(!workers.add_late());
        workers.remove_late();
        assert!(workers.add_late());
    }
}
