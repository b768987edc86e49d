//! Where log lines go and how they look.

use std::io::IsTerminal;

use anyhow::{Context, anyhow};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt, registry};

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
    let filter: Targets = format!("{quiet}{filter}").parse().with_context(|| {
        format!("log: '{filter}' is no filter: write it like info,virtnode=debug")
    })?;
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    let outcome = registry().with(filter).with(lines).try_init();
    outcome.map_err(|error| anyhow!("cannot start the log: {error}"))
}
