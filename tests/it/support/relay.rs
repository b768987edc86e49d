//! A relay in front of libvirtd that counts requests and holds a request or an answer, so that a test
//! can kill the daemon between any two steps without a hook in it.
//!
//! It parses only the header of a message (libvirt's docs/kbase/internals/rpc.rst): six words, the
//! length first.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io, thread};

use anyhow::{Context as _, ensure};

use super::libvirtd::Libvirtd;

/// libvirt's main program; others are for keepalive and the monitor.
const REMOTE_PROGRAM: u32 = 0x2000_8086;

/// Procedures (libvirt's src/remote/remote_protocol.x).
pub(crate) const LOOKUP_BY_NAME: u32 = 23;
pub(crate) const ATTACH_DEVICE: u32 = 160;
pub(crate) const UPDATE_DEVICE: u32 = 174;
pub(crate) const SET_VCPUS: u32 = 199;
pub(crate) const GUEST_VCPUS: u32 = 371;

/// Maximum size of a message (`VIR_NET_MESSAGE_MAX`).
const LONGEST: usize = 32 << 20;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

/// The message to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// The next request of this procedure, and all later messages on its connection.
    Request(u32),
    /// The next answer to this procedure.
    Answer(u32),
    /// Everything after this number of further requests.
    After(usize),
}

#[derive(Default)]
struct State {
    hold: Option<Hold>,
    /// Number of holds so far.
    holds: usize,
    /// Number of messages in the last hold.
    held: usize,
    /// By the number of the hold: true if its messages are forwarded, false if they are dropped.
    released: BTreeMap<usize, bool>,
    passed: BTreeMap<u32, usize>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The relay, which listens until it is dropped.
pub(crate) struct Relay {
    shared: Arc<Shared>,
    uri: String,
    path: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToLibvirt,
    ToClient,
}

impl Relay {
    /// Listens next to this libvirtd's socket.
    pub(crate) fn start(libvirtd: &Libvirtd) -> anyhow::Result<Self> {
        Self::before(&libvirtd.uri(), libvirtd.directory().join("relay"))
    }

    /// Listens at a path, for a libvirt with this URI.
    pub(crate) fn before(uri: &str, path: PathBuf) -> anyhow::Result<Self> {
        let (head, socket) = uri.rsplit_once("socket=").context("a URI with a socket")?;
        let (uri, socket) = (
            format!("{head}socket={}", path.display()),
            PathBuf::from(socket),
        );
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777))?;
        let shared = Arc::new(Shared::default());
        let relay = Self {
            shared: Arc::clone(&shared),
            uri,
            path,
        };
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                // If libvirtd does not run, the connection of the client is closed.
                if let Ok(libvirt) = UnixStream::connect(&socket) {
                    shared.join(client, libvirt).ok();
                }
            }
        });
        Ok(relay)
    }

    /// Returns the URI of libvirt through the relay.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Starts to hold this message.
    pub(crate) fn hold(&self, hold: Hold) {
        let mut state = self.shared.lock();
        state.holds += 1;
        state.held = 0;
        state.hold = Some(hold);
    }

    /// Forwards the held messages, and starts to hold this one.
    pub(crate) fn then(&self, hold: Hold) {
        let held = self.shared.lock().holds;
        self.hold(hold);
        self.shared.lock().released.insert(held, true);
        self.shared.changed.notify_all();
    }

    /// Waits for the message to hold.
    pub(crate) fn holds(&self) -> anyhow::Result<()> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, LONG, |state| state.held == 0)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(state.held > 0, "there came nothing to hold");
        Ok(())
    }

    /// True if a message is held.
    pub(crate) fn is_holding(&self) -> bool {
        self.shared.lock().held > 0
    }

    /// Forwards the held messages, or drops them with their connection. Stops holding.
    pub(crate) fn release(&self, pass_on: bool) {
        let mut state = self.shared.lock();
        let holds = state.holds;
        state.released.insert(holds, pass_on);
        state.hold = None;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Returns the number of requests of this procedure that libvirt received.
    pub(crate) fn passed(&self, procedure: u32) -> usize {
        let state = self.shared.lock();
        state.passed.get(&procedure).copied().unwrap_or(0)
    }

    /// Returns the procedures of which libvirt received requests.
    pub(crate) fn procedures(&self) -> Vec<u32> {
        self.shared.lock().passed.keys().copied().collect()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.release(false);
        fs::remove_file(&self.path).ok();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, client: UnixStream, libvirt: UnixStream) -> io::Result<()> {
        let ends = [
            (
                client.try_clone()?,
                libvirt.try_clone()?,
                Direction::ToLibvirt,
            ),
            (libvirt, client, Direction::ToClient),
        ];
        for (from, to, direction) in ends {
            let shared = Arc::clone(self);
            thread::spawn(move || {
                let ended = shared.pass(from, &to, direction);
                // One end closed; the other may still send.
                let how = match (ended, direction) {
                    (Ok(()), Direction::ToLibvirt) => Shutdown::Write,
                    _ => Shutdown::Both,
                };
                to.shutdown(how).ok();
            });
        }
        Ok(())
    }

    /// Forwards messages until one end closes.
    fn pass(
        &self,
        mut from: UnixStream,
        mut to: &UnixStream,
        direction: Direction,
    ) -> io::Result<()> {
        while let Some(message) = read(&mut from)? {
            let word = |index: usize| {
                let bytes = message.get(4 * index..4 * index + 4)?;
                Some(u32::from_be_bytes(bytes.try_into().ok()?))
            };
            let ours = word(1) == Some(REMOTE_PROGRAM);
            let procedure = word(3).unwrap_or(0);
            if !self.may_pass(ours, procedure, word(4), direction) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            to.write_all(&message)?;
        }
        Ok(())
    }

    /// Waits while a message is held. Returns true if it is to be forwarded.
    fn may_pass(
        &self,
        ours: bool,
        procedure: u32,
        kind: Option<u32>,
        direction: Direction,
    ) -> bool {
        const CALL: u32 = 0;
        const ANSWER: u32 = 1;
        let mut state = self.lock();
        let is_call = ours && direction == Direction::ToLibvirt && kind == Some(CALL);
        let held = match state.hold {
            Some(Hold::Request(wanted)) => is_call && procedure == wanted,
            Some(Hold::Answer(wanted)) => {
                let is_answer = direction == Direction::ToClient && kind == Some(ANSWER);
                ours && is_answer && procedure == wanted
            }
            Some(Hold::After(0)) => true,
            Some(Hold::After(left)) => {
                if is_call {
                    state.hold = Some(Hold::After(left - 1));
                }
                false
            }
            None => false,
        };
        if held {
            // Only one message is held; the next of its kind is forwarded.
            if !matches!(state.hold, Some(Hold::After(_))) {
                state.hold = None;
            }
            state.held += 1;
            let number = state.holds;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| !state.released.contains_key(&number))
                .unwrap_or_else(PoisonError::into_inner);
            if state.released.get(&number) != Some(&true) {
                return false;
            }
        }
        if is_call {
            *state.passed.entry(procedure).or_default() += 1;
        }
        true
    }
}

/// Returns the next message with its length; `None` at the end.
fn read(from: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let size = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if !(length.len()..=LONGEST).contains(&size) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; size];
    message[..4].copy_from_slice(&length);
    from.read_exact(&mut message[4..])?;
    Ok(Some(message))
}
