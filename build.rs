//! Sets the commit for `virtnode_build_info` and `--version`, and makes the linker pack
//! relocations.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=VIRTNODE_COMMIT");
    // The reflog of HEAD grows with every commit and checkout, in worktrees as well.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && Path::new(&log).exists()
    {
        println!("cargo:rerun-if-changed={log}");
    }
    // The image is built without git, so its build passes the commit.
    let passed = std::env::var("VIRTNODE_COMMIT").ok();
    let commit = passed
        .filter(|commit| !commit.is_empty())
        .or_else(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=VIRTNODE_COMMIT={commit}");
    // The loader reads every relocation at each start: 0.4 MB of them, or 10 kB packed. glibc
    // supports packed ones since 2.36. A linker that does not ignores the option.
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
