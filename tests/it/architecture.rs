//! The invariants of ARCHITECTURE.md that a test can hold.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(directory: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src")
        .join(directory);
    if root.is_file() {
        return vec![(root.clone(), fs::read_to_string(&root).unwrap())];
    }
    let mut found = Vec::new();
    let mut pending = vec![root];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

/// The lines of code, without comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
}

const CORE: [&str; 9] = [
    "capability",
    "compat",
    "doctor/checks",
    "domain",
    "hotplug",
    "label",
    "operation.rs",
    "units.rs",
    "xml.rs",
];

#[test]
fn the_core_reaches_nothing_outside_itself() {
    let outside = [
        "tokio",
        "virt::",
        "kube::",
        "k8s_openapi",
        "tracing",
        "std::fs",
        "std::net",
        "std::env",
        "std::process",
        "std::time",
        "std::thread",
        "crate::hypervisor",
        "crate::host",
        "crate::cluster",
        "crate::publish",
        "crate::telemetry",
        "crate::config",
        "crate::ffi",
        "crate::daemon",
        "crate::cli",
        "crate::probe",
        "crate::labeller",
        "crate::executor",
        "crate::monitor",
        "crate::doctor::observe_node",
        "crate::journal",
        "async fn",
    ];
    for (path, text) in CORE.iter().flat_map(|part| sources(part)) {
        for line in code(&text) {
            // A duration is a value; a clock is not.
            let line = line.replace("std::time::Duration", "");
            for word in outside {
                assert!(!uses(&line, word), "{} uses {word}: {line}", path.display());
            }
        }
    }
}

/// Whether a line has the word, not as the end of a longer one.
fn uses(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_')
    })
}

#[test]
fn adapters_do_not_know_each_other_or_the_services() {
    let adapters = ["hypervisor", "host", "cluster", "journal.rs"];
    for adapter in adapters {
        for (path, text) in sources(adapter) {
            for line in code(&text) {
                let others = adapters.iter().filter(|other| **other != adapter);
                for other in others.chain(&[
                    "executor",
                    "controller",
                    "probe",
                    "labeller",
                    "daemon",
                    "cli",
                ]) {
                    let word = format!("crate::{}", other.trim_end_matches(".rs"));
                    assert!(
                        !line.contains(&word),
                        "{} uses {word}: {line}",
                        path.display()
                    );
                }
            }
        }
    }
}

#[test]
fn unsafe_code_is_in_one_directory_and_explained() {
    for (path, text) in sources("") {
        let blocks = code(&text).filter(|line| line.contains("unsafe ")).count();
        let is_ffi = path
            .parent()
            .is_some_and(|parent| parent.ends_with("src/ffi"));
        if is_ffi {
            let explained = text.matches("// SAFETY:").count();
            assert!(explained > 0 || blocks == 0, "{}", path.display());
        } else {
            assert_eq!(blocks, 0, "{}", path.display());
        }
    }
}

#[test]
fn files_are_small_enough_to_hold_in_the_head() {
    // What only tests see may be as long as its cases.
    let product = |path: &Path| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        !name.ends_with("tests") && name != "simulation"
    };
    for (path, text) in sources("").into_iter().filter(|(path, _)| product(path)) {
        let lines = text.lines().count();
        assert!(
            lines <= 600,
            "{} has {lines} lines: it wants to be two",
            path.display()
        );
    }
}
