//! What the CPU and the kernel offer: extensions, KVM's module, nesting.

use super::finding::{Check, DoctorReport, Place, Remedy, Severity};
use super::observed::{CpuInfo, DeviceNode, HostSurvey, Observed};

/// Whether the CPU can run guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Extensions {
    /// It can, and this shows it.
    Shown(&'static str),
    /// It would show, and does not.
    NotShown(&'static str),
    /// It cannot be known from here.
    Unknown(&'static str),
}

/// What the architecture shows by itself, whatever KVM says.
pub(super) fn extensions(host: &HostSurvey) -> Extensions {
    let none = CpuInfo::default();
    let cpu = host.cpu.as_ref().unwrap_or(&none);
    let has = |flag: &str| cpu.flags.contains(flag);
    match host.arch.as_str() {
        "aarch64" | "armv7l" => Extensions::Unknown(
            "on Arm the kernel shows only by /dev/kvm that it was started at EL2",
        ),
        _ if host.cpu.is_none() => Extensions::Unknown("/proc/cpuinfo cannot be read"),
        "x86_64" | "i686" => match (has("vmx"), has("svm")) {
            (true, _) => Extensions::Shown("VT-x (flag vmx)"),
            (_, true) => Extensions::Shown("AMD-V (flag svm)"),
            _ => Extensions::NotShown("neither vmx nor svm is among the CPU's flags"),
        },
        "s390x" => match has("sie") {
            true => Extensions::Shown("SIE (feature sie)"),
            false => Extensions::NotShown("sie is not among the CPU's features"),
        },
        "ppc64" | "ppc64le" => match cpu.platform.as_deref() {
            Some("PowerNV") => Extensions::Shown("hypervisor mode (platform PowerNV)"),
            _ => Extensions::Unknown(
                "this kernel runs under PowerVM or another hypervisor, which may let it have guests \
                 or not; only /dev/kvm shows it",
            ),
        },
        "riscv64" => match cpu.flags.iter().any(|isa| has_h(isa)) {
            true => Extensions::Shown("the hypervisor extension (H)"),
            false => Extensions::NotShown("the CPU's isa has no h"),
        },
        "loongarch64" => match has("lvz") {
            true => Extensions::Shown("LVZ (feature lvz)"),
            false => Extensions::NotShown("lvz is not among the CPU's features"),
        },
        _ => Extensions::Unknown("how this architecture shows it is not known here"),
    }
}

/// Whether a RISC-V isa string such as `rv64imafdch_zicsr` has the single letter h, which stands
/// before the first underscore.
fn has_h(isa: &str) -> bool {
    let base = isa.split('_').next().unwrap_or_default();
    base.strip_prefix("rv64")
        .or_else(|| base.strip_prefix("rv32"))
        .is_some_and(|letters| letters.contains('h'))
}

/// The module of KVM for this CPU, where it is one that can be loaded by name.
pub(super) fn module(host: &HostSurvey) -> Option<&'static str> {
    let has = |flag: &str| {
        host.cpu
            .as_ref()
            .is_some_and(|cpu| cpu.flags.contains(flag))
    };
    match host.arch.as_str() {
        "x86_64" | "i686" if has("vmx") => Some("kvm_intel"),
        "x86_64" | "i686" if has("svm") => Some("kvm_amd"),
        "ppc64" | "ppc64le" => Some("kvm_hv"),
        "s390x" | "riscv64" => Some("kvm"),
        _ => None,
    }
}

/// Whether KVM itself answered, which settles the matter.
fn kvm_works(host: &HostSurvey) -> bool {
    host.kvm.max_vcpus.is_some()
}

/// Whether there is a device node of KVM, which a kernel without KVM does not make.
fn has_device(host: &HostSurvey) -> bool {
    host.kvm.registered && matches!(host.kvm.device, DeviceNode::Node { .. })
}

pub(super) fn check_extensions(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::VirtualizationExtensions;
    let host = &observed.host;
    let guest = match &host.guest_of {
        Some(hypervisor) => format!("; this machine is itself a guest ({hypervisor})"),
        None => String::new(),
    };
    let shown = extensions(host);
    if let (Some(most), false) = (host.kvm.max_vcpus, matches!(shown, Extensions::Shown(_))) {
        let what = format!("KVM answers: up to {most} vCPUs in a domain{guest}");
        return diagnosis.ok(check, what);
    }
    match shown {
        Extensions::Shown(how) => diagnosis.ok(check, format!("{how}{guest}")),
        _ if kvm_works(host) || has_device(host) => {
            diagnosis.ok(
                check,
                format!("KVM is there, whatever the CPU shows{guest}"),
            );
        }
        Extensions::NotShown(what) => {
            let remedy = match &host.guest_of {
                Some(_) => Remedy::words(
                    Place::Outside,
                    "This machine is a guest: have its hypervisor give it nested virtualisation. \
                     On a KVM host that is the module's parameter nested=1, and the domain's CPU \
                     as <cpu mode='host-passthrough'/> or host-model.",
                ),
                None => Remedy::words(
                    Place::Outside,
                    "Switch virtualisation on in the firmware's setup (Intel: VT-x; AMD: SVM mode), \
                     and power the machine off and on: a kernel hides the flag that the firmware \
                     locked.",
                ),
            };
            diagnosis.trouble(
                check,
                Severity::Warning,
                format!("{what}{guest}"),
                "Guests run in software emulation only, which is far slower.",
                remedy,
            );
        }
        Extensions::Unknown(why) => diagnosis.unseen(check, format!("{why}{guest}"), None),
    }
}

pub(super) fn check_module(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::KvmModule;
    let host = &observed.host;
    let loaded = |name: &&str| host.kvm.modules.contains(*name);
    let own = ["kvm_intel", "kvm_amd", "kvm_hv", "kvm_pr", "kvm"];
    if let Some(name) = module(host).filter(|name| loaded(name)) {
        return diagnosis.ok(check, format!("{name} is there"));
    }
    if kvm_works(host) || has_device(host) {
        let name = own.iter().find(|name| loaded(name));
        return diagnosis.ok(
            check,
            match name {
                Some(name) => format!("{name} is there"),
                None => "KVM is built into the kernel".to_owned(),
            },
        );
    }
    match (extensions(host), module(host)) {
        (Extensions::Shown(how), Some(name)) => diagnosis.trouble(
            check,
            Severity::Error,
            format!("the CPU has {how}, and {name} is not loaded"),
            "Without it there is no /dev/kvm, and guests run in software emulation.",
            load(name),
        ),
        (Extensions::NotShown(_), _) => {
            diagnosis.ok(check, "none to load, as the CPU shows no extensions");
        }
        _ => diagnosis.unseen(
            check,
            "this kernel shows no module of KVM: it is built in, or there is none",
            None,
        ),
    }
}

/// How to load a module, for good.
pub(super) fn load(module: &str) -> Remedy {
    Remedy::on_host(
        [
            format!("modprobe {module}"),
            format!("echo {module} >/etc/modules-load.d/{module}.conf"),
        ],
        "The second keeps it so after a reboot. If modprobe says that the operation is not \
         supported, virtualisation is switched off in the firmware's setup.",
    )
}

pub(super) fn check_nested(observed: &Observed, diagnosis: &mut DoctorReport) {
    let check = Check::Nested;
    match observed.host.kvm.nested {
        Some(true) => diagnosis.ok(check, "on: guests can be hypervisors themselves"),
        Some(false) => diagnosis.ok(
            check,
            "off: guests cannot be hypervisors themselves, which few need",
        ),
        None => diagnosis.ok(check, "KVM's module has no such parameter here"),
    }
}
