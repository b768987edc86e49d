//! `virtnode check` offline, live, and with bad input.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use assert_cmd::Command;
use serde_json::Value;

use crate::support::libvirtd::Libvirtd;

const DEBIAN_13: &str = "tests/fixtures/debian13-libvirt-11.3.0-qemu-10.0";
const CAPTURED: &str = "tests/lab/captured/debian12-backports-libvirt-11.3.0-qemu-10.0";

/// Returns exit code, standard output and standard error.
fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .arg("check")
        .args(arguments)
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Runs `virtnode check` with Debian 13's documents.
fn offline(virt_type: &str, arguments: &[&str]) -> (i32, String, String) {
    let capabilities = format!("{DEBIAN_13}/capabilities.xml");
    let document = format!("{DEBIAN_13}/dc-x86_64-q35-{virt_type}.xml");
    let node = [
        "--capabilities",
        &capabilities,
        "--domain-capabilities",
        &document,
        "--libvirt-version",
        "11.3.0",
        "--qemu-version",
        "10.0.2",
    ];
    run(&[&node, arguments].concat())
}

#[test]
fn infeasible_domain_prints_every_reason_with_a_remedy() {
    let (code, out, err) = offline(
        "kvm",
        &[
            "--machine",
            "pc",
            "--vcpus",
            "300",
            "--current-vcpus",
            "2",
            "--cpu-model",
            "Denverton",
        ],
    );
    assert_eq!((code, err.as_str()), (4, ""));
    insta::assert_snapshot!("check-infeasible", out);
}

#[test]
fn unknown_feature_prints_unknown_and_headroom() {
    let file = format!("{CAPTURED}/domain-q35-plugged.xml");
    let (code, out, err) = offline("qemu", &["--domain-xml", &file]);
    assert_eq!((code, err.as_str()), (6, ""), "{out}");
    insta::assert_snapshot!("check-unknown", out);
}

#[test]
fn json_and_yaml_carry_the_answer() {
    let arguments = ["--machine", "q35", "--vcpus", "2000", "--output", "json"];
    let (code, out, _) = offline("kvm", &arguments);
    assert_eq!(code, 4);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["answer"], "infeasible");
    let finding = &answer["findings"][0];
    assert_eq!(finding["severity"], "blocks");
    assert_eq!(finding["code"], "vcpus-kvm");
    assert_eq!(finding["stage"], "emulator");
    assert_eq!(
        finding["words"],
        "Number of SMP cpus requested (2000) exceeds the maximum cpus supported by KVM (1024)"
    );
    assert_eq!(answer["confirmation"], Value::Null);
    assert_eq!(answer["node"]["live"], false);
    let (code, out, _) = offline("kvm", &["--machine", "q35", "--vcpus", "300", "-o", "yaml"]);
    assert_eq!(code, 0);
    assert!(out.contains("answer: feasible"), "{out}");
    assert!(out.contains("notChecked:\n- what: "), "{out}");
    let (_, out, _) = offline("kvm", &["--machine", "q35", "--vcpus", "300"]);
    assert!(out.contains("\nNot checked:\n  * "), "{out}");
}

#[test]
fn node_without_documents_yields_unknown() {
    let (code, out, _) = run(&[
        "--libvirt-version",
        "11.3.0",
        "--machine",
        "q35",
        "--vcpus",
        "4",
    ]);
    assert_eq!(code, 6);
    assert!(out.starts_with("Unknown: "), "{out}");
}

#[test]
fn bad_input_yields_one_error_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("domain.xml");
    let path = file.to_str().unwrap();
    let xml = |content: &[u8]| {
        fs::write(&file, content).unwrap();
        offline("kvm", &["--domain-xml", path])
    };
    for (content, sentence) in [
        (b"".as_slice(), "is empty"),
        (
            b"<capabilities/>",
            "the root is <capabilities>, expected <domain>",
        ),
        (b"<domain type='kvm'><name>x</name>", "ends too early"),
        (
            b"<domain type='kvm'><memory>1</memory></domain>",
            "has no <name>",
        ),
        (
            b"<domain><name>x</name><vcpu>many</vcpu></domain>",
            "'many' is not a valid number of vCPUs",
        ),
        (b"<domain>\xff</domain>", "is not UTF-8"),
        (&vec![b' '; 9 << 20], "is larger than 8 MiB"),
    ] {
        let (code, out, err) = xml(content);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains(sentence), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
    }
    for (arguments, sentence) in [
        (vec![], "no domain given: use --domain-xml FILE"),
        (
            vec!["--domain-xml", path, "--domain", "x"],
            "cannot be used with",
        ),
        (
            vec!["--domain-xml", path, "--vcpus", "3"],
            "cannot be used with",
        ),
        (vec!["--domain", "x"], "--domain needs this node's libvirt"),
        (vec!["--memory", "12"], "--memory"),
    ] {
        let (code, out, err) = offline("kvm", &arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(sentence), "{err}");
    }
    let (code, _, err) = run(&[
        "--connect",
        "qemu+unix:///system?socket=/nonexistent",
        "--vcpus",
        "1",
    ]);
    assert_eq!(code, 5, "{err}");
}

#[test]
fn domain_xml_is_read_from_standard_input() {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .args(["check", "--domain-xml", "-", "--libvirt-version", "11.3.0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let xml = b"<domain type='kvm'><name>from-a-pipe</name><memory>65536</memory>\
                <vcpu current='3'>2</vcpu></domain>";
    child.stdin.take().unwrap().write_all(xml).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("domain from-a-pipe cannot run"), "{text}");
}

/// Definitions from the field that were answered wrongly, each for its kind: name, `<vcpu>`, machine
/// type, attributes and content of `<os>`, content of `<features>`, other elements, devices; exit
/// code, and a part of the answer. They were tried with libvirt 11.3.0 and QEMU 10.0.2 on the host of
/// the documents.
type FieldCase = (&'static str, [&'static str; 7], i32, &'static str);

#[rustfmt::skip]
const FIELD_CASES: &[FieldCase] = {
    const VCPU: &str = "<vcpu>1</vcpu>";
    const ACPI: &str = "<acpi/>";
    const EFI: &str = " firmware='efi'";
    const NO_EFI: &str = "Unable to find 'efi' firmware";
    &[
        ("qxl", [VCPU, "q35", "", "", ACPI, "", "<video><model type='qxl'/></video>"], 4, "domain configuration does not support video model 'qxl'"),
        ("ideq35", [VCPU, "q35", "", "", ACPI, "", "<disk type='file' device='disk'><source file='/dev/null'/><target dev='hda' bus='ide'/></disk>"], 4, "IDE controllers are unsupported for this QEMU binary or machine type"),
        ("portonpc", [VCPU, "pc", "", "", ACPI, "", "<controller type='pci' index='1' model='pcie-root-port'/>"], 4, "a PCI slot is needed to connect a PCI controller model='pcie-root-port', but none is available"),
        ("fwpath", [VCPU, "q35", EFI, "<loader readonly='yes' type='pflash'>/usr/share/edk2/x64/OVMF_CODE.fd</loader>", ACPI, "", ""], 4, NO_EFI),
        ("noacpi", [VCPU, "q35", EFI, "", "", "", ""], 4, "UEFI requires ACPI on this architecture"),
        ("sbnosmm", [VCPU, "q35", EFI, "<loader secure='yes'/>", "<acpi/><smm state='off'/>", "", ""], 4, NO_EFI),
        ("numatune", [VCPU, "q35", "", "", ACPI, "<numatune><memory mode='strict' nodeset='3'/></numatune>", ""], 4, "NUMA node 3 is unavailable"),
        // libvirt takes the definition, and its start fails.
        ("cpuset", ["<vcpu cpuset='4-7'>1</vcpu>", "q35", "", "", ACPI, "", ""], 4, "names host CPUs 4-7, but the host has 0-1"),
        ("tsc", [VCPU, "q35", "", "", ACPI, "<clock offset='utc'><timer name='tsc' frequency='1000000000'/></clock>", ""], 4, "Requested TSC frequency 1000000000 Hz is outside tolerance range"),
        ("s390acpi", [VCPU, "s390-ccw-virtio", "", "", ACPI, "", "<controller type='pci' index='1' model='pcie-root-port'/>"], 4, "choose a node of that architecture"),
        ("nehalem", [VCPU, "q35", "", "", ACPI, "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem</model></cpu>", ""], 0, "libvirt starts the domain, and QEMU drops them"),
        ("epycnosvm", [VCPU, "q35", "", "", ACPI, "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>EPYC</model><feature policy='disable' name='svm'/></cpu>", ""], 0, "libvirt starts the domain, and QEMU drops them"),
        ("vendorpart", [VCPU, "q35", "", "", ACPI, "<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>pentium</model><vendor>Intel</vendor></cpu>", ""], 0, "Feasible: "),
        ("hp4kb", [VCPU, "q35", "", "", ACPI, "<memoryBacking><hugepages><page size='4' unit='KiB'/></hugepages></memoryBacking>", ""], 0, "Feasible: "),
    ]
};

#[test]
fn definitions_from_the_field_have_the_right_answer_without_libvirt() {
    let directory = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for (name, [vcpu, machine, os, boot, features, other, devices], code, words) in FIELD_CASES {
        let arch = match *machine {
            "s390-ccw-virtio" => "s390x",
            _ => "x86_64",
        };
        let xml = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>64</memory>{vcpu}<os{os}>\
             <type arch='{arch}' machine='{machine}'>hvm</type>{boot}</os>\
             <features>{features}</features>{other}<devices>{devices}<memballoon model='none'/>\
             </devices></domain>"
        );
        let file = directory.path().join(name);
        fs::write(&file, xml).unwrap();
        let pc = format!("{DEBIAN_13}/dc-x86_64-pc-kvm.xml");
        let file = file.to_str().unwrap();
        let arguments = ["--domain-capabilities", &pc, "--domain-xml", file];
        let (actual, out, err) = offline("kvm", &arguments);
        // The table wraps its lines.
        let text = out.split_whitespace().collect::<Vec<_>>().join(" ");
        if actual != *code || !text.contains(words) || !text.contains("Not checked:") {
            wrong.push(format!(
                "{name}: {actual} instead of {code}: {words}\n{out}{err}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(FIELD_CASES.len(), 14);
}

#[test]
fn live_check_reports_libvirts_answer_beside_the_computed_one() {
    let libvirtd = Libvirtd::start().unwrap();
    let uri = libvirtd.uri();
    let ask = |arguments: &[&str]| {
        let (code, out, err) = run(&[&["--connect", &uri, "-o", "json"], arguments].concat());
        assert_eq!(err, "", "{arguments:?}");
        (code, serde_json::from_str::<Value>(&out).unwrap())
    };
    let (code, answer) = ask(&["--machine", "q35", "--vcpus", "300", "--current-vcpus", "2"]);
    assert_eq!((code, &answer["agrees"]), (0, &Value::Bool(true)));
    assert_eq!(answer["confirmation"]["dryRun"]["answer"], "accepted");

    let (code, answer) = ask(&["--cpu-model", "qemu64", "--cpu-feature", "avx512f"]);
    assert_eq!((code, &answer["agrees"]), (4, &Value::Bool(true)));
    let words = answer["confirmation"]["dryRun"]["words"].as_str().unwrap();
    assert_eq!(answer["findings"][0]["words"], words);
    assert_eq!(answer["confirmation"]["cpu"]["words"], words);

    // Only libvirt can tell that it does not know the model.
    let file = libvirtd.directory().join("strange.xml");
    fs::write(
        &file,
        "<domain type='qemu'><name>d</name><memory>65536</memory><vcpu>1</vcpu><os>\
         <type arch='x86_64' machine='q35'>hvm</type></os><cpu><model>Strange</model></cpu></domain>",
    )
    .unwrap();
    let (code, answer) = ask(&["--domain-xml", file.to_str().unwrap()]);
    assert_eq!(code, 4, "{answer}");
    assert_eq!(
        answer["findings"][0]["words"],
        "internal error: Unknown CPU model Strange"
    );

    libvirtd.start_domain("web").unwrap();
    let before = libvirtd.virsh(&["list", "--all", "--name"]).unwrap();
    let (code, answer) = ask(&["--domain", "web"]);
    assert_eq!(
        (code, &answer["domain"]),
        (0, &Value::String("web".to_owned())),
        "{answer}"
    );
    assert_eq!(answer["agrees"], true);
    // The check neither defines nor starts a domain.
    assert_eq!(
        libvirtd.virsh(&["list", "--all", "--name"]).unwrap(),
        before
    );
    let (code, _, err) = run(&["--connect", &uri, "--domain", "wep"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("domain 'wep' is not running here (running: web)"),
        "{err}"
    );
}
