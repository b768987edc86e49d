//! Decides which bytes pass between a client and a launcher's daemon. Pure: bytes in, bytes out.
//!
//! A message has a header of 28 bytes: its length, which includes the header, then program, version,
//! procedure, type, serial and status, each a big-endian word (libvirt's docs/kbase/internals/rpc.rst).
//!
//! ```text
//! client ──▶ Requests: a message passes when it is complete, its procedure is in the list and its
//!                      arguments meet the procedure's condition; at most 64 KiB are held
//! daemon ──▶ Replies:  a message passes after its header is checked; its length is at most 1 MiB
//! ```
//! Any other message is a [`Refusal`], after which the connection must end: nothing of the refused
//! message has passed. So the bytes that passed are always a prefix of those received, and in the
//! direction of the daemon they are whole messages.

mod arguments;

use thiserror::Error;

use super::procedures::{CHANGE, EVENTS, KEEPALIVE, Procedure, QEMU, READ, REMOTE, VERSION, find};
use arguments::are_allowed;

/// Length of a header, and so the minimum of a message.
pub const HEADER: usize = 28;
/// Maximum length of a request: the longest of virtnode's describes a CPU with all its features, about 16
/// KiB.
pub const MAX_REQUEST: usize = 64 * 1024;
/// Maximum length of a reply or an event. libvirt allows 32 MiB; capabilities and definitions have
/// about 100 KiB.
pub const MAX_REPLY: usize = 1024 * 1024;

/// Procedures of [`KEEPALIVE`]: ping and pong.
const KEEPALIVE_PROCEDURES: [u32; 2] = [1, 2];

/// The type of a message (`virNetMessageType`). The others transfer streams and file descriptors.
const CALL: u32 = 0;
const REPLY: u32 = 1;
const MESSAGE: u32 = 2;

/// The status of a message (`virNetMessageStatus`).
const OK: u32 = 0;
const ERROR: u32 = 1;

/// A message that does not pass, and ends its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("a message with a length of {0} bytes")]
    Length(u32),
    #[error("a message of the unknown program {0:#x}")]
    Program(u32),
    #[error("a message of the type {kind}, status {status} and version {version}")]
    Kind {
        kind: u32,
        status: u32,
        version: u32,
    },
    /// Not in the list.
    #[error("procedure {number} of program {program:#x}{}", named(.program, .number))]
    Procedure { program: u32, number: u32 },
    /// In the list, with other arguments.
    #[error("{0} with arguments that the broker does not forward")]
    Arguments(&'static str),
}

/// Returns the name of a procedure that only `--allow-changes` forwards.
fn named(program: &u32, number: &u32) -> String {
    find(CHANGE, *program, *number)
        .map(|procedure| format!(" ({}, needs --allow-changes)", procedure.name))
        .unwrap_or_default()
}

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub length: u32,
    pub program: u32,
    pub version: u32,
    pub procedure: u32,
    pub kind: u32,
    pub serial: u32,
    pub status: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| {
            let [a, b, c, d] = [0, 1, 2, 3].map(|byte| bytes[4 * at + byte]);
            u32::from_be_bytes([a, b, c, d])
        };
        Self {
            length: word(0),
            program: word(1),
            version: word(2),
            procedure: word(3),
            kind: word(4),
            serial: word(5),
            status: word(6),
        }
    }

    /// Returns the message's length if it is from the header's to `maximum`.
    fn checked_length(&self, maximum: usize) -> Result<usize, Refusal> {
        usize::try_from(self.length)
            .ok()
            .filter(|length| (HEADER..=maximum).contains(length))
            .ok_or(Refusal::Length(self.length))
    }

    fn check_kind(&self, kinds: &[u32], statuses: &[u32]) -> Result<(), Refusal> {
        let is_allowed = kinds.contains(&self.kind)
            && statuses.contains(&self.status)
            && self.version == VERSION;
        if is_allowed {
            Ok(())
        } else {
            Err(Refusal::Kind {
                kind: self.kind,
                status: self.status,
                version: self.version,
            })
        }
    }

    fn is_keepalive(&self) -> bool {
        self.program == KEEPALIVE
    }

    /// Keepalive messages are the same in both directions, and have no body.
    fn check_keepalive(&self) -> Result<(), Refusal> {
        self.checked_length(HEADER)?;
        self.check_kind(&[MESSAGE], &[OK])?;
        if KEEPALIVE_PROCEDURES.contains(&self.procedure) {
            Ok(())
        } else {
            Err(self.refused_procedure())
        }
    }

    fn refused_procedure(&self) -> Refusal {
        Refusal::Procedure {
            program: self.program,
            number: self.procedure,
        }
    }
}

/// The direction from a client to the daemon.
#[derive(Debug)]
pub struct Requests {
    allow_changes: bool,
    /// The part of the current message so far.
    held: Vec<u8>,
}

impl Requests {
    pub fn new(allow_changes: bool) -> Self {
        Self {
            allow_changes,
            held: Vec::new(),
        }
    }

    /// Adds received bytes, and appends to `passed` the messages that are complete.
    ///
    /// # Errors
    /// A message is not allowed. The messages before it are in `passed`.
    pub fn push(&mut self, mut input: &[u8], passed: &mut Vec<u8>) -> Result<(), Refusal> {
        while !input.is_empty() {
            let wanted = match self.header() {
                None => HEADER,
                Some(header) => self.check(&header)?.0,
            };
            let (taken, rest) = input.split_at(input.len().min(wanted - self.held.len()));
            self.held.extend_from_slice(taken);
            input = rest;
            self.release(passed)?;
        }
        Ok(())
    }

    /// Returns the current message's header, if it is complete.
    fn header(&self) -> Option<Header> {
        self.held.first_chunk().map(Header::parse)
    }

    /// Passes the current message if it is complete.
    fn release(&mut self, passed: &mut Vec<u8>) -> Result<(), Refusal> {
        let Some(header) = self.header() else {
            return Ok(());
        };
        let (length, procedure) = self.check(&header)?;
        if self.held.len() < length {
            return Ok(());
        }
        if let Some(procedure) = procedure
            && !are_allowed(procedure.arguments, &self.held[HEADER..])
        {
            return Err(Refusal::Arguments(procedure.name));
        }
        passed.extend_from_slice(&self.held);
        // An idle connection holds no memory.
        self.held = Vec::new();
        Ok(())
    }

    /// Returns the length of a message, and its procedure unless it is a keepalive message.
    fn check(&self, header: &Header) -> Result<(usize, Option<&'static Procedure>), Refusal> {
        if header.is_keepalive() {
            header.check_keepalive()?;
            return Ok((HEADER, None));
        }
        if ![REMOTE, QEMU].contains(&header.program) {
            return Err(Refusal::Program(header.program));
        }
        let in_list = |list| find(list, header.program, header.procedure);
        let change = in_list(CHANGE).filter(|_| self.allow_changes);
        let procedure = in_list(READ).or(change);
        let procedure = procedure.ok_or_else(|| header.refused_procedure())?;
        header.check_kind(&[CALL], &[OK])?;
        Ok((header.checked_length(MAX_REQUEST)?, Some(procedure)))
    }
}

/// The direction from the daemon to a client.
#[derive(Debug)]
pub struct Replies {
    allow_changes: bool,
    /// The part of the current message's header so far.
    header: [u8; HEADER],
    known: usize,
    /// Bytes of the current message's body that are still to come.
    remaining: usize,
}

impl Replies {
    pub fn new(allow_changes: bool) -> Self {
        Self {
            allow_changes,
            header: [0; HEADER],
            known: 0,
            remaining: 0,
        }
    }

    /// Adds received bytes, and appends to `passed` those that may pass.
    ///
    /// # Errors
    /// A message is not allowed. The messages before it are in `passed`.
    pub fn push(&mut self, mut input: &[u8], passed: &mut Vec<u8>) -> Result<(), Refusal> {
        while !input.is_empty() {
            if self.remaining > 0 {
                let (body, rest) = input.split_at(input.len().min(self.remaining));
                passed.extend_from_slice(body);
                self.remaining -= body.len();
                input = rest;
                continue;
            }
            let (taken, rest) = input.split_at(input.len().min(HEADER - self.known));
            self.header[self.known..self.known + taken.len()].copy_from_slice(taken);
            self.known += taken.len();
            input = rest;
            if self.known == HEADER {
                let length = self.check(&Header::parse(&self.header))?;
                passed.extend_from_slice(&self.header);
                self.known = 0;
                self.remaining = length - HEADER;
            }
        }
        Ok(())
    }

    /// Returns the length of a message.
    fn check(&self, header: &Header) -> Result<usize, Refusal> {
        if header.is_keepalive() {
            header.check_keepalive()?;
            return Ok(HEADER);
        }
        if ![REMOTE, QEMU].contains(&header.program) {
            return Err(Refusal::Program(header.program));
        }
        header.check_kind(&[REPLY, MESSAGE], &[OK, ERROR])?;
        let in_list = |list| find(list, header.program, header.procedure);
        let found = if header.kind == MESSAGE {
            in_list(EVENTS)
        } else {
            in_list(READ).or(in_list(CHANGE).filter(|_| self.allow_changes))
        };
        found.ok_or_else(|| header.refused_procedure())?;
        header.checked_length(MAX_REPLY)
    }
}

#[cfg(test)]
mod filter_tests;
