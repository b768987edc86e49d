//! `virtnode operations`.

use clap::Args;

use super::api_client::{ApiClient, DaemonLookup};
use super::hotplug::report::request;
use super::output::{OutputOption, table};
use super::{Exit, runtime};
use crate::config::Config;
use crate::daemon::api::OperationList;
use crate::domain::plain;
use crate::journal::{DIRECTORY, Journal};
use crate::operation::Record;

#[derive(Debug, Args)]
pub(super) struct OperationsCommand {
    #[command(flatten)]
    output: OutputOption,
}

impl OperationsCommand {
    /// Lists the daemon's operations, or those in the journal if no daemon runs.
    pub(super) fn run(&self, config: &Config) -> anyhow::Result<Exit> {
        let operations = runtime()?.block_on(async {
            match ApiClient::find(&config.socket).await? {
                DaemonLookup::Running(mut daemon) => daemon.operations().await,
                DaemonLookup::Absent(_) => from_journal(config),
            }
        })?;
        let list = OperationList { operations };
        self.output.print(&list, || show(&list.operations))?;
        Ok(Exit::Done)
    }
}

fn show(operations: &[Record]) -> String {
    if operations.is_empty() {
        return "The journal contains no operations.\n".to_owned();
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
        &["OPERATION", "CREATED", "DOMAIN", "REQUEST", "VERDICT", "BY"],
        rows,
    )
}

/// Returns the operations in the journal, the newest first. Does not create a journal.
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
