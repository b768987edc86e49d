//! Makes the copies of a definition that libvirt is given: one for a dry run, one to start.
//!
//! libvirt treats a definition in a dry run (`virConnectDomainXMLToNative`) as if it were about to
//! start it, but opens no disk and starts no QEMU. Measured with strace on libvirt 11.3, these
//! parts of a definition still make it do something to the host, so the copy replaces or omits
//! them and names them:
//!
//! * `<emulator>` and a virtiofs `<binary>` are executed;
//! * each `<interface>` of any type opens /dev/net/tun and creates a TAP device, and its
//!   `<script>` is executed, by a privileged libvirtd as root;
//! * the `<device>` of a TPM is opened for reading and writing;
//! * secrets, storage volumes and virtual networks are looked up in other drivers.
//!
//! Everything else stays, so libvirt's answer covers it. Kinds of devices that are not listed here
//! are omitted: a later libvirt may do something to the host for them.

use super::NotChecked;
use super::tree::Tree;

/// Name of the domain in the dry run, which defines nothing.
const NAME: &str = "virtnode-dry-run";
/// Path that replaces others where libvirt opens it.
const NOTHING: &str = "/dev/null";

/// Maximum number of names in one entry of the list, and of characters of a name.
const SHOWN: usize = 6;
const SHOWN_CHARS: usize = 80;

/// Elements of `<domain>` that are not part of a copy: identity, texts of tenants, and labels that
/// exist only for the domain itself.
const IDENTITY: [&str; 6] = [
    "name",
    "uuid",
    "title",
    "description",
    "seclabel",
    "bootloader",
];

/// The kinds of devices that libvirt 11.3 has, without `<emulator>` and `<interface>`.
const DEVICES: [&str; 29] = [
    "audio",
    "channel",
    "console",
    "controller",
    "crypto",
    "disk",
    "filesystem",
    "graphics",
    "hostdev",
    "hub",
    "input",
    "iommu",
    "lease",
    "memballoon",
    "memory",
    "nvram",
    "panic",
    "parallel",
    "pstore",
    "redirdev",
    "redirfilter",
    "rng",
    "serial",
    "shmem",
    "smartcard",
    "sound",
    "tpm",
    "video",
    "vsock",
];
const WATCHDOG: &str = "watchdog";

/// A copy of a definition, and the parts that libvirt's answer to it does not cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefinitionCopy {
    pub xml: String,
    /// Parts of the definition that the copy omits or replaces.
    pub omitted: Vec<NotChecked>,
    /// Parts that only a start uses.
    pub at_start: Vec<NotChecked>,
}

/// Returns the copy for a dry run; `None` if the definition is not well-formed.
///
/// `emulator` is libvirt's own choice for the architecture. Another one is omitted, since libvirt
/// executes it.
pub fn dry_run_copy(definition: &str, emulator: Option<&str>) -> Option<DefinitionCopy> {
    let mut domain = Tree::parse(definition)?;
    let mut list = NotCheckedList::default();
    let at_start = at_start(&domain);
    identify(&mut domain, NAME, &mut list);
    let Some(devices) = domain.child_mut("devices") else {
        return copy(&domain, list, at_start);
    };
    devices.retain(|device| {
        let keep = match device.name.as_str() {
            "emulator" => emulator == Some(device.text().as_str()),
            "interface" => true,
            name => DEVICES.contains(&name) || name == WATCHDOG,
        };
        if !keep {
            match device.name.as_str() {
                "emulator" => list.add(
                    format!("emulator {}", device.text()),
                    "libvirt would execute it; its own choice was checked instead",
                ),
                name => list.add(format!("<{name}>"), "this kind of device is unknown"),
            }
        }
        keep
    });
    for device in devices.elements_mut() {
        neutralize(device, &mut list);
    }
    devices.retain(|device| device.name != "interface");
    copy(&domain, list, at_start)
}

/// Returns a copy that can be started beside the domain: without disks, networks, host devices,
/// files, listeners and firmware; `None` if the definition is not well-formed.
///
/// The CPU, memory, NUMA placement, resource limits, clock, controllers and IOMMU stay.
pub fn trial_copy(definition: &str, name: &str, emulator: Option<&str>) -> Option<DefinitionCopy> {
    let mut domain = Tree::parse(definition)?;
    let mut list = NotCheckedList::default();
    identify(&mut domain, name, &mut list);
    domain.remove("sysinfo");
    domain.remove("throttlegroups");
    let mut has_firmware = false;
    let mut is_x86 = true;
    if let Some(os) = domain.child_mut("os") {
        has_firmware = os.attribute("firmware").is_some() || os.child("loader").is_some();
        let arch = os.child("type").and_then(|kind| kind.attribute("arch"));
        is_x86 = arch.is_none_or(crate::capability::is_x86);
        if has_firmware {
            list.add("firmware", COPY_HAS_NONE);
        }
        if os.elements().any(|child| child.name == "kernel") {
            list.add("kernel and initrd", COPY_HAS_NONE);
        }
        os.keep_attributes(&[]);
        os.retain(|child| child.name == "type");
    }
    // libvirt rejects ACPI without UEFI on Arm.
    if let Some(features) = domain.child_mut("features")
        && has_firmware
        && !is_x86
    {
        features.remove("acpi");
    }
    if let Some(devices) = domain.child_mut("devices") {
        devices.retain(|device| {
            let keep = is_started(device, emulator);
            if !keep && device.name != "emulator" {
                list.add(plural(device), COPY_HAS_NONE);
            }
            keep
        });
        for device in devices.elements_mut() {
            if let Some(cid) = device.child_mut("cid") {
                cid.keep_attributes(&[]);
                cid.set("auto", "yes");
            }
        }
    }
    copy(&domain, list, Vec::new())
}

const COPY_HAS_NONE: &str = "the copy that --try starts has none";

fn copy(domain: &Tree, list: NotCheckedList, at_start: Vec<NotChecked>) -> Option<DefinitionCopy> {
    Some(DefinitionCopy {
        xml: domain.to_xml()?,
        omitted: list.finish(),
        at_start,
    })
}

/// Gives the copy a name of its own, and removes what belongs only to the domain itself.
fn identify(domain: &mut Tree, name: &str, list: &mut NotCheckedList) {
    let is_live = domain.attribute("id").is_some();
    domain.keep_attributes(&["type"]);
    if !is_live && domain.elements().any(|child| child.name == "seclabel") {
        list.add("security labels", "they belong to the domain itself");
    }
    domain.retain(|child| !IDENTITY.contains(&child.name.as_str()));
    domain.for_each_mut(&mut |element| {
        element.remove("seclabel");
        if is_live {
            element.remove("alias");
            // The images behind a running domain's disks, which libvirt determines anew.
            element.remove("backingStore");
            element.remove("mirror");
        }
    });
    domain.push_front(Tree::new("name").with_text(name));
}

fn neutralize_filesystem(filesystem: &mut Tree, list: &mut NotCheckedList) {
    if filesystem.remove("binary") {
        list.add(
            "virtiofsd of a filesystem",
            "libvirt would execute the file that the definition names",
        );
        filesystem.remove("idmap");
        filesystem.remove("source");
        filesystem.push(Tree::new("source").with("socket", NOTHING));
    }
}

/// Replaces the parts of a device that make libvirt do something to the host.
fn neutralize(device: &mut Tree, list: &mut NotCheckedList) {
    match device.name.as_str() {
        "disk" => neutralize_disk(device, list),
        "interface" => neutralize_interface(device, list),
        "tpm" => neutralize_tpm(device, list),
        "filesystem" => neutralize_filesystem(device, list),
        "graphics" => {
            let before = device.elements().count();
            device.retain(|child| !(child.name == "listen" && child.has("type", "network")));
            if device.elements().count() < before {
                list.add(
                    "virtual network that graphics listen on",
                    "a dry run does not look for virtual networks",
                );
            }
        }
        // libvirt determines the address when it starts the domain.
        "hostdev" if device.has("type", "usb") => {
            if let Some(source) = device.child_mut("source")
                && source.child("address").is_none()
            {
                source.remove("vendor");
                source.remove("product");
                source.push(Tree::new("address").with("bus", "1").with("device", "1"));
            }
        }
        _ => {}
    }
}

fn neutralize_disk(disk: &mut Tree, list: &mut NotCheckedList) {
    let is_lun = disk.has("device", "lun");
    if disk.has("type", "volume")
        && let Some(source) = disk.child_mut("source")
    {
        let name = |attribute| source.attribute(attribute).unwrap_or_default();
        list.add(
            format!("storage volume {}/{}", name("pool"), name("volume")),
            "a dry run does not look into storage pools",
        );
        source.keep_attributes(&["startupPolicy"]);
        source.set(if is_lun { "dev" } else { "file" }, NOTHING);
        disk.set("type", if is_lun { "block" } else { "file" });
    }
    let mut has_secret = false;
    disk.for_each_mut(&mut |element| {
        has_secret |= element.remove("auth") | element.remove("encryption");
        if element.name == "source" {
            element.remove_attribute("fdgroup");
        }
    });
    if has_secret {
        list.add("secrets of disks", "a dry run does not look them up");
    }
}

/// Turns an interface into a device that needs a slot of the same kind, as far as there is one.
/// The others are removed afterwards.
fn neutralize_interface(interface: &mut Tree, list: &mut NotCheckedList) {
    let model = interface.child("model").and_then(|m| m.attribute("type"));
    let model = model.map(str::to_owned);
    let address = interface.child("address").cloned();
    if interface.has("type", "hostdev") {
        let source = interface.child("source").cloned();
        let driver = interface.child("driver").cloned();
        let managed = interface.attribute("managed").unwrap_or("no");
        *interface = Tree::new("hostdev")
            .with("mode", "subsystem")
            .with("type", "pci")
            .with("managed", managed)
            .with_child(source)
            .with_child(driver)
            .with_child(address);
        return;
    }
    let named = match &model {
        Some(model) => format!("network interface of model {model}"),
        None => "network interface".to_owned(),
    };
    list.add(named, "libvirt would create a TAP device for it");
    if let Some(model) = model.filter(|model| model.starts_with("virtio")) {
        *interface = Tree::new("rng")
            .with("model", &model)
            .with_child(
                Tree::new("backend")
                    .with("model", "random")
                    .with_text("/dev/urandom"),
            )
            .with_child(address);
    }
}

fn neutralize_tpm(tpm: &mut Tree, list: &mut NotCheckedList) {
    let Some(backend) = tpm.child_mut("backend") else {
        return;
    };
    if backend.has("type", "passthrough")
        && let Some(device) = backend.child_mut("device")
        && let Some(path) = device.attribute("path").map(str::to_owned)
    {
        list.add(format!("TPM {path}"), "libvirt would open it");
        device.set("path", NOTHING);
    }
    if backend.remove("encryption") {
        list.add("secret of the TPM", "a dry run does not look it up");
    }
}

/// True if a copy beside the domain may have this device.
fn is_started(device: &Tree, emulator: Option<&str>) -> bool {
    match device.name.as_str() {
        "emulator" => emulator == Some(device.text().as_str()),
        "controller" | "iommu" | "memballoon" | "panic" | "vsock" | WATCHDOG => true,
        "memory" => device.has("model", "dimm") || device.has("model", "virtio-mem"),
        "input" => !device.has("type", "passthrough") && !device.has("type", "evdev"),
        "video" => {
            let driver = device.child("driver");
            driver.is_none_or(|driver| !driver.has("name", "vhostuser"))
        }
        _ => false,
    }
}

/// Returns the name of a kind of device in the plural.
fn plural(device: &Tree) -> String {
    match device.name.as_str() {
        "disk" => "disks".to_owned(),
        "interface" => "network interfaces".to_owned(),
        "hostdev" => "host devices".to_owned(),
        "filesystem" => "filesystems".to_owned(),
        "graphics" => "graphics".to_owned(),
        "serial" | "parallel" | "console" | "channel" => "serial devices and channels".to_owned(),
        other => format!("<{other}>"),
    }
}

/// Returns the parts of a definition that libvirt and QEMU use only at the start.
fn at_start(domain: &Tree) -> Vec<NotChecked> {
    let mut list = NotCheckedList::default();
    let files = "libvirt and QEMU open them only at the start";
    domain.for_each(&mut |element| match element.name.as_str() {
        "loader" | "nvram" | "kernel" | "initrd" | "dtb" | "table" | "path"
            if element.text().starts_with('/') =>
        {
            list.add(element.text(), files);
        }
        "source" => {
            for attribute in ["file", "dev", "dir", "path", "socket", "evdev"] {
                if let Some(path) = element.attribute(attribute) {
                    list.add(path, files);
                }
            }
            if let Some(protocol) = element.attribute("protocol") {
                let name = element.attribute("name").unwrap_or_default();
                list.add(format!("{protocol}:{name}"), files);
            }
        }
        "hostdev" => {
            let kind = element.attribute("type").unwrap_or("unknown");
            list.add(
                format!("host device of type {kind}"),
                "only a start shows if it is free",
            );
        }
        "vcpu" if element.attribute("cpuset").is_some() => {
            list.add("CPU pinning", PINNING);
        }
        "vcpupin" | "emulatorpin" | "iothreadpin" => list.add("CPU pinning", PINNING),
        "hugepages" => list.add("free huge pages", "QEMU allocates them only at the start"),
        _ => {}
    });
    list.add(
        "the start itself (free memory, cgroups, permissions, QEMU's own checks)",
        "a dry run starts nothing; --try starts a copy",
    );
    list.finish()
}

const PINNING: &str = "cgroups accept or reject the CPUs only at the start";

/// Collects the parts that are not checked, grouped by the reason.
#[derive(Default)]
struct NotCheckedList(Vec<(&'static str, Vec<String>)>);

impl NotCheckedList {
    fn add(&mut self, what: impl Into<String>, why: &'static str) {
        let what: String = what.into().chars().take(SHOWN_CHARS).collect();
        match self.0.iter_mut().find(|(own, _)| *own == why) {
            Some((_, names)) if names.contains(&what) => {}
            Some((_, names)) => names.push(what),
            None => self.0.push((why, vec![what])),
        }
    }

    fn finish(self) -> Vec<NotChecked> {
        let entry = |(why, names): (&'static str, Vec<String>)| {
            let what = match names.len().checked_sub(SHOWN) {
                Some(rest @ 1..) => format!("{} and {rest} more", names[..SHOWN].join(", ")),
                _ => names.join(", "),
            };
            NotChecked::new(what, why)
        };
        self.0.into_iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMULATOR: Option<&str> = Some("/usr/bin/qemu-system-x86_64");

    fn devices(devices: &str) -> DefinitionCopy {
        let xml = format!("<domain type='kvm'><name>x</name><devices>{devices}</devices></domain>");
        dry_run_copy(&xml, EMULATOR).unwrap()
    }

    fn names(list: &[NotChecked]) -> String {
        let names: Vec<&str> = list.iter().map(|entry| entry.what.as_str()).collect();
        names.join("; ")
    }

    #[test]
    fn dry_run_keeps_the_whole_definition_without_its_identity() {
        let xml = "<?xml version='1.0'?><!-- x --><domain type='kvm' id='7' xmlns:qemu='q'>
  <name>secret &amp; co</name><uuid>1</uuid><title>t</title>
  <vcpu placement='auto' cpuset='0-3' current='1'>4</vcpu>
  <os firmware='efi'><type machine='q35'>hvm</type><loader secure='yes'/></os>
  <numatune><memory mode='strict' nodeset='3'/></numatune>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file'><source file='/x'/><backingStore/><target dev='hda' bus='ide'/>
      <alias name='ide0'/></disk>
    <video><model type='qxl'/></video>
  </devices>
  <seclabel type='dynamic'/>
  <qemu:commandline><qemu:arg value='-evil'/></qemu:commandline>
</domain>";
        let copy = dry_run_copy(xml, EMULATOR).unwrap();
        assert_eq!(
            copy.xml,
            "<domain type=\"kvm\"><name>virtnode-dry-run</name><vcpu placement=\"auto\" \
             cpuset=\"0-3\" current=\"1\">4</vcpu><os firmware=\"efi\"><type \
             machine=\"q35\">hvm</type><loader secure=\"yes\"/></os><numatune><memory \
             mode=\"strict\" nodeset=\"3\"/></numatune><devices><emulator>\
             /usr/bin/qemu-system-x86_64</emulator><disk type=\"file\"><source file=\"/x\"/>\
             <target dev=\"hda\" bus=\"ide\"/></disk><video><model type=\"qxl\"/></video>\
             </devices></domain>"
        );
        assert_eq!(copy.omitted, []);
        let at_start = names(&copy.at_start);
        assert!(at_start.contains("CPU pinning"), "{at_start}");
        assert!(at_start.contains("/x"), "{at_start}");
        assert!(at_start.contains("the start itself"), "{at_start}");
    }

    #[test]
    fn parts_that_touch_the_host_are_replaced_and_named() {
        for (device, gone, named) in [
            ("<emulator>/evil</emulator>", "evil", "emulator /evil"),
            (
                "<interface type='ethernet'><script path='/evil'/></interface>",
                "interface",
                "network interface",
            ),
            (
                "<interface type='bridge'><model type='e1000'/></interface>",
                "interface",
                "network interface of model e1000",
            ),
            (
                "<tpm><backend type='passthrough'><device path='/dev/watchdog'/></backend></tpm>",
                "watchdog",
                "TPM /dev/watchdog",
            ),
            (
                "<filesystem><driver type='virtiofs'/><binary path='/evil'/><source dir='/x'/>\
                 </filesystem>",
                "evil",
                "virtiofsd of a filesystem",
            ),
            (
                "<disk type='volume'><source pool='p' volume='v'/></disk>",
                "pool",
                "storage volume p/v",
            ),
            (
                "<disk type='network'><source protocol='rbd'><auth username='a'/></source></disk>",
                "auth",
                "secrets of disks",
            ),
            (
                "<graphics type='vnc'><listen type='network' network='n'/></graphics>",
                "listen",
                "virtual network that graphics listen on",
            ),
            ("<time-machine/>", "time", "<time-machine>"),
        ] {
            let copy = devices(device);
            assert!(!copy.xml.contains(gone), "{}", copy.xml);
            assert_eq!(names(&copy.omitted), named);
        }
    }

    #[test]
    fn interface_leaves_its_slot_and_its_host_device() {
        let copy = devices(
            "<interface type='network'><model type='virtio'/><address type='pci' slot='0x04'/>\
             </interface>",
        );
        assert!(
            copy.xml.contains(
                "<rng model=\"virtio\"><backend model=\"random\">/dev/urandom</backend>\
                           <address type=\"pci\" slot=\"0x04\"/></rng>"
            ),
            "{}",
            copy.xml
        );
        let copy = devices(
            "<interface type='hostdev' managed='yes'><source><address bus='0x3f'/></source>\
             <vlan/></interface>",
        );
        assert!(
            copy.xml.contains(
                "<hostdev mode=\"subsystem\" type=\"pci\" managed=\"yes\"><source><address \
                 bus=\"0x3f\"/></source></hostdev>"
            ),
            "{}",
            copy.xml
        );
    }

    #[test]
    fn trial_has_no_device_that_others_notice() {
        let xml = "<domain type='kvm' id='7'><name>web</name><uuid>1</uuid>\
            <memory>65536</memory><sysinfo type='fwcfg'><entry file='/x'/></sysinfo>\
            <os firmware='efi'><type arch='aarch64' machine='virt'>hvm</type>\
            <loader>/x</loader><nvram>/x</nvram></os>\
            <features><acpi/><gic version='3'/></features>\
            <cputune><vcpupin vcpu='0' cpuset='7'/></cputune><devices>\
            <emulator>/evil</emulator><disk type='file'><source file='/x'/></disk>\
            <interface type='user'/><hostdev type='pci'/><graphics type='vnc'/>\
            <tpm/><filesystem/><serial type='file'><source path='/x'/></serial>\
            <memory model='nvdimm'><source><path>/x</path></source></memory>\
            <memory model='dimm'/><controller type='pci'/><iommu model='smmuv3'/>\
            <vsock><cid auto='no' address='3'/></vsock></devices></domain>";
        let copy = trial_copy(xml, "virtnode-try-1", EMULATOR).unwrap();
        assert_eq!(
            copy.xml,
            "<domain type=\"kvm\"><name>virtnode-try-1</name><memory>65536</memory><os><type \
             arch=\"aarch64\" machine=\"virt\">hvm</type></os><features><gic version=\"3\"/>\
             </features><cputune><vcpupin vcpu=\"0\" cpuset=\"7\"/></cputune><devices><memory \
             model=\"dimm\"/><controller type=\"pci\"/><iommu model=\"smmuv3\"/><vsock><cid \
             auto=\"yes\"/></vsock></devices></domain>"
        );
        assert_eq!(
            names(&copy.omitted),
            "firmware, disks, network interfaces, host devices, graphics, <tpm> and 3 more"
        );
    }

    #[test]
    fn malformed_definition_yields_none() {
        assert_eq!(dry_run_copy("<domain><a", None), None);
        assert_eq!(trial_copy("<domain><a", "x", None), None);
    }
}
