//! Opens a connection's primary handle, and opens it again when it is lost.
//!
//! ```text
//!            ┌────────────── Opening ◀───────────────┐ lost: closed by libvirtd, keepalive,
//!   opened   │        failed │     │ open_deadline   │ or a call of class Control was late
//!            ▼               ▼     ▼                 │
//!           Up ──────┐      Down(reason) ─ retry ─┐  │
//!            ▲       └───────────────────────────────┘
//!            └───────────── opened, even late ────┘
//! ```
//!
//! One task for each connection. It never blocks: handles are opened by workers. An attempt that
//! is late is left behind, as it cannot be cancelled, and the next one is made; if it succeeds
//! after all it is used. When too many calls are late no attempt is made until one returns.

use std::sync::Arc;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt, future};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::call::{Lost, Primary, worker_ended};
use super::connection::{Occupied, Seat, Shared};
use super::limits::{Class, FIRST_RETRY, LATE_CALLS, MAX_RETRY};
use super::session::Session;
use crate::hypervisor::{CallError, ConnectionState};

type Opened = (u64, Result<Session, CallError>);
type Attempts = FuturesUnordered<future::BoxFuture<'static, Opened>>;

/// Keeps a connection open until cancelled.
pub(super) async fn keep(shared: Arc<Shared>, mut losses: mpsc::UnboundedReceiver<Lost>) {
    shared.metrics.connected.set(0);
    let mut reopening = Reopening {
        shared,
        attempts: FuturesUnordered::new(),
        generation: 0,
        since: Instant::now(),
        was_up: false,
        logged: false,
    };
    let mut delay = FIRST_RETRY;
    loop {
        match reopening.open().await {
            (generation, Ok(session)) => {
                delay = FIRST_RETRY;
                reopening.set_up(generation, session);
                let reason = loop {
                    match losses.recv().await {
                        Some(lost) if lost.generation == generation => break lost.reason,
                        Some(_) => {}
                        None => return,
                    }
                };
                reopening.set_lost(&reason);
            }
            (_, Err(error)) => {
                reopening.set_down(error);
                sleep(delay.mul_f64(0.75 + 0.25 * fastrand::f64())).await;
                delay = (delay * 2).min(MAX_RETRY);
            }
        }
    }
}

struct Reopening {
    shared: Arc<Shared>,
    attempts: Attempts,
    /// The number of the last attempt.
    generation: u64,
    /// Time of the last change between up and down.
    since: Instant,
    was_up: bool,
    /// True if the log has the reason for there being no connection.
    logged: bool,
}

impl Reopening {
    /// Waits for the first attempt that ends, and makes another one whenever the last is late.
    async fn open(&mut self) -> Opened {
        let deadline = self.shared.config.open_deadline;
        loop {
            let seat = if self.shared.may_be_late() {
                self.attempt().await
            } else {
                None
            };
            if seat.is_none() {
                self.set_down(CallError::Unavailable(format!(
                    "{LATE_CALLS} calls have not returned; no new connection is opened until \
                     one does"
                )));
            }
            let shared = Arc::clone(&self.shared);
            tokio::select! {
                Some(opened) = self.attempts.next(), if !self.attempts.is_empty() => return opened,
                () = sleep(deadline), if seat.is_some() => {}
                () = shared.returned.notified(), if seat.is_none() => continue,
            }
            if let Some(seat) = seat {
                seat.set_late(&self.shared);
                let late: Result<(), _> = Err(CallError::Overdue {
                    call: "open".into(),
                    after: deadline,
                });
                self.shared.metrics.call_ended("open", deadline, &late);
                self.set_down(CallError::Unavailable(format!(
                    "libvirt has not answered to a new connection for {deadline:.1?}"
                )));
            }
        }
    }

    /// Starts an attempt on a worker; `None` if no worker is free in time.
    async fn attempt(&mut self) -> Option<Arc<Seat>> {
        let shared = &self.shared;
        let deadline = shared.config.open_deadline;
        let permits = timeout(deadline, shared.workers.acquire(Class::Control))
            .await
            .ok()??;
        self.generation += 1;
        let generation = self.generation;
        let seat = Arc::new(Seat::new(generation, Class::Control, None, permits));
        let occupied = Occupied(Arc::clone(&seat), Arc::clone(shared));
        let (reply, answer) = oneshot::channel();
        shared.workers.start(move || {
            let began = Instant::now();
            let shared = &occupied.1;
            let losses = shared.losses();
            let on_close = move |reason: crate::ffi::CloseReason| {
                let reason = reason.to_string();
                // The receiver ends with the connection.
                drop(losses.send(Lost { generation, reason }));
            };
            let opened = Session::open(&shared.config, generation, on_close).and_then(|session| {
                if shared.config.events {
                    session.listen(&shared.publisher)
                } else {
                    Ok(session)
                }
            });
            if began.elapsed() < deadline {
                shared.metrics.call_ended("open", began.elapsed(), &opened);
            }
            drop(occupied);
            if let Err(unused) = reply.send(opened) {
                // Closed here, on a worker.
                drop(unused);
            }
        });
        let opened = answer.map(move |answer| {
            let opened = answer.unwrap_or_else(|_| Err(worker_ended()));
            (generation, opened)
        });
        self.attempts.push(opened.boxed());
        Some(seat)
    }

    fn set_up(&mut self, generation: u64, session: Session) {
        let shared = &self.shared;
        shared.set_primary(generation, session);
        let uri = &shared.config.uri;
        if self.was_up {
            shared.metrics.reconnects.inc();
            info!(uri, away = ?self.since.elapsed(), "reconnected to libvirt");
        } else {
            info!(uri, "connected to libvirt");
        }
        (self.was_up, self.logged, self.since) = (true, false, Instant::now());
        // Events between two connections are lost.
        shared.publisher.gap();
        shared.metrics.connected.set(1);
        shared.primary.send_replace(Primary::Up(generation));
        shared.health.send_replace(ConnectionState::Up(generation));
    }

    fn set_lost(&mut self, reason: &str) {
        let shared = &self.shared;
        let uri = &shared.config.uri;
        warn!(uri, reason, "connection to libvirt lost; reconnecting");
        (self.logged, self.since) = (true, Instant::now());
        shared.metrics.connected.set(0);
        shared.primary.send_replace(Primary::Opening);
        shared.health.send_replace(ConnectionState::Down);
        shared.close_handles();
    }

    fn set_down(&mut self, error: CallError) {
        if !self.logged {
            self.logged = true;
            warn!(uri = self.shared.config.uri, "{error}; retrying");
        }
        let reason = match error {
            CallError::Unavailable(reason) => reason,
            other => other.to_string(),
        };
        self.shared.primary.send_replace(Primary::Down(reason));
    }
}

impl Drop for Reopening {
    /// Sessions that were opened and not used are closed by a worker, not by the runtime's thread.
    fn drop(&mut self) {
        let unused = std::mem::take(&mut self.attempts);
        let opened = unused.into_iter().filter_map(FutureExt::now_or_never);
        let opened: Vec<Opened> = opened.collect();
        if !opened.is_empty() {
            self.shared.workers.start(move || drop(opened));
        }
    }
}
