//! `make dist`: builds are reproducible, and the installed program works.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use virtnode::capability::Version;

/// Minimum version of libvirt, as a client library and as a daemon.
const OLDEST_LIBVIRT: Version = Version::new(7, 0, 0);

fn run(command: &mut Command) -> anyhow::Result<Output> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {stderr}");
    Ok(output)
}

fn text(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn files_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut files = files.collect::<anyhow::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// A version in a command or manifest that is forgotten is an image that nobody has.
#[test]
fn version_is_the_same_in_manifests_documents_and_changelog() -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let version = env!("CARGO_PKG_VERSION");
    for file in [
        "README.md",
        "Containerfile",
        "docs/kubernetes.md",
        "manifests/base/daemonset.yaml",
        "manifests/overlays/kubevirt/daemonset.yaml",
    ] {
        let text = text(&root.join(file))?;
        let versions = ["virtnode:", "virtnode_"].into_iter().flat_map(|name| {
            let rest = text.split(name).skip(1);
            rest.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let versions: Vec<_> = versions.collect();
        ensure!(!versions.is_empty(), "{file} names no version");
        for found in versions {
            let found: String = found.chars().take(20).collect();
            ensure!(found.starts_with(version), "{file}: {found}, not {version}");
        }
    }
    let changelog = text(&root.join("CHANGELOG.md"))?;
    ensure!(
        changelog.contains(&format!("\n## [{version}] - 20")),
        "CHANGELOG.md has no section with a date for {version}"
    );
    Ok(())
}

#[test]
fn distribution_is_reproducible_and_works() -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let at = |name: &str| scratch.path().join(name);
    // Without the debug information of a test build.
    run(Command::new("strip")
        .arg("-o")
        .arg(at("virtnode"))
        .arg(env!("CARGO_BIN_EXE_virtnode")))?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/dist.sh");
    for (directory, zone) in [("first", "UTC"), ("second", "Asia/Tokyo")] {
        let mut command = Command::new(&script);
        command
            .arg(at(directory))
            .env("VIRTNODE", at("virtnode"))
            .env("LEVEL", "1");
        run(command
            .env("TZ", zone)
            .env("SOURCE_DATE_EPOCH", "1700000000"))?;
    }
    let files = files_in(&at("first"))?;
    assert_eq!(files.len(), 3, "{files:?}");
    for (first, second) in files.iter().zip(files_in(&at("second"))?) {
        assert_eq!(first.file_name(), second.file_name());
        assert!(
            fs::read(first)? == fs::read(second)?,
            "{} differs",
            first.display()
        );
    }
    run(Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(at("first")))?;

    let ending = |end: &str| {
        files
            .iter()
            .find(|file| file.to_string_lossy().ends_with(end))
    };
    let package = ending(".deb").context("no package")?;
    run(Command::new("dpkg-deb")
        .arg("--extract")
        .arg(package)
        .arg(at("root")))?;
    let archive = ending(".tar.gz").context("no archive")?;
    fs::create_dir(at("unpacked"))?;
    let mut unpack = Command::new("tar");
    run(unpack
        .args(["--extract", "--strip-components=1", "--file"])
        .arg(archive)
        .arg("-C")
        .arg(at("unpacked")))?;
    for root in [at("root"), at("unpacked")] {
        let version = run(Command::new(root.join("usr/bin/virtnode"))
            .env_clear()
            .arg("--version"))?;
        assert!(
            version
                .stdout
                .starts_with(concat!("virtnode ", env!("CARGO_PKG_VERSION")).as_bytes())
        );
        let unit = text(&root.join("usr/lib/systemd/system/virtnode.service"))?;
        assert!(unit.contains("ExecStart=/usr/bin/virtnode run\n"));
        assert!(text(&root.join("usr/lib/sysusers.d/virtnode.conf"))?.contains("u virtnode "));
        for page in ["virtnode.1.gz", "virtnode-run.1.gz"] {
            let page = root.join("usr/share/man/man1").join(page);
            assert!(
                !run(Command::new("gzip").arg("-dc").arg(page))?
                    .stdout
                    .is_empty()
            );
        }
        let completions = root.join("usr/share/bash-completion/completions/virtnode");
        run(Command::new("bash").arg("-n").arg(completions))?;
        let config = root.join("etc/virtnode/config.yaml");
        let mut labels = Command::new(root.join("usr/bin/virtnode"));
        let document = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0/capabilities.xml";
        labels
            .env_clear()
            .args(["labels", "--capabilities", document, "--config"])
            .arg(&config);
        run(labels.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    }
    let control = run(Command::new("dpkg-deb").arg("--field").arg(package))?;
    let control = String::from_utf8(control.stdout)?;
    assert!(control.contains("Package: virtnode\n"), "{control}");
    let least = |package: &str| -> anyhow::Result<Version> {
        let rest = control.split_once(&format!("{package} (>= "));
        let version = rest.and_then(|(_, rest)| rest.split_once(')'));
        Ok(version.with_context(|| control.clone())?.0.parse()?)
    };
    assert!(least("libvirt0")? <= OLDEST_LIBVIRT, "{control}");
    // The program needs no newer libraries than the package declares.
    let required = run(Command::new("readelf")
        .args(["--version-info", "--wide"])
        .arg(at("virtnode")))?;
    let required = String::from_utf8(required.stdout)?;
    let names = required.split_whitespace();
    for name in names {
        let (package, version) = match (name.strip_prefix("GLIBC_"), name.strip_prefix("LIBVIRT_"))
        {
            // glibc supports packed relocations since 2.36.
            (Some("ABI_DT_RELR"), _) => ("libc6", "2.36"),
            (Some(version), _) => ("libc6", version),
            (_, Some(version)) if !version.starts_with("QEMU_") => ("libvirt0", version),
            _ => continue,
        };
        assert!(
            version.parse::<Version>()? <= least(package)?,
            "{name}: {control}"
        );
    }
    let contents = run(Command::new("dpkg-deb").arg("--contents").arg(package))?;
    let contents = String::from_utf8(contents.stdout)?;
    assert!(
        contents.lines().all(|line| line.contains(" root/root ")),
        "{contents}"
    );
    Ok(())
}
