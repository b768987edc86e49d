//! Where log lines go and how they look.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, anyhow};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt, registry};

use crate::cluster::NOISY_LOG_TARGETS;
use crate::config::LogFormat;
use crate::domain::is_plain;

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
    let lines = fmt::layer().with_target(false);
    let lines = match format {
        LogFormat::Json => {
            let lines = lines.with_writer(io::stderr);
            lines.json().flatten_event(true).boxed()
        }
        LogFormat::Text => {
            let lines = lines.with_writer(|| OneLine);
            lines.with_ansi(io::stderr().is_terminal()).boxed()
        }
    };
    let outcome = registry().with(filter).with(lines).try_init();
    outcome.map_err(|error| anyhow!("cannot start the log: {error}"))
}

/// Standard error, to which each record is written as one line, whatever is in it: libvirt's and
/// QEMU's messages have line breaks, and no domain's name is to write a record of its own.
struct OneLine;

impl Write for OneLine {
    /// Takes a whole record, as the formatter gives it. Of escape sequences that are not its own
    /// it has made text already.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let line = one_line(&String::from_utf8_lossy(record));
        io::stderr().lock().write_all(line.as_bytes())?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn one_line(record: &str) -> String {
    let mut line = String::with_capacity(record.len());
    for c in record.strip_suffix('\n').unwrap_or(record).chars() {
        match is_plain(c) || c == '\u{1b}' {
            true => line.push(c),
            false => line.extend(c.escape_default()),
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_whatever_is_in_it() {
        let record = "\u{1b}[32m INFO\u{1b}[0m QEMU said: a\n2026-11-21T00:00:00Z INFO b\r\n";
        assert_eq!(
            one_line(record),
            "\u{1b}[32m INFO\u{1b}[0m QEMU said: a\\n2026-11-21T00:00:00Z INFO b\\r\n"
        );
    }
}
