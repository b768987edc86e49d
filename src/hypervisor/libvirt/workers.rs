//! The threads that call libvirt, shared by all connections of the process.
//!
//! Each kind of connection has permits of its own ([`LaneLimits`]), so that launchers, whose daemons
//! belong to tenants, can occupy no worker of the host's libvirt, and calls of connections that are up
//! do not wait for those that are being opened.
//!
//! ```text
//! acquire (async) ──▶ Permits ──▶ start(job) ──▶ an idle thread, or a new one
//!                        │                            │ idle for WORKER_IDLE: the thread ends
//!                        └── released when the job returns, or when it is late
//! ```
//!
//! A call blocks its thread and cannot be cancelled. So a call that is late releases its permits
//! while its thread is still inside libvirt, and another thread replaces the worker. The number of
//! such threads is bounded: beyond [`LaneLimits::late`] a late call keeps its permits. In a lane with
//! that many late calls, statistics are not read until one returns: they can wait, and the workers
//! that are left are for operations.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::{Class, LaneLimits, WORKER_IDLE};

type Job = Box<dyn FnOnce() + Send>;

/// A pool of worker threads, and permits to use them. Clones share both; the threads end after the
/// last clone of any lane.
#[derive(Clone)]
pub struct Workers(Arc<Lane>);

/// The permits of one kind of connection.
struct Lane {
    all: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    statistics: Arc<Semaphore>,
    late: AtomicUsize,
    max_late: usize,
    threads: Arc<Threads>,
}

struct Threads(Arc<Queue>);

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
        let threads = Arc::new(Threads(Arc::default()));
        Self::lane(threads, LaneLimits::HOST)
    }

    /// Returns the permits for calls to launchers, on the same threads.
    pub fn for_launchers(&self) -> Self {
        Self::lane(Arc::clone(&self.0.threads), LaneLimits::LAUNCHERS)
    }

    /// Returns the permits for opening and closing connections to launchers, on the same threads.
    pub fn for_opening(&self) -> Self {
        Self::lane(Arc::clone(&self.0.threads), LaneLimits::OPENING)
    }

    fn lane(threads: Arc<Threads>, limits: LaneLimits) -> Self {
        Self(Arc::new(Lane {
            all: Arc::new(Semaphore::new(limits.workers)),
            waiting: Arc::new(Semaphore::new(limits.waiting)),
            statistics: Arc::new(Semaphore::new(limits.statistics)),
            late: AtomicUsize::new(0),
            max_late: limits.late,
            threads,
        }))
    }

    /// Waits until a worker is free, in order of arrival. `None` if the lane has too many late calls
    /// for this class.
    pub(super) async fn acquire(&self, class: Class) -> Option<Permits> {
        let lane = &self.0;
        let part = match class {
            Class::Control => None,
            Class::Statistics => Some(&lane.statistics),
            Class::Change | Class::Agent => Some(&lane.waiting),
        };
        let mut permits = Vec::new();
        if let Some(part) = part {
            permits.push(Arc::clone(part).acquire_owned().await.ok()?);
        }
        permits.push(Arc::clone(&lane.all).acquire_owned().await.ok()?);
        let is_full = lane.late.load(Ordering::Acquire) >= lane.max_late;
        (class != Class::Statistics || !is_full).then_some(permits)
    }

    /// Runs a job on a worker thread at once. If no thread can be started the job is dropped.
    pub(super) fn start(&self, job: impl FnOnce() + Send + 'static) {
        let queue = &self.0.threads.0;
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
        let max = self.0.max_late;
        let add = |late| (late < max).then_some(late + 1);
        let late = &self.0.late;
        late.fetch_update(Ordering::AcqRel, Ordering::Acquire, add)
            .is_ok()
    }

    /// Counts the return of a late call.
    pub(super) fn remove_late(&self) {
        self.0.late.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.wake.notify_all();
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
        for _ in 0..LaneLimits::HOST.waiting {
            held.push(workers.acquire(Class::Change).await);
        }
        let moment = Duration::from_millis(20);
        assert!(
            timeout(moment, workers.acquire(Class::Agent))
                .await
                .is_err()
        );
        let rest = workers.acquire(Class::Control).await;
        assert!(
            timeout(moment, workers.acquire(Class::Control))
                .await
                .is_err()
        );
        drop((held, rest));
        assert!(workers.acquire(Class::Change).await.is_some());
    }

    #[tokio::test]
    async fn launchers_occupy_no_worker_of_the_host() {
        let host = Workers::new();
        let (launchers, opening) = (host.for_launchers(), host.for_opening());
        let mut held = Vec::new();
        for _ in 0..LaneLimits::LAUNCHERS.workers {
            held.push(launchers.acquire(Class::Control).await);
        }
        for _ in 0..LaneLimits::OPENING.workers {
            held.push(opening.acquire(Class::Control).await);
        }
        while launchers.add_late() {}
        while opening.add_late() {}
        assert!(host.add_late());
        for _ in 0..LaneLimits::HOST.workers {
            let permits = host.acquire(Class::Control).await;
            assert!(permits.is_some());
            held.push(permits);
        }
    }

    #[tokio::test]
    async fn statistics_stop_while_too_many_launchers_are_late() {
        let launchers = Workers::new().for_launchers();
        while launchers.add_late() {}
        assert!(launchers.acquire(Class::Statistics).await.is_none());
        assert!(launchers.acquire(Class::Change).await.is_some());
        launchers.remove_late();
        assert!(launchers.acquire(Class::Statistics).await.is_some());
        // Statistics leave workers to operations.
        let mut held = Vec::new();
        for _ in 0..LaneLimits::LAUNCHERS.statistics {
            held.push(launchers.acquire(Class::Statistics).await);
        }
        let moment = Duration::from_millis(20);
        assert!(
            timeout(moment, launchers.acquire(Class::Statistics))
                .await
                .is_err()
        );
        assert!(launchers.acquire(Class::Change).await.is_some());
    }

    #[test]
    fn late_calls_are_bounded() {
        let workers = Workers::new();
        for _ in 0..LaneLimits::HOST.late {
            assert!(workers.add_late());
        }
        assert!(!workers.add_late());
        workers.remove_late();
        assert!(workers.add_late());
    }
}
