//! libvirt's event loop, which keepalive and callbacks need: one thread for the whole process.

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use tracing::error;
use virt::error::clear_error_callback;
use virt::event::{event_register_default_impl, event_run_default_impl};

/// Has the loop run, from before the first connection is opened until the process ends: libvirt
/// has no way to take an event loop back. Also silences libvirt's own printing to stderr.
///
/// # Errors
/// A sentence on why there can be none. It is the same at every call.
pub(super) fn ensure() -> Result<(), String> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    STARTED.get_or_init(start).clone()
}

fn start() -> Result<(), String> {
    clear_error_callback();
    event_register_default_impl()
        .map_err(|error| format!("libvirt has no event loop: {}", error.message()))?;
    thread::Builder::new()
        .name("libvirt-events".to_owned())
        .spawn(run)
        .map(drop)
        .map_err(|error| format!("no thread for libvirt's events: {error}"))
}

fn run() {
    let mut failing = false;
    loop {
        match event_run_default_impl() {
            Ok(()) => failing = false,
            Err(reason) => {
                // It polls; if even that fails it must not take a whole CPU.
                if !failing {
                    error!(reason = reason.message(), "libvirt's event loop failed");
                }
                failing = true;
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}
