//! What a domain needs of a node, from its definition or its live XML.
//!
//! Shapes after docs/formatdomain.rst of libvirt 9.0 to 12.x. An inactive definition may leave out
//! nearly everything; what it leaves out libvirt chooses, and [`super::fits`] follows its choice.

mod cpu;
mod devices;

use serde::Serialize;

pub use self::cpu::{Check, CpuRequirement};
use self::devices::read_features;
pub use self::devices::{HostDevices, IoApic, Iommu, IommuModel, PciControllers};
use crate::capability::is_x86;
use crate::domain::{Domain, DomainState};
use crate::units::Bytes;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// The Hyper-V enlightenments that every KVM gives, also where a libvirt before 9.0 lists none: two
/// came with the first of them, two are values that the guest is told.
const EVERYWHERE: [&str; 4] = ["relaxed", "vapic", "spinlocks", "vendor_id"];
/// More than any hypervisor has. What is above needs no further arithmetic to be too many.
const MOST_VCPUS: u64 = 65_536;

/// What a domain needs of a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Requirement {
    /// The domain's name: tenants' text.
    pub name: Option<String>,
    /// The domain type, `kvm`.
    pub virt_type: Option<String>,
    /// Whether it is the live XML of a running domain, in which libvirt wrote down its choices.
    pub live: bool,
    /// `hvm`, or another driver's type of guest.
    pub os_type: Option<String>,
    /// The guest architecture; libvirt takes the host's if there is none.
    pub arch: Option<String>,
    /// The machine type or an alias; libvirt takes the emulator's default if there is none.
    pub machine: Option<String>,
    /// Number and arrangement of the vCPUs.
    pub vcpus: VcpuRequirement,
    /// The CPU.
    pub cpu: CpuRequirement,
    /// `<features><ioapic driver=…>`: who emulates the I/O APIC.
    pub io_apic: Option<IoApic>,
    /// `<features><gic version=…>`: `2`, `3` or `host`.
    pub gic_version: Option<String>,
    /// Whether the guest has ACPI.
    pub acpi: bool,
    /// The Hyper-V enlightenments that are switched on, by libvirt's names.
    pub enlightenments: Vec<String>,
    /// The virtual IOMMU.
    pub iommu: Option<Iommu>,
    /// `<os firmware=…>`: `efi` or `bios`, chosen by libvirt from what the node has.
    pub firmware: Option<String>,
    /// Whether secure boot is asked for, with a loader that guards it.
    pub secure_boot: bool,
    /// `<launchSecurity type=…>`: `sev`, `sev-snp`, `tdx`, `s390-pv`.
    pub launch_security: Option<String>,
    /// `<memoryBacking><source type=…>`: `memfd`, `file`, `anonymous`.
    pub memory_source: Option<String>,
    /// The sizes of huge pages asked for; an empty list with `huge_pages` is the default size.
    pub huge_page_sizes: Vec<Bytes>,
    /// Whether memory is to come from huge pages.
    pub huge_pages: bool,
    /// The devices of the host that the domain is given.
    pub host_devices: HostDevices,
    /// The PCI controllers, as far as room for hotplug is concerned.
    pub pci: PciControllers,
    /// Whether the XML has elements or attributes of QEMU's own namespace, about which nothing can
    /// be said.
    pub raw_arguments: bool,
    /// All the rest: memory, agent, balloon. `None` if the numbers of vCPUs contradict each other.
    #[serde(skip)]
    pub domain: Option<Domain>,
}

/// Number and arrangement of vCPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuRequirement {
    /// The most that there can ever be: it, not the current number, decides what the domain needs.
    pub maximum: u64,
    /// Those that the domain starts with.
    pub current: u64,
    /// The arrangement, if the definition has one.
    pub topology: Option<Shape>,
    /// The arrangement's attribute that libvirt wants and that is missing.
    #[serde(skip)]
    pub topology_lacks: Option<&'static str>,
}

/// `<topology>`, in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Sockets of the domain.
    pub sockets: u32,
    /// Dies of a socket.
    pub dies: u32,
    /// Clusters of a die.
    pub clusters: u32,
    /// Cores of a cluster.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Default for Shape {
    /// One of each.
    fn default() -> Self {
        Self {
            sockets: 1,
            dies: 1,
            clusters: 1,
            cores: 1,
            threads: 1,
        }
    }
}

impl Shape {
    /// How many vCPUs there are in such an arrangement.
    pub fn product(self) -> u128 {
        [
            self.sockets,
            self.dies,
            self.clusters,
            self.cores,
            self.threads,
        ]
        .into_iter()
        .map(u128::from)
        .product()
    }

    /// The largest APIC ID of such an arrangement with `vcpus` in it.
    ///
    /// Each level below the socket takes as many bits as the next power of two needs, so an
    /// arrangement with other numbers has holes (`x86_apicid_from_cpu_idx`, QEMU
    /// include/hw/i386/topology.h).
    pub fn highest_apic_id(self, vcpus: u64) -> Option<u128> {
        let parts = [self.threads, self.cores, self.clusters, self.dies].map(u128::from);
        let mut index = u128::from(vcpus.checked_sub(1)?);
        let (mut id, mut shift) = (0_u128, 0_u32);
        for part in parts {
            let rest = index.checked_rem(part)?;
            id |= rest << shift;
            index /= part;
            shift += part.next_power_of_two().trailing_zeros();
        }
        Some(id | (index << shift))
    }
}

impl Requirement {
    /// Reads a domain's XML, live or not; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none, has no name or memory, or in which a known value is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        let mut requirement = xml::read(document, bytes, &["domain"], |cursor, root| {
            let mut requirement = Self {
                live: root.attribute("id")?.is_some(),
                virt_type: root.text("type")?.filter(|text| !text.is_empty()),
                ..Self::default()
            };
            requirement.vcpus = VcpuRequirement {
                maximum: 1,
                current: 1,
                ..VcpuRequirement::default()
            };
            requirement.read(cursor)?;
            Ok(requirement)
        })?;
        if requirement.vcpus.current <= requirement.vcpus.maximum
            && requirement.vcpus.maximum <= MOST_VCPUS
        {
            let domain = Domain::parse(document, bytes, DomainState::Unknown)?;
            requirement.domain = Some(domain);
        }
        Ok(requirement)
    }

    /// The machine type or alias, with libvirt's choice for an architecture where there is none.
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

    /// The Hyper-V enlightenments that not every node with KVM gives.
    pub fn special_enlightenments(&self) -> impl Iterator<Item = &str> {
        let names = self.enlightenments.iter().map(String::as_str);
        names.filter(|name| !EVERYWHERE.contains(name))
    }

    fn read(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            match child.name() {
                "name" => self.name = Some(cursor.text()?),
                "vcpu" => self.read_vcpu(cursor, child)?,
                "os" => {
                    self.firmware = child.text("firmware")?;
                    self.read_os(cursor)?;
                }
                "features" => read_features(cursor, self)?,
                "cpu" => {
                    self.cpu = cpu::read(cursor, child, &mut self.vcpus)?;
                }
                "launchSecurity" => self.launch_security = child.text("type")?,
                "memoryBacking" => self.read_backing(cursor)?,
                "devices" => devices::read(cursor, self)?,
                name if name.starts_with("qemu:") => self.raw_arguments = true,
                _ => cursor.ignore_unknown(),
            }
            Ok(())
        })
    }

    fn read_vcpu(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        let current = element.parsed("current", "number of vCPUs")?;
        self.vcpus.maximum = cursor.parsed("number of vCPUs")?;
        self.vcpus.current = current.unwrap_or(self.vcpus.maximum);
        Ok(())
    }

    fn read_os(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            match child.name() {
                "type" => {
                    self.arch = child.text("arch")?;
                    self.machine = child.text("machine")?;
                    self.os_type = Some(cursor.text()?);
                }
                "loader" => self.secure_boot |= child.yes_no("secure")? == Some(true),
                "firmware" => cursor.children(|_, feature| {
                    let secure = feature.attribute("name")?.as_deref() == Some("secure-boot");
                    self.secure_boot |= secure && feature.yes_no("enabled")? == Some(true);
                    Ok(())
                })?,
                _ => cursor.ignore_unknown(),
            }
            Ok(())
        })
    }

    fn read_backing(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            match child.name() {
                "source" => self.memory_source = child.text("type")?,
                "hugepages" => {
                    self.huge_pages = true;
                    cursor.children(|_, page| {
                        if let Some(size) = page.parsed("size", "size of a page")? {
                            let unit = page.attribute("unit")?;
                            let size = crate::domain::scaled(size, unit.as_deref())?;
                            self.huge_page_sizes.push(size);
                        }
                        Ok(())
                    })?;
                }
                _ => cursor.ignore_unknown(),
            }
            Ok(())
        })
    }
}
