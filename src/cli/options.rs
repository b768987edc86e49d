//! Which of the global options affect which command.
//!
//! All of [`crate::config::Settings`] is accepted before and after every command, because scripts
//! and units set options without regard to the command that follows. Help, manual pages and
//! completions show only those in the table below.

use clap::{Arg, Command};

use crate::config::heading;

/// The global options, by their heading in `--help`.
const GLOBALS: [(&str, &[&str]); 6] = [
    (
        heading::CONNECTION,
        &["connect", "call_deadline_seconds", "socket"],
    ),
    (heading::KUBERNETES, &["node_name", "kubeconfig", "context"]),
    (
        heading::PUBLISHING,
        &[
            "publish",
            "schema",
            "force_conflicts",
            "features_directory",
            "probe_interval_seconds",
            "start_jitter_seconds",
        ],
    ),
    (heading::SERVING, &["listen"]),
    (heading::LOGGING, &["log_format", "log"]),
    (heading::FILES, &["config", "state_directory"]),
];

/// Makes the options of the root global, each under its heading.
pub(super) fn with_globals(root: Command) -> Command {
    root.mut_args(|argument| {
        let id = argument.get_id().clone();
        let heading = GLOBALS.iter().find(|(_, ids)| ids.contains(&id.as_str()));
        argument
            .global(true)
            .help_heading(heading.map(|(heading, _)| *heading))
    })
}

/// True if a global option changes what a command does.
fn is_effective(command: &str, option: &str) -> bool {
    let options: &[&str] = match command {
        "run" => return true,
        "labels" => &[
            "config",
            "connect",
            "call_deadline_seconds",
            "schema",
            "state_directory",
        ],
        "capabilities" | "check" => &["config", "connect", "call_deadline_seconds"],
        // The socket of the daemon, or with --direct what a daemon would use.
        "hotplug" => &[
            "config",
            "connect",
            "call_deadline_seconds",
            "socket",
            "state_directory",
        ],
        "operations" => &["config", "socket", "state_directory"],
        // The schema decides which labels are rejected, the interval how old a probe may be.
        "doctor" => &[
            "config",
            "connect",
            "call_deadline_seconds",
            "socket",
            "schema",
            "probe_interval_seconds",
            "listen",
        ],
        "baseline" => &["config", "node_name", "kubeconfig", "context"],
        "targets" | "compare" => &[
            "config",
            "connect",
            "call_deadline_seconds",
            "node_name",
            "kubeconfig",
            "context",
        ],
        "cleanup" => &[
            "config",
            "node_name",
            "kubeconfig",
            "context",
            "publish",
            "state_directory",
            "features_directory",
        ],
        // It has no configuration file.
        "sockets" => &["log_format", "log"],
        // `virtnode --help` itself: the file is the only setting of interest to every command.
        "virtnode" => &["config"],
        _ => &[],
    };
    options.contains(&option)
}

/// Hides from the help of each command the global options that do not affect it. They stay
/// accepted.
pub(super) fn hide_without_effect(root: Command) -> Command {
    let globals = globals(&root);
    let hide = |argument: Arg, is_effective: bool| Some(argument.hide(!is_effective));
    let root = add_globals(root, &globals, &hide);
    root.mut_args(|argument| {
        let hidden = !is_effective("virtnode", argument.get_id().as_str());
        argument.hide(hidden)
    })
}

/// Removes from each command the global options that do not affect it. For completion scripts:
/// that of bash offers hidden options as well.
pub(super) fn remove_without_effect(root: Command) -> Command {
    let globals = globals(&root);
    let keep = |argument: Arg, is_effective: bool| is_effective.then(|| argument.global(false));
    let root = add_globals(root, &globals, &keep);
    root.mut_args(|argument| argument.global(false))
}

fn globals(root: &Command) -> Vec<Arg> {
    let arguments = root.get_arguments();
    arguments.filter(|a| a.is_global_set()).cloned().collect()
}

/// Adds the global options to every command, each as `adapt` returns it. clap does not replace an
/// option that exists by the global one.
fn add_globals(
    root: Command,
    globals: &[Arg],
    adapt: &dyn Fn(Arg, bool) -> Option<Arg>,
) -> Command {
    root.mut_subcommands(|command| {
        let options = globals.iter().filter_map(|global| {
            let is_effective = is_effective(command.get_name(), global.get_id().as_str());
            adapt(global.clone(), is_effective)
        });
        let options: Vec<Arg> = options.collect();
        with_options(command, &options)
    })
}

fn with_options(command: Command, options: &[Arg]) -> Command {
    command
        .args(options)
        .mut_subcommands(|command| with_options(command, options))
}
