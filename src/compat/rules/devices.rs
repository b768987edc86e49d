//! Rules for devices: the abilities that the domain capabilities list, and the machine type's buses.
//!
//! libvirt accepts some devices that its documents do not list (channels of type `file`, mediated
//! host devices), so a rule exists only for a list that libvirt 11.3 enforces.

use super::{RuleInput, named, unsupported};
use crate::compat::{NotChecked, RuleCode, RuleFinding, Stage};
use crate::domain::DeviceSpec;

pub(super) fn check(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    let mut found = Vec::new();
    for device in &input.domain.devices {
        match device.kind.as_str() {
            "video" => check_video(input, device, &mut found),
            "graphics" => check_graphics(input, device, &mut found),
            "disk" => check_disk(input, device, &mut found),
            "controller" => check_controller(input, device, &mut found),
            "tpm" => check_tpm(input, device, &mut found),
            "rng" => check_rng(input, device, &mut found),
            "filesystem" => check_filesystem(input, device, &mut found),
            "channel" | "redirdev" => check_spice_channel(input, device, &mut found),
            "hostdev" => check_host_device(input, device, &mut found),
            "panic" => check_panic(input, device, &mut found),
            "crypto" => check_crypto(input, device, &mut found),
            "watchdog" => check_watchdog(input, device, &mut found),
            "input" => check_input(device, &mut found),
            _ => {}
        }
    }
    check_ps2(input, &mut found);
    // Several devices of a kind may share a fault.
    for finding in found {
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
}

fn blocks(message: String, words: String, remedy: String) -> RuleFinding {
    RuleFinding::blocking(RuleCode::Device, message)
        .at_define(words)
        .remedy(remedy)
}

/// True if the domain capabilities list the value; `None` if they have no such list.
fn lists(input: &RuleInput<'_>, device: &str, property: &str, value: &str) -> Option<bool> {
    let section = input.node.devices.as_ref()?.get(device)?;
    if section.supported == Some(false) {
        return Some(false);
    }
    section.enums.get(property)?;
    Some(section.offers(property, value))
}

/// Returns the remedy: one of the listed values.
fn instead(input: &RuleInput<'_>, device: &str, property: &str, element: &str) -> String {
    let section = input.node.devices.as_ref().and_then(|all| all.get(device));
    let values = section.and_then(|section| section.enums.get(property));
    match values.filter(|values| !values.is_empty()) {
        Some(values) => format!(
            "use one that this node has: {}",
            named(values.iter().map(String::as_str))
        ),
        None => format!("remove <{element}>, or choose a node that has it"),
    }
}

fn check_video(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let Some(model) = device.model.as_deref().filter(|model| *model != "default") else {
        return;
    };
    if lists(input, "video", "modelType", model) == Some(false) {
        findings.push(blocks(
            format!("the emulator has no video device of model {model}"),
            unsupported(format!(
                "domain configuration does not support video model '{model}'"
            )),
            instead(input, "video", "modelType", "video"),
        ));
    }
}

fn check_graphics(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let Some(kind) = device.device_type.as_deref() else {
        return;
    };
    if lists(input, "graphics", "type", kind) == Some(false) {
        findings.push(blocks(
            format!("the emulator has no graphics of type {kind}"),
            unsupported(format!("{kind} graphics are not supported with this QEMU")),
            instead(input, "graphics", "type", "graphics"),
        ));
    }
}

/// True for the x86 machine types with an IDE controller (`qemuDomainHasBuiltinIDE`).
fn has_ide(input: &RuleInput<'_>) -> Option<bool> {
    let machine = input.machine?;
    let named = |prefix: &&str| machine.starts_with(*prefix);
    let x86 = ["pc-i440fx", "pc-0.", "pc-1.", "rhel"];
    input
        .is_x86()
        .then(|| machine == "pc" || x86.iter().any(named))
}

fn no_ide(input: &RuleInput<'_>) -> RuleFinding {
    blocks(
        format!(
            "machine type {} has no IDE controller",
            input.machine.unwrap_or("of the domain")
        ),
        unsupported("IDE controllers are unsupported for this QEMU binary or machine type"),
        "use bus='sata' or bus='virtio', and remove <controller type='ide'>".to_owned(),
    )
}

fn check_disk(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let target = device.target.as_deref().unwrap_or_default();
    let role = device.role.as_deref().unwrap_or("disk");
    let Some(bus) = device.bus.as_deref().or(bus_of(target, role)) else {
        return;
    };
    let invalid =
        |message: String, words: String, remedy: &str| blocks(message, words, remedy.to_owned());
    if role == "floppy" && bus != "fdc" {
        findings.push(invalid(
            format!("a floppy disk cannot have bus {bus}"),
            format!("internal error: Invalid bus type '{bus}' for floppy disk"),
            "write bus='fdc'",
        ));
    } else if role != "floppy" && bus == "fdc" {
        findings.push(invalid(
            "bus fdc is for floppy disks only".to_owned(),
            "internal error: Invalid bus type 'fdc' for disk".to_owned(),
            "write device='floppy', or another bus",
        ));
    } else if role == "lun" && !matches!(bus, "virtio" | "scsi") {
        findings.push(invalid(
            format!("a disk with device='lun' cannot have bus {bus}"),
            unsupported(format!(
                "disk device='lun' is not supported for bus='{bus}'"
            )),
            "write bus='scsi'",
        ));
    } else if role == "cdrom" && matches!(bus, "virtio" | "sd") {
        findings.push(invalid(
            format!("a CD drive cannot have bus {bus}"),
            unsupported(format!(
                "disk type of '{target}' does not support ejectable media"
            )),
            "write bus='sata' or bus='scsi'",
        ));
    } else if matches!(bus, "xen" | "uml") {
        findings.push(
            RuleFinding::blocking(RuleCode::Device, format!("QEMU has no disk bus {bus}"))
                .at_start(format!(
                    "internal error: unsupported disk bus '{bus}' with device setup"
                ))
                .remedy("write bus='virtio'"),
        );
    } else if bus == "ide" && has_ide(input) == Some(false) {
        findings.push(no_ide(input));
    } else if lists(input, "disk", "bus", bus) == Some(false) && has_ide(input).is_none() {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Device,
                format!("the emulator has no disk bus {bus} for this machine type"),
            )
            .stage(Stage::Define)
            .remedy(instead(input, "disk", "bus", "disk")),
        );
    } else if bus == "sd" && lists(input, "disk", "bus", bus) == Some(false) {
        findings.push(
            RuleFinding::blocking(RuleCode::Device, "the machine type has no SD card slot")
                .stage(Stage::Emulator)
                .remedy(instead(input, "disk", "bus", "disk")),
        );
    }
}

/// Returns the bus that libvirt derives from the name of the target
/// (`virDomainDiskDefAssignBus`).
fn bus_of(target: &str, role: &str) -> Option<&'static str> {
    if role == "floppy" {
        return Some("fdc");
    }
    let buses = [
        ("hd", "ide"),
        ("sd", "scsi"),
        ("vd", "virtio"),
        ("xvd", "xen"),
        ("ubd", "uml"),
    ];
    let bus = buses
        .into_iter()
        .find(|(prefix, _)| target.starts_with(prefix));
    bus.map(|(_, bus)| bus)
}

fn check_controller(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let model = device.model.as_deref().unwrap_or_default();
    match device.device_type.as_deref() {
        Some("ide") if has_ide(input) == Some(false) => findings.push(no_ide(input)),
        Some("pci") => check_pci(input, device, model, findings),
        Some("usb") if matches!(model, "qusb1" | "qusb2") => findings.push(blocks(
            format!("QEMU has no USB controller of model {model}"),
            unsupported(format!(
                "USB controller model type 'qusb1' or 'qusb2' is not supported in {}",
                input.virt_type().unwrap_or("kvm")
            )),
            "write model='qemu-xhci'".to_owned(),
        )),
        _ => {}
    }
}

/// Checks a PCI controller against the root bus of an x86 machine type.
fn check_pci(
    input: &RuleInput<'_>,
    device: &DeviceSpec,
    model: &str,
    findings: &mut Vec<RuleFinding>,
) {
    let machine = input.machine.unwrap_or_default();
    if input.arch == Some("s390x") && model.starts_with("pcie-root-port") {
        let message = format!("machine type {machine} has no PCI Express bus for {model}");
        findings.push(
            RuleFinding::blocking(RuleCode::Device, message)
                .stage(Stage::Define)
                .remedy("remove the controller: devices of s390x use the channel bus"),
        );
        return;
    }
    if !input.is_x86() || machine.is_empty() {
        return;
    }
    let is_i440fx = has_ide(input) == Some(true);
    let root = match (input.is_q35(), is_i440fx) {
        (true, _) => Some("pcie-root"),
        (_, true) => Some("pci-root"),
        _ => None,
    };
    if is_first_bus(input, device)
        && let Some(root) = root
        && !model.is_empty()
        && model != root
    {
        findings.push(blocks(
            format!("the first PCI controller of machine type {machine} is {root}, not {model}"),
            format!(
                "XML error: The PCI controller with index='0' must be model='{root}' for this \
                 machine type, but model='{model}' was found instead"
            ),
            format!("write model='{root}'"),
        ));
        return;
    }
    let words = match model {
        "pci-expander-bus" if !is_i440fx => unsupported(
            "pci-expander-bus controllers are only supported on 440fx-based machinetypes",
        ),
        "pcie-expander-bus" if !input.is_q35() => {
            unsupported("pcie-expander-bus controllers are not supported with this machine type")
        }
        "pcie-root-port" | "dmi-to-pci-bridge" | "pcie-switch-downstream-port"
            if !input.is_q35() =>
        {
            no_slot(model)
        }
        // libvirt first adds the root port that the switch needs.
        "pcie-switch-upstream-port" if !input.is_q35() => no_slot("pcie-root-port"),
        "pcie-to-pci-bridge" if !input.is_q35() => {
            "internal error: Cannot automatically add a new PCI bus for a device with connect \
             flags 2000"
                .to_owned()
        }
        _ => return,
    };
    let (bus, remedy) = if input.is_q35() {
        (
            "conventional PCI root",
            "use pcie-expander-bus, or machine type pc",
        )
    } else {
        (
            "PCI Express root",
            "use machine type q35, or remove the controller",
        )
    };
    findings.push(blocks(
        format!("machine type {machine} has no {bus} for a controller of model {model}"),
        words,
        remedy.to_owned(),
    ));
}

/// True if libvirt gives a PCI controller the index 0: the first without an index gets the lowest.
fn is_first_bus(input: &RuleInput<'_>, device: &DeviceSpec) -> bool {
    let is_pci =
        |it: &&DeviceSpec| it.kind == "controller" && it.device_type.as_deref() == Some("pci");
    let buses = || input.domain.devices.iter().filter(is_pci);
    let first = buses()
        .find(|it| it.index.as_deref() == Some("0"))
        .or_else(|| buses().find(|it| it.index.is_none()));
    first.is_some_and(|first| std::ptr::eq(first, device))
}

fn no_slot(model: &str) -> String {
    format!(
        "internal error: a PCI slot is needed to connect a PCI controller model='{model}', but \
         none is available, and it cannot be automatically added"
    )
}

/// Checks a TPM in libvirt's order: version of the emulator, backend, model
/// (`qemuValidateDomainDeviceDefTPM`).
fn check_tpm(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let backend = device.backend.as_ref();
    let kind = backend.and_then(|backend| backend.name.as_deref());
    let version = backend.and_then(|backend| backend.version.as_deref());
    let model = device.model.as_deref().unwrap_or("tpm-tis");
    let emulator = input.emulator();
    if kind == Some("emulator") {
        let version = version.unwrap_or("2.0");
        let has_backend = lists(input, "tpm", "backendModel", "emulator");
        // libvirt lists versions since 8.6.
        let has_version = lists(input, "tpm", "backendVersion", version);
        if has_backend == Some(false) || has_version == Some(false) {
            findings.push(blocks(
                format!("the node cannot emulate a TPM of version {version}"),
                unsupported(format!("TPM version '{version}' is not supported")),
                "install swtpm and swtpm-tools on the node, or choose a node that has them"
                    .to_owned(),
            ));
            return;
        }
    } else if let Some(kind) = kind
        && lists(input, "tpm", "backendModel", kind) == Some(false)
    {
        findings.push(blocks(
            format!("the emulator has no TPM backend of type {kind}"),
            unsupported(format!(
                "The QEMU executable {emulator} does not support TPM backend type {kind}"
            )),
            instead(input, "tpm", "backendModel", "tpm"),
        ));
        return;
    }
    if lists(input, "tpm", "model", model) == Some(false) {
        findings.push(blocks(
            format!("the emulator has no TPM of model {model}"),
            unsupported(format!(
                "The QEMU executable {emulator} does not support TPM model {model}"
            )),
            instead(input, "tpm", "model", "tpm"),
        ));
    }
}

fn check_rng(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let model = device.model.as_deref().unwrap_or("virtio");
    if lists(input, "rng", "model", model) == Some(false) {
        findings.push(blocks(
            format!("the emulator has no random number generator of model {model}"),
            unsupported(format!(
                "domain configuration does not support rng model '{model}'"
            )),
            instead(input, "rng", "model", "rng"),
        ));
    }
    let backend = device.backend.as_ref().and_then(|it| it.name.as_deref());
    if let Some(backend) = backend
        && lists(input, "rng", "backendModel", backend) == Some(false)
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Device,
                format!("the emulator has no source of random numbers of type {backend}"),
            )
            .stage(Stage::Define)
            .remedy(instead(input, "rng", "backendModel", "rng")),
        );
    }
}

fn check_filesystem(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let driver = device.driver.as_deref().unwrap_or("path");
    if driver == "virtiofs" && !input.domain.backing.is_shared {
        findings.push(blocks(
            "virtiofs requires memory that is shared with the host".to_owned(),
            unsupported("'virtiofs' requires shared memory"),
            "write <source type='memfd'/><access mode='shared'/> into <memoryBacking>".to_owned(),
        ));
    } else if matches!(driver, "virtiofs" | "path" | "loop" | "nbd" | "ploop")
        && lists(input, "filesystem", "driverType", driver) == Some(false)
    {
        findings.push(
            RuleFinding::blocking(
                RuleCode::Device,
                format!("the emulator has no file system driver {driver}"),
            )
            .stage(Stage::Define)
            .remedy(instead(input, "filesystem", "driverType", "filesystem")),
        );
    }
}

/// Checks a channel that SPICE carries.
fn check_spice_channel(
    input: &RuleInput<'_>,
    device: &DeviceSpec,
    findings: &mut Vec<RuleFinding>,
) {
    let Some(kind @ ("spicevmc" | "spiceport")) = device.device_type.as_deref() else {
        return;
    };
    let mut devices = input.domain.devices.iter();
    let has_spice = devices
        .any(|device| device.kind == "graphics" && device.device_type.as_deref() == Some("spice"));
    if !has_spice {
        findings.push(blocks(
            format!("a device of type {kind} requires SPICE graphics, which the domain lacks"),
            unsupported(format!(
                "chardev '{kind}' not supported without spice graphics"
            )),
            format!(
                "remove the <{}>, or add <graphics type='spice'/>",
                device.kind
            ),
        ));
    }
}

fn check_host_device(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    if device.mode.as_deref() == Some("capabilities") {
        findings.push(blocks(
            "QEMU has no host devices of mode capabilities".to_owned(),
            unsupported(format!(
                "hostdev mode 'capabilities' is not supported in {}",
                input.virt_type().unwrap_or("kvm")
            )),
            "remove the <hostdev>".to_owned(),
        ));
    }
}

fn check_panic(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let Some(model) = device.model.as_deref() else {
        return;
    };
    let words = match model {
        "pseries" if !input.is_pseries() => Some(unsupported(
            "only pSeries guests support panic device of model 'pseries'",
        )),
        "s390" if input.arch != Some("s390x") => Some(unsupported(
            "only S390 guests support panic device of model 's390'",
        )),
        _ => None,
    };
    if words.is_none() && lists(input, "panic", "model", model) != Some(false) {
        return;
    }
    let finding = RuleFinding::blocking(
        RuleCode::Device,
        format!("the machine type has no panic device of model {model}"),
    );
    let finding = match words {
        Some(words) => finding.at_define(words),
        None => finding.stage(Stage::Define),
    };
    findings.push(finding.remedy(instead(input, "panic", "model", "panic")));
}

fn check_crypto(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let backend = device.backend.as_ref().and_then(|it| it.name.as_deref());
    if let Some(backend) = backend
        && lists(input, "crypto", "backendModel", backend) == Some(false)
    {
        findings.push(blocks(
            format!("the emulator has no crypto backend {backend}"),
            unsupported(format!("crypto backend {backend} is not supported")),
            instead(input, "crypto", "backendModel", "crypto"),
        ));
    }
}

fn check_watchdog(input: &RuleInput<'_>, device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    let model = device.model.as_deref().unwrap_or_default();
    let words = match model {
        "itco" if !input.is_q35() => "itco model of watchdog is only part of q35 machine",
        "ib700" if has_ide(input) == Some(false) => {
            "ib700 model of watchdog cannot be used with this machine type"
        }
        "diag288" if !matches!(input.arch, Some("s390" | "s390x") | None) => {
            "diag288 model of watchdog is allowed for s390 and s390x only"
        }
        _ => return,
    };
    if input.machine.is_none() {
        return;
    }
    findings.push(blocks(
        format!("the machine type has no watchdog of model {model}"),
        unsupported(words),
        "use model='i6300esb', or remove <watchdog>".to_owned(),
    ));
}

fn check_input(device: &DeviceSpec, findings: &mut Vec<RuleFinding>) {
    match (device.bus.as_deref(), device.device_type.as_deref()) {
        (Some("xen"), _) => findings.push(blocks(
            "QEMU has no input device on bus xen".to_owned(),
            "internal error: unsupported input bus xen".to_owned(),
            "write bus='usb' or bus='virtio'".to_owned(),
        )),
        (Some("ps2"), Some("tablet")) => findings.push(blocks(
            "a tablet cannot have bus ps2".to_owned(),
            "internal error: ps2 bus does not support tablet input device".to_owned(),
            "write bus='usb'".to_owned(),
        )),
        _ => {}
    }
}

/// Checks `<ps2 state=…>`, which some machine types lack.
fn check_ps2(input: &RuleInput<'_>, findings: &mut Vec<RuleFinding>) {
    if input.domain.ps2.is_some() && input.node.ps2 == Some(false) {
        findings.push(blocks(
            "the PS/2 controller of this machine type cannot be configured".to_owned(),
            unsupported("ps2 feature is not available with this QEMU binary"),
            "leave <ps2> out of <features>".to_owned(),
        ));
    }
}

/// Elements and enums of the domain capabilities that the rules above use.
const LISTS: [(&str, &str); 8] = [
    ("video", "modelType"),
    ("graphics", "type"),
    ("disk", "bus"),
    ("tpm", "model"),
    ("rng", "model"),
    ("filesystem", "driverType"),
    ("panic", "model"),
    ("crypto", "backendModel"),
];
/// Elements for which libvirt's documents list nothing that decides.
const UNLISTED: [&str; 13] = [
    "audio",
    "channel",
    "console",
    "input",
    "interface",
    "lease",
    "parallel",
    "serial",
    "shmem",
    "smartcard",
    "sound",
    "vsock",
    "watchdog",
];

/// Returns the devices of the domain that no given document describes.
pub(super) fn not_checked(input: &RuleInput<'_>) -> Vec<NotChecked> {
    let has = |kind: &str| input.domain.devices.iter().any(|it| it.kind == kind);
    let is_listed = |(kind, property): &(&str, &str)| {
        let sections = input.node.devices.as_ref();
        let section = sections.and_then(|sections| sections.get(*kind));
        section.is_some_and(|section| {
            section.supported == Some(false) || section.enums.contains_key(*property)
        })
    };
    let unread: Vec<&str> = LISTS
        .iter()
        .filter(|list| has(list.0) && !is_listed(list))
        .map(|(kind, _)| *kind)
        .collect();
    let unlisted: Vec<&str> = UNLISTED.into_iter().filter(|kind| has(kind)).collect();
    let mut list = Vec::new();
    if !unread.is_empty() {
        let why = match input.node.devices {
            Some(_) => "the node's domain capabilities do not list them",
            None => "no domain capabilities for this architecture and domain type are known",
        };
        list.push(NotChecked::new(
            format!("devices: {}", unread.join(", ")),
            why,
        ));
    }
    if !unlisted.is_empty() {
        list.push(NotChecked::new(
            format!("models and backends of devices: {}", unlisted.join(", ")),
            "libvirt's documents do not list what decides",
        ));
    }
    list
}
