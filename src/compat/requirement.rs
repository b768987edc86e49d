//! [`Requirement`]: the view of a domain's definition that is compared with a node.
//!
//! An inactive definition may leave out nearly everything. libvirt then chooses a value, and the
//! rules follow its choice.

use crate::capability::is_x86;
use crate::domain::{
    CpuRequirement, DeviceSpec, Domain, DomainDefinition, DomainState, Firmware, Gic, HostDevices,
    HostPlacement, IoApicDriver, IommuDevice, MemoryBacking, PciControllers,
};
use crate::xml::{DocumentError, ElementError};

/// The Hyper-V enlightenments that every KVM supports, although a libvirt before 9.0 lists none:
/// two came with the first of them, two are values that the guest reads.
const UNIVERSAL_ENLIGHTENMENTS: [&str; 4] = ["relaxed", "vapic", "spinlocks", "vendor_id"];

/// A domain's requirements of its node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Requirement {
    /// Tenant-controlled text.
    pub name: Option<String>,
    /// The domain type, `kvm`.
    pub virt_type: Option<String>,
    /// True for the live XML of a running domain, in which libvirt has written down its choices.
    pub live: bool,
    /// `hvm`, or another driver's guest type.
    pub os_type: Option<String>,
    /// libvirt's default is the host's architecture.
    pub arch: Option<String>,
    /// The machine type or an alias; libvirt's default is the emulator's.
    pub machine: Option<String>,
    pub vcpus: VcpuRequirement,
    pub cpu: CpuRequirement,
    pub io_apic: Option<IoApicDriver>,
    pub gic: Option<Gic>,
    pub acpi: bool,
    /// System management mode.
    pub smm: Option<bool>,
    /// The emulated PS/2 controller.
    pub ps2: Option<bool>,
    /// The frequency of the guest's time stamp counter in Hz.
    pub tsc_frequency: Option<u64>,
    /// True if the guest has the Hyper-V reference time.
    pub hyperv_clock: bool,
    /// The enabled Hyper-V enlightenments, by libvirt's names.
    pub enlightenments: Vec<String>,
    pub iommu: Option<IommuDevice>,
    pub firmware: Firmware,
    /// `sev`, `sev-snp`, `tdx`, `s390-pv`.
    pub launch_security: Option<String>,
    pub backing: MemoryBacking,
    /// The host CPUs and NUMA nodes that the domain names.
    pub placement: HostPlacement,
    pub devices: Vec<DeviceSpec>,
    pub host_devices: HostDevices,
    pub pci: PciControllers,
    /// True if there are elements of QEMU's own namespace, whose effect is unknown.
    pub raw_arguments: bool,
    /// Memory, agent and balloon. `None` if the numbers of vCPUs contradict each other.
    pub domain: Option<Domain>,
}

/// The number of vCPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuRequirement {
    /// It decides what the domain needs, not the current number.
    pub maximum: u64,
    /// The number at start.
    pub current: u64,
}

impl Requirement {
    /// Reads a domain's XML, live or not; `document` names it in errors.
    ///
    /// # Errors
    /// A document that is not a domain, has no name or memory, or in which a known value is
    /// malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        DomainDefinition::parse(document, bytes, Self::from_definition)
    }

    /// Takes the view of a definition. Contradictory numbers of vCPUs are no error here: a rule
    /// reports them in libvirt's words.
    fn from_definition(definition: DomainDefinition) -> Result<Self, ElementError> {
        let domain = if definition.vcpus.is_consistent() {
            Some(Domain::from_definition(
                definition.clone(),
                DomainState::Unknown,
            )?)
        } else {
            None
        };
        let maximum = definition.vcpus.maximum.unwrap_or(1);
        Ok(Self {
            name: definition.name,
            virt_type: definition.virt_type,
            live: definition.id.is_some(),
            os_type: definition.os_type,
            arch: definition.arch,
            machine: definition.machine,
            vcpus: VcpuRequirement {
                maximum,
                current: definition.vcpus.current.unwrap_or(maximum),
            },
            cpu: definition.cpu,
            io_apic: definition.io_apic,
            gic: definition.gic,
            acpi: definition.acpi,
            smm: definition.smm,
            ps2: definition.ps2,
            tsc_frequency: definition.tsc_frequency,
            hyperv_clock: definition.hyperv_clock,
            enlightenments: definition.enlightenments,
            iommu: definition.devices.iommu,
            firmware: definition.firmware,
            launch_security: definition.launch_security,
            backing: MemoryBacking {
                is_shared: definition.backing.is_shared || definition.memory.has_shared_cell,
                ..definition.backing
            },
            placement: definition.placement,
            devices: definition.devices.specs,
            host_devices: definition.devices.host,
            pci: definition.devices.pci,
            raw_arguments: definition.raw_arguments,
            domain,
        })
    }

    /// Returns the machine type or alias, with libvirt's default for the architecture.
    pub fn machine_on(&self, arch: Option<&str>) -> Option<&str> {
        let default = match arch {
            Some(arch) if is_x86(arch) => Some("pc"),
            Some("aarch64" | "armv7l" | "riscv64" | "riscv32") => Some("virt"),
            Some("s390x") => Some("s390-ccw-virtio"),
            Some("ppc64" | "ppc64le") => Some("pseries"),
            _ => None,
        };
        self.machine.as_deref().or(default)
    }

    /// Returns the Hyper-V enlightenments that not every node with KVM supports.
    pub fn special_enlightenments(&self) -> impl Iterator<Item = &str> {
        let names = self.enlightenments.iter().map(String::as_str);
        names.filter(|name| !UNIVERSAL_ENLIGHTENMENTS.contains(name))
    }
}
