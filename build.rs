//! Writes the commit into the binary, for `virtnode_build_info` and `--version`, and has the
//! linker pack it.

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
    // An image is built where there is no git.
    let told = std::env::var("VIRTNODE_COMMIT").ok();
    let commit = told
        .filter(|told| !told.is_empty())
        .or_else(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .unwrap_or_else(|| "unknown".to_owned());
    println!("cargo:rustc-env=VIRTNODE_COMMIT={commit}");
    // The loader reads all of the relocations at each start: 0.4 MB of them, packed 10 kB.
    // glibc knows them since 2.36; a linker that does not leaves them as they are.
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
