//! `virtnode operations`.

mod external;

use clap::Args;

use super::api_client::{ApiClient, DaemonLookup};
use super::hotplug::report::request;
use super::output::{OutputOption, complain, table};
use super::{Exit, runtime};
use crate::config::Config;
use crate::daemon::api::{ExternalChangeList, OperationList};
use crate::domain::plain;
use crate::journal::{DIRECTORY, Journal};
use crate::operation::Record;
use crate::units::shortened;

/// Maximum width of a cell in characters. JSON has the whole text.
const CELL_MAX: usize = 40;

#[derive(Debug, Args)]
pub(super) struct OperationsCommand {
    #[command(flatten)]
    output: OutputOption,

    /// List the changes that other clients of libvirt made since the daemon started, and what their
    /// guests made of them
    #[arg(long)]
    external: bool,
}

impl OperationsCommand {
    /// Lists the daemon's operations, or those in the journal if no daemon runs.
    pub(super) fn run(&self, config: &Config) -> anyhow::Result<Exit> {
        if self.external {
            return self.external(config);
        }
        let operations = runtime()?.block_on(async {
            match ApiClient::find(&config.socket).await? {
                DaemonLookup::Running(mut daemon) => daemon.operations().await,
                DaemonLookup::Absent(reason) => from_journal(config, &reason),
            }
        })?;
        let list = OperationList { operations };
        self.output.print(&list, || show(&list.operations))?;
        Ok(Exit::Done)
    }
}

impl OperationsCommand {
    /// Lists the changes by other clients, which only the daemon knows.
    fn external(&self, config: &Config) -> anyhow::Result<Exit> {
        let changes = runtime()?.block_on(async {
            match ApiClient::find(&config.socket).await? {
                DaemonLookup::Running(mut daemon) => daemon.external_changes().await,
                DaemonLookup::Absent(problem) => anyhow::bail!(
                    "{problem}: changes by other clients are known only to a running daemon \
                     (virtnode run) with externalChanges.enabled"
                ),
            }
        })?;
        let list = ExternalChangeList { changes };
        self.output.print(&list, || external::show(&list.changes))?;
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
            shortened(&plain(&record.domain.display_name()), CELL_MAX),
            request(&record.request),
            end.to_owned(),
            shortened(&plain(&record.asked_by.to_string()), CELL_MAX),
        ]
    });
    table(
        &["OPERATION", "CREATED", "DOMAIN", "REQUEST", "VERDICT", "BY"],
        rows,
    )
}

/// Returns the operations in the journal, the newest first, and reports on standard error where they
/// come from. Changes nothing, because a daemon without a socket may have the journal open.
fn from_journal(config: &Config, reason: &str) -> anyhow::Result<Vec<Record>> {
    let directory = config.state_directory.join(DIRECTORY);
    let journal = directory.display();
    if !directory.exists() {
        complain(&format!(
            "virtnode: {reason}; the journal {journal} does not exist either"
        ));
        return Ok(Vec::new());
    }
    complain(&format!(
        "virtnode: {reason}; listing the journal {journal} instead"
    ));
    let entries = Journal::read(&config.state_directory)?;
    Ok(entries
        .into_iter()
        .rev()
        .map(|entry| entry.record)
        .collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hotplug::{HotplugRequest, Require};
    use crate::operation::{AskedBy, OperationId, Order};
    use crate::units::Timestamp;

    #[test]
    fn long_names_do_not_widen_the_table() {
        let order = Order {
            domain: "n".repeat(255).parse().unwrap(),
            request: HotplugRequest::Vcpus {
                count: 2,
                online: false,
            },
            require: Require::Online,
            persistent: false,
            timeout: Duration::from_secs(60),
            idempotency_key: None,
            asked_by: AskedBy::Object {
                object: format!("domainhotplug/{}", "o".repeat(253)),
                user: None,
            },
        };
        let record = Record::new(OperationId::new(1, 7), &order, Timestamp::from_millis(0));
        let text = show(&[record]);
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest.is_some_and(|width| width <= 180), "{text}");
        assert!(
            text.contains("nnn…") && text.contains("domainhotplug/ooo"),
            "{text}"
        );
    }
}
