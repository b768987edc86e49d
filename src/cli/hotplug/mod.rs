//! `virtnode hotplug`: one file per kind of resource.
//!
//! A kind adds a variant to [`ResourceCommand`] and a file with its arguments, which become a
//! [`HotplugRequest`].
//!
//! ```text
//! request ┬ local API: submit, follow ┬ report, exit code by verdict
//!         └ --direct: own executor    ┘
//! ```

mod memory;
pub(super) mod report;
mod vcpus;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures::StreamExt;
use futures::stream::BoxStream;
use nix::unistd::getuid;
use serde_json::json;
use tokio::signal::ctrl_c;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::api_client::{ApiClient, DaemonLookup};
use super::output::{OutputOption, StatusLine};
use super::{Exit, Failure, no_libvirt, runtime};
use crate::config::Config;
use crate::daemon::Metrics;
use crate::daemon::api::states;
use crate::daemon::{hotplug, libvirt_config};
use crate::hotplug::{HotplugRequest, Require};
use crate::hypervisor::Libvirt;
use crate::monitor::now;
use crate::operation::{AskedBy, DomainName, Order, Record};
use crate::units::whole_number;

/// Time for the executor of --direct to stop, after the verdict.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct HotplugCommand {
    #[command(subcommand)]
    resource: ResourceCommand,
}

#[derive(Debug, Subcommand)]
enum ResourceCommand {
    /// Set the number of vCPUs of a running domain and verify that its guest uses them
    Vcpus(vcpus::VcpusCommand),
    /// Set the memory of a running domain and verify that its guest uses it
    Memory(memory::MemoryCommand),
}

/// Options of every kind.
#[derive(Debug, Args)]
struct HotplugOptions {
    /// Proof that the verdict Verified requires: accepted, acknowledged or online
    #[arg(long, value_name = "LEVEL", default_value = "online")]
    require: Require,

    /// Also change the domain's definition, for its next start. By default only the running domain
    /// is changed, and the change ends with it
    #[arg(long)]
    persistent: bool,

    /// Seconds until there must be a verdict
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = whole_number(1..=3600_u64))]
    timeout: u64,

    /// Perform the operation in this process, without a daemon
    #[arg(long)]
    direct: bool,

    #[command(flatten)]
    output: OutputOption,
}

/// One request of the command line.
struct Submission {
    domain: DomainName,
    request: HotplugRequest,
    options: HotplugOptions,
}

impl HotplugCommand {
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        let submission = match self.resource {
            ResourceCommand::Vcpus(arguments) => arguments.into_submission(),
            ResourceCommand::Memory(arguments) => arguments.into_submission(),
        };
        let record = runtime()?.block_on(submission.perform(config))?;
        let output = &submission.options.output;
        output.print(&record, || report::report(&record))?;
        match record.verdict {
            Some(verdict) => Ok(verdict.into()),
            None => bail!(
                "the daemon stopped before the verdict; the operation is in its journal: see \
                 virtnode operations"
            ),
        }
    }
}

impl Submission {
    async fn perform(&self, config: &Config) -> anyhow::Result<Record> {
        if self.options.direct {
            return self.perform_directly(config).await;
        }
        let mut client = ApiClient::connect(&config.socket).await?;
        // The route is named after the kind, and its body has the fields of the request.
        let kind = self.request.kind().as_str();
        let mut body = json!(self.request)[kind].take();
        body["require"] = json!(self.options.require);
        if self.options.persistent {
            body["persistent"] = json!(true);
        }
        body["timeoutSeconds"] = json!(self.options.timeout);
        let domain = path_segment(self.domain.as_str());
        let path = format!("/v1/domains/{domain}/{kind}");
        let record = client.submit(&path, &body).await?;
        if record.is_done() {
            return Ok(record);
        }
        let states = client.follow(&record).await?;
        let id = record.id.clone();
        tokio::select! {
            record = follow(record, states) => record,
            result = interrupted() => Err(result?.into_error(format!(
                "operation {id} continues in the daemon: see virtnode operations"
            ))),
        }
    }

    /// Performs the operation in this process, with the journal that a daemon would use.
    async fn perform_directly(&self, config: &Config) -> anyhow::Result<Record> {
        if let Ok(DaemonLookup::Running(_)) = ApiClient::find(&config.socket).await {
            // Two executors would both resume the unfinished operations of one journal.
            bail!(
                "a daemon runs at {}: omit --direct",
                config.socket.display()
            );
        }
        let options = libvirt_config(config).map_err(no_libvirt)?;
        let metrics = Metrics::new();
        let libvirt = Libvirt::start(options, Arc::clone(&metrics.hypervisor));
        let executor = hotplug::start_executor(
            config,
            Arc::new(libvirt),
            &metrics.hotplug,
            None,
            None,
            None,
        )?;
        let order = Order {
            domain: self.domain.clone(),
            request: self.request.clone(),
            require: self.options.require,
            persistent: self.options.persistent,
            timeout: Duration::from_secs(self.options.timeout),
            idempotency_key: None,
            asked_by: AskedBy::Local {
                uid: getuid().as_raw(),
            },
        };
        let id = executor.submit(order).await?;
        let record = executor.operation(&id).zip(executor.watch(&id));
        let (record, changes) = record.context("the operation is not in the journal")?;
        let states = states(changes).map(anyhow::Ok).boxed();
        let record = tokio::select! {
            record = follow(record, states) => record,
            result = interrupted() => result.and_then(|interrupt| Err(interrupt.into_error(format!(
                "operation {id} is in the journal, libvirt may carry out its last call, and the next \
                 daemon (virtnode run) or hotplug --direct resumes it"
            )))),
        };
        // The next daemon resumes what is unfinished or may still be verified.
        timeout(GRACE, executor.stop()).await.ok();
        record
    }
}

/// Shows the progress on a terminal until there is a verdict, or the stream ends.
async fn follow(
    mut record: Record,
    mut states: BoxStream<'static, anyhow::Result<Record>>,
) -> anyhow::Result<Record> {
    let line = StatusLine::new();
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !record.is_done() {
        line.show(&report::progress(&record, now()));
        tokio::select! {
            next = states.next() => match next {
                Some(next) => record = next?,
                None => break,
            },
            _ = second.tick() => {}
        }
    }
    Ok(record)
}

/// An interrupt by the user.
struct Interrupt(&'static str);

impl Interrupt {
    /// Returns the error that says what becomes of the operation.
    fn into_error(self, consequence: String) -> anyhow::Error {
        Failure::new(Exit::Failed, format!("{}: {consequence}", self.0)).into()
    }
}

/// Waits for Ctrl-C, or for the signal that ends a process.
async fn interrupted() -> anyhow::Result<Interrupt> {
    let mut end = signal(SignalKind::terminate())?;
    Ok(tokio::select! {
        result = ctrl_c() => result.map(|()| Interrupt("interrupted"))?,
        _ = end.recv() => Interrupt("terminated"),
    })
}

/// Encodes a name as one segment of a path.
fn path_segment(name: &str) -> String {
    let mut path = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(byte.into()),
            // Dots as well, because "." and ".." are directories to some clients.
            _ => {
                let _ok = write!(path, "%{byte:02X}");
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_becomes_one_path_segment() {
        assert_eq!(path_segment("vm-1_a~"), "vm-1_a~");
        assert_eq!(path_segment("../a b\"\n"), "%2E%2E%2Fa%20b%22%0A");
        assert_eq!(path_segment("ü"), "%C3%BC");
    }
}
