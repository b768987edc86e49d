//! The command line: output, help, invalid input, exit codes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

const DEBIAN_13: &str = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0";

fn virtnode(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    command
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .args(arguments);
    command
}

/// Returns the exit code, standard output and standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = virtnode(arguments).output().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn labels(arguments: &[&str]) -> Value {
    let (code, out, err) = run(&[&["labels", "--output", "json"], arguments].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
    serde_json::from_str(&out).unwrap()
}

fn capabilities() -> String {
    format!("{DEBIAN_13}/capabilities.xml")
}

fn document(name: &str) -> String {
    format!("{DEBIAN_13}/{name}")
}

/// Writes a document and returns its path.
fn write(directory: &Path, content: impl AsRef<[u8]>) -> String {
    let path = directory.join("document.xml");
    fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn offline_labels_depend_on_documents_only() {
    let printed = labels(&[
        "--capabilities",
        &capabilities(),
        "--domain-capabilities",
        &document("dc-x86_64-q35-kvm.xml"),
        "--libvirt-version",
        "11.3.0",
        "--qemu-version",
        "10.0.2",
    ]);
    let labels = &printed["labels"];
    assert_eq!(labels["machine.virtnode.io/pc-q35-10.0"], "1024");
    assert_eq!(labels["machine.virtnode.io/pc-q35-8.0"], "288");
    assert_eq!(labels["machine.virtnode.io/pc-i440fx-10.0"], "255");
    assert_eq!(labels["machine-alias.virtnode.io/q35"], "pc-q35-10.0");
    assert_eq!(labels["machine-deprecated.virtnode.io/pc-q35-2.4"], "true");
    assert_eq!(labels["virtnode.io/max-vcpus"], "1024");
    assert_eq!(labels["virtnode.io/eim"], "auto");
    assert_eq!(labels["virtnode.io/accelerator"], "kvm");
    assert_eq!(labels["virtnode.io/iommu"], "none");
    assert_eq!(labels["virtnode.io/host-model"], "EPYC-Genoa");
    assert_eq!(labels["virtnode.io/tsc-frequency-hz"], "2596136000");
    assert_eq!(labels["virtnode.io/tsc-scaling"], "false");
    assert_eq!(printed["rejected"], Value::Array(vec![]));
    assert_eq!(printed["retained"], Value::Array(vec![]));
    let other = labels
        .as_object()
        .unwrap()
        .keys()
        .find(|key| key.contains("clipper"));
    assert_eq!(other, None, "a machine of another architecture");
}

#[test]
fn more_than_255_vcpus_require_eim_and_kvm_support() {
    let q35 = |arguments: &[&str]| {
        let file = capabilities();
        let printed = labels(&[&["--capabilities", &file], arguments].concat());
        printed["labels"]["machine.virtnode.io/pc-q35-10.0"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(q35(&[]), "255");
    assert_eq!(q35(&["--eim", "none"]), "255");
    assert_eq!(q35(&["--eim", "explicit"]), "255");
    assert_eq!(q35(&["--eim", "auto"]), "4096");
    assert_eq!(q35(&["--eim", "auto", "--kvm-max-vcpus", "710"]), "710");
    assert_eq!(
        q35(&["--libvirt-version", "10.9.0", "--kvm-max-vcpus", "710"]),
        "255"
    );
    assert_eq!(
        q35(&["--libvirt-version", "11.0.0", "--kvm-max-vcpus", "710"]),
        "710"
    );
    assert_eq!(
        q35(&[
            "--libvirt-version",
            "12.5.0-1.el10",
            "--kvm-max-vcpus",
            "64"
        ]),
        "64"
    );
}

#[test]
fn missing_documents_omit_their_labels() {
    let only_document = labels(&["--domain-capabilities", &document("dc-x86_64-q35-qemu.xml")]);
    assert_eq!(only_document["labels"]["virtnode.io/accelerator"], "tcg");
    assert_eq!(
        only_document["labels"]["machine.virtnode.io/pc-q35-10.0"],
        "255"
    );
    let only_version = labels(&["--libvirt-version", "11.3.0"]);
    assert_eq!(only_version["labels"].as_object().unwrap().len(), 1);
    let arm = labels(&[
        "--domain-capabilities",
        &document("dc-aarch64-virt-qemu.xml"),
    ]);
    assert_eq!(arm["labels"].get("virtnode.io/eim"), None);
    let riscv = labels(&["--domain-capabilities", &document("dc-riscv64-qemu.xml")]);
    assert!(!riscv["labels"].as_object().unwrap().is_empty());
}

#[test]
fn document_of_slower_domain_type_yields_no_host_model() {
    let (code, out, err) = run(&[
        "labels",
        "--output",
        "json",
        "--capabilities",
        &capabilities(),
        "--domain-capabilities",
        &document("dc-x86_64-q35-qemu.xml"),
    ]);
    assert_eq!(code, 0);
    assert!(err.contains("describe domains of type qemu"), "{err}");
    let printed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(printed["labels"]["virtnode.io/accelerator"], "kvm");
    assert_eq!(printed["labels"].get("virtnode.io/host-model"), None);
    assert_eq!(printed["notes"].as_array().unwrap().len(), 1);
}

/// KubeVirt's reduced file has no architecture, and without one there are no labels.
#[test]
fn documents_without_labels_are_named_and_exit_with_1() {
    let directory = tempfile::tempdir().unwrap();
    let text = "<domainCapabilities><path>/usr/bin/qemu</path><cpu/></domainCapabilities>";
    let file = write(directory.path(), text);
    let (code, out, err) = run(&["labels", "-o", "json", "--domain-capabilities", &file]);
    assert_eq!(code, 1);
    assert!(
        err.contains("no document has the node's architecture"),
        "{err}"
    );
    let printed: Value = serde_json::from_str(&out).unwrap();
    assert!(printed["labels"].as_object().unwrap().is_empty());
    assert_eq!(printed["notes"].as_array().unwrap().len(), 1);
}

#[test]
fn duplicate_key_of_the_configuration_is_reported_without_advice_to_programmers() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(
        directory.path(),
        "connect: qemu:///system\nconnect: qemu:///session\n",
    );
    let (code, _, err) = run(&["run", "--check-config", "--config", &file]);
    assert_eq!(code, 2);
    assert!(err.contains("connect") && !err.contains("Options"), "{err}");
    let (code, _, err) = run(&["run", "--check-config"]);
    assert_eq!((code, err.as_str()), (0, ""));
}

#[test]
fn features_come_from_the_baseline() {
    let directory = tempfile::tempdir().unwrap();
    let cpu = write(
        directory.path(),
        "<cpu mode='custom'><model>EPYC</model><feature policy='require' name='sse4.2'/>
         <feature policy='disable' name='pku'/></cpu>",
    );
    let file = document("dc-x86_64-q35-kvm.xml");
    let printed = labels(&["--domain-capabilities", &file, "--supported-features", &cpu]);
    let features: Vec<&String> = printed["labels"]
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| key.starts_with("cpu-feature."))
        .collect();
    assert_eq!(features, ["cpu-feature.virtnode.io/sse4.2"]);
}

#[test]
fn invalid_labels_are_rejected_with_reason() {
    let directory = tempfile::tempdir().unwrap();
    let long = "x".repeat(64);
    let file = write(
        directory.path(),
        format!(
            "<capabilities><host><cpu><arch>x86_64</arch></cpu></host><guest><os_type>hvm</os_type>
             <arch name='x86_64'><machine maxCpus='8'>pc+special</machine>
             <machine maxCpus='8'>{long}</machine><machine maxCpus='8'>fine</machine>
             <domain type='kvm'/></arch></guest></capabilities>"
        ),
    );
    let printed = labels(&["--capabilities", &file]);
    assert_eq!(printed["labels"]["machine.virtnode.io/fine"], "8");
    let reasons: Vec<&Value> = printed["rejected"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["reason"])
        .collect();
    assert_eq!(reasons, ["invalid-name", "name-too-long"]);
    let (code, out, _) = run(&["labels", "--capabilities", &file]);
    assert_eq!(code, 0);
    assert!(
        out.contains("Rejected, because they are not valid labels:"),
        "{out}"
    );
    assert!(out.contains("pc+special"), "{out}");
}

#[test]
fn schema_both_yields_native_and_kubevirt_labels() {
    let file = capabilities();
    let count = |schema: &str| {
        let printed = labels(&["--capabilities", &file, "--schema", schema]);
        printed["labels"].as_object().unwrap().len()
    };
    assert_eq!(count("both"), count("native") + count("kubevirt"));
}

#[test]
fn invalid_document_is_exit_code_1_with_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let good = fs::read(capabilities()).unwrap();
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("empty", vec![], "is empty"),
        ("truncated", good[..good.len() / 2].to_vec(), ": /capabilities/"),
        ("not UTF-8", [b"<capabilities>\xff".as_slice(), &good].concat(), "is not UTF-8"),
        ("huge", vec![b' '; 9 * 1024 * 1024], "is larger than 8 MiB"),
        ("deep", "<capabilities>".repeat(1000).into_bytes(), "is nested deeper than 64"),
        ("wrong root", b"<domain/>".to_vec(), "the root is <domain>, expected <capabilities>"),
        ("a DTD", b"<!DOCTYPE x><capabilities/>".to_vec(), "has a DTD"),
        ("text", b"error: failed to connect".to_vec(), "is not an XML document"),
        (
            "a bad number",
            b"<capabilities><guest><arch name='x'><machine maxCpus='many'>m</machine></arch></guest></capabilities>".to_vec(),
            "/capabilities/guest/arch/machine/@maxCpus: 'many' is not a valid number of vCPUs",
        ),
    ];
    for (name, content, sentence) in cases {
        let file = write(directory.path(), content);
        let (code, out, err) = run(&["labels", "--capabilities", &file]);
        assert_eq!((code, out.as_str()), (1, ""), "{name}");
        assert!(err.starts_with("virtnode: "), "{name}: {err}");
        assert!(
            err.contains(&file) && err.contains(sentence),
            "{name}: {err}"
        );
        assert_eq!(err.lines().count(), 1, "{name}: {err}");
    }
    let (code, _, err) = run(&["labels", "--capabilities", "/nonexistent.xml"]);
    assert_eq!(code, 1);
    assert!(err.contains("cannot read /nonexistent.xml"), "{err}");
}

#[test]
fn sparse_capabilities_are_accepted() {
    let directory = tempfile::tempdir().unwrap();
    for odd in [
        "<capabilities/>",
        "<capabilities><host/></capabilities>",
        "<capabilities><host><cpu/></host><guest/></capabilities>",
        "<capabilities><guest><arch name='x86_64'/></guest></capabilities>",
    ] {
        let file = write(directory.path(), odd);
        let (code, out, err) = run(&["labels", "-o", "json", "--capabilities", &file]);
        let printed: Value = serde_json::from_str(&out).unwrap();
        assert!(
            printed["labels"].as_object().unwrap().is_empty(),
            "{odd}: {printed}"
        );
        // An empty answer is none.
        assert_eq!(code, 1, "{odd}");
        assert!(err.starts_with("virtnode: "), "{odd}: {err}");
    }
    let file = write(
        directory.path(),
        "<domainCapabilities><domain>kvm</domain><arch>x86_64</arch><cpu>
         <mode name='host-model' supported='yes'><vendor>Zhaoxin CentaurHauls</vendor></mode>
         </cpu></domainCapabilities>",
    );
    let printed = labels(&["--domain-capabilities", &file, "--schema", "both"]);
    let reasons: Vec<&Value> = printed["rejected"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["reason"])
        .collect();
    assert_eq!(reasons, ["invalid-name", "invalid-value"]);
}

#[test]
fn xen_domain_type_has_no_qemu_version_label() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(
        directory.path(),
        "<domainCapabilities><domain>xen</domain><machine>xenfv</machine><arch>x86_64</arch>
         <vcpu max='128'/></domainCapabilities>",
    );
    let printed = labels(&["--domain-capabilities", &file, "--qemu-version", "4.17.0"]);
    let expected = serde_json::json!({
        "machine.virtnode.io/xenfv": "128",
        "virtnode.io/max-vcpus": "128",
    });
    assert_eq!(printed["labels"], expected);
}

#[test]
fn invalid_flags_and_configurations_are_exit_code_2() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.yaml");
    fs::write(&config, "publsh: file\n").unwrap();
    let config = config.to_str().unwrap();
    for (arguments, sentence) in [
        (
            vec!["labels", "--schema", "none"],
            "'none' is not a valid schema",
        ),
        (
            vec!["labels", "--eim", "maybe"],
            "not one of auto, explicit, none",
        ),
        (vec!["labels", "--kvm-max-vcpus", "0"], "--kvm-max-vcpus"),
        (
            vec!["labels", "--libvirt-version", "new"],
            "'new' is not a valid version",
        ),
        (vec!["lables"], "unrecognized subcommand"),
        (
            vec!["run", "--publish", "none,file"],
            "'none' cannot be combined",
        ),
        (
            vec!["run", "--listen", "nowhere"],
            "'nowhere' is not a valid address",
        ),
        (vec!["run", "--config", config], "publsh"),
        (
            vec!["run", "--config", "/nonexistent.yaml"],
            "cannot read the configuration",
        ),
    ] {
        let (code, out, err) = run(&arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(sentence), "{arguments:?}: {err}");
    }
}

#[test]
fn unreachable_libvirt_is_exit_code_5() {
    for command in ["labels", "capabilities"] {
        let (code, out, err) = run(&[
            command,
            "--connect",
            "qemu+unix:///system?socket=/nonexistent/socket",
        ]);
        assert_eq!((code, out.as_str()), (5, ""), "{err}");
        assert!(err.contains("no connection to libvirt"), "{err}");
        assert!(err.contains("/nonexistent/socket"), "{err}");
    }
}

#[test]
fn facts_are_printed_as_table_json_and_yaml() {
    let file = capabilities();
    let domain = document("dc-x86_64-q35-kvm.xml");
    let arguments = ["--capabilities", &file, "--domain-capabilities", &domain];
    let (_, table, _) = run(&[&["capabilities"][..], &arguments].concat());
    assert!(table.contains("EPYC-Genoa"), "{table}");
    assert!(
        table
            .lines()
            .any(|line| line.starts_with("pc-q35-10.0 ") && line.contains(" q35 "))
    );
    let (_, json, _) = run(&[&["capabilities", "-o", "json"][..], &arguments].concat());
    let facts: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(facts["domainCapabilities"][0]["maxVcpus"], 1024);
    let (_, yaml, _) = run(&[&["capabilities", "-o", "yaml"][..], &arguments].concat());
    assert!(yaml.contains("maxVcpus: 1024"), "{yaml}");
}

#[test]
fn cleanup_removes_only_files_of_virtnode() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    fs::write(directory.path().join("labels.json"), "{}").unwrap();
    fs::write(directory.path().join("other"), "kept").unwrap();
    let arguments = ["cleanup", "--publish", "file", "--state-directory", state];
    let (code, out, _) = run(&arguments);
    assert_eq!(code, 0);
    assert!(out.contains("labels.json: removed."), "{out}");
    assert!(directory.path().join("other").exists());
    let (code, out, _) = run(&arguments);
    assert_eq!(code, 0);
    assert!(out.contains("labels.json: does not exist."), "{out}");
}

/// The names of all options in a help text, without those of clap itself.
fn options(help: &str) -> BTreeSet<&str> {
    let lines = help.lines().map(str::trim_start);
    let words = lines
        .filter(|line| line.starts_with('-'))
        .flat_map(|line| line.split_whitespace().take(2));
    let names = words.filter_map(|word| word.strip_prefix("--"));
    names
        .filter(|name| !["help", "version"].contains(name))
        .collect()
}

const CONNECTION: &str = "config connect call-deadline";
const KUBERNETES: &str = "node-name kubeconfig context";
const DOCUMENTS: &str = "documents capabilities domain-capabilities supported-features kvm-max-vcpus eim \
                         libvirt-version qemu-version";
const DOMAIN: &str = "domain-xml domain machine arch domain-type vcpus current-vcpus sockets dies \
                      cores threads memory cpu-model cpu-mode cpu-feature";
const HOTPLUG: &str = "socket state-directory";

/// Every command with the options in its help.
const COMMANDS: [(&str, &[&str]); 18] = [
    ("", &["config"]),
    (
        "run",
        &[
            CONNECTION,
            KUBERNETES,
            "socket publish schema force-conflicts state-directory features-directory \
             probe-interval start-jitter listen log-format log check-config",
        ],
    ),
    (
        "labels",
        &[CONNECTION, DOCUMENTS, "output schema state-directory"],
    ),
    ("capabilities", &[CONNECTION, DOCUMENTS, "output"]),
    ("check", &[CONNECTION, DOCUMENTS, DOMAIN, "try output"]),
    ("hotplug", &[CONNECTION, HOTPLUG]),
    (
        "hotplug vcpus",
        &[
            CONNECTION,
            HOTPLUG,
            "online require persistent timeout direct output",
        ],
    ),
    (
        "hotplug memory",
        &[
            CONNECTION,
            HOTPLUG,
            "force require persistent timeout direct output",
        ],
    ),
    (
        "operations",
        &["config external output socket state-directory"],
    ),
    (
        "sockets",
        &["directory serve allow-changes volume names log-format log"],
    ),
    (
        "doctor",
        &[
            CONNECTION,
            "output root socket schema probe-interval listen",
        ],
    ),
    (
        "targets",
        &[CONNECTION, KUBERNETES, "domain-xml nodes affinity output"],
    ),
    (
        "baseline",
        &[KUBERNETES, "config selector nodes format output"],
    ),
    (
        "compare",
        &[CONNECTION, KUBERNETES, "domain-xml domain nodes output"],
    ),
    (
        "cleanup",
        &[
            KUBERNETES,
            "config publish state-directory features-directory",
        ],
    ),
    ("crd", &[]),
    ("completions", &[]),
    ("man", &["directory"]),
];

#[test]
fn help_lists_only_options_that_affect_the_command() {
    for (command, expected) in COMMANDS {
        let groups = expected.iter().flat_map(|group| group.split_whitespace());
        let expected: BTreeSet<&str> = groups.collect();
        for help in ["-h", "--help"] {
            let mut arguments: Vec<&str> = command.split_whitespace().collect();
            arguments.push(help);
            let (code, text, err) = run(&arguments);
            assert_eq!((code, err.as_str()), (0, ""), "{command}");
            assert_eq!(options(&text), expected, "virtnode {command} {help}");
            let first = text.lines().next().unwrap_or_default();
            assert!(first.len() > 20 && !first.ends_with('.'), "{first}");
        }
    }
    let (_, text, _) = run(&["hotplug", "vcpus", "--help"]);
    for heading in ["Connection:", "Output:", "Files:"] {
        assert!(
            text.lines().any(|line| line == heading),
            "{heading} in {text}"
        );
    }
}

#[test]
fn hidden_options_are_accepted_before_and_after_every_command() {
    let global = [
        "--connect=x",
        "--uri=x",
        "-cx",
        "--call-deadline=1",
        "--socket=/x",
        "--node-name=x",
        "--kubeconfig=/x",
        "--context=x",
        "--publish=file",
        "--schema=both",
        "--force-conflicts=true",
        "--state-directory=/x",
        "--features-directory=/x",
        "--probe-interval=1",
        "--start-jitter=1",
        "--listen=:1",
        "--log-format=json",
        "--log=debug",
        "--config=/nonexistent",
    ];
    for option in global {
        for (command, _) in COMMANDS {
            // With --help the command itself does not run.
            let words: Vec<&str> = command.split_whitespace().collect();
            for at in 0..=words.len() {
                let mut arguments = words.clone();
                arguments.insert(at, option);
                arguments.push("--help");
                let (code, _, err) = run(&arguments);
                assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
            }
        }
    }
    // The value given before the command reaches it.
    let socket = "/nonexistent/virtnode.sock";
    for arguments in [
        ["--socket", socket, "hotplug", "vcpus", "vm", "2"],
        ["hotplug", "--socket", socket, "vcpus", "vm", "2"],
        ["hotplug", "vcpus", "vm", "2", "--socket", socket],
    ] {
        let (code, _, err) = run(&arguments);
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(socket), "{err}");
    }
}

#[test]
fn documents_are_read_from_standard_input_once() {
    let with_input = |arguments: &[&str], file: &str| {
        let input = fs::read(file).unwrap();
        let output = virtnode(arguments).write_stdin(input).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), output.stdout, err)
    };
    for (command, option, name) in [
        ("labels", "--capabilities", "capabilities.xml"),
        ("labels", "--domain-capabilities", "dc-x86_64-q35-kvm.xml"),
        ("capabilities", "--capabilities", "capabilities.xml"),
    ] {
        let file = document(name);
        let (_, expected, _) = run(&[command, option, &file]);
        let (code, out, err) = with_input(&[command, option, "-"], &file);
        assert_eq!((code, err.as_str()), (0, ""), "{command} {option}");
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
    let (code, _, err) = with_input(&["labels", "--capabilities", "-"], "Cargo.toml");
    assert_eq!(code, 1);
    assert!(err.contains("standard input: "), "{err}");
    for arguments in [
        &[
            "labels",
            "--capabilities",
            "-",
            "--domain-capabilities",
            "-",
        ][..],
        &[
            "labels",
            "--domain-capabilities",
            "-",
            "--domain-capabilities",
            "-",
        ],
        &[
            "capabilities",
            "--capabilities",
            "-",
            "--supported-features",
            "-",
        ],
        &["check", "--capabilities", "-", "--domain-xml", "-"],
        &["targets", "--nodes", "-", "--domain-xml", "-"],
        &["compare", "a", "--nodes", "-", "--domain-xml", "-"],
    ] {
        let (code, out, err) = run(arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(
            err.contains("only one option can read standard input"),
            "{err}"
        );
    }
}

#[test]
fn completions_offer_only_options_that_affect_the_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (code, script, err) = run(&["completions", shell]);
        assert_eq!((code, err.as_str()), (0, ""), "{shell}");
        assert!(script.contains("call-deadline"), "{shell}");
        // Before the command, and for `run` alone.
        let jitter = script.matches("start-jitter").count();
        let config = script.matches("config").count();
        assert!(
            jitter > 0 && jitter * 3 < config,
            "{shell}: {jitter} of {config}"
        );
    }
}

#[test]
fn completions_and_manual_page_are_generated() {
    let (code, script, _) = run(&["completions", "bash"]);
    assert_eq!(code, 0);
    assert!(script.contains("--domain-capabilities"));
    let (code, page, _) = run(&["man"]);
    assert_eq!(code, 0);
    assert!(page.contains(".TH virtnode 1"), "{page}");
}
