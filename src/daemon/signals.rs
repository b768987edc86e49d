//! SIGHUP across a reload.
//!
//! A handler does not survive the execution of a program, so a signal that arrives before the new
//! image has its own handler would end the process. A blocked signal does survive: it stays pending
//! until the new image handles it, and then reloads once more. So no configuration is missed.

use std::io;

use nix::sys::signal::{SigSet, Signal as SignalNumber};
use tokio::signal::unix::{Signal, SignalKind, signal};

fn hangup() -> SigSet {
    let mut set = SigSet::empty();
    set.add(SignalNumber::SIGHUP);
    set
}

/// Blocks SIGHUP in this thread, for the image that the process executes next.
///
/// # Errors
/// The kernel's own.
pub fn block_hangup() -> io::Result<()> {
    Ok(hangup().thread_block()?)
}

/// Handles SIGHUP from now on, including one that is pending. Must be called before other threads
/// start, because they inherit the mask.
pub(super) fn handle_hangup() -> io::Result<Signal> {
    let handled = signal(SignalKind::hangup())?;
    hangup().thread_unblock()?;
    Ok(handled)
}
