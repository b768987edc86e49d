//! What it takes to give devices to guests: IOMMU and VFIO. And memory in huge pages.

use super::finding::{Check, DoctorReport, Place, Remedy, Severity};
use super::observed::{BootLoader, HostSurvey, HugePages, Observed};
use crate::units::Bytes;

/// Whose IOMMU x86 has, by what shows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Maker {
    Intel,
    Amd,
    Other,
}

fn maker(host: &HostSurvey) -> Maker {
    match host.cpu.as_ref().and_then(|cpu| cpu.vendor.as_deref()) {
        Some("GenuineIntel") => Maker::Intel,
        Some("AuthenticAMD" | "HygonGenuine") => Maker::Amd,
        _ => Maker::Other,
    }
}

/// The words of the command line that switch the IOMMU off. The kernel reads the words from left
/// to right, so that the last of a name counts (Documentation/admin-guide/kernel-parameters.txt).
fn switched_off(arguments: &[String]) -> Option<&str> {
    ["iommu=", "intel_iommu=", "amd_iommu="]
        .iter()
        .find_map(|name| {
            let last = arguments.iter().rfind(|word| word.starts_with(name))?;
            let value = &last[name.len()..];
            value
                .split(',')
                .any(|part| part == "off")
                .then_some(last.as_str())
        })
}

/// Whether devices were to see the machine's own addresses.
fn wants_passthrough(arguments: &[String]) -> Option<&str> {
    arguments.iter().map(String::as_str).find(|word| {
        matches!(*word, "iommu=pt" | "iommu.passthrough=1") || word.ends_with("_iommu=pt")
    })
}

fn asked_for(arguments: &[String]) -> Option<&str> {
    arguments.iter().map(String::as_str).find(|word| {
        word.strip_prefix("intel_iommu=")
            .is_some_and(|value| value.split(',').any(|part| part == "on"))
            || word.strip_prefix("amd_iommu=").is_some_and(|value| {
                value
                    .split(',')
                    .any(|part| matches!(part, "on" | "force_enable"))
            })
            || matches!(*word, "iommu=force" | "iommu=pt" | "iommu.passthrough=1")
    })
}

pub(super) fn check_iommu(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Iommu;
    let host = &observed.host;
    let iommu = &host.iommu;
    let Some(arguments) = &host.kernel_arguments else {
        return diagnosis.unseen(check, "/proc/cmdline cannot be read", None);
    };
    let why = "Devices cannot be given to guests (hostdev, VFIO).";
    if iommu.groups > 0 {
        return present(host, arguments, diagnosis);
    }
    if let Some(word) = switched_off(arguments) {
        return diagnosis.trouble(
            check,
            Severity::Warning,
            format!("{word} on the kernel command line switches the IOMMU off"),
            why,
            change_arguments(host, None, Some(word)),
        );
    }
    let tables = iommu.tables.clone().unwrap_or_default();
    let in_firmware = ["DMAR", "IVRS"]
        .into_iter()
        .find(|table| tables.contains(*table));
    match (asked_for(arguments), in_firmware) {
        (Some(word), None) => diagnosis.trouble(
            check,
            Severity::Error,
            format!("{word} is on the kernel command line, and sysfs shows no IOMMU"),
            why,
            not_in_firmware(host),
        ),
        (Some(word), Some(table)) => diagnosis.trouble(
            check,
            Severity::Error,
            format!(
                "{word} is on the kernel command line and the firmware describes an IOMMU ({table}), \
                 but sysfs shows none"
            ),
            why,
            match (maker(host), table) {
                // Translation for pass-through is no reason to switch the IOMMU on with VT-d.
                (Maker::Intel, "DMAR") if !arguments.iter().any(|a| a == "intel_iommu=on") => {
                    change_arguments(host, Some("intel_iommu=on"), None)
                }
                _ => in_the_log(),
            },
        ),
        (None, Some(table)) => diagnosis.trouble(
            check,
            Severity::Warning,
            format!("the firmware describes an IOMMU ({table}), and the kernel does not use it"),
            why,
            match maker(host) {
                Maker::Intel => change_arguments(host, Some("intel_iommu=on"), None),
                Maker::Amd | Maker::Other => in_the_log(),
            },
        ),
        (None, None) => match &host.guest_of {
            Some(hypervisor) => diagnosis.ok(
                check,
                format!("none, in a guest ({hypervisor}); its hypervisor would have to give it one"),
            ),
            None if matches!(host.arch.as_str(), "x86_64" | "i686") => diagnosis.trouble(
                check,
                Severity::Warning,
                "sysfs shows no IOMMU",
                why,
                not_in_firmware(host),
            ),
            None => diagnosis.ok(check, "sysfs shows none"),
        },
    }
}

fn present(host: &HostSurvey, arguments: &[String], diagnosis: &mut DoctorReport) {
    let check = Check::Iommu;
    let iommu = &host.iommu;
    let kind = match iommu.devices.first().map(String::as_str) {
        Some(name) if name.starts_with("dmar") => "VT-d",
        Some(name) if name.starts_with("ivhd") => "AMD-Vi",
        Some(name) if name.starts_with("smmu") => "SMMU",
        _ => "an IOMMU",
    };
    let seen = format!("{kind}, {} groups", iommu.groups);
    match wants_passthrough(arguments) {
        Some(word) if iommu.typed > 0 && iommu.identity == 0 => diagnosis.trouble(
            check,
            Severity::Warning,
            format!("{word} is on the kernel command line, and none of {seen} is of type identity"),
            "Each access of the host's own devices to memory is translated, which costs them speed; \
             giving devices to guests works.",
            Remedy::on_host(
                ["grep . /sys/kernel/iommu_groups/*/type | head; dmesg | grep -iE 'iommu.*(domain|pass)'"],
                "A later word of the command line (iommu.passthrough=0, iommu=nopt, iommu.strict=) or \
                 the kernel's own default overrules it; its log says which.",
            ),
        ),
        Some(word) => diagnosis.ok(
            check,
            format!("{seen}, {} of them identity ({word})", iommu.identity),
        ),
        None => diagnosis.ok(check, seen),
    }
}

fn in_the_log() -> Remedy {
    Remedy::on_host(
        ["dmesg | grep -iE 'DMAR|IOMMU|AMD-Vi'"],
        "The kernel's log says why it did not take it.",
    )
}

fn not_in_firmware(host: &HostSurvey) -> Remedy {
    Remedy::words(
        Place::Outside,
        match &host.guest_of {
            Some(_) => "This machine is a guest: its hypervisor has to give it a virtual IOMMU.",
            None => {
                "Switch it on in the firmware's setup (Intel: VT-d; AMD: IOMMU), and start the \
                 machine anew: the firmware describes none now."
            }
        },
    )
}

/// How a word comes onto the kernel command line, or goes from it.
fn change_arguments(host: &HostSurvey, add: Option<&str>, remove: Option<&str>) -> Remedy {
    const REBOOT: &str = "It takes a reboot; move or stop the domains first.";
    // Words that sed or a shell would read as something else are left to the reader.
    let plain = |word: &&str| {
        word.chars()
            .all(|c| c.is_ascii_alphanumeric() || "_=,.".contains(c))
    };
    let is_plain = add.iter().chain(&remove).all(plain);
    let boot_loader = if is_plain {
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
        (Some(word), _) => format!("Put {word} on the kernel command line."),
        (None, Some(word)) => format!("Take {word} from the kernel command line."),
        (None, None) => String::new(),
    };
    Remedy::on_host(commands, format!("{what} {REBOOT}"))
}

pub(super) fn check_vfio(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Vfio;
    let host = &observed.host;
    let vfio = host.vfio;
    let mut told = false;
    let mut warn = |what: &str, why: &str, file: &str, option: &str| {
        told = true;
        let module = option.split('.').next().unwrap_or_default();
        diagnosis.trouble(
            check,
            Severity::Warning,
            what,
            why,
            Remedy::on_host(
                [format!("echo N >{file}")],
                format!(
                    "Take the option {option} from /etc/modprobe.d (module {module}) and from the \
                     kernel command line as well, or it comes back."
                ),
            ),
        );
    };
    if vfio.unsafe_interrupts {
        warn(
            "interrupts of passed-through devices are not isolated (allow_unsafe_interrupts)",
            "A guest with a device can send interrupts to the host and to other guests.",
            "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            "vfio_iommu_type1.allow_unsafe_interrupts",
        );
    }
    if vfio.no_iommu {
        warn(
            "devices can be passed through without an IOMMU (enable_unsafe_noiommu_mode)",
            "A guest with such a device can read and write all of the host's memory.",
            "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
            "vfio.enable_unsafe_noiommu_mode",
        );
    }
    if told {
        return;
    }
    let what = match (vfio.vfio, vfio.iommufd) {
        (true, true) => "vfio and iommufd are there",
        (true, false) => "vfio is there, iommufd is not",
        (false, true) => "iommufd is there; vfio is loaded when a device is first passed through",
        (false, false) if host.iommu.groups > 0 => {
            "not loaded; libvirt loads it when a device is first passed through"
        }
        (false, false) => "not loaded, and of no use without an IOMMU",
    };
    diagnosis.ok(check, what);
}

pub(super) fn check_hugepages(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Hugepages;
    let host = &observed.host;
    let reserved: Vec<&HugePages> = host
        .huge_pages
        .iter()
        .filter(|pages| pages.reserved > 0)
        .collect();
    if host.huge_pages.is_empty() {
        return diagnosis.ok(check, "this kernel has none");
    }
    if reserved.is_empty() {
        return diagnosis.ok(check, "none are reserved");
    }
    let unmounted = reserved
        .iter()
        .filter(|pages| pages.mounted == Some(false) && !host.in_container);
    let mut told = false;
    for pages in unmounted {
        told = true;
        let size = pages.size;
        let mib = size.get() >> 20;
        let path = format!("/dev/hugepages-{mib}M");
        diagnosis.trouble(
            check,
            Severity::Error,
            format!("{} pages of {size} are reserved, and no hugetlbfs of that size is mounted", pages.reserved),
            "libvirt starts no domain with <hugepages> of that size, and the memory is of no use to \
             others.",
            Remedy::on_host(
                [
                    format!("mkdir -p {path} && mount -t hugetlbfs -o pagesize={mib}M hugetlbfs {path}"),
                    restart(host),
                ],
                "libvirt looks for mounts when it starts; domains go on running. For after a reboot, \
                 put the mount into /etc/fstab.",
            ),
        );
    }
    if told {
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
    diagnosis.ok(check, list.collect::<Vec<_>>().join("; "));
}

/// How libvirt is started anew.
pub(super) fn restart(host: &HostSurvey) -> String {
    let daemon = super::libvirt::daemon(host);
    match host.systemd {
        true => format!("systemctl restart {daemon}.service"),
        false => format!("kill $(cat /run/{daemon}.pid) && {daemon} -d"),
    }
}
