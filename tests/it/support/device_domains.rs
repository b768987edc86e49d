//! Domains with one device or one kind of firmware each, on every machine type at hand.

/// A definition, and the kind of the device that it is about.
pub(crate) struct DeviceDomain {
    /// `qxl on q35`, for messages.
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) arch: &'static str,
    pub(crate) machine: &'static str,
    pub(crate) xml: String,
}

/// Architecture, machine type and features of its domains.
const MACHINES: [(&str, &str, &str); 4] = [
    ("x86_64", "q35", "<acpi/>"),
    ("x86_64", "pc", "<acpi/>"),
    ("aarch64", "virt", ""),
    ("s390x", "s390-ccw-virtio", ""),
];

const MEMFD: &str = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

/// Kind, name, and the device.
#[rustfmt::skip]
const DEVICES: [(&str, &str, &str); 84] = [
    ("video", "qxl", "<video><model type='qxl'/></video>"),
    ("video", "virtio-gpu", "<video><model type='virtio'/></video>"),
    ("video", "cirrus", "<video><model type='cirrus'/></video>"),
    ("video", "vga", "<video><model type='vga'/></video>"),
    ("video", "bochs", "<video><model type='bochs'/></video>"),
    ("video", "ramfb", "<video><model type='ramfb'/></video>"),
    ("video", "vmvga", "<video><model type='vmvga'/></video>"),
    ("video", "xen video", "<video><model type='xen'/></video>"),
    ("video", "no video", "<video><model type='none'/></video>"),
    ("graphics", "vnc", "<graphics type='vnc'/>"),
    ("graphics", "spice", "<graphics type='spice' autoport='yes'/>"),
    ("graphics", "sdl", "<graphics type='sdl' display=':0'/>"),
    ("graphics", "egl-headless", "<graphics type='egl-headless'/>"),
    ("graphics", "dbus", "<graphics type='dbus'/>"),
    ("disk", "ide disk", "<disk type='file'><source file='/no/where'/><target dev='hda' bus='ide'/></disk>"),
    ("disk", "sata disk", "<disk type='file'><source file='/no/where'/><target dev='sda' bus='sata'/></disk>"),
    ("disk", "scsi disk", "<disk type='file'><source file='/no/where'/><target dev='sda' bus='scsi'/></disk>"),
    ("disk", "virtio disk", "<disk type='file'><source file='/no/where'/><target dev='vda' bus='virtio'/></disk>"),
    ("disk", "usb disk", "<disk type='file'><source file='/no/where'/><target dev='sda' bus='usb'/></disk>"),
    ("disk", "sd disk", "<disk type='file'><source file='/no/where'/><target dev='sda' bus='sd'/></disk>"),
    ("disk", "xen disk", "<disk type='file'><source file='/no/where'/><target dev='xvda' bus='xen'/></disk>"),
    ("disk", "floppy", "<disk type='file' device='floppy'><source file='/no/where'/><target dev='fda' bus='fdc'/></disk>"),
    ("disk", "ide cdrom", "<disk type='file' device='cdrom'><target dev='hda' bus='ide'/></disk>"),
    ("disk", "sata cdrom", "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"),
    ("disk", "virtio cdrom", "<disk type='file' device='cdrom'><target dev='vda' bus='virtio'/></disk>"),
    ("disk", "rbd disk", "<disk type='network'><source protocol='rbd' name='p/x'><host name='192.0.2.7' port='6789'/></source><auth username='a'><secret type='ceph' uuid='11111111-2222-3333-4444-555555555555'/></auth><target dev='vda' bus='virtio'/></disk>"),
    ("disk", "volume", "<disk type='volume'><source pool='none' volume='v'/><target dev='vda' bus='virtio'/></disk>"),
    ("disk", "vhost-user disk", "<disk type='vhostuser'><driver name='qemu' type='raw'/><source type='unix' path='/no/where'/><target dev='vda' bus='virtio'/></disk>"),
    ("controller", "pcie-root-port", "<controller type='pci' model='pcie-root-port'/>"),
    ("controller", "pci-bridge", "<controller type='pci' model='pci-bridge'/>"),
    ("controller", "dmi-to-pci-bridge", "<controller type='pci' model='dmi-to-pci-bridge'/>"),
    ("controller", "pcie-to-pci-bridge", "<controller type='pci' model='pcie-to-pci-bridge'/>"),
    ("controller", "virtio-scsi", "<controller type='scsi' model='virtio-scsi'/>"),
    ("controller", "lsilogic", "<controller type='scsi' model='lsilogic'/>"),
    ("controller", "lsisas1068", "<controller type='scsi' model='lsisas1068'/>"),
    ("controller", "ibmvscsi", "<controller type='scsi' model='ibmvscsi'/>"),
    ("controller", "qemu-xhci", "<controller type='usb' model='qemu-xhci'/>"),
    ("controller", "nec-xhci", "<controller type='usb' model='nec-xhci'/>"),
    ("controller", "piix3-uhci", "<controller type='usb' model='piix3-uhci'/>"),
    ("controller", "ich9-ehci1", "<controller type='usb' model='ich9-ehci1'/>"),
    ("controller", "no usb", "<controller type='usb' model='none'/>"),
    ("controller", "virtio-serial", "<controller type='virtio-serial' index='0'/>"),
    ("controller", "ide controller", "<controller type='ide' index='0'/>"),
    ("controller", "sata controller", "<controller type='sata' index='0'/>"),
    ("controller", "ccid", "<controller type='ccid' index='0'/>"),
    ("tpm", "tpm-tis", "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"),
    ("tpm", "tpm-crb", "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"),
    ("tpm", "tpm-spapr", "<tpm model='tpm-spapr'><backend type='emulator' version='2.0'/></tpm>"),
    ("tpm", "tpm passthrough", "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/watchdog'/></backend></tpm>"),
    ("rng", "rng random", "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"),
    ("rng", "rng builtin", "<rng model='virtio'><backend model='builtin'/></rng>"),
    ("rng", "rng egd", "<rng model='virtio'><backend model='egd' type='unix'><source mode='connect' path='/no/where'/></backend></rng>"),
    ("filesystem", "9p", "<filesystem type='mount' accessmode='mapped'><source dir='/no/where'/><target dir='t'/></filesystem>"),
    ("filesystem", "virtiofs", "<filesystem type='mount'><driver type='virtiofs'/><source dir='/no/where'/><target dir='t'/></filesystem>"),
    ("filesystem", "virtiofs by another", "<filesystem type='mount'><driver type='virtiofs'/><source socket='/no/where'/><target dir='t'/></filesystem>"),
    ("channel", "agent channel", "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"),
    ("channel", "spice channel", "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>"),
    ("hostdev", "pci device", "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0' bus='0x3f' slot='0' function='0'/></source></hostdev>"),
    ("hostdev", "usb device", "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>"),
    ("hostdev", "mediated device", "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev>"),
    ("hostdev", "capability", "<hostdev mode='capabilities' type='storage'><source><block>/dev/sdf1</block></source></hostdev>"),
    ("interface", "virtio interface", "<interface type='network'><source network='none'/><model type='virtio'/></interface>"),
    ("interface", "bridge", "<interface type='bridge'><source bridge='none'/></interface>"),
    ("interface", "vf", "<interface type='hostdev'><source><address type='pci' domain='0' bus='0x3f' slot='7' function='0'/></source></interface>"),
    ("panic", "panic isa", "<panic model='isa'/>"),
    ("panic", "panic hyperv", "<panic model='hyperv'/>"),
    ("panic", "pvpanic", "<panic model='pvpanic'/>"),
    ("panic", "panic s390", "<panic model='s390'/>"),
    ("sound", "ich9", "<sound model='ich9'/>"),
    ("sound", "ac97", "<sound model='ac97'/>"),
    ("sound", "usb sound", "<sound model='usb'/>"),
    ("watchdog", "i6300esb", "<watchdog model='i6300esb' action='reset'/>"),
    ("watchdog", "itco", "<watchdog model='itco' action='reset'/>"),
    ("watchdog", "diag288", "<watchdog model='diag288' action='reset'/>"),
    ("input", "usb tablet", "<input type='tablet' bus='usb'/>"),
    ("input", "ps2 keyboard", "<input type='keyboard' bus='ps2'/>"),
    ("input", "virtio keyboard", "<input type='keyboard' bus='virtio'/>"),
    ("iommu", "intel iommu", "<iommu model='intel'/>"),
    ("iommu", "smmuv3", "<iommu model='smmuv3'/>"),
    ("crypto", "crypto", "<crypto model='virtio' type='qemu'><backend model='builtin' queues='1'/></crypto>"),
    ("vsock", "vsock", "<vsock model='virtio'><cid auto='no' address='3'/></vsock>"),
    ("shmem", "shmem", "<shmem name='s'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"),
    ("redirdev", "redirdev", "<redirdev bus='usb' type='tcp'><source mode='connect' host='192.0.2.7' service='4000'/></redirdev>"),
    ("serial", "serial file", "<serial type='file'><source path='/no/where'/></serial>"),
];

/// Name, attributes of `<os>`, its content besides the type, features, elements of the domain.
#[rustfmt::skip]
const FIRMWARE: [(&str, &str, &str, &str, &str); 9] = [
    ("efi", " firmware='efi'", "", "<acpi/>", ""),
    ("efi without ACPI", " firmware='efi'", "", "", ""),
    ("bios", " firmware='bios'", "", "<acpi/>", ""),
    ("secure boot without SMM", " firmware='efi'", "<loader secure='yes'/>", "<acpi/><smm state='off'/>", ""),
    ("foreign loader", " firmware='efi'", "<loader readonly='yes' type='pflash'>/no/where</loader>", "<acpi/>", ""),
    ("loader", "", "<loader readonly='yes' type='pflash'>/no/where</loader><nvram>/no/vars</nvram>", "<acpi/>", ""),
    ("acpi", "", "", "<acpi/>", ""),
    ("kernel", "", "<kernel>/no/where</kernel><initrd>/no/where</initrd>", "", ""),
    ("sev", "", "", "<acpi/>", "<launchSecurity type='sev'><policy>0x3</policy></launchSecurity>"),
];

/// Returns all domains of the architectures that `has_emulator` accepts.
pub(crate) fn all(has_emulator: impl Fn(&str) -> bool) -> Vec<DeviceDomain> {
    let mut domains = Vec::new();
    for (arch, machine, features) in MACHINES {
        if !has_emulator(arch) {
            continue;
        }
        let domain = |kind, name: &str, os: &str, features: &str, more: &str, devices: &str| {
            let (before, content) = os.split_once('>').unwrap_or((os, ""));
            DeviceDomain {
                name: format!("{name} on {machine}"),
                kind,
                arch,
                machine,
                xml: format!(
                    "<domain type='qemu'><name>with-device</name><memory unit='MiB'>64</memory>\
                     {more}<vcpu>1</vcpu><os{before}><type arch='{arch}' \
                     machine='{machine}'>hvm</type>{content}</os><features>{features}</features>\
                     <devices>{devices}</devices></domain>"
                ),
            }
        };
        for (kind, name, device) in DEVICES {
            let shared = name.contains("virtiofs") || name.contains("vhost-user");
            let more = if shared { MEMFD } else { "" };
            domains.push(domain(kind, name, "", features, more, device));
        }
        for (name, attributes, content, features, more) in FIRMWARE {
            let os = format!("{attributes}>{content}");
            domains.push(domain("firmware", name, &os, features, more, ""));
        }
    }
    domains
}
