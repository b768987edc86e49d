//! `virtnode run`.

use super::{Exit, runtime};
use crate::config::Config;
use crate::{daemon, telemetry};

/// Runs the daemon until it is told to stop.
pub(super) fn run(config: Config) -> anyhow::Result<Exit> {
    telemetry::log::init(config.log_format, &config.log)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(config));
    // Threads may still be waiting for a libvirt that does not answer; the process does not.
    runtime.shutdown_background();
    outcome.map(|()| Exit::Done)
}
