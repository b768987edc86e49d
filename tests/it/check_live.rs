//! `virtnode check` against a real libvirt: the field's cases, hostile definitions, `--try`, and a
//! libvirt that does not answer.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::eventually;
use crate::support::libvirtd::Libvirtd;

/// Timeout that only a failing test reaches.
const LONG: Duration = Duration::from_secs(60);

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtnode"));
    command.env_clear().arg("check").args(arguments);
    command
}

/// Returns the exit code and the answer.
fn check(arguments: &[&str]) -> (i32, Value) {
    let output = command(arguments).args(["-o", "json"]).output().unwrap();
    let code = output.status.code().unwrap();
    let answer = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{code}: {}", String::from_utf8_lossy(&output.stderr)));
    (code, answer)
}

/// Writes a definition for the private libvirtd and returns its path.
fn write(libvirtd: &Libvirtd, name: &str, xml: &str) -> String {
    let file = libvirtd.directory().join(format!("{name}.xml"));
    fs::write(&file, xml).unwrap();
    file.to_string_lossy().into_owned()
}

/// Returns what was not checked, in one text.
fn not_checked(answer: &Value) -> String {
    let list = answer["notChecked"].as_array().unwrap();
    assert!(!list.is_empty(), "{answer:#}");
    let words = |entry: &Value| format!("{}: {}", entry["what"], entry["why"]);
    list.iter().map(words).collect::<Vec<_>>().join("\n")
}

#[derive(Default)]
struct Case {
    name: &'static str,
    virt_type: &'static str,
    arch: &'static str,
    machine: &'static str,
    os: &'static str,
    loader: &'static str,
    features: &'static str,
    more: &'static str,
    devices: &'static str,
}

impl Case {
    fn xml(&self) -> String {
        let or = |own: &'static str, default: &'static str| match own {
            "" => default,
            own => own,
        };
        format!(
            "<domain type='{}'><name>{}</name><memory unit='MiB'>64</memory>{}<os{}>\
             <type arch='{}' machine='{}'>hvm</type>{}</os><features>{}</features>\
             <devices>{}<memballoon model='none'/></devices></domain>",
            or(self.virt_type, "qemu"),
            self.name,
            or(self.more, "<vcpu>1</vcpu>"),
            self.os,
            or(self.arch, "x86_64"),
            or(self.machine, "q35"),
            self.loader,
            or(self.features, "<acpi/>"),
            self.devices,
        )
    }
}

/// The cases with the right exit code, which `None` leaves to libvirt on this machine.
#[rustfmt::skip]
fn cases() -> Vec<(Case, Option<i32>)> {
    let of = |name| Case { name, ..Case::default() };
    let cpu = |name, cpu| Case { virt_type: "kvm", more: cpu, ..of(name) };
    vec![
        (Case { devices: "<video><model type='qxl'/></video>", ..of("video-that-qemu-may-lack") }, None),
        (Case { devices: "<disk type='file'><source file='/dev/null'/><target dev='hda' bus='ide'/></disk>", ..of("bus-that-the-machine-lacks") }, Some(4)),
        (Case { machine: "pc", devices: "<controller type='pci' index='1' model='pcie-root-port'/>", ..of("port-that-the-machine-lacks") }, Some(4)),
        (Case { os: " firmware='efi'", loader: "<loader readonly='yes' type='pflash'>/no/where.fd</loader>", ..of("foreign-loader") }, Some(4)),
        (Case { os: " firmware='efi'", features: "<pae/>", ..of("uefi-without-acpi") }, Some(4)),
        (Case { os: " firmware='efi'", loader: "<loader secure='yes'/>", features: "<acpi/><smm state='off'/>", ..of("secure-boot-without-smm") }, Some(4)),
        (Case { more: "<vcpu>1</vcpu><numatune><memory mode='strict' nodeset='63'/></numatune>", ..of("absent-numa-node") }, Some(4)),
        (Case { arch: "s390x", machine: "s390-ccw-virtio", devices: "<controller type='pci' index='1' model='pcie-root-port'/>", ..of("acpi-on-s390x") }, Some(4)),
        (Case { more: "<vcpu>1</vcpu><memoryBacking><hugepages><page size='4' unit='KiB'/></hugepages></memoryBacking>", ..of("ordinary-page-as-huge-page") }, None),
        (cpu("tsc-without-scaling", "<vcpu>1</vcpu><clock offset='utc'><timer name='tsc' frequency='1000000000'/></clock>"), None),
        (cpu("model-that-kvm-lacks-in-part", "<vcpu>1</vcpu><cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem</model></cpu>"), None),
        (cpu("model-without-svm", "<vcpu>1</vcpu><cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>EPYC</model><feature policy='disable' name='svm'/></cpu>"), None),
        (cpu("foreign-vendor", "<vcpu>1</vcpu><cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>pentium</model><vendor>Intel</vendor></cpu>"), None),
    ]
}

#[test]
fn libvirts_answer_to_the_whole_definition_is_the_verdict() {
    let mut daemons = vec![Libvirtd::start().unwrap()];
    daemons.extend(Libvirtd::start_with_kvm().unwrap());
    for libvirtd in &daemons {
        let uri = libvirtd.uri();
        for (case, expected) in cases() {
            let file = write(libvirtd, case.name, &case.xml());
            let asked = libvirtd.virsh(&["domxml-to-native", "qemu-argv", "--xml", &file]);
            let code = match (&asked, expected) {
                (Ok(_), None) => 0,
                (Err(_), None) => 4,
                (Ok(_), Some(expected)) => panic!("{}: accepted, not {expected}", case.name),
                (Err(_), Some(expected)) => expected,
            };
            let (live, answer) = check(&["--connect", &uri, "--domain-xml", &file]);
            assert_eq!(live, code, "{}: {asked:?}\n{answer:#}", case.name);
            not_checked(&answer);
            if let Err(refusal) = asked {
                let words = answer["findings"][0]["words"].as_str().unwrap();
                assert!(refusal.to_string().contains(words), "{refusal}\n{words}");
            }
        }
    }
    if daemons.len() == 1 {
        println!("KVM is not usable here: the cases of domain type kvm were only rejected");
    }
}

#[test]
fn cpuset_of_absent_cpus_is_named_or_rejected() {
    let libvirtd = Libvirtd::start().unwrap();
    let case = Case {
        name: "cpuset",
        more: "<vcpu cpuset='1000-1003'>1</vcpu>",
        ..Case::default()
    };
    let file = write(&libvirtd, case.name, &case.xml());
    let (code, answer) = check(&["--connect", &libvirtd.uri(), "--domain-xml", &file]);
    assert_eq!(answer["confirmation"]["dryRun"]["answer"], "accepted");
    let names = not_checked(&answer);
    assert!(code == 4 || names.contains("CPU pinning"), "{answer:#}");
    let arguments = ["--connect", &libvirtd.uri(), "--domain-xml", &file, "--try"];
    let (code, answer) = check(&arguments);
    assert_eq!(code, 4, "{answer:#}");
    assert_eq!(answer["confirmation"]["trial"]["answer"], "refused");
}

/// Most of these make libvirt execute, open or create something in a dry run (docs/security.md).
#[test]
fn hostile_definition_touches_nothing_and_is_named() {
    let libvirtd = Libvirtd::start().unwrap();
    let directory = libvirtd.directory().join("hostile");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let evil = directory.join("evil");
    let trace = directory.join("trace");
    fs::write(&evil, format!("#!/bin/sh\ntouch {}\n", trace.display())).unwrap();
    fs::set_permissions(&evil, fs::Permissions::from_mode(0o755)).unwrap();
    let fifo = directory.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    let (evil, fifo) = (evil.display(), fifo.display());
    let xml = format!(
        "<domain type='qemu'><name>hostile</name><uuid>11111111-2222-3333-4444-555555555555</uuid>\
         <memory unit='MiB'>64</memory><memoryBacking><source type='memfd'/>\
         <access mode='shared'/></memoryBacking><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type>\
         <loader readonly='yes' type='pflash'>{fifo}</loader><nvram>{fifo}</nvram>\
         <kernel>{fifo}</kernel></os><features><acpi/></features><devices>\
         <emulator>{evil}</emulator>\
         <disk type='file'><source file='{fifo}'/><target dev='vda' bus='virtio'/></disk>\
         <disk type='network'><source protocol='nbd' name='x'><host name='192.0.2.7'/></source>\
         <target dev='vdb' bus='virtio'/></disk>\
         <disk type='volume'><source pool='p' volume='v'/><target dev='vdc' bus='virtio'/></disk>\
         <interface type='ethernet'><script path='{evil}'/><model type='virtio'/></interface>\
         <interface type='network'><source network='none'/><model type='e1000'/></interface>\
         <filesystem type='mount'><driver type='virtiofs'/><binary path='{evil}'/>\
         <source dir='/'/><target dir='t'/></filesystem>\
         <tpm model='tpm-tis'><backend type='passthrough'><device path='{fifo}'/></backend></tpm>\
         <serial type='file'><source path='{directory}/created'/></serial>\
         <rng model='virtio'><backend model='random'>{fifo}</backend></rng>\
         </devices></domain>",
        directory = directory.display()
    );
    let before = fs::read_dir(&directory).unwrap().count();
    let file = write(&libvirtd, "hostile", &xml);
    let arguments = ["--connect", &libvirtd.uri(), "--domain-xml", &file, "--try"];
    let (code, answer) = check(&arguments);
    assert_eq!(code, 0, "{answer:#}");
    assert!(!trace.exists(), "libvirt executed a file of the definition");
    assert_eq!(fs::read_dir(&directory).unwrap().count(), before);
    let names = not_checked(&answer);
    for name in [
        &format!("emulator {evil}"),
        "network interface of model virtio",
        "network interface of model e1000",
        "virtiofsd of a filesystem",
        "storage volume p/v",
        "TPM ",
    ] {
        let name: String = name.chars().take(60).collect();
        assert!(names.contains(&name), "{name}:\n{names}");
    }
    assert_eq!(
        libvirtd.virsh(&["list", "--all", "--name"]).unwrap().trim(),
        ""
    );
}

#[test]
fn tried_copy_is_started_and_leaves_nothing() {
    let libvirtd = Libvirtd::start().unwrap();
    let uri = libvirtd.uri();
    libvirtd.start_domain("web").unwrap();
    let before = libvirtd.virsh(&["list", "--all", "--uuid"]).unwrap();
    let (code, answer) = check(&["--connect", &uri, "--domain", "web", "--try"]);
    assert_eq!(code, 0, "{answer:#}");
    assert_eq!(answer["confirmation"]["trial"]["answer"], "started");
    assert!(not_checked(&answer).contains("the guest's own start"));
    assert_eq!(
        libvirtd.virsh(&["list", "--all", "--uuid"]).unwrap(),
        before
    );
    let log = libvirtd.directory().join("cache/libvirt/qemu/log");
    let started = fs::read_dir(log).unwrap().flatten().any(|file| {
        let name = file.file_name().to_string_lossy().into_owned();
        name.starts_with("virtnode-try-")
    });
    assert!(started, "no copy was started");

    // Larger than any machine.
    let (code, answer) = check(&["--connect", &uri, "--memory", "100TiB", "--try"]);
    let trial = &answer["confirmation"]["trial"];
    assert_eq!(trial["answer"], "notTried", "{answer:#}");
    assert!(trial["reason"].as_str().unwrap().contains("available"));
    assert_ne!(code, 0, "{answer:#}");

    // Already rejected.
    let arguments = ["--connect", &uri, "--machine", "none-such", "--try"];
    let (code, answer) = check(&arguments);
    assert_eq!(code, 4);
    assert_eq!(answer["confirmation"]["trial"]["answer"], "notTried");

    let output = command(&["--libvirt-version", "11.3.0", "--vcpus", "1", "--try"]).output();
    assert_eq!(output.unwrap().status.code(), Some(2));
}

/// libvirt destroys the copy when the connection ends, at whatever moment.
#[tokio::test]
async fn interrupted_trial_leaves_no_domain() {
    let libvirtd = Libvirtd::start().unwrap();
    let uri = libvirtd.uri();
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut child = command(&["--connect", &uri, "--vcpus", "1", "--domain-type", "qemu"])
            .arg("--try")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let log = libvirtd.directory().join("cache/libvirt/qemu/log");
        let begun = async || match logs(&log) {
            0 => Err(anyhow::anyhow!("no copy is being started")),
            _ => Ok(()),
        };
        eventually(LONG, begun).await.unwrap();
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        child.wait().unwrap();
        let gone = async || {
            let list = libvirtd.virsh(&["list", "--all", "--name"])?;
            anyhow::ensure!(list.trim().is_empty(), "{list}");
            Ok(())
        };
        eventually(LONG, gone).await.unwrap();
        fs::remove_dir_all(&log).unwrap();
    }
}

fn logs(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}
