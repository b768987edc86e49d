//! Device passthrough (IOMMU, VFIO) and huge pages.

use super::finding::{Check, DoctorReport, Place, Remedy, Severity};
use super::libvirt::restart;
use super::observed::{BootLoader, HostSurvey, HugePages, Observed};
use crate::units::Bytes;

/// Vendor of an x86 CPU, and thereby the kind of its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CpuVendor {
    Intel,
    Amd,
    Other,
}

fn vendor(host: &HostSurvey) -> CpuVendor {
    match host.cpu.as_ref().and_then(|cpu| cpu.vendor.as_deref()) {
        Some("GenuineIntel") => CpuVendor::Intel,
        Some("AuthenticAMD" | "HygonGenuine") => CpuVendor::Amd,
        _ => CpuVendor::Other,
    }
}

/// Returns the kernel argument that disables the IOMMU. The last argument of a name wins
/// (Documentation/admin-guide/kernel-parameters.txt).
fn disabling(arguments: &[String]) -> Option<&str> {
    ["iommu=", "intel_iommu=", "amd_iommu="]
        .iter()
        .find_map(|name| {
            let last = arguments.iter().rfind(|word| word.starts_with(name))?;
            let mut values = last[name.len()..].split(',');
            values.any(|value| value == "off").then_some(last.as_str())
        })
}

/// Returns the kernel argument that requests identity mappings for the host's own devices.
fn requesting_identity(arguments: &[String]) -> Option<&str> {
    arguments.iter().map(String::as_str).find(|word| {
        matches!(*word, "iommu=pt" | "iommu.passthrough=1") || word.ends_with("_iommu=pt")
    })
}

/// Returns the kernel argument that requests the IOMMU.
fn requesting(arguments: &[String]) -> Option<&str> {
    let has = |word: &str, name, values: &[&str]| {
        word.strip_prefix(name)
            .is_some_and(|list| list.split(',').any(|value| values.contains(&value)))
    };
    arguments.iter().map(String::as_str).find(|word| {
        has(word, "intel_iommu=", &["on"])
            || has(word, "amd_iommu=", &["on", "force_enable"])
            || matches!(*word, "iommu=force" | "iommu=pt" | "iommu.passthrough=1")
    })
}

pub(super) fn check_iommu(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::Iommu;
    let host = &observed.host;
    let Some(arguments) = &host.kernel_arguments else {
        return report.unseen(check, "/proc/cmdline cannot be read", None);
    };
    if host.iommu.groups > 0 {
        return check_active_iommu(host, arguments, report);
    }
    let tables = host.iommu.tables.as_ref();
    let table = ["DMAR", "IVRS"]
        .into_iter()
        .find(|table| tables.is_some_and(|tables| tables.contains(*table)));
    let (severity, what, remedy) = match (disabling(arguments), requesting(arguments), table) {
        (Some(word), ..) => (
            Severity::Warning,
            format!("{word} on the kernel command line disables the IOMMU"),
            change_arguments(host, None, Some(word)),
        ),
        (None, Some(word), None) => (
            Severity::Error,
            format!("{word} is on the kernel command line, but sysfs shows no IOMMU"),
            enable_in_firmware(host),
        ),
        (None, Some(word), Some(table)) => (
            Severity::Error,
            format!(
                "{word} is on the kernel command line and the firmware describes an IOMMU ({table}), \
                 but sysfs shows none"
            ),
            // With VT-d, iommu=pt alone does not enable the IOMMU.
            if (vendor(host), table) == (CpuVendor::Intel, "DMAR")
                && !arguments.iter().any(|word| word == "intel_iommu=on")
            {
                change_arguments(host, Some("intel_iommu=on"), None)
            } else {
                read_log()
            },
        ),
        (None, None, Some(table)) => (
            Severity::Warning,
            format!("the firmware describes an IOMMU ({table}), but the kernel does not use it"),
            match vendor(host) {
                CpuVendor::Intel => change_arguments(host, Some("intel_iommu=on"), None),
                CpuVendor::Amd | CpuVendor::Other => read_log(),
            },
        ),
        (None, None, None) => match &host.guest_of {
            Some(hypervisor) => {
                return report.ok(
                    check,
                    format!("none, in a guest ({hypervisor}); only its hypervisor can provide one"),
                );
            }
            None if matches!(host.arch.as_str(), "x86_64" | "i686") => (
                Severity::Warning,
                "sysfs shows no IOMMU".to_owned(),
                enable_in_firmware(host),
            ),
            None => return report.ok(check, "sysfs shows none"),
        },
    };
    let why = "Devices cannot be passed through to guests (hostdev, VFIO).";
    report.problem(check, severity, what, why, remedy);
}

fn check_active_iommu(host: &HostSurvey, arguments: &[String], report: &mut DoctorReport) {
    let check = Check::Iommu;
    let iommu = &host.iommu;
    let kind = match iommu.devices.first().map(String::as_str) {
        Some(name) if name.starts_with("dmar") => "VT-d",
        Some(name) if name.starts_with("ivhd") => "AMD-Vi",
        Some(name) if name.starts_with("smmu") => "SMMU",
        _ => "an IOMMU",
    };
    let seen = format!("{kind}, {} groups", iommu.groups);
    match requesting_identity(arguments) {
        Some(word) if iommu.typed > 0 && iommu.identity == 0 => report.problem(
            check,
            Severity::Warning,
            format!("{word} is on the kernel command line, but none of {seen} is of type identity"),
            "Every memory access of the host's own devices is translated, which makes them slower; \
             passing devices through works.",
            Remedy::on_host(
                ["grep . /sys/kernel/iommu_groups/*/type | head; dmesg | grep -iE 'iommu.*(domain|pass)'"],
                "A later argument (iommu.passthrough=0, iommu=nopt, iommu.strict=) or the kernel's own \
                 default overrides it; the kernel log shows which.",
            ),
        ),
        Some(word) => report.ok(
            check,
            format!("{seen}, {} of them identity ({word})", iommu.identity),
        ),
        None => report.ok(check, seen),
    }
}

fn read_log() -> Remedy {
    Remedy::on_host(
        ["dmesg | grep -iE 'DMAR|IOMMU|AMD-Vi'"],
        "The kernel log shows why the IOMMU is not in use.",
    )
}

fn enable_in_firmware(host: &HostSurvey) -> Remedy {
    let text = if host.guest_of.is_some() {
        "This machine is a guest: its hypervisor must provide a virtual IOMMU."
    } else {
        "The firmware does not describe an IOMMU. Enable it in the firmware setup (Intel: VT-d; AMD: \
         IOMMU) and reboot."
    };
    Remedy::words(Place::Outside, text)
}

/// Returns the commands that add or remove a kernel argument.
fn change_arguments(host: &HostSurvey, add: Option<&str>, remove: Option<&str>) -> Remedy {
    // No command for words with characters that are special to sed or the shell.
    let is_plain = |word: &&str| {
        word.chars()
            .all(|c| c.is_ascii_alphanumeric() || "_=,.".contains(c))
    };
    let boot_loader = if add.iter().chain(&remove).all(is_plain) {
        host.boot_loader
    } else {
        BootLoader::Unknown
    };
    let commands: Vec<String> = match (boot_loader, add, remove) {
        (BootLoader::Grubby, add, remove) => {
            let add = add.map(|word| format!("--args={word}"));
            let remove = remove.map(|word| format!("--remove-args={word}"));
            let changes: Vec<String> = add.into_iter().chain(remove).collect();
            vec![format!("grubby --update-kernel=ALL {}", changes.join(" "))]
        }
        (BootLoader::UpdateGrub, Some(word), _) => vec![format!(
            "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{word} /' /etc/default/grub && update-grub"
        )],
        (BootLoader::UpdateGrub, None, Some(word)) => vec![format!(
            "sed -i '/^GRUB_CMDLINE_LINUX/s/\\b{word}\\b//' /etc/default/grub && update-grub"
        )],
        (BootLoader::UpdateGrub | BootLoader::Unknown, ..) => Vec::new(),
    };
    let what = match (add, remove) {
        (Some(word), _) => format!("Add {word} to the kernel command line."),
        (None, Some(word)) => format!("Remove {word} from the kernel command line."),
        (None, None) => String::new(),
    };
    Remedy::on_host(
        commands,
        format!("{what} This requires a reboot; migrate or stop the domains first."),
    )
}

pub(super) fn check_vfio(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::Vfio;
    let host = &observed.host;
    let vfio = host.vfio;
    let unsafe_options = [
        (
            vfio.unsafe_interrupts,
            "interrupts of passed-through devices are not isolated (allow_unsafe_interrupts)",
            "A guest with such a device can send interrupts to the host and to other guests.",
            ("vfio_iommu_type1", "allow_unsafe_interrupts"),
        ),
        (
            vfio.no_iommu,
            "devices can be passed through without an IOMMU (enable_unsafe_noiommu_mode)",
            "A guest with such a device can read and write all of the host's memory.",
            ("vfio", "enable_unsafe_noiommu_mode"),
        ),
    ];
    for (is_set, what, why, (module, parameter)) in unsafe_options {
        if !is_set {
            continue;
        }
        report.problem(
            check,
            Severity::Warning,
            what,
            why,
            Remedy::on_host(
                [format!(
                    "echo N >/sys/module/{module}/parameters/{parameter}"
                )],
                format!(
                    "To make this permanent, also remove the option {module}.{parameter} from \
                     /etc/modprobe.d (module {module}) and from the kernel command line."
                ),
            ),
        );
    }
    if report.covers(check) {
        return;
    }
    let what = match (vfio.vfio, vfio.iommufd) {
        (true, true) => "vfio and iommufd are available",
        (true, false) => "vfio is available, iommufd is not",
        (false, true) => {
            "iommufd is available; vfio is loaded when a device is first passed through"
        }
        (false, false) if host.iommu.groups > 0 => {
            "not loaded; libvirt loads it when a device is first passed through"
        }
        (false, false) => "not loaded, and not usable without an IOMMU",
    };
    report.ok(check, what);
}

pub(super) fn check_hugepages(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::Hugepages;
    let host = &observed.host;
    let reserved: Vec<&HugePages> = host
        .huge_pages
        .iter()
        .filter(|pages| pages.reserved > 0)
        .collect();
    if host.huge_pages.is_empty() {
        return report.ok(check, "not supported by this kernel");
    }
    if reserved.is_empty() {
        return report.ok(check, "none are reserved");
    }
    let unmounted = reserved
        .iter()
        .filter(|pages| pages.mounted == Some(false) && !host.in_container);
    for pages in unmounted {
        let size = pages.size;
        let mib = size.get() >> 20;
        let path = format!("/dev/hugepages-{mib}M");
        report.problem(
            check,
            Severity::Error,
            format!(
                "{} pages of {size} are reserved, but no hugetlbfs of that size is mounted",
                pages.reserved
            ),
            "libvirt does not start domains with <hugepages> of that size, and the reserved memory \
             cannot be used for anything else.",
            Remedy::on_host(
                [
                    format!(
                        "mkdir -p {path} && mount -t hugetlbfs -o pagesize={mib}M hugetlbfs {path}"
                    ),
                    restart(host),
                ],
                "libvirt reads the mounts when it starts; domains keep running. To make the mount \
                 permanent, add it to /etc/fstab.",
            ),
        );
    }
    if report.covers(check) {
        return;
    }
    let list = reserved.iter().map(|pages| {
        let bytes = |count: u64| Bytes::new(pages.size.get().saturating_mul(count));
        format!(
            "{} of {} reserved, {} free",
            bytes(pages.reserved),
            pages.size,
            bytes(pages.free)
        )
    });
    report.ok(check, list.collect::<Vec<_>>().join("; "));
}
