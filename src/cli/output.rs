//! Output for people and scripts.

use std::io::{IsTerminal, Write as _, stderr, stdout};

use anyhow::Context;
use clap::{Args, ValueEnum};
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::config::heading;

/// Maximum width of a line of prose. Commands to copy stay on one line.
const WIDTH: usize = 100;

#[derive(Debug, Args)]
pub(super) struct OutputOption {
    /// Output format
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        value_enum,
        default_value_t,
        help_heading = heading::OUTPUT
    )]
    output: OutputFormat,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// For people
    #[default]
    Table,
    /// For scripts: its fields are stable
    Json,
    /// The fields of the JSON, for people
    Yaml,
}

impl OutputOption {
    /// Prints `value` as JSON or YAML, or `text` for people.
    pub(super) fn print(
        &self,
        value: &impl Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut text = match self.output {
            OutputFormat::Table => text(),
            OutputFormat::Json => serde_json::to_string_pretty(value)?,
            OutputFormat::Yaml => serde_saphyr::to_string(value).context("cannot write YAML")?,
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        print(&text)
    }
}

/// Writes to standard output.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a line to standard error. If standard error is closed, the line is dropped.
pub(super) fn complain(line: &str) {
    let _closed = writeln!(stderr().lock(), "{line}");
}

/// Returns a table without borders or wrapping, for `grep` and `awk`.
pub(super) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied()).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    format!("{}\n", table.trim_fmt())
}

/// Writes a paragraph in lines of at most [`WIDTH`] characters. Text in backquotes is a command to
/// copy and stays on one line.
pub(super) fn wrap(text: &mut String, first_indent: &str, indent: &str, paragraph: &str) {
    let mut line = first_indent.to_owned();
    let mut is_empty = true;
    for word in unbroken_words(paragraph) {
        let is_too_long = line.chars().count() + 1 + word.chars().count() > WIDTH;
        if !is_empty && is_too_long {
            text.push_str(&line);
            text.push('\n');
            indent.clone_into(&mut line);
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(&word);
        is_empty = false;
    }
    text.push_str(&line);
    text.push('\n');
}

/// Splits at spaces, but not between backquotes. A message of QEMU may have an unpaired one.
fn unbroken_words(paragraph: &str) -> Vec<String> {
    let is_odd = |text: &str| text.matches('`').count() % 2 == 1;
    let are_paired = !is_odd(paragraph);
    let mut words: Vec<String> = Vec::new();
    let mut in_quotes = false;
    for word in paragraph.split(' ').filter(|word| !word.is_empty()) {
        match words.last_mut() {
            Some(last) if in_quotes => {
                last.push(' ');
                last.push_str(word);
            }
            _ => words.push(word.to_owned()),
        }
        in_quotes ^= are_paired && is_odd(word);
    }
    words
}

/// One line on the terminal that is overwritten by the next, and cleared when dropped. Without a
/// terminal nothing is written.
pub(super) struct StatusLine {
    on_terminal: bool,
}

impl StatusLine {
    pub(super) fn new() -> Self {
        Self {
            on_terminal: stderr().is_terminal(),
        }
    }

    pub(super) fn show(&self, text: &str) {
        /// Carriage return, then "erase in line" (ECMA-48).
        const CLEAR: &str = "\r\u{1b}[2K";
        if self.on_terminal {
            // A longer text would become two lines, of which only one is cleared.
            let text: String = text.chars().take(WIDTH).collect();
            let mut err = stderr().lock();
            let _closed = write!(err, "{CLEAR}{text}").and_then(|()| err.flush());
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.show("");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_backquotes_stays_on_one_line() {
        let mut text = String::new();
        let paragraph = format!(
            "{} `echo 'a b c' >file`, then {}",
            "x".repeat(80),
            "y".repeat(80)
        );
        wrap(&mut text, "", "  ", &paragraph);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[1], "  `echo 'a b c' >file`, then");
    }
}
