//! `virtnode run`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, anyhow};

use super::{Exit, runtime};
use crate::config::{Config, ConfigError};
use crate::daemon::Ending;
use crate::{daemon, ffi, telemetry};

/// Runs the daemon until it is told to stop. Told to reload, it starts again in the same process:
/// as the command line, the environment and the program's file are then. `check` reads the
/// configuration anew.
pub(super) fn run(
    config: Config,
    check: impl Fn() -> Result<(), ConfigError>,
) -> anyhow::Result<Exit> {
    ffi::keep_little_memory();
    telemetry::log::init(config.log_format, &config.log)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(config, check));
    // Threads may still be waiting for a libvirt that does not answer; the process does not.
    runtime.shutdown_background();
    match outcome? {
        Ending::Stop => Ok(Exit::Done),
        Ending::Reload => {
            let mut arguments = std::env::args_os();
            let program = arguments.next().context("it was started without a name")?;
            // Returns only if it fails. A service manager sees the same process go on.
            let error = std::process::Command::new(&program).args(arguments).exec();
            Err(anyhow!(error).context(format!("cannot start {} again", program.display())))
        }
    }
}
