//! `virtnode doctor` on simulated machines: each is a directory with the files that such a machine
//! has. libvirt is unreachable, and all other checks must still report.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Gid;
use rstest::rstest;
use serde_json::Value;
use tempfile::TempDir;
use virtnode::doctor::checks::Check;

/// A simulated machine: a directory with its files.
struct Machine(TempDir);

impl Machine {
    fn new(files: &[(&str, &str)]) -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for (path, text) in files {
            machine.put(path, text);
        }
        machine
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Writes a file, or creates a directory if the path ends in a slash.
    fn put(&self, path: &str, text: &str) {
        let file = self.path(path);
        if path.ends_with('/') {
            fs::create_dir_all(file).unwrap();
            return;
        }
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }

    /// Returns exit code and standard output.
    fn doctor(&self, output: &str) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
            .env_clear()
            .args(["doctor", "--output", output, "--root"])
            .arg(self.0.path())
            .args([
                "--connect",
                "qemu+unix:///system?socket=/nonexistent/libvirt-sock",
            ])
            // No daemon listens there on any machine: port 1 is never assigned.
            .args([
                "--listen",
                "127.0.0.1:1",
                "--socket",
                "/nonexistent/virtnode.sock",
            ])
            .output()
            .unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(err, "");
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
        )
    }

    /// Returns the report as JSON. Every check must have an entry, and libvirt must be an error.
    fn diagnose(&self) -> Value {
        let (code, out) = self.doctor("json");
        let diagnosis: Value = serde_json::from_str(&out).unwrap();
        let checks: BTreeSet<&str> = ["findings", "unseen"]
            .iter()
            .flat_map(|list| diagnosis[list].as_array().unwrap())
            .map(|entry| entry["check"].as_str().unwrap())
            .collect();
        let all: BTreeSet<&str> = Check::ALL.iter().map(|check| check.as_str()).collect();
        assert_eq!(checks, all, "{out}");
        assert_eq!(
            finding(&diagnosis, "libvirt-connection")["severity"],
            "error"
        );
        assert_eq!(code, 1);
        diagnosis
    }
}

/// Returns the most severe finding of a check, or null.
fn finding<'d>(diagnosis: &'d Value, check: &str) -> &'d Value {
    let mut of = diagnosis["findings"].as_array().unwrap().iter();
    of.find(|finding| finding["check"] == check)
        .unwrap_or(&Value::Null)
}

fn unseen<'d>(diagnosis: &'d Value, check: &str) -> &'d Value {
    let mut of = diagnosis["unseen"].as_array().unwrap().iter();
    of.find(|unseen| unseen["check"] == check)
        .unwrap_or(&Value::Null)
}

fn first_command(finding: &Value) -> &str {
    finding["remedy"]["commands"][0]
        .as_str()
        .unwrap_or_default()
}

/// Expected entry of a check: name, severity (or `unseen`), part of the text, part of the first
/// command.
type Expected<'e> = (&'e str, &'e str, &'e str, &'e str);

fn expect(machine: &Machine, expected: &[Expected<'_>]) {
    let diagnosis = machine.diagnose();
    for (check, severity, what, command) in expected {
        let entry = match *severity {
            "unseen" => unseen(&diagnosis, check),
            _ => finding(&diagnosis, check),
        };
        if *severity != "unseen" {
            assert_eq!(entry["severity"], *severity, "{check} in {diagnosis:#}");
        }
        let text = entry["what"].as_str().unwrap_or_default();
        assert!(text.contains(what), "{check}: {what:?} in {entry:#}");
        assert!(
            first_command(entry).contains(command),
            "{check}: {command:?} in {entry:#}"
        );
        // A problem has a consequence and a remedy.
        if matches!(*severity, "warning" | "error") {
            assert!(entry["why"].is_string(), "{entry:#}");
            let remedy = &entry["remedy"];
            let text = remedy["text"].as_str().unwrap();
            assert!(
                !text.is_empty() || !first_command(entry).is_empty(),
                "{entry:#}"
            );
        }
    }
}

const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\n\
                     flags\t\t: fpu vme msr vmx smx est tm2\n\n";
const AMD: &str =
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu vme msr svm extapic\n\n";
const CLOUD: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vme hypervisor\n\n";
const GRUB: &str = "GRUB_DEFAULT=0\nGRUB_CMDLINE_LINUX=\"quiet\"\n";
const X86: (&str, &str) = ("proc/sys/kernel/arch", "x86_64\n");

#[test]
fn intel_host_without_modules_is_an_error() {
    let machine = Machine::new(&[
        X86,
        ("proc/cpuinfo", INTEL),
        ("proc/cmdline", "BOOT_IMAGE=/vmlinuz ro quiet\n"),
        ("sys/firmware/acpi/tables/DMAR", ""),
        ("etc/default/grub", GRUB),
        ("usr/sbin/update-grub", ""),
    ]);
    expect(
        &machine,
        &[
            ("virtualization-extensions", "ok", "VT-x (flag vmx)", ""),
            (
                "kvm-module",
                "error",
                "kvm_intel is not loaded",
                "modprobe kvm_intel",
            ),
            (
                "kvm-device",
                "error",
                "kvm_intel is not loaded",
                "modprobe kvm_intel",
            ),
            ("nested", "ok", "no such parameter", ""),
            (
                "iommu",
                "warning",
                "describes an IOMMU (DMAR)",
                "intel_iommu=on",
            ),
            ("vfio", "ok", "not usable without an IOMMU", ""),
            ("versions", "unseen", "only libvirt reports", ""),
            ("probe-age", "warning", "no virtnode daemon", "virtnode run"),
        ],
    );
    // The remedy for the IOMMU edits the file as described.
    let diagnosis = machine.diagnose();
    let command = first_command(finding(&diagnosis, "iommu"));
    let grub = machine.path("etc/default/grub");
    let edit = command
        .strip_suffix(" && update-grub")
        .unwrap()
        .replace("/etc/default/grub", grub.to_str().unwrap());
    assert!(
        Command::new("sh")
            .args(["-c", &edit])
            .status()
            .unwrap()
            .success()
    );
    let edited = fs::read_to_string(grub).unwrap();
    assert!(
        edited.contains("GRUB_CMDLINE_LINUX=\"intel_iommu=on quiet\"\n"),
        "{edited}"
    );
}

#[test]
fn intel_host_with_passthrough_is_ok() {
    let machine = Machine::new(&[
        X86,
        ("proc/cpuinfo", INTEL),
        ("proc/cmdline", "ro intel_iommu=on iommu=pt\n"),
        ("sys/firmware/acpi/tables/DMAR", ""),
        ("sys/class/iommu/dmar0/intel-iommu/version", "1:0\n"),
        ("sys/kernel/iommu_groups/0/type", "identity\n"),
        ("sys/kernel/iommu_groups/1/type", "identity\n"),
        ("sys/kernel/iommu_groups/2/type", "DMA-FQ\n"),
        ("sys/module/kvm_intel/parameters/nested", "Y\n"),
        ("dev/vfio/vfio", ""),
        ("sys/class/misc/iommu/dev", "10:1\n"),
    ]);
    expect(
        &machine,
        &[
            ("kvm-module", "ok", "kvm_intel", ""),
            ("nested", "ok", "on: ", ""),
            (
                "iommu",
                "ok",
                "VT-d, 3 groups, 2 of them identity (iommu=pt)",
                "",
            ),
            ("vfio", "ok", "vfio and iommufd", ""),
        ],
    );
}

#[rstest]
#[case::not_in_firmware(INTEL, "intel_iommu=on", &[], "error", "sysfs shows no IOMMU", "")]
#[case::pt_without_on(INTEL, "iommu=pt", &["sys/firmware/acpi/tables/DMAR"], "error", "sysfs shows none", "--args=intel_iommu=on")]
#[case::amd_off(AMD, "ro amd_iommu=off", &["sys/firmware/acpi/tables/IVRS"], "warning", "amd_iommu=off", "--remove-args=amd_iommu=off")]
#[case::amd_unused(AMD, "ro", &["sys/firmware/acpi/tables/IVRS"], "warning", "(IVRS)", "dmesg")]
#[case::amd_translates(AMD, "iommu=pt", &["sys/class/iommu/ivhd0/", "sys/kernel/iommu_groups/0/type"], "warning", "none of AMD-Vi, 1 groups", "")]
#[case::no_argument(INTEL, "ro", &[], "warning", "no IOMMU", "")]
#[case::last_argument_wins(INTEL, "intel_iommu=off intel_iommu=on", &[], "error", "intel_iommu=on", "")]
#[case::guest(CLOUD, "ro", &[], "ok", "in a guest", "")]
fn iommu_arguments_are_compared_with_sysfs(
    #[case] cpu: &str,
    #[case] arguments: &str,
    #[case] files: &[&str],
    #[case] severity: &str,
    #[case] what: &str,
    #[case] command: &str,
) {
    let machine = Machine::new(&[
        X86,
        ("proc/cpuinfo", cpu),
        ("proc/cmdline", arguments),
        ("usr/sbin/grubby", ""),
    ]);
    for file in files {
        machine.put(file, "DMA\n");
    }
    expect(&machine, &[("iommu", severity, what, command)]);
}

#[test]
fn amd_host_without_a_device_node_is_an_error() {
    let machine = Machine::new(&[
        X86,
        ("proc/cpuinfo", AMD),
        ("proc/cmdline", "ro"),
        ("sys/module/kvm_amd/parameters/nested", "0\n"),
        ("sys/class/misc/kvm/dev", "10:232\n"),
    ]);
    expect(
        &machine,
        &[
            ("virtualization-extensions", "ok", "AMD-V (flag svm)", ""),
            ("kvm-module", "ok", "kvm_amd", ""),
            (
                "kvm-device",
                "error",
                "does not exist",
                "mknod /dev/kvm c 10 232",
            ),
            ("nested", "ok", "off: ", ""),
        ],
    );
}

#[rstest]
#[case::arm("aarch64", "Features\t: fp asimd evtstrm aes\n", &[], "unseen", "EL2")]
#[case::s390x("s390x", "vendor_id       : IBM/S390\nfeatures\t: esan3 zarch stfle msa vx sie \n", &[], "ok", "SIE")]
#[case::s390x_without("s390x", "features\t: esan3 zarch stfle\n", &[("proc/sysinfo", "VM00 Control Program: z/VM 7.3.0\n")], "warning", "guest (z/VM 7.3.0)")]
#[case::power("ppc64le", "cpu\t\t: POWER9\n\nplatform\t: PowerNV\n", &[], "ok", "PowerNV")]
#[case::lpar("ppc64le", "cpu\t\t: POWER10\n\nplatform\t: pSeries\n", &[], "unseen", "PowerVM")]
#[case::riscv("riscv64", "isa\t\t: rv64imafdch_zicsr_zba\n", &[], "ok", "(H)")]
#[case::riscv_without("riscv64", "isa\t\t: rv64imafdc_zihintpause_sscofpmf\n", &[], "warning", "not contain h")]
#[case::cloud("x86_64", CLOUD, &[("sys/class/dmi/id/sys_vendor", "Amazon EC2\n"), ("sys/class/dmi/id/product_name", "m5.large\n")], "warning", "guest (Amazon EC2 m5.large)")]
#[case::firmware("x86_64", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vme\n", &[], "warning", "neither the flag vmx nor svm")]
#[case::empty_cpuinfo("x86_64", "", &[], "warning", "neither the flag vmx nor svm")]
#[case::unknown_architecture("sparc64", "cpu\t\t: TI UltraSparc\n", &[], "unseen", "cannot detect")]
fn extensions_are_detected_on_each_architecture(
    #[case] arch: &str,
    #[case] cpuinfo: &str,
    #[case] files: &[(&str, &str)],
    #[case] severity: &str,
    #[case] what: &str,
) {
    let machine = Machine::new(&[("proc/sys/kernel/arch", arch), ("proc/cpuinfo", cpuinfo)]);
    for (path, text) in files {
        machine.put(path, text);
    }
    expect(
        &machine,
        &[("virtualization-extensions", severity, what, "")],
    );
}

#[test]
fn arm_host_without_kvm_gets_no_remedy_to_load_it() {
    let machine = Machine::new(&[
        ("proc/sys/kernel/arch", "aarch64\n"),
        ("proc/cpuinfo", "Features\t: fp asimd\n"),
    ]);
    expect(
        &machine,
        &[
            ("kvm-module", "unseen", "built in, or missing", ""),
            ("kvm-device", "warning", "/dev/kvm does not exist", ""),
            ("iommu", "unseen", "/proc/cmdline", ""),
        ],
    );
}

#[test]
fn container_reports_hidden_devices_as_unseen() {
    let machine = Machine::new(&[X86, ("proc/cpuinfo", INTEL), (".dockerenv", "")]);
    expect(
        &machine,
        &[
            ("kvm-device", "unseen", "container", "virtnode doctor"),
            ("libvirt-connection", "error", "no connection", ""),
        ],
    );
    // A leftover .dockerenv from an image does not make a machine a container.
    fs::create_dir_all(machine.path("proc/self/ns")).unwrap();
    for (kind, number) in [
        ("ipc", 4_026_531_839_u32),
        ("uts", 4_026_531_838),
        ("pid", 4_026_531_836),
        ("cgroup", 4_026_531_835),
    ] {
        symlink(
            format!("{kind}:[{number}]"),
            machine.path("proc/self/ns").join(kind),
        )
        .unwrap();
    }
    expect(&machine, &[("kvm-device", "error", "kvm_intel", "")]);
}

#[test]
fn huge_pages_without_a_mount_are_an_error() {
    let machine = Machine::new(&[
        (
            "proc/meminfo",
            "MemTotal: 1 kB\nHugepagesize:       2048 kB\n",
        ),
        ("proc/1/mounts", "proc /proc proc rw 0 0\n"),
        (
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "512\n",
        ),
        (
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
            "256\n",
        ),
        (
            "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
            "0\n",
        ),
        (
            "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
            "0\n",
        ),
    ]);
    let mount = "mount -t hugetlbfs -o pagesize=2M hugetlbfs /dev/hugepages-2M";
    expect(
        &machine,
        &[("hugepages", "error", "512 pages of 2MiB", mount)],
    );
    for mounted in ["rw,relatime", "rw,relatime,pagesize=2M"] {
        let line = format!("hugetlbfs /dev/hugepages hugetlbfs {mounted} 0 0\n");
        machine.put("proc/1/mounts", &line);
        expect(
            &machine,
            &[("hugepages", "ok", "1GiB of 2MiB reserved, 512MiB free", "")],
        );
    }
    machine.put("proc/1/mounts", "h /h hugetlbfs rw,pagesize=1024M 0 0\n");
    expect(
        &machine,
        &[("hugepages", "error", "no hugetlbfs of that size", "")],
    );
}

#[test]
fn disabled_isolation_is_a_warning() {
    let interrupts = "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    let machine = Machine::new(&[
        (interrupts, "Y\n"),
        (
            "sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
            "N\n",
        ),
    ]);
    let command = format!("echo N >/{interrupts}");
    expect(&machine, &[("vfio", "warning", "not isolated", &command)]);
}

/// Creates KVM's device node, or as an unprivileged user a file, which is not a device.
fn kvm_node(machine: &Machine) -> bool {
    machine.put("dev/", "");
    let path = machine.path("dev/kvm");
    let device = mknod(&path, SFlag::S_IFCHR, Mode::empty(), makedev(10, 232));
    if device.is_err() {
        fs::write(&path, "").unwrap();
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    device.is_ok()
}

fn closed_to_qemu(groups: &str) -> (Machine, bool) {
    let machine = Machine::new(&[
        X86,
        ("proc/cpuinfo", INTEL),
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/:/bin/false\n",
        ),
        ("etc/group", groups),
    ]);
    let is_device = kvm_node(&machine);
    (machine, is_device)
}

/// With /dev/kvm at mode 0600 root, libvirt's capability cache is never valid. After the printed
/// command has run, the check is ok.
#[test]
fn closed_kvm_device_is_an_error_and_its_remedy_works() {
    let own = Gid::effective();
    let groups = format!("kvm:x:{own}:libvirt-qemu\nlibvirt-qemu:x:64055:\n");
    let (machine, is_device) = closed_to_qemu(&groups);
    if !is_device {
        // Only this part can be tested without the privilege to create devices.
        expect(
            &machine,
            &[("kvm-device", "error", "not a device", "mknod")],
        );
        return;
    }
    let diagnosis = machine.diagnose();
    let device = finding(&diagnosis, "kvm-device");
    // On a machine without KVM the device has no driver, so nobody can open it.
    if device["what"].as_str().unwrap().contains("has no driver") {
        return;
    }
    assert_eq!(device["severity"], "error", "{device:#}");
    let what = device["what"].as_str().unwrap();
    assert!(
        what.contains("crw------- root:") && what.contains("libvirt-qemu"),
        "{what}"
    );
    assert!(
        device["why"]
            .as_str()
            .unwrap()
            .contains("starts every QEMU binary again")
    );
    let command = first_command(device);
    assert_eq!(command, "chgrp kvm /dev/kvm && chmod 660 /dev/kvm");

    // The group's name exists on the simulated machine only.
    let device = machine.path("dev/kvm");
    let command = command
        .replace("/dev/kvm", device.to_str().unwrap())
        .replace("chgrp kvm", &format!("chgrp {own}"));
    assert!(
        Command::new("sh")
            .args(["-c", &command])
            .status()
            .unwrap()
            .success()
    );
    expect(
        &machine,
        &[(
            "kvm-device",
            "ok",
            "QEMU's user libvirt-qemu can open it",
            "",
        )],
    );
}

#[rstest]
#[case::no_group("libvirt-qemu:x:64055:\n", &["groupadd --system kvm", "usermod --append --groups kvm libvirt-qemu", "chgrp kvm"])]
#[case::not_a_member("kvm:x:107:\n", &["usermod --append --groups kvm libvirt-qemu", "chgrp kvm"])]
#[case::member("kvm:x:107:other,libvirt-qemu\n", &["chgrp kvm"])]
fn remedy_depends_on_the_groups(#[case] groups: &str, #[case] commands: &[&str]) {
    let (machine, is_device) = closed_to_qemu(groups);
    let diagnosis = machine.diagnose();
    let device = finding(&diagnosis, "kvm-device");
    if !is_device || device["what"].as_str().unwrap().contains("has no driver") {
        return;
    }
    let printed = device["remedy"]["commands"].as_array().unwrap();
    assert_eq!(printed.len(), commands.len(), "{device:#}");
    for (printed, expected) in printed.iter().zip(commands) {
        assert!(
            printed.as_str().unwrap().starts_with(expected),
            "{device:#}"
        );
    }
}

#[test]
fn qemu_user_is_read_from_its_configuration() {
    let (machine, is_device) = closed_to_qemu("kvm:x:107:\n");
    machine.put("etc/libvirt/qemu.conf", "# user = \"x\"\nuser = \"root\"\n");
    let diagnosis = machine.diagnose();
    let device = finding(&diagnosis, "kvm-device");
    if is_device && !device["what"].as_str().unwrap().contains("has no driver") {
        assert_eq!(device["severity"], "ok", "{device:#}");
    }
}

#[test]
fn table_has_finding_consequence_and_remedy() {
    let machine = Machine::new(&[X86, ("proc/cpuinfo", INTEL), ("proc/cmdline", "ro")]);
    let (code, text) = machine.doctor("table");
    assert_eq!(code, 1);
    let lines: Vec<&str> = text.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.starts_with("ERROR kvm-module: "))
        .unwrap();
    assert!(
        lines[at + 1].starts_with("    Without the module"),
        "{text}"
    );
    assert_eq!(lines[at + 2], "    Fix, as root on this host:");
    assert_eq!(lines[at + 3], "      modprobe kvm_intel");
    assert!(text.contains("\nSkipped:\n"), "{text}");
    assert!(text.contains("\nPassed:\n"), "{text}");
    assert!(lines.last().unwrap().contains(" errors, "), "{text}");
    let (_, yaml) = machine.doctor("yaml");
    assert!(yaml.contains("check: kvm-module"), "{yaml}");
}

#[test]
fn missing_root_directory_is_an_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_virtnode"))
        .env_clear()
        .args(["doctor", "--root", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(
        err.contains("/nonexistent: directory does not exist"),
        "{err}"
    );
}

/// docs/doctor.md lists all checks, in order and with their descriptions.
#[test]
fn documentation_lists_all_checks() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, table) = text
        .split_once("| check | looks at |\n| --- | --- |\n")
        .unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let rows = Check::ALL
        .iter()
        .map(|check| format!("| `{}` | {} |", check.as_str(), check.looks_at()));
    assert_eq!(table.lines().collect::<Vec<_>>(), rows.collect::<Vec<_>>());
}
