//! CPU and kernel: virtualization extensions, KVM's module, nesting.

use super::finding::{Check, DoctorReport, Place, Remedy, Severity};
use super::observed::{CpuInfo, DeviceNode, HostSurvey, Observed};
use crate::capability::Accelerator;

/// Virtualization extensions of the CPU, each with the reason as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Extensions {
    Present(&'static str),
    Absent(&'static str),
    Unknown(&'static str),
}

/// Returns what the CPU's own flags show, regardless of KVM.
pub(super) fn extensions(host: &HostSurvey) -> Extensions {
    use Extensions::{Absent, Present, Unknown};
    let none = CpuInfo::default();
    let cpu = host.cpu.as_ref().unwrap_or(&none);
    let has = |flag: &str| cpu.flags.contains(flag);
    let by_flag = |is_present, present, absent| {
        if is_present {
            Present(present)
        } else {
            Absent(absent)
        }
    };
    match host.arch.as_str() {
        "aarch64" | "armv7l" => {
            Unknown("on Arm the kernel shows only through /dev/kvm that it was started at EL2")
        }
        _ if host.cpu.is_none() => Unknown("/proc/cpuinfo cannot be read"),
        "x86_64" | "i686" if has("vmx") => Present("VT-x (flag vmx)"),
        "x86_64" | "i686" => by_flag(
            has("svm"),
            "AMD-V (flag svm)",
            "the CPU has neither the flag vmx nor svm",
        ),
        "s390x" => by_flag(
            has("sie"),
            "SIE (feature sie)",
            "the CPU does not have the feature sie",
        ),
        "ppc64" | "ppc64le" => match cpu.platform.as_deref() {
            Some("PowerNV") => Present("hypervisor mode (platform PowerNV)"),
            _ => Unknown(
                "this kernel runs under PowerVM or another hypervisor, which may or may not allow \
                 guests; only /dev/kvm shows it",
            ),
        },
        "riscv64" => by_flag(
            cpu.flags.iter().any(|isa| has_h(isa)),
            "the hypervisor extension (H)",
            "the CPU's isa string does not contain h",
        ),
        "loongarch64" => by_flag(
            has("lvz"),
            "LVZ (feature lvz)",
            "the CPU does not have the feature lvz",
        ),
        _ => Unknown("virtnode cannot detect the extensions of this architecture"),
    }
}

/// True if a RISC-V isa string such as `rv64imafdch_zicsr` has the single-letter extension h, which
/// comes before the first underscore.
fn has_h(isa: &str) -> bool {
    let base = isa.split('_').next().unwrap_or_default();
    base.strip_prefix("rv64")
        .or_else(|| base.strip_prefix("rv32"))
        .is_some_and(|letters| letters.contains('h'))
}

/// Returns the KVM module for this CPU, if it can be loaded by name.
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

/// True if libvirt offers KVM, as the label `virtnode.io/accelerator` says, KVM answered, or the
/// kernel has its device, which a kernel without KVM does not create.
pub(super) fn has_kvm(observed: &Observed) -> bool {
    let host = &observed.host;
    observed.facts.accelerator() == Some(Accelerator::Kvm)
        || host.kvm.max_vcpus.is_some()
        || (host.kvm.registered && matches!(host.kvm.device, DeviceNode::Node { .. }))
}

pub(super) fn check_extensions(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::VirtualizationExtensions;
    let host = &observed.host;
    let guest = match &host.guest_of {
        Some(hypervisor) => format!("; this machine is itself a guest ({hypervisor})"),
        None => String::new(),
    };
    match (extensions(host), host.kvm.max_vcpus) {
        (Extensions::Present(how), _) => report.ok(check, format!("{how}{guest}")),
        (_, Some(maximum)) => report.ok(
            check,
            format!("KVM answers: up to {maximum} vCPUs in a domain{guest}"),
        ),
        _ if has_kvm(observed) => report.ok(
            check,
            format!("KVM is available, whatever the CPU shows{guest}"),
        ),
        (Extensions::Absent(what), _) => {
            let remedy = if host.guest_of.is_some() {
                "This machine is a guest: enable nested virtualization on its hypervisor. On a KVM \
                 host, set the module parameter nested=1 and give the domain <cpu \
                 mode='host-passthrough'/> or host-model."
            } else {
                "Enable virtualization in the firmware setup (Intel: VT-x; AMD: SVM mode), then \
                 power-cycle the machine: the kernel hides a flag that the firmware has locked."
            };
            report.problem(
                check,
                Severity::Warning,
                format!("{what}{guest}"),
                "Guests run in software emulation only, which is far slower.",
                Remedy::words(Place::Outside, remedy),
            );
        }
        (Extensions::Unknown(why), _) => report.unseen(check, format!("{why}{guest}"), None),
    }
}

pub(super) fn check_module(observed: &Observed, report: &mut DoctorReport) {
    let check = Check::KvmModule;
    let host = &observed.host;
    let is_loaded = |name: &&str| host.kvm.modules.contains(*name);
    let own = module(host).filter(is_loaded);
    if own.is_some() || has_kvm(observed) {
        let modules = ["kvm_intel", "kvm_amd", "kvm_hv", "kvm_pr", "kvm"];
        let what = match own.or_else(|| modules.into_iter().find(is_loaded)) {
            Some(name) => format!("{name} is loaded"),
            None => "KVM is built into the kernel".to_owned(),
        };
        return report.ok(check, what);
    }
    match (extensions(host), module(host)) {
        (Extensions::Present(how), Some(name)) => report.problem(
            check,
            Severity::Error,
            format!("the CPU has {how}, but {name} is not loaded"),
            "Without the module, /dev/kvm does not exist and guests run in software emulation.",
            load(name),
        ),
        (Extensions::Absent(_), _) => report.ok(
            check,
            "none to load, since the CPU has no virtualization extensions",
        ),
        _ => report.unseen(
            check,
            "this kernel shows no KVM module: KVM is built in, or missing",
            None,
        ),
    }
}

/// Returns the commands that load a module now and at each boot.
pub(super) fn load(module: &str) -> Remedy {
    Remedy::on_host(
        [
            format!("modprobe {module}"),
            format!("echo {module} >/etc/modules-load.d/{module}.conf"),
        ],
        "The second command makes it permanent. If modprobe reports that the operation is not \
         supported, virtualization is disabled in the firmware setup.",
    )
}

pub(super) fn check_nested(observed: &Observed, report: &mut DoctorReport) {
    let what = match observed.host.kvm.nested {
        Some(true) => "on: guests can run guests of their own",
        Some(false) => "off: guests cannot run guests of their own, which few need",
        None => "the KVM module has no such parameter here",
    };
    report.ok(Check::Nested, what);
}
