//! Domain definitions as virt-launcher writes them, for the lab's guests.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Maximum size of memory devices, in MiB.
const PLUGGABLE_MIB: u64 = 1024;

/// A KubeVirt VM. The default has one vCPU of 16, little memory, and no volume.
#[derive(Debug, Clone)]
pub(crate) struct Vm<'c> {
    pub(crate) namespace: &'c str,
    pub(crate) name: &'c str,
    /// `spec.domain.firmware.uuid`: the same in two namespaces for VMs of older KubeVirt.
    pub(crate) uuid: &'c str,
    pub(crate) vcpus: u32,
    /// Maximum number of vCPUs.
    pub(crate) maximum: u32,
    /// Memory at boot, in MiB. A guest of the lab needs at least [`Vm::BOOT_MIB`].
    pub(crate) memory_mib: u64,
    /// Words for the guest: see `tests/lab/guest-init`.
    pub(crate) words: &'c str,
    /// Names of the volumes: disks with the alias `ua-<name>`.
    pub(crate) volumes: &'c [&'c str],
}

impl Default for Vm<'_> {
    fn default() -> Self {
        Self {
            namespace: "default",
            name: "web",
            uuid: "5f9b2ad6-6b68-4c6c-9e7e-0d1f2c3b4a59",
            vcpus: 1,
            maximum: 16,
            memory_mib: Self::BOOT_MIB,
            words: "",
            volumes: &[],
        }
    }
}

impl Vm<'_> {
    /// Memory with which the lab's guest boots.
    pub(crate) const BOOT_MIB: u64 = 256;

    /// Returns the domain's name.
    pub(crate) fn domain(&self) -> String {
        format!("{}_{}", self.namespace, self.name)
    }

    /// Returns the file of the guest's console.
    pub(crate) fn console(&self, directory: &Path) -> PathBuf {
        directory.join(format!("common/{}.console", self.domain()))
    }

    /// Returns the definition: without a UUID, which libvirt takes from the sysinfo, and with empty
    /// metadata. Each vCPU is a socket, which KubeVirt plugs; the serial number and the port of VMware
    /// have Linux reserve absent CPUs in software emulation (see `guest.rs`).
    ///
    /// # Errors
    /// The file of a volume cannot be written.
    pub(crate) fn xml(&self, directory: &Path) -> anyhow::Result<String> {
        let Self {
            uuid,
            vcpus,
            maximum,
            memory_mib,
            words,
            ..
        } = *self;
        let files = directory.join("guest");
        let (kernel, initramfs) = (files.join("vmlinuz"), files.join("initramfs.gz"));
        let (kernel, initramfs) = (kernel.display(), initramfs.display());
        let console = self.console(directory);
        let console = console.display();
        let name = self.domain();
        let max_memory = memory_mib + PLUGGABLE_MIB;
        let last = maximum - 1;
        let list: String = (0..maximum)
            .map(|id| {
                let enabled = if id < vcpus { "yes" } else { "no" };
                let hotpluggable = if id == 0 { "no" } else { "yes" };
                format!("<vcpu id='{id}' enabled='{enabled}' hotpluggable='{hotpluggable}'/>")
            })
            .collect();
        // Devices of the definition have ports of their own.
        let ports = "<controller type='pci' model='pcie-root-port'/>".repeat(10);
        let targets = "abcdefgh".chars();
        let disks = std::iter::zip(self.volumes, targets)
            .map(|(volume, letter)| disk(directory, volume, &format!("vd{letter}")))
            .collect::<anyhow::Result<String>>()?;
        Ok(format!(
            "<domain type='qemu'><name>{name}</name>\
             <metadata><kubevirt xmlns='http://kubevirt.io'><uid></uid></kubevirt></metadata>\
             <maxMemory slots='4' unit='MiB'>{max_memory}</maxMemory>\
             <memory unit='MiB'>{memory_mib}</memory>\
             <vcpu placement='static' current='{vcpus}'>{maximum}</vcpu><vcpus>{list}</vcpus>\
             <sysinfo type='smbios'><system><entry name='manufacturer'>KubeVirt</entry>\
             <entry name='serial'>VMware-lab</entry><entry name='uuid'>{uuid}</entry>\
             </system></sysinfo>\
             <os><type arch='x86_64' machine='q35'>hvm</type>\
             <kernel>{kernel}</kernel><initrd>{initramfs}</initrd>\
             <cmdline>console=ttyS0 quiet panic=-1 {words}</cmdline><smbios mode='sysinfo'/></os>\
             <features><acpi/><apic/><vmport state='on'/></features>\
             <cpu mode='custom' match='exact'><model>qemu64</model>\
             <topology sockets='{maximum}' cores='1' threads='1'/>\
             <feature name='hypervisor' policy='disable'/>\
             <numa><cell id='0' cpus='0-{last}' memory='{memory_mib}' unit='MiB'/></numa></cpu>\
             <on_crash>destroy</on_crash>\
             <devices>{disks}\
             <controller type='pci' index='0' model='pcie-root'/>{ports}\
             <controller type='virtio-serial' index='0' model='virtio-non-transitional'/>\
             <controller type='usb' index='0' model='none'/>\
             <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <serial type='file'><source path='{console}' append='on'/></serial>\
             <memballoon model='virtio-non-transitional'><stats period='10'/></memballoon>\
             </devices></domain>"
        ))
    }
}

/// Creates a volume of 1 MiB and returns its disk.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn disk(directory: &Path, volume: &str, target: &str) -> anyhow::Result<String> {
    let file = directory.join(format!("{volume}.img"));
    fs::File::create(&file)?.set_len(1 << 20)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
    Ok(format!(
        "<disk type='file' device='disk' model='virtio-non-transitional'>\
         <driver name='qemu' type='raw' error_policy='stop'/>\
         <source file='{}'/><target dev='{target}' bus='virtio'/><alias name='ua-{volume}'/></disk>",
        file.display()
    ))
}
