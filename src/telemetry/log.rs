//! Where log lines go and how they look.

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use tracing_subscriber::EnvFilter;

use crate::cluster::NOISY_LOG_TARGETS;
use crate::config::LogFormat;

/// Sends log lines to standard error from here on.
///
/// # Errors
/// A filter that is none, or a second call.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    // First, so that what the operator writes of these targets still counts.
    let quiet = NOISY_LOG_TARGETS
        .map(|target| format!("{target}=off,"))
        .concat();
    let filter = EnvFilter::builder()
        .parse(format!("{quiet}{filter}"))
        .with_context(|| {
            format!("log: '{filter}' is no filter: write it like info,virtnode=debug")
        })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    let outcome = match format {
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
    outcome.map_err(|error| anyhow!("cannot start the log: {error}"))
}
