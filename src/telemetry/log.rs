//! Log lines on standard error, as text or JSON.
//!
//! The driver of an operation runs in a span with the fields `operation`, `domain` and
//! `connection`. Text shows them before the message, JSON in the object `span`.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, anyhow};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt, registry};

use crate::config::LogFormat;
use crate::domain::is_plain;

/// Log targets to silence: kube logs each failed call, however often it fails. The cluster's
/// errors contain the same text.
const NOISY_LOG_TARGETS: [&str; 2] = ["kube_client", "kube_runtime"];

/// Starts logging to standard error.
///
/// # Errors
/// An invalid filter, or a second call.
pub fn init(format: LogFormat, filter: &str) -> anyhow::Result<()> {
    // First, so that the operator's own filter for these targets overrides it.
    let quiet = NOISY_LOG_TARGETS
        .map(|target| format!("{target}=off,"))
        .concat();
    let filter: Targets = format!("{quiet}{filter}").parse().with_context(|| {
        format!("log: '{filter}' is not a valid filter: write it like info,virtnode=debug")
    })?;
    let lines = fmt::layer().with_target(false);
    let lines = match format {
        LogFormat::Json => {
            let lines = lines.with_writer(io::stderr);
            let lines = lines.json().flatten_event(true);
            lines.with_span_list(false).boxed()
        }
        LogFormat::Text => {
            let lines = lines.with_writer(|| OneLine);
            lines.with_ansi(io::stderr().is_terminal()).boxed()
        }
    };
    let outcome = registry().with(filter).with(lines).try_init();
    outcome.map_err(|error| anyhow!("cannot start the log: {error}"))
}

/// Writer to standard error that escapes line breaks and control characters within a record:
/// libvirt's and QEMU's messages contain line breaks, and a domain's name must not forge a record.
struct OneLine;

impl Write for OneLine {
    /// Writes one whole record. The formatter has escaped every escape sequence but its own.
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
        if is_plain(c) || c == '\u{1b}' {
            line.push(c);
        } else {
            line.extend(c.escape_default());
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_with_line_breaks_is_written_as_one_line() {
        let record = "\u{1b}[32m INFO\u{1b}[0m QEMU said: a\n2026-11-21T00:00:00Z INFO b\r\n";
        assert_eq!(
            one_line(record),
            "\u{1b}[32m INFO\u{1b}[0m QEMU said: a\\n2026-11-21T00:00:00Z INFO b\\r\n"
        );
    }
}
