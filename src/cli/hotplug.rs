//! `virtnode hotplug`.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures::StreamExt;
use futures::stream::BoxStream;
use nix::unistd::getuid;
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::local::{Found, Local};
use super::output::{Output, print, print_value};
use super::{Exit, report, runtime};
use crate::config::Config;
use crate::daemon::api::{Operations, states};
use crate::daemon::hotplug::Carried;
use crate::daemon::libvirt_config;
use crate::hotplug::{HotplugRequest, Require};
use crate::hypervisor::Libvirt;
use crate::operation::{AskedBy, DomainName, Order, Record};
use crate::telemetry::{Metrics, now};
use crate::units::Bytes;

/// `virtnode hotplug vcpus|memory DOMAIN …`.
#[derive(Debug, Args)]
pub(super) struct Hotplug {
    #[command(subcommand)]
    resource: Resource,
}

#[derive(Debug, Subcommand)]
enum Resource {
    /// Give a running domain this many vCPUs in all, and prove that its guest uses them
    Vcpus {
        /// The domain's name or UUID
        domain: DomainName,
        /// How many vCPUs in all
        #[arg(allow_negative_numbers = true)]
        count: u32,
        /// Bring vCPUs that the guest leaves offline online through its agent
        #[arg(long)]
        online: bool,
        #[command(flatten)]
        terms: Terms,
    },
    /// Give a running domain this much memory in all, and prove that its guest uses it
    Memory {
        /// The domain's name or UUID
        domain: DomainName,
        /// How much memory in all, such as 2GiB, 1536MiB or 2Gi
        #[arg(allow_hyphen_values = true)]
        size: Bytes,
        #[command(flatten)]
        terms: Terms,
    },
}

#[derive(Debug, Args)]
struct Terms {
    /// What must be proven: accepted, acknowledged or online
    #[arg(long, value_name = "LEVEL", default_value = "online")]
    require: Require,

    /// Seconds until there must be a verdict
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,

    /// Do it in this process, without a daemon
    #[arg(long)]
    direct: bool,

    /// How the result is printed
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

impl Hotplug {
    /// Does one verified operation; the verdict decides how the command ends.
    pub(super) fn run(self, config: &Config) -> anyhow::Result<Exit> {
        let (domain, request, terms) = match self.resource {
            Resource::Vcpus {
                domain,
                count,
                online,
                terms,
            } => (domain, HotplugRequest::Vcpus { count, online }, terms),
            Resource::Memory {
                domain,
                size,
                terms,
            } => (domain, HotplugRequest::Memory { size }, terms),
        };
        let record = runtime()?.block_on(ask(config, &domain, &request, &terms))?;
        match terms.output {
            Output::Table => print(&report::report(&record))?,
            output => print_value(&record, output)?,
        }
        match record.verdict {
            Some(verdict) => Ok(verdict.into()),
            None => bail!(
                "the daemon ended before there was a verdict; the operation is in its journal: \
                 see virtnode operations"
            ),
        }
    }
}

async fn ask(
    config: &Config,
    domain: &DomainName,
    request: &HotplugRequest,
    terms: &Terms,
) -> anyhow::Result<Record> {
    if terms.direct {
        return direct(config, domain, request, terms).await;
    }
    let mut local = Local::connect(&config.socket).await?;
    let resource = request.kind().as_str();
    let mut body = json!(request)[resource].take();
    body["require"] = json!(terms.require);
    body["timeoutSeconds"] = json!(terms.timeout);
    let path = format!("/v1/domains/{}/{resource}", encoded(domain.as_str()));
    let record = local.submit(&path, &body).await?;
    if record.is_done() {
        return Ok(record);
    }
    let progress = local.follow(&record).await?;
    follow(record, progress.states()).await
}

/// The same in this process, with the journal that a daemon would have.
async fn direct(
    config: &Config,
    domain: &DomainName,
    request: &HotplugRequest,
    terms: &Terms,
) -> anyhow::Result<Record> {
    if let Ok(Found::Daemon(_)) = Local::find(&config.socket).await {
        // Both would take up what the journal holds unfinished.
        bail!(
            "a daemon answers at {}: leave --direct out",
            config.socket.display()
        );
    }
    let metrics = Arc::new(Metrics::new());
    let control = Libvirt::start(libvirt_config(config), Arc::clone(&metrics));
    let (state, deep) = (&config.state_directory, config.deep_verify);
    let carried = Carried::start(Arc::new(control), state, deep, &metrics, None)?;
    let order = Order {
        domain: domain.clone(),
        request: request.clone(),
        require: terms.require,
        timeout: Duration::from_secs(terms.timeout),
        idempotency_key: None,
        asked_by: AskedBy::Local {
            uid: getuid().as_raw(),
        },
    };
    let id = carried.submit(order).await?;
    let record = carried.operation(&id).zip(carried.watch(&id));
    let (record, states_to_come) = record.context("the operation is not in the journal")?;
    let states = states(states_to_come).map(anyhow::Ok).boxed();
    let record = follow(record, states).await;
    // What is unfinished, or may still become good, the next daemon takes up.
    timeout(GRACE, carried.stop()).await.ok();
    record
}

/// How long this process waits for its own work to end.
const GRACE: Duration = Duration::from_secs(2);

/// Shows what is awaited on a terminal, until there is a verdict or the daemon ends.
async fn follow(
    mut record: Record,
    mut states: BoxStream<'static, anyhow::Result<Record>>,
) -> anyhow::Result<Record> {
    let mut line = Line::default();
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        line.show(&record);
        tokio::select! {
            next = states.next() => match next {
                Some(next) => record = next?,
                None => return Ok(record),
            },
            _ = second.tick() => {}
        }
        if record.is_done() {
            return Ok(record);
        }
    }
}

/// The one line on the terminal; taken away at the end.
struct Line {
    on_terminal: bool,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            on_terminal: std::io::stderr().is_terminal(),
        }
    }
}

/// To the line's begin, and clear it.
const CLEAR: &str = "\r\u{1b}[2K";

impl Line {
    fn show(&mut self, record: &Record) {
        if self.on_terminal {
            // So that it stays one line on the usual terminal.
            let text = report::progress(record, now());
            self.write(&text.chars().take(100).collect::<String>());
        }
    }

    fn write(&self, text: &str) {
        let mut err = std::io::stderr().lock();
        // A closed terminal is the reader's wish.
        let _closed = write!(err, "{CLEAR}{text}").and_then(|()| err.flush());
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.on_terminal {
            self.write("");
        }
    }
}

/// A name as one segment of a path.
fn encoded(name: &str) -> String {
    let mut path = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(byte.into()),
            // Dots too: some take "." and ".." for directories.
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
    fn any_name_is_one_segment() {
        assert_eq!(encoded("vm-1_a~"), "vm-1_a~");
        assert_eq!(encoded("../a b\"\n"), "%2E%2E%2Fa%20b%22%0A");
        assert_eq!(encoded("ü"), "%C3%BC");
    }
}
