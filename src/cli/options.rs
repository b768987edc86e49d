//! Which of the global options affect which command.
//!
//! All of [`crate::config::Settings`] is accepted before and after every command, because scripts
//! and units set options without regard to the command that follows. Help, manual pages and
//! completions show only those in [`effective`].

use clap::{Arg, Command};

const ALL: &[&str] = &[
    "config",
    "connect",
    "call_deadline_seconds",
    "socket",
    "node_name",
    "kubeconfig",
    "context",
    "publish",
    "schema",
    "force_conflicts",
    "state_directory",
    "features_directory",
    "probe_interval_seconds",
    "start_jitter_seconds",
    "listen",
    "log_format",
    "log",
];

/// Returns the identifiers of the global options that change what a command does.
fn effective(command: &str) -> &'static [&'static str] {
    match command {
        "run" => ALL,
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
        "targets" => &[
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
        // `virtnode --help` itself: the file is the only setting of interest to every command.
        "virtnode" => &["config"],
        _ => &[],
    }
}

/// Hides from the help of each command the global options that do not affect it. They stay
/// accepted.
pub(super) fn hide_without_effect(root: Command) -> Command {
    let globals: Vec<Arg> = root
        .get_arguments()
        .filter(|argument| argument.is_global_set())
        .cloned()
        .collect();
    let root = root.mut_subcommands(|command| {
        let shown = effective(command.get_name());
        with_globals(command, &globals, shown)
    });
    globals.iter().fold(root, |root, global| {
        let hidden = !effective("virtnode").contains(&global.get_id().as_str());
        root.mut_arg(global.get_id(), |argument| argument.hide(hidden))
    })
}

/// Adds the global options before clap would, which does not replace an option that exists.
fn with_globals(command: Command, globals: &[Arg], shown: &[&str]) -> Command {
    let copies = globals.iter().map(|global| {
        let hidden = !shown.contains(&global.get_id().as_str());
        global.clone().hide(hidden)
    });
    command
        .args(copies)
        .mut_subcommands(|command| with_globals(command, globals, shown))
}
