//! The states of launchers, and the decisions about them. Without IO or clock.
//!
//! ```text
//!          socket seen             greeted, opened
//!  (new) ─────────────▶ Found ──▶ Opening ────────▶ Up ──── closed ──▶ Lost ─┐
//!                         ▲          │  │            │                       │
//!   link, not a socket    │          │  └ late ▶ Unresponsive                │
//!  (new) ────▶ Odd        │          ▼               │                       │
//!                         └── Refused, Lost, Unresponsive ◀── retry: 0.5 s to 30 s, at once
//!                                                    │        with a new socket
//!                                 pod is gone: Gone ─┴─▶ removed once its connection is closed
//! ```
//!
//! * One attempt or one closing of a launcher is in progress at a time: what a launcher's daemon delays
//!   is its own next connection.
//! * A socket is another one if its inode or the time of its last change differs. An open connection to
//!   an earlier socket is closed then.
//! * At most `most` launchers are taken, those that are known first. The others are counted.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::files::pods::{Scan, SocketFile};
use crate::units::words;

/// Pauses between attempts. KubeVirt restarts a libvirt that died after a second.
const MIN_PAUSE: Duration = Duration::from_millis(500);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// A launcher's socket as a scan finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketSighting {
    Socket(SocketFile),
    /// The volume exists and the socket does not: the daemon starts, or ended.
    Missing,
    /// A link, or another file than a socket.
    Odd,
    /// It cannot be decided.
    Unknown,
}

/// Returns the launchers of a scan, by pod UID.
pub(super) fn sightings(scan: Scan) -> BTreeMap<String, SocketSighting> {
    let sockets = scan.sockets.into_iter().map(|(pod, file)| {
        let sighting = file.map_or(SocketSighting::Odd, SocketSighting::Socket);
        (pod, sighting)
    });
    let missing = scan.without_socket.into_iter();
    let unknown = scan.unreadable.into_iter();
    sockets
        .chain(missing.map(|pod| (pod, SocketSighting::Missing)))
        .chain(unknown.map(|pod| (pod, SocketSighting::Unknown)))
        .collect()
}

words! {
    /// The state of a launcher.
    #[derive(Hash, PartialOrd, Ord)]
    pub enum LauncherState {
        /// It has no connection yet.
        Found = "found",
        Opening = "opening",
        Up = "up",
        /// Its daemon ended, or cannot be reached.
        Lost = "lost",
        /// File mode, authentication or the daemon refuses this client.
        Refused = "refused",
        /// A link or another file is in the place of its socket.
        Odd = "odd",
        /// Its daemon accepts connections or calls and does not answer.
        Unresponsive = "unresponsive",
        /// The pod is gone, and the connection is not closed yet.
        Gone = "gone",
    }
}

words! {
    /// The result of an attempt that failed.
    #[derive(Hash)]
    pub enum OpenFailure {
        Refused = "refused",
        Silent = "silent",
        Gone = "gone",
        Odd = "odd",
    }
}

/// The next thing to do about a launcher after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NextStep {
    Nothing,
    /// The failure is another one than the last.
    Report,
    /// The connection is to be used.
    Use,
    /// The connection is to be closed: its pod or its socket is gone.
    Close,
}

/// The launchers, by pod UID.
#[derive(Debug)]
pub(super) struct Table {
    most: usize,
    launchers: BTreeMap<String, KnownLauncher>,
    surplus: Vec<String>,
    scanned: bool,
}

#[derive(Debug)]
struct KnownLauncher {
    state: LauncherState,
    /// The socket at the last scan.
    socket: Option<SocketFile>,
    /// The socket of the connection, or of the attempt.
    used: Option<SocketFile>,
    /// True while an attempt or a closing has not ended.
    is_busy: bool,
    /// Time of the next attempt.
    due: Option<Instant>,
    pause: Duration,
    /// The last failure since it was up.
    failure: Option<OpenFailure>,
}

impl KnownLauncher {
    fn new() -> Self {
        Self {
            state: LauncherState::Found,
            socket: None,
            used: None,
            is_busy: false,
            due: None,
            pause: MIN_PAUSE,
            failure: None,
        }
    }

    fn retry(&mut self, state: LauncherState, now: Instant) {
        self.state = state;
        self.due = Some(now + self.pause);
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    /// Takes a sighting. Returns true if the connection is to be closed.
    fn seen(&mut self, sighting: SocketSighting, now: Instant) -> bool {
        let is_up = self.state == LauncherState::Up;
        let socket = match sighting {
            SocketSighting::Socket(socket) => Some(socket),
            SocketSighting::Missing => None,
            SocketSighting::Odd => {
                self.state = LauncherState::Odd;
                (self.socket, self.due) = (None, None);
                return is_up;
            }
            SocketSighting::Unknown => return false,
        };
        if matches!(self.state, LauncherState::Odd | LauncherState::Gone) {
            self.state = LauncherState::Found;
        }
        if socket.is_some() && socket != self.socket {
            (self.due, self.pause) = (Some(now), MIN_PAUSE);
        }
        self.socket = socket;
        // A daemon that ended removes its socket, and its connection ends by itself.
        let is_replaced = is_up && socket.is_some() && socket != self.used;
        if is_replaced {
            self.state = LauncherState::Lost;
        }
        is_replaced
    }
}

impl Table {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            launchers: BTreeMap::new(),
            surplus: Vec::new(),
            scanned: false,
        }
    }

    /// Takes the result of a scan. Returns the launchers whose connections are to be closed; each
    /// then counts as busy until [`Self::closed`].
    pub(super) fn scanned(
        &mut self,
        found: &BTreeMap<String, SocketSighting>,
        now: Instant,
    ) -> Vec<String> {
        self.scanned = true;
        let mut to_close = Vec::new();
        self.launchers.retain(|pod, launcher| {
            if found.contains_key(pod) {
                return true;
            }
            if launcher.state == LauncherState::Up {
                launcher.is_busy = true;
                to_close.push(pod.clone());
            }
            launcher.state = LauncherState::Gone;
            (launcher.socket, launcher.due) = (None, None);
            launcher.is_busy
        });
        self.surplus.clear();
        for (pod, sighting) in found {
            if !self.launchers.contains_key(pod) {
                if *sighting == SocketSighting::Unknown {
                    continue;
                }
                if self.launchers.len() >= self.most {
                    self.surplus.push(pod.clone());
                    continue;
                }
                self.launchers.insert(pod.clone(), KnownLauncher::new());
            }
            if let Some(launcher) = self.launchers.get_mut(pod)
                && launcher.seen(*sighting, now)
            {
                launcher.is_busy = true;
                to_close.push(pod.clone());
            }
        }
        to_close
    }

    /// Starts the attempt that is due first, if one is.
    pub(super) fn open_next(&mut self, now: Instant) -> Option<String> {
        let due = self.launchers.iter_mut().filter_map(|(pod, launcher)| {
            let due = launcher.due.filter(|due| *due <= now)?;
            (!launcher.is_busy && launcher.socket.is_some()).then_some((due, pod, launcher))
        });
        let (_, pod, launcher) = due.min_by_key(|(due, _, _)| *due)?;
        launcher.state = LauncherState::Opening;
        (launcher.is_busy, launcher.due) = (true, None);
        launcher.used = launcher.socket;
        Some(pod.clone())
    }

    /// Returns the time of the next attempt.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let waiting = self.launchers.values();
        let waiting = waiting.filter(|launcher| !launcher.is_busy && launcher.socket.is_some());
        waiting.filter_map(|launcher| launcher.due).min()
    }

    /// Records that an attempt is late, and goes on.
    pub(super) fn late(&mut self, pod: &str) {
        if let Some(launcher) = self.launchers.get_mut(pod)
            && launcher.state == LauncherState::Opening
        {
            launcher.state = LauncherState::Unresponsive;
        }
    }

    /// Records the end of an attempt, with the socket that it used. If the connection is to be closed
    /// the launcher stays busy.
    pub(super) fn opened(
        &mut self,
        pod: &str,
        result: Result<SocketFile, OpenFailure>,
        now: Instant,
    ) -> NextStep {
        let Some(launcher) = self.launchers.get_mut(pod) else {
            return if result.is_ok() {
                NextStep::Close
            } else {
                NextStep::Nothing
            };
        };
        let is_gone = launcher.state == LauncherState::Gone;
        match result {
            Ok(used) => {
                launcher.used = Some(used);
                let is_replaced = launcher.socket.is_some_and(|socket| socket != used);
                if is_gone || is_replaced || launcher.state == LauncherState::Odd {
                    return NextStep::Close;
                }
                launcher.is_busy = false;
                launcher.state = LauncherState::Up;
                (launcher.due, launcher.pause) = (None, MIN_PAUSE);
                launcher.failure = None;
                NextStep::Use
            }
            Err(_) if is_gone => {
                self.launchers.remove(pod);
                NextStep::Nothing
            }
            Err(failure) => {
                launcher.is_busy = false;
                // Seen by a scan while the attempt was in progress.
                let has_another = launcher.socket.is_some() && launcher.socket != launcher.used;
                let state = match failure {
                    OpenFailure::Refused => LauncherState::Refused,
                    OpenFailure::Silent => LauncherState::Unresponsive,
                    OpenFailure::Gone => LauncherState::Lost,
                    OpenFailure::Odd => LauncherState::Odd,
                };
                if has_another {
                    (launcher.state, launcher.due) = (LauncherState::Found, Some(now));
                } else if launcher.state != LauncherState::Odd {
                    launcher.retry(state, now);
                }
                if launcher.failure.replace(failure) == Some(failure) {
                    NextStep::Nothing
                } else {
                    NextStep::Report
                }
            }
        }
    }

    /// Records that a connection ended. Returns true if it is to be closed; the launcher is busy then.
    pub(super) fn lost(&mut self, pod: &str, now: Instant) -> bool {
        let Some(launcher) = self.launchers.get_mut(pod) else {
            return false;
        };
        let is_up = launcher.state == LauncherState::Up;
        if is_up {
            launcher.retry(LauncherState::Lost, now);
            launcher.is_busy = true;
        }
        is_up
    }

    /// Records that a connection is closed.
    pub(super) fn closed(&mut self, pod: &str, now: Instant) {
        let Some(launcher) = self.launchers.get_mut(pod) else {
            return;
        };
        launcher.is_busy = false;
        if launcher.state == LauncherState::Gone {
            self.launchers.remove(pod);
        } else if launcher.due.is_none() && launcher.socket.is_some() {
            launcher.due = Some(now);
        }
    }

    /// True once a scan has succeeded.
    pub(super) fn is_scanned(&self) -> bool {
        self.scanned
    }

    pub(super) fn state(&self, pod: &str) -> Option<LauncherState> {
        self.launchers.get(pod).map(|launcher| launcher.state)
    }

    pub(super) fn states(&self) -> impl Iterator<Item = (&str, LauncherState)> {
        let launchers = self.launchers.iter();
        launchers.map(|(pod, launcher)| (pod.as_str(), launcher.state))
    }

    /// Returns the pods of the launchers beyond the maximum.
    pub(super) fn surplus(&self) -> &[String] {
        &self.surplus
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
