//! A connection to one libvirtd: its state, its virConnect handles and the calls over them.
//!
//! A call passes four gates, each by its deadline: the connection is up; no earlier call of the
//! same class for the same domain is in progress; the class is below its limit; a worker is free.
//! On the worker it takes the first handle with room, or opens another one. A handle that is not
//! the primary is closed when it has been idle for [`HANDLE_IDLE`].
//!
//! A call that is late keeps its domain's turn and its room on the handle, since libvirt is still
//! busy with it, and releases its class and its worker to the calls of other domains.
//!
//! Calls to guest agents pass one more gate: [`AgentPlace`]. A guest decides how long its agent
//! takes, so an agent that was slow is asked only in the places kept for those.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::call::{Call, Lost, Primary, no_panic, worker_ended};
use super::events::Publisher;
use super::limits::{
    AgentPlace, CALLS_PER_HANDLE, Class, HANDLE_IDLE, LATE_AGENT_CALLS, LATE_CALLS, SLOW_AGENT,
    SLOW_AGENT_FOR,
};
use super::session::Session;
use super::workers::{Permits, Workers};
use super::{DaemonKind, LibvirtConfig};
use crate::hypervisor::{CallError, ConnectionState, HypervisorMetrics};

/// A connection that is opened again whenever it is lost, until this is dropped. Dropping waits
/// for nothing: handles are closed by workers.
pub(super) struct LibvirtConnection {
    shared: Arc<Shared>,
    _reconnecting: DropGuard,
}

/// The state of a connection, shared with its calls and with the task that reopens it.
pub(super) struct Shared {
    pub(super) config: LibvirtConfig,
    pub(super) metrics: Arc<HypervisorMetrics>,
    pub(super) workers: Workers,
    pub(super) publisher: Publisher,
    pub(super) health: watch::Sender<ConnectionState>,
    pub(super) primary: watch::Sender<Primary>,
    /// The first is the primary handle.
    handles: Mutex<Vec<Handle>>,
    limits: HashMap<Class, Arc<Semaphore>>,
    /// One call at a time for each domain and class, in order of arrival.
    turns: Mutex<HashMap<(Class, String), Weak<Semaphore>>>,
    late: AtomicUsize,
    agent_places: HashMap<AgentPlace, Arc<Semaphore>>,
    late_agents: AtomicUsize,
    /// UUIDs of domains whose agents were slow, with the time of the last slow call.
    slow_agents: Mutex<HashMap<String, Instant>>,
    /// Notified when a late call returns.
    pub(super) returned: Notify,
    lost: mpsc::UnboundedSender<Lost>,
}

/// A virConnect, or the room for one that is being opened.
struct Handle {
    slot: Arc<Slot>,
    calls: usize,
    idle_since: Instant,
}

/// A session that the first call opens while the others wait for it.
struct Slot {
    generation: u64,
    session: Mutex<Option<Arc<Session>>>,
    closed: Arc<AtomicBool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LibvirtConnection {
    /// Starts the task `keep`, which opens and reopens the connection, and returns at once.
    pub(super) fn start<K: Future<Output = ()> + Send + 'static>(
        config: LibvirtConfig,
        workers: Workers,
        metrics: Arc<HypervisorMetrics>,
        keep: impl FnOnce(Arc<Shared>, mpsc::UnboundedReceiver<Lost>) -> K,
    ) -> Self {
        let (lost, losses) = mpsc::unbounded_channel();
        let daemon = config.daemon;
        let limit = |class: Class| (class, Arc::new(Semaphore::new(class.limit(daemon))));
        let agent_limit = |place: AgentPlace| (place, Arc::new(Semaphore::new(place.limit())));
        let shared = Arc::new(Shared {
            config,
            metrics,
            workers,
            publisher: Publisher::new(daemon),
            health: watch::Sender::new(ConnectionState::Down),
            primary: watch::Sender::new(Primary::Opening),
            handles: Mutex::default(),
            limits: Class::ALL.map(limit).into(),
            turns: Mutex::default(),
            late: AtomicUsize::new(0),
            agent_places: AgentPlace::ALL.map(agent_limit).into(),
            late_agents: AtomicUsize::new(0),
            slow_agents: Mutex::default(),
            returned: Notify::new(),
            lost,
        });
        let stop = CancellationToken::new();
        let keep = keep(Arc::clone(&shared), losses);
        tokio::spawn(stop.clone().run_until_cancelled_owned(keep));
        Self {
            shared,
            _reconnecting: stop.drop_guard(),
        }
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Makes a call and waits for its result, at most until its deadline. A caller that stops
    /// waiting does not stop a call that has begun.
    pub(super) async fn call<T, W>(&self, call: Call, work: W) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&Session) -> Result<T, CallError> + Send + 'static,
    {
        let began = Instant::now();
        let until = began + call.wait.unwrap_or(call.deadline);
        match self.shared.seat(&call, until).await {
            // Detached from the caller, so that a late call is noticed though nobody waits.
            Ok(seat) => {
                let until = match call.wait {
                    Some(_) => Instant::now() + call.deadline,
                    None => until,
                };
                let shared = Arc::clone(&self.shared);
                let running = tokio::spawn(shared.run(call, Arc::new(seat), until, work));
                running.await.unwrap_or_else(|_| Err(worker_ended()))
            }
            Err(error) => {
                let outcome = Err(error);
                let metrics = &self.shared.metrics;
                metrics.call_ended(call.name, began.elapsed(), &outcome);
                outcome
            }
        }
    }
}

impl Drop for LibvirtConnection {
    fn drop(&mut self) {
        self.shared.close_handles();
    }
}

impl Drop for Shared {
    /// Closes a handle that was opened while the connection was dropped.
    fn drop(&mut self) {
        self.close_handles();
    }
}

impl Shared {
    /// Waits for the call's turn, room in its class, and a worker.
    async fn seat(&self, call: &Call, until: Instant) -> Result<Seat, CallError> {
        let generation = self.up(call, until).await?;
        self.admit(call)?;
        let is_late = |text: &str| match call.domain {
            Some(_) => CallError::Busy {
                call: call.name.into(),
                text: text.to_owned(),
            },
            None => CallError::Overdue {
                call: call.name.into(),
                after: call.deadline,
            },
        };
        let turn = match &call.domain {
            Some(domain) => Some(
                timeout_at(until, self.turn(call.class, domain).acquire_owned())
                    .await
                    .map_err(|_| is_late("an earlier call for this domain has not returned"))?
                    .map_err(|_| worker_ended())?,
            ),
            None => None,
        };
        let room = async {
            let mut places = Vec::new();
            if let Some(place) = self.agent_place(call) {
                let limit = self.agent_places.get(&place).map(Arc::clone)?;
                places.push(limit.acquire_owned().await.ok()?);
            }
            let limit = self.limits.get(&call.class).map(Arc::clone)?;
            places.push(limit.acquire_owned().await.ok()?);
            let mut permits = self.workers.acquire(call.class).await?;
            permits.append(&mut places);
            Some(permits)
        };
        let permits = timeout_at(until, room)
            .await
            .map_err(|_| is_late("calls for other domains have not returned"))?
            .ok_or_else(|| {
                let text = "the calls of too many launchers have not returned";
                CallError::Unavailable(text.to_owned())
            })?;
        self.admit(call)?;
        Ok(Seat::new(generation, call.class, turn, permits))
    }

    /// Rejects a call to a launcher that has a late one: it would take another thread, or a handle that
    /// does not exist. A late call to a guest agent delays only those to the agent.
    fn admit(&self, call: &Call) -> Result<(), CallError> {
        let late = match call.class {
            Class::Agent => self.late_calls() + self.late_agents.load(Ordering::Acquire),
            Class::Control | Class::Statistics | Class::Change => self.late_calls(),
        };
        if self.config.daemon == DaemonKind::Host || late == 0 {
            return Ok(());
        }
        let text = "an earlier call to this launcher has not returned";
        Err(CallError::Unavailable(text.to_owned()))
    }

    /// Returns the number of calls, except to guest agents, that have not returned by their deadline.
    pub(super) fn late_calls(&self) -> usize {
        self.late.load(Ordering::Acquire)
    }

    /// Returns the place that a call to a guest agent is restricted to.
    fn agent_place(&self, call: &Call) -> Option<AgentPlace> {
        let domain = call.domain.as_ref()?;
        if call.class == Class::Agent && lock(&self.slow_agents).contains_key(domain) {
            return Some(AgentPlace::Slow);
        }
        call.agent_place
    }

    /// Remembers for a while that an agent was slow.
    fn record_agent(&self, call: &Call, took: Duration) {
        if call.class != Class::Agent {
            return;
        }
        let mut slow = lock(&self.slow_agents);
        slow.retain(|_, at| at.elapsed() < SLOW_AGENT_FOR);
        if let Some(domain) = call.domain.as_ref().filter(|_| took >= SLOW_AGENT) {
            slow.insert(domain.clone(), Instant::now());
        }
    }

    /// Waits until it is known whether there is a connection; returns its generation.
    async fn up(&self, call: &Call, until: Instant) -> Result<u64, CallError> {
        let mut primary = self.primary.subscribe();
        let known = primary.wait_for(|state| *state != Primary::Opening);
        let reason = match timeout_at(until, known).await {
            Ok(Ok(state)) => match &*state {
                Primary::Up(generation) => return Ok(*generation),
                Primary::Down(reason) => reason.clone(),
                Primary::Opening => "it is being opened".to_owned(),
            },
            Ok(Err(_)) => return Err(worker_ended()),
            Err(_) => format!(
                "libvirt has not answered to a new connection within {:?}",
                call.deadline
            ),
        };
        Err(CallError::Unavailable(reason))
    }

    /// Returns the queue of a domain's calls of one class.
    fn turn(&self, class: Class, domain: &str) -> Arc<Semaphore> {
        let mut turns = lock(&self.turns);
        let key = (class, domain.to_owned());
        if let Some(turn) = turns.get(&key).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Semaphore::new(1));
        turns.insert(key, Arc::downgrade(&turn));
        turn
    }

    /// Has a worker make the call; enforces its deadline.
    async fn run<T, W>(
        self: Arc<Self>,
        call: Call,
        seat: Arc<Seat>,
        until: Instant,
        work: W,
    ) -> Result<T, CallError>
    where
        T: Send + 'static,
        W: FnOnce(&Session) -> Result<T, CallError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let occupied = Occupied(Arc::clone(&seat), Arc::clone(&self));
        self.workers.start(move || {
            let began = Instant::now();
            let outcome = occupied.1.lease().and_then(|lease| {
                let outcome = no_panic(call.name, || work(&lease.session));
                if !lease.session.is_alive() {
                    // The close callback was earlier in most cases, with a better reason.
                    occupied
                        .1
                        .report_lost(lease.slot.generation, "it was closed");
                }
                outcome
            });
            drop(occupied);
            // The receiver is gone if the call was late.
            drop(reply.send((outcome, began.elapsed())));
        });
        let (outcome, took) = match timeout_at(until, answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| (Err(worker_ended()), Duration::ZERO)),
            Err(_) => {
                seat.set_late(&self);
                if call.class == Class::Control {
                    self.report_lost(seat.generation, "libvirt did not answer a call in time");
                }
                let late = CallError::Overdue {
                    call: call.name.into(),
                    after: call.deadline,
                };
                (Err(late), call.deadline)
            }
        };
        self.record_agent(&call, took);
        self.metrics.call_ended(call.name, took, &outcome);
        outcome
    }

    /// Reports the end of the handles of a generation. Never blocks.
    pub(super) fn report_lost(&self, generation: u64, reason: &str) {
        let reason = reason.to_owned();
        // The receiver ends with the connection.
        drop(self.lost.send(Lost { generation, reason }));
    }

    /// Returns a channel for the close callback of a handle.
    pub(super) fn losses(&self) -> mpsc::UnboundedSender<Lost> {
        self.lost.clone()
    }

    /// True if one more late call of this connection may release its worker.
    pub(super) fn may_be_late(&self) -> bool {
        self.late.load(Ordering::Acquire) < LATE_CALLS
    }

    /// Makes an opened session the primary handle.
    pub(super) fn set_primary(&self, generation: u64, session: Session) {
        let slot = Slot {
            generation,
            session: Mutex::new(Some(Arc::new(session))),
            closed: Arc::default(),
        };
        lock(&self.handles).push(Handle::new(slot));
    }

    /// Removes all handles, for the caller to drop where it may block.
    pub(super) fn take_handles(&self) -> impl Send + 'static + use<> {
        std::mem::take(&mut *lock(&self.handles))
    }

    /// Removes all handles. Calls in progress go on; each handle is closed after its last one.
    pub(super) fn close_handles(&self) {
        self.close(std::mem::take(&mut *lock(&self.handles)));
    }

    /// Closes handles on a worker: closing sends a message to libvirtd and waits for the answer.
    fn close(&self, handles: Vec<Handle>) {
        if !handles.is_empty() {
            self.workers.start(move || drop(handles));
        }
    }

    /// Takes the first handle with room for one more call; opens one if there is none. Blocks.
    fn lease(self: &Arc<Self>) -> Result<Lease, CallError> {
        let slot = {
            let mut handles = lock(&self.handles);
            let Some(generation) = handles.first().map(|primary| primary.slot.generation) else {
                return Err(CallError::Unavailable("it was closed".to_owned()));
            };
            let has_room = |handle: &Handle| handle.calls < CALLS_PER_HANDLE && !handle.is_closed();
            let index = match handles.iter().position(has_room) {
                Some(index) => index,
                None if self.config.daemon == DaemonKind::Launcher => {
                    let text = "the launcher's only handle is in use";
                    return Err(CallError::Unavailable(text.to_owned()));
                }
                None => {
                    handles.push(Handle::new(Slot {
                        generation,
                        session: Mutex::default(),
                        closed: Arc::default(),
                    }));
                    handles.len() - 1
                }
            };
            let handle = &mut handles[index];
            handle.calls += 1;
            Arc::clone(&handle.slot)
        };
        // From here on the room is given back whatever happens.
        let room = Room(Arc::clone(self), slot);
        let session = room.1.session(self)?;
        Ok(Lease {
            session,
            slot: Arc::clone(&room.1),
            _room: room,
        })
    }

    /// Gives back a handle's room, and closes the additional handles that are idle or closed.
    fn release(&self, slot: &Arc<Slot>) {
        let mut handles = lock(&self.handles);
        let handle = handles
            .iter_mut()
            .find(|handle| Arc::ptr_eq(&handle.slot, slot));
        if let Some(handle) = handle {
            handle.calls -= 1;
            handle.idle_since = Instant::now();
        }
        let primary = handles.first().map(|primary| Arc::clone(&primary.slot));
        let unused = handles.extract_if(.., |handle| {
            let is_primary = primary
                .as_ref()
                .is_some_and(|primary| Arc::ptr_eq(primary, &handle.slot));
            let is_idle = handle.calls == 0 && handle.idle_since.elapsed() >= HANDLE_IDLE;
            !is_primary && (is_idle || handle.is_closed())
        });
        let unused = unused.collect();
        drop(handles);
        self.close(unused);
    }
}

impl Handle {
    fn new(slot: Slot) -> Self {
        Self {
            slot: Arc::new(slot),
            calls: 0,
            idle_since: Instant::now(),
        }
    }

    fn is_closed(&self) -> bool {
        self.slot.closed.load(Ordering::Acquire)
    }
}

impl Slot {
    /// Returns the session, opening it if it is not open yet.
    fn session(&self, shared: &Shared) -> Result<Arc<Session>, CallError> {
        let mut session = lock(&self.session);
        if let Some(session) = &*session {
            return Ok(Arc::clone(session));
        }
        let closed = Arc::clone(&self.closed);
        let began = Instant::now();
        let opened = Session::open(&shared.config, self.generation, move |_| {
            closed.store(true, Ordering::Release)
        });
        let metrics = &shared.metrics;
        metrics.call_ended("open", began.elapsed(), &opened);
        match opened {
            Ok(opened) => {
                let opened = Arc::new(opened);
                *session = Some(Arc::clone(&opened));
                Ok(opened)
            }
            Err(error) => {
                self.closed.store(true, Ordering::Release);
                Err(error)
            }
        }
    }
}

/// A handle in use by one call.
struct Lease {
    session: Arc<Session>,
    slot: Arc<Slot>,
    _room: Room,
}

/// Room for one call on a handle.
struct Room(Arc<Shared>, Arc<Slot>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.release(&self.1);
    }
}

/// Everything that a call occupies.
pub(super) struct Seat {
    generation: u64,
    class: Class,
    state: Mutex<SeatState>,
}

struct SeatState {
    turn: Option<OwnedSemaphorePermit>,
    permits: Permits,
    late: bool,
    returned: bool,
}

impl Seat {
    pub(super) fn new(
        generation: u64,
        class: Class,
        turn: Option<OwnedSemaphorePermit>,
        permits: Permits,
    ) -> Self {
        Self {
            generation,
            class,
            state: Mutex::new(SeatState {
                turn,
                permits,
                late: false,
                returned: false,
            }),
        }
    }

    /// Releases all but the domain's turn, unless too many calls are late already.
    pub(super) fn set_late(&self, shared: &Shared) {
        let mut state = lock(&self.state);
        let (late, limit) = self.late(shared);
        let may_be_late = late.load(Ordering::Acquire) < limit;
        if state.returned || state.late || !may_be_late || !shared.workers.add_late() {
            return;
        }
        late.fetch_add(1, Ordering::AcqRel);
        state.late = true;
        state.permits.clear();
    }

    /// Returns the number of late calls of this kind, and its maximum.
    fn late<'s>(&self, shared: &'s Shared) -> (&'s AtomicUsize, usize) {
        match self.class {
            Class::Agent => (&shared.late_agents, LATE_AGENT_CALLS),
            Class::Control | Class::Statistics | Class::Change => (&shared.late, LATE_CALLS),
        }
    }

    fn set_returned(&self, shared: &Shared) {
        let mut state = lock(&self.state);
        state.returned = true;
        state.turn = None;
        state.permits.clear();
        if std::mem::take(&mut state.late) {
            self.late(shared).0.fetch_sub(1, Ordering::AcqRel);
            shared.workers.remove_late();
            shared.returned.notify_one();
        }
    }
}

/// Marks a seat as returned however its job ends, also if it was never run.
pub(super) struct Occupied(pub(super) Arc<Seat>, pub(super) Arc<Shared>);

impl Drop for Occupied {
    fn drop(&mut self) {
        self.0.set_returned(&self.1);
    }
}
