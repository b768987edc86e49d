//! A relay in front of libvirtd that counts what libvirt is asked to do, and holds a request or an
//! answer back: so a test can end the daemon between any two steps, without a hook in it.
//!
//! It knows as much of libvirt's protocol as each message begins with (libvirt's
//! docs/kbase/internals/rpc.rst): six words, of which the length comes first.

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

/// libvirt's main program; others are for keeping alive and for the monitor.
const REMOTE_PROGRAM: u32 = 0x2000_8086;

/// Procedures (libvirt's src/remote/remote_protocol.x).
pub(crate) const LOOKUP_BY_NAME: u32 = 23;
pub(crate) const ATTACH_DEVICE: u32 = 160;
pub(crate) const UPDATE_DEVICE: u32 = 174;
pub(crate) const SET_VCPUS: u32 = 199;
pub(crate) const GUEST_VCPUS: u32 = 371;

/// No message of libvirt's is longer (`VIR_NET_MESSAGE_MAX`).
const LONGEST: usize = 32 << 20;

/// For what takes a moment; only a failing test waits so long.
const LONG: Duration = Duration::from_secs(60);

/// Which message is to be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// The next request of this procedure, and whatever comes after it on its connection.
    Request(u32),
    /// The next answer to this procedure.
    Answer(u32),
    /// After so many more requests everything.
    After(usize),
}

#[derive(Default)]
struct State {
    hold: Option<Hold>,
    /// How many times there was something to hold.
    holds: usize,
    /// How many messages were held by the last.
    held: usize,
    /// What becomes of what is held, by the number of the hold: whether it is passed on.
    released: BTreeMap<usize, bool>,
    passed: BTreeMap<u32, usize>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The relay; it listens until it is dropped.
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
    /// Listens beside this libvirtd's socket.
    pub(crate) fn start(libvirtd: &Libvirtd) -> anyhow::Result<Self> {
        let path = libvirtd.directory().join("relay");
        let uri = libvirtd.uri();
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
                // libvirtd may be away: then the client finds its connection closed.
                if let Ok(libvirt) = UnixStream::connect(&socket) {
                    shared.join(client, libvirt).ok();
                }
            }
        });
        Ok(relay)
    }

    /// Where libvirt is found behind the relay.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// From now on that message is held back.
    pub(crate) fn hold(&self, hold: Hold) {
        let mut state = self.shared.lock();
        state.holds += 1;
        state.held = 0;
        state.hold = Some(hold);
    }

    /// Passes on what is held, and holds that next.
    pub(crate) fn then(&self, hold: Hold) {
        let held = self.shared.lock().holds;
        self.hold(hold);
        self.shared.lock().released.insert(held, true);
        self.shared.changed.notify_all();
    }

    /// Waits until the message came that is to be held.
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

    /// Whether something is held now.
    pub(crate) fn is_holding(&self) -> bool {
        self.shared.lock().held > 0
    }

    /// Passes on what is held, or throws it away with its connection. Nothing more is held.
    pub(crate) fn release(&self, pass_on: bool) {
        let mut state = self.shared.lock();
        let holds = state.holds;
        state.released.insert(holds, pass_on);
        state.hold = None;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// How many requests of this procedure libvirt got so far.
    pub(crate) fn passed(&self, procedure: u32) -> usize {
        let state = self.shared.lock();
        state.passed.get(&procedure).copied().unwrap_or(0)
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
                // Who is gone has nothing more to say; the other end may.
                let how = match (ended, direction) {
                    (Ok(()), Direction::ToLibvirt) => Shutdown::Write,
                    _ => Shutdown::Both,
                };
                to.shutdown(how).ok();
            });
        }
        Ok(())
    }

    /// Passes messages on until one end is gone.
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

    /// Waits while a message is held; says whether it is to be passed on.
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
            // A single message is held once; the next like it is passed on.
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

/// The next message with its length; `None` at the end.
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
