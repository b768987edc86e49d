//! The command line: one file per command.
//!
//! ```text
//! main → parse → run          no configuration: crd, completions, man, sockets
//!                 └ load Config ┬ one-shot libvirt connection: labels, capabilities, check, targets, compare, doctor
//!                               ├ daemon's local API (`api_client`): hotplug, operations, doctor
//!                               └ daemon: run
//! ```
//! A command returns an [`Exit`] or an error; [`main`] prints the error and picks its exit code.

mod api_client;
mod baseline;
mod capabilities;
mod check;
mod cleanup;
mod compare;
mod crd;
mod doctor;
mod exit;
mod generate;
mod hotplug;
mod input;
mod labels;
mod nodes;
mod offline;
mod operations;
mod options;
mod output;
mod run;
mod sockets;
mod targets;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use exit::{Exit, Failure};

use crate::config::{Config, Settings};
use crate::daemon::{Metrics, NoLibvirt, one_shot_libvirt_config};
use crate::documents::DocumentDirectory;
use crate::hypervisor::Libvirt;
use crate::label::FactSource;
use crate::probe::{LabelSource, Prober, Reading};

/// Publish the capabilities of a libvirt node as labels, and verify hotplug in its guests
#[derive(Debug, Parser)]
#[command(
    name = "virtnode",
    version = version(),
    max_term_width = 100,
    after_help = "`virtnode COMMAND --help` lists the options of a command. Each can also be set in \
                  the configuration file or by its environment variable."
)]
struct Cli {
    #[command(flatten)]
    settings: Settings,

    /// Configuration file [default: /etc/virtnode/config.yaml, if it exists]
    #[arg(long, env = "VIRTNODE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the daemon: publish labels, serve hotplug requests, metrics and health
    Run(run::RunCommand),
    /// Print the labels this node would publish, and why any were rejected
    Labels(labels::LabelsCommand),
    /// Print the facts that labels are derived from: CPU, machine types, IOMMU, versions
    Capabilities(capabilities::CapabilitiesCommand),
    /// Check whether a domain can run on this node, and how far it can grow
    Check(Box<check::CheckCommand>),
    /// Change a running domain and verify that its guest uses the result
    Hotplug(hotplug::HotplugCommand),
    /// List this node's hotplug operations
    Operations(operations::OperationsCommand),
    /// Diagnose this node: list each problem, its impact and the command that fixes it
    Doctor(doctor::DoctorCommand),
    /// List the cluster's nodes that can run a domain, and the node affinity for its pod
    Targets(targets::TargetsCommand),
    /// Find the best CPU that all of the chosen nodes can give, and what each node costs
    Baseline(baseline::BaselineCommand),
    /// Compare the CPUs of two nodes, or what a domain needs with a node
    Compare(compare::CompareCommand),
    /// Serve the sockets of KubeVirt's launchers for reading, to a daemon without access to them
    Sockets(sockets::SocketsCommand),
    /// Remove everything that virtnode published
    Cleanup,
    /// Print the CustomResourceDefinitions, for `kubectl apply`
    Crd,
    /// Print a shell completion script
    Completions(generate::CompletionsCommand),
    /// Print the manual page, or write one per command
    Man(generate::ManCommand),
}

fn version() -> &'static str {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (",
        env!("VIRTNODE_COMMIT"),
        ")"
    )
}

/// Parses the arguments, runs the command, and prints its error, if any.
pub fn main() -> Exit {
    let cli = match Cli::parse() {
        Ok(cli) => cli,
        Err(error) => {
            let exit = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
                _ => Exit::Usage,
            };
            // Fails only if the reader closed the pipe.
            let _closed = error.print();
            return exit;
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
    fn parse() -> Result<Self, clap::Error> {
        let mut matches = command().try_get_matches()?;
        Self::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command()))
    }

    fn run(self) -> anyhow::Result<Exit> {
        let Self {
            config: path,
            settings,
            command: chosen,
        } = self;
        let in_cluster = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        let load = || Config::load(path.as_deref(), &settings, in_cluster);
        let config = || load().map_err(|error| Failure::new(Exit::Usage, error));
        match chosen {
            // These need no configuration, so an invalid one does not stop them.
            CliCommand::Crd => crd::run(),
            CliCommand::Completions(arguments) => {
                arguments.run(options::remove_without_effect(definition()))
            }
            CliCommand::Man(arguments) => arguments.run(command()),
            CliCommand::Sockets(arguments) => arguments.run(&settings),
            CliCommand::Run(arguments) => arguments.run(config()?, || load().map(drop)),
            CliCommand::Labels(arguments) => arguments.run(&config()?),
            CliCommand::Capabilities(arguments) => arguments.run(&config()?),
            CliCommand::Check(arguments) => arguments.run(&config()?),
            CliCommand::Hotplug(arguments) => arguments.run(&config()?),
            CliCommand::Operations(arguments) => arguments.run(&config()?),
            CliCommand::Doctor(arguments) => arguments.run(&config()?),
            CliCommand::Targets(arguments) => arguments.run(&config()?),
            CliCommand::Baseline(arguments) => arguments.run(&config()?),
            CliCommand::Compare(arguments) => arguments.run(&config()?),
            CliCommand::Cleanup => cleanup::run(&config()?),
        }
    }
}

/// Returns the definition of the command line, with the help of each command reduced to the
/// options that affect it.
fn command() -> clap::Command {
    options::hide_without_effect(definition())
}

fn definition() -> clap::Command {
    options::with_globals(Cli::command())
}

/// Returns a single-threaded runtime: almost all work of the commands and the daemon is waiting.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

/// Probes this machine once, and returns the connection for further questions. Must be called
/// within a runtime.
///
/// # Errors
/// The node has no libvirt of its own.
async fn probe(config: &Config) -> Result<(Reading, Arc<Libvirt>), Failure> {
    let options = one_shot_libvirt_config(config).map_err(no_libvirt)?;
    let metrics = Metrics::new();
    let libvirt = Libvirt::start(options, metrics.hypervisor);
    let libvirt = Arc::new(libvirt);
    let mut prober = Prober::new(
        Arc::clone(&libvirt),
        Arc::clone(&metrics.labeller.probe),
        Path::new("/").to_owned(),
    );
    Ok((prober.read().await, libvirt))
}

/// Returns the failure of a command that needs a libvirt which does not exist.
fn no_libvirt(error: NoLibvirt) -> Failure {
    Failure::new(Exit::Unreachable, error)
}

/// Probes this machine once for its labels, which KubeVirt's documents may describe. Must be called
/// within a runtime.
async fn probe_labels(config: &Config) -> Reading {
    let metrics = Metrics::new();
    let options = one_shot_libvirt_config(config).ok();
    let libvirt = options.map(|options| Arc::new(Libvirt::start(options, metrics.hypervisor)));
    let source = LabelSource::new(
        config.label_origin,
        DocumentDirectory::new(&config.documents),
        libvirt,
        None,
    );
    let mut prober = Prober::new(
        Arc::new(source),
        Arc::clone(&metrics.labeller.probe),
        Path::new("/").to_owned(),
    );
    prober.read().await
}

/// Prints the failures of a probe, a line each, and returns the exit code of the worst.
fn conclude(reading: &Reading, config: &Config) -> Exit {
    let failed_with = |code| {
        let whole = reading
            .failures
            .iter()
            .filter(|failure| !failure.is_partial);
        // The CPU baseline is also unavailable if the document that it depends on is.
        let mut whole = whole.filter(|failure| failure.source != FactSource::CpuBaseline);
        whole.find(|failure| failure.code == code)
    };
    if let Some(failure) = failed_with("unavailable") {
        output::complain(&format!(
            "virtnode: {} (connecting to {})",
            failure.message,
            config.connect.as_deref().unwrap_or_default()
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
    if failed_with("timeout").is_some() {
        Exit::Unreachable
    } else if reading.failures.iter().all(|failure| failure.is_partial) {
        Exit::Done
    } else {
        Exit::Failed
    }
}
