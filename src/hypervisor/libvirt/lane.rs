//! One thread that owns one connection and makes one call after the other.
//!
//! A call to libvirt blocks for as long as it likes and cannot be taken back. So the thread is
//! never waited for: who waits for an answer has a deadline, and a lane that is late is retired
//! (see [`super::lanes`]). It ends when its call returns, and nobody hears of it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::link::Link;
use super::session::Session;
use crate::hypervisor::CallError;

/// A call: made on a session, or told why there is none.
pub(super) struct Job {
    /// Unlike that of any other job of the process.
    pub(super) id: u64,
    pub(super) run: Run,
}

type Run = Box<dyn FnOnce(Result<&mut Session, CallError>) + Send>;

/// What a lane's thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activity {
    /// Waiting for a job, or for the next try to connect.
    Idle,
    /// Opening a connection, since then.
    Opening(Instant),
    /// Making the call of this job, since then.
    Calling(u64, Instant),
    /// It is no more.
    Ended,
}

/// What the thread shares with those who give it jobs.
pub(super) struct Lane {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    activity: Activity,
    /// The connection that was closed by the other side, by its number.
    closed: u64,
    retired: bool,
}

/// Between tries to connect: short, so that a libvirtd that is back is used at once; with jitter,
/// so that a machine's daemons do not all knock together.
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(1);

impl Lane {
    pub(super) fn new(jobs: VecDeque<Job>) -> Self {
        Self {
            state: Mutex::new(State {
                jobs,
                activity: Activity::Idle,
                closed: 0,
                retired: false,
            }),
            wake: Condvar::new(),
        }
    }

    /// The lock is held for moments only, never over a call to libvirt.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.wake.notify_one();
    }

    pub(super) fn activity(&self) -> Activity {
        self.lock().activity
    }

    /// Takes a job back if it was not begun: what is being done instead, and whether it waited.
    pub(super) fn withdraw(&self, id: u64) -> (Activity, bool) {
        let mut state = self.lock();
        let before = state.jobs.len();
        state.jobs.retain(|job| job.id != id);
        (state.activity, state.jobs.len() < before)
    }

    /// Has the thread end after what it is doing; what it has not begun is handed back.
    pub(super) fn retire(&self) -> VecDeque<Job> {
        let mut state = self.lock();
        state.retired = true;
        self.wake.notify_one();
        std::mem::take(&mut state.jobs)
    }

    fn close(&self, connection: u64) {
        let mut state = self.lock();
        state.closed = state.closed.max(connection);
        self.wake.notify_one();
    }

    /// Starts the thread. `ended` is told when it is over, however that comes, and whether the
    /// lane had been retired; also when no thread could be started.
    pub(super) fn start(lane: &Arc<Self>, link: &Link, ended: impl FnOnce(bool) + Send + 'static) {
        let end = End(Arc::clone(lane), Some(ended));
        let link = link.clone();
        let thread = thread::Builder::new().name("libvirt-calls".to_owned());
        let started = thread.spawn(move || {
            let end = end;
            end.0.run(&link);
        });
        if let Err(error) = started {
            // `end` was dropped with the closure, so the lane counts as ended.
            tracing::error!(%error, "no thread for calls to libvirt");
        }
    }

    /// What the thread does until the lane is retired.
    fn run(self: &Arc<Self>, link: &Link) {
        let mut delay = FIRST_DELAY;
        while self.is_wanted(link) {
            match self.connect(link) {
                Ok((number, session)) => {
                    delay = FIRST_DELAY;
                    self.serve(number, session, link);
                }
                // Who has another job comes and finds out anew.
                Err(reason) if link.is_on_demand() => self.refuse(&reason, Duration::ZERO),
                Err(reason) => {
                    self.refuse(&reason, delay.mul_f64(0.75 + 0.25 * fastrand::f64()));
                    delay = (delay * 2).min(LONGEST_DELAY);
                }
            }
        }
    }

    /// Whether there is to be a connection: not if the lane is retired, and on demand only once
    /// there is a job, which is waited for.
    fn is_wanted(&self, link: &Link) -> bool {
        let mut state = self.lock();
        while link.is_on_demand() && !state.retired && state.jobs.is_empty() {
            state = wait(&self.wake, state, None);
        }
        !state.retired
    }

    fn connect(self: &Arc<Self>, link: &Link) -> Result<(u64, Session), CallError> {
        let number = link.next_number();
        let lane = Arc::clone(self);
        let closed_link = link.clone();
        let on_close = move |reason: crate::ffi::CloseReason| {
            lane.close(number);
            closed_link.down(number, &reason);
        };
        let started = Instant::now();
        self.lock().activity = Activity::Opening(started);
        let opened =
            Session::open(link.config(), on_close).and_then(|session| match link.notices() {
                Some(notices) => session.listen(notices),
                None => Ok(session),
            });
        let mut state = self.lock();
        state.activity = Activity::Idle;
        // A retired lane was counted as a timeout, and another one speaks for the connection.
        if state.retired {
            drop(state);
            return opened.map(|session| (number, session));
        }
        link.call_ended("open", started.elapsed(), &opened);
        match &opened {
            Ok(_) => link.up(number),
            Err(reason) => link.still_down(reason),
        }
        drop(state);
        opened.map(|session| (number, session))
    }

    /// Makes calls for as long as the connection lives.
    fn serve(&self, number: u64, mut session: Session, link: &Link) {
        while let Some(job) = self.next(number) {
            (job.run)(Ok(&mut session));
            self.lock().activity = Activity::Idle;
            if !session.is_alive() {
                break;
            }
        }
        // Mostly the close callback was first, with a better reason.
        link.down(number, &"it was closed");
        // Closing says goodbye to the other side, which may not listen.
        drop(session);
    }

    /// Waits for a job; `None` if this connection is over or the lane retired.
    fn next(&self, connection: u64) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.retired || state.closed >= connection {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                state.activity = Activity::Calling(job.id, Instant::now());
                return Some(job);
            }
            state = wait(&self.wake, state, None);
        }
    }

    /// Answers every job with `reason` for a while.
    fn refuse(&self, reason: &CallError, during: Duration) {
        let reason = CallError::Unavailable(match reason {
            CallError::Unavailable(message) => message.clone(),
            other => other.to_string(),
        });
        let until = Instant::now() + during;
        let mut state = self.lock();
        while !state.retired {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                (job.run)(Err(reason.clone()));
                state = self.lock();
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = wait(&self.wake, state, Some(left));
        }
    }

    /// Marks the thread as ended; whether the lane had been retired before.
    fn end(&self) -> bool {
        let mut state = self.lock();
        state.activity = Activity::Ended;
        state.retired
    }
}

/// Marks the end of a lane's thread, however it comes.
struct End<F: FnOnce(bool)>(Arc<Lane>, Option<F>);

impl<F: FnOnce(bool)> Drop for End<F> {
    fn drop(&mut self) {
        let was_retired = self.0.end();
        if let Some(ended) = self.1.take() {
            ended(was_retired);
        }
    }
}

fn wait<'s>(
    wake: &Condvar,
    state: MutexGuard<'s, State>,
    at_most: Option<Duration>,
) -> MutexGuard<'s, State> {
    match at_most {
        None => wake.wait(state).unwrap_or_else(PoisonError::into_inner),
        Some(time) => {
            wake.wait_timeout(state, time)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        }
    }
}
