//! `virtnode operations`.

use clap::Args;

use super::local::{Found, Local};
use super::output::{Output, print, print_value, table};
use super::report::{plain, request};
use super::{Exit, runtime};
use crate::config::Config;
use crate::daemon::api::OperationList;
use crate::journal::{DIRECTORY, Journal};
use crate::operation::Record;

/// `virtnode operations`.
#[derive(Debug, Args)]
pub(super) struct Operations {
    /// How they are printed
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

impl Operations {
    /// Lists the operations: the daemon's, or those in the journal if there is no daemon.
    pub(super) fn run(&self, config: &Config) -> anyhow::Result<Exit> {
        let operations = runtime()?.block_on(async {
            match Local::find(&config.socket).await? {
                Found::Daemon(mut daemon) => daemon.operations().await,
                Found::Nobody(_) => from_journal(config),
            }
        })?;
        match self.output {
            Output::Table => print(&show(&operations))?,
            output => print_value(&OperationList { operations }, output)?,
        }
        Ok(Exit::Done)
    }
}

fn show(operations: &[Record]) -> String {
    if operations.is_empty() {
        return "The journal has no operations.\n".to_owned();
    }
    let rows = operations.iter().map(|record| {
        let end = record.verdict.map_or(record.state.as_str(), |v| v.as_str());
        vec![
            record.id.to_string(),
            record.created.to_string(),
            plain(&record.domain.name),
            request(&record.request),
            end.to_owned(),
            plain(&record.asked_by.to_string()),
        ]
    });
    table(
        &["OPERATION", "ASKED", "DOMAIN", "REQUEST", "VERDICT", "BY"],
        rows,
    )
}

/// What the journal holds, the newest first. Where there is none nothing is made.
fn from_journal(config: &Config) -> anyhow::Result<Vec<Record>> {
    if !config.state_directory.join(DIRECTORY).exists() {
        return Ok(Vec::new());
    }
    let entries = Journal::open(&config.state_directory)?.entries()?;
    Ok(entries
        .into_iter()
        .rev()
        .map(|entry| entry.record)
        .collect())
}
