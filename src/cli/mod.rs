//! The command line: one file for each command.

mod capabilities;
mod check;
mod cleanup;
mod crd;
mod diagnosis;
mod doctor;
mod exit;
mod generate;
mod hotplug;
mod labels;
mod local;
mod offline;
mod operations;
mod output;
mod report;
mod run;
mod targets;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

pub use exit::{Exit, Failure};

use crate::config::{Config, Settings};
use crate::hypervisor::{Libvirt, LibvirtConfig};
use crate::probe::{Prober, Reading};
use crate::telemetry::Metrics;

/// Publishes what a libvirt node can run as labels, and keeps them true.
#[derive(Debug, Parser)]
#[command(name = "virtnode", version = version(), max_term_width = 100)]
struct Cli {
    /// The configuration file [default: /etc/virtnode/config.yaml, which may be missing]
    #[arg(long, env = "VIRTNODE_CONFIG", value_name = "FILE", global = true)]
    config: Option<PathBuf>,

    #[command(flatten)]
    settings: Settings,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The daemon: probe, publish, hotplug, serve metrics, health and the local API
    Run,
    /// The labels this node would publish, and why one was left out
    Labels(labels::Labels),
    /// The facts behind the labels: CPU, machine types, models with blockers, IOMMU, versions
    Capabilities(capabilities::Capabilities),
    /// Would a domain run here? Every reason and remedy, and how much room it has to grow
    Check(Box<check::Check>),
    /// Change a running domain, and prove that its guest has taken it
    Hotplug(hotplug::Hotplug),
    /// The hotplug operations this node has done or is doing
    Operations(operations::Operations),
    /// Look this node over: each thing that is wrong, why it matters, and the command that cures it
    Doctor(doctor::Doctor),
    /// Which nodes of the cluster can take a domain, why the others cannot, and the affinity for a pod
    Targets(targets::Targets),
    /// Remove what this program published, and nothing else
    Cleanup,
    /// Print the definitions of the custom resources, for `kubectl apply`
    Crd,
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Print the manual page, or write one for each command into a directory
    Man(generate::Man),
}

fn version() -> &'static str {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (",
        env!("VIRTNODE_COMMIT"),
        ")"
    )
}

/// Parses the arguments, runs the command, and says what went wrong.
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let status = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
                _ => Exit::Usage,
            };
            // A closed pipe is the reader's wish.
            let _closed = error.print();
            return status;
        }
    };
    match cli.run() {
        Ok(exit) => exit,
        Err(error) => {
            let exit = Exit::of(&error);
            if !exit::is_broken_pipe(&error) {
                output::complain(&format!("virtnode: {error:#}"));
            }
            exit
        }
    }
}

impl Cli {
    fn run(self) -> anyhow::Result<Exit> {
        let Self {
            config,
            settings,
            command,
        } = self;
        // Commands that ask nothing local do not need a readable configuration.
        match command {
            Command::Crd => return crd::run(),
            Command::Completions(arguments) => return arguments.run(Cli::command()),
            Command::Man(arguments) => return arguments.run(Cli::command()),
            _ => {}
        }
        let in_cluster = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        let load = || Config::load(config.as_deref(), &settings, in_cluster);
        let config = load().map_err(|error| Failure::new(Exit::Usage, error))?;
        match command {
            Command::Run => run::run(config, || load().map(drop)),
            Command::Labels(arguments) => arguments.run(&config),
            Command::Capabilities(arguments) => arguments.run(&config),
            Command::Check(arguments) => arguments.run(&config),
            Command::Hotplug(arguments) => arguments.run(&config),
            Command::Operations(arguments) => arguments.run(&config),
            Command::Doctor(arguments) => arguments.run(&config),
            Command::Targets(arguments) => arguments.run(&config),
            Command::Cleanup => cleanup::run(&config),
            Command::Crd | Command::Completions(_) | Command::Man(_) => Ok(Exit::Done),
        }
    }
}

/// The runtime of commands and daemon: one thread, since all the work is waiting.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// One probe of this machine.
fn probe(config: &Config) -> anyhow::Result<Reading> {
    let metrics = Arc::new(Metrics::new());
    runtime()?.block_on(async {
        let libvirt = LibvirtConfig {
            call_deadline: config.call_deadline,
            ..LibvirtConfig::without_events(config.connect.clone())
        };
        let libvirt = Arc::new(Libvirt::start(libvirt, Arc::clone(&metrics)));
        let mut prober = Prober::new(libvirt, metrics, Path::new("/").to_owned());
        Ok(prober.read().await)
    })
}

/// How a command ends that needed a whole reading: the worst of its failures, each on a line.
fn conclude(reading: &Reading, config: &Config) -> Exit {
    let unavailable = reading
        .failures
        .iter()
        .find(|failure| failure.code == "unavailable");
    if let Some(failure) = unavailable {
        output::complain(&format!(
            "virtnode: {} (connecting to {})",
            failure.message, config.connect
        ));
        return Exit::Unreachable;
    }
    for failure in &reading.failures {
        output::complain(&format!(
            "virtnode: {}: {}",
            failure.source.as_str(),
            failure.message
        ));
    }
    if reading
        .failures
        .iter()
        .any(|failure| failure.code == "timeout")
    {
        Exit::Unreachable
    } else if reading.failures.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    }
}
