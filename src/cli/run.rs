//! `virtnode run`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, anyhow};
use clap::Args;

use super::{Exit, runtime};
use crate::config::{Config, ConfigError};
use crate::daemon::ExitReason;
use crate::{daemon, ffi, telemetry};

#[derive(Debug, Args)]
pub(super) struct RunCommand {
    /// Validate the configuration and exit, for `systemctl reload`
    #[arg(long)]
    check_config: bool,
}

impl RunCommand {
    pub(super) fn run(
        self,
        config: Config,
        check: impl Fn() -> Result<(), ConfigError>,
    ) -> anyhow::Result<Exit> {
        // A configuration that is not valid is an error before this.
        if self.check_config {
            return Ok(Exit::Done);
        }
        run(config, check)
    }
}

/// Runs the daemon until a signal stops it. On SIGHUP the process executes its own program again,
/// which may have been replaced, with the same arguments. `check` validates the configuration
/// before that.
fn run(config: Config, check: impl Fn() -> Result<(), ConfigError>) -> anyhow::Result<Exit> {
    ffi::keep_little_memory();
    telemetry::log::init(config.log_format, &config.log)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(config, check));
    // Does not wait for threads that are blocked in libvirt calls.
    runtime.shutdown_background();
    match outcome? {
        ExitReason::Stop => Ok(Exit::Done),
        ExitReason::Reload => {
            let mut arguments = std::env::args_os();
            let program = arguments.next().context("the process has no argv[0]")?;
            daemon::block_hangup().context("cannot block SIGHUP")?;
            // Returns only on failure. The process keeps its PID, by which systemd supervises it.
            let error = std::process::Command::new(&program).args(arguments).exec();
            Err(anyhow!(error).context(format!("cannot execute {} again", program.display())))
        }
    }
}
