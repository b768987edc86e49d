//! The reader of domain XML, and the model that it fills.
//!
//! [`DomainDefinition`] holds every element that some part of the program needs. No part uses it
//! directly; each consumer takes a view of it:
//!
//! ```text
//!             ┌▶ DomainDefinition ┬▶ Domain       hotplug, monitor: vCPUs, memory, agent
//! domain XML ─┤                   └▶ Requirement  check and targets (src/compat)
//!             └▶ NodeRequirements                 labels: machine type, CPU, security, scheduler
//! ```
//!
//! Element names and defaults follow docs/formatdomain.rst of libvirt 9.0 to 12.x. An unknown
//! element is ignored. A malformed value of a known element is an error, because libvirt rejects
//! it too. `<metadata>` belongs to the tenant: its content is skipped, however deeply it nests.
//!
//! The model is lenient about what is missing or contradictory: a view returns an error if it
//! needs a value that the document lacks.

use super::cpu::CpuRequirement;
use super::devices::DeviceDefinitions;
use super::firmware::Firmware;
use super::memory::{MemoryDefinition, read_size};
use super::placement::{HostPlacement, MemoryBacking};
use super::vcpus::VcpuDefinition;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// A domain's XML, live or not. An absent element or attribute is `None`, empty or false.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DomainDefinition {
    /// Present while the domain runs.
    pub id: Option<u32>,
    pub virt_type: Option<String>,
    /// Tenant-controlled text.
    pub name: Option<String>,
    pub uuid: Option<String>,
    /// The content of `<os><type>`: `hvm`, or another driver's guest type.
    pub os_type: Option<String>,
    pub arch: Option<String>,
    /// The machine type: canonical in live XML, possibly an alias otherwise.
    pub machine: Option<String>,
    pub firmware: Firmware,
    /// `<smm state=…>`.
    pub smm: Option<bool>,
    /// `<ps2 state=…>`.
    pub ps2: Option<bool>,
    pub acpi: bool,
    pub io_apic: Option<IoApicDriver>,
    /// `<gic>`.
    pub gic: Option<Gic>,
    /// The enabled Hyper-V enlightenments, by libvirt's names.
    pub enlightenments: Vec<String>,
    pub cpu: CpuRequirement,
    pub vcpus: VcpuDefinition,
    pub memory: MemoryDefinition,
    pub backing: MemoryBacking,
    /// The host CPUs and NUMA nodes that the definition names.
    pub placement: HostPlacement,
    /// The frequency of the guest's time stamp counter: `<timer name='tsc' frequency=…>`.
    pub tsc_frequency: Option<u64>,
    /// True if the guest has the Hyper-V reference time: `<timer name='hypervclock'>`.
    pub hyperv_clock: bool,
    /// `<launchSecurity type=…>`: `sev`, `sev-snp`, `tdx`, `s390-pv`.
    pub launch_security: Option<String>,
    pub devices: DeviceDefinitions,
    /// True if there are elements of QEMU's own namespace.
    pub raw_arguments: bool,
}

/// Arm's interrupt controller: `<gic>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gic {
    /// `2`, `3` or `host`; `None` leaves it to libvirt.
    pub version: Option<String>,
}

/// The emulator of the I/O APIC: `<features><ioapic driver=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoApicDriver {
    /// QEMU, a "split" I/O APIC, which interrupt remapping needs.
    Qemu,
    Kvm,
}

impl DomainDefinition {
    /// Reads a domain's XML and returns a view of it; `document` names it in errors.
    ///
    /// # Errors
    /// A document that is not a domain, in which a known value is malformed, or from which `view`
    /// cannot be made.
    pub fn parse<T>(
        document: &str,
        bytes: &[u8],
        view: impl FnOnce(Self) -> Result<T, ElementError>,
    ) -> Result<T, DocumentError> {
        xml::read(document, bytes, &["domain"], |cursor, root| {
            let mut definition = Self {
                id: root.parsed("id", "number of a domain")?,
                virt_type: root.text("type")?.filter(|text| !text.is_empty()),
                ..Self::default()
            };
            cursor.children(|cursor, child| definition.read(cursor, child))?;
            view(definition)
        })
    }

    fn read(&mut self, cursor: &mut Cursor<'_>, element: &Element<'_>) -> Result<(), ElementError> {
        match element.name() {
            "metadata" => cursor.skip()?,
            "name" => self.name = Some(cursor.text()?),
            "uuid" => self.uuid = Some(cursor.text()?),
            "os" => {
                self.firmware.automatic = element.text("firmware")?;
                cursor.children(|cursor, child| self.read_os(cursor, child))?;
            }
            "features" => cursor.children(|cursor, child| self.read_feature(cursor, child))?,
            "cpu" => self.cpu = CpuRequirement::read(cursor, element, &mut self.memory)?,
            "vcpu" => {
                self.placement.read_vcpu(element)?;
                self.vcpus.read_count(cursor, element)?;
            }
            "cputune" => cursor.children(|_, child| self.placement.read_tune(child))?,
            "numatune" => cursor.children(|_, child| self.placement.read_numatune(child))?,
            "clock" => cursor.children(|_, child| self.read_timer(child))?,
            "vcpus" => self.vcpus.read_each(cursor)?,
            "memory" => self.memory.total = Some(read_size(cursor, element)?),
            "currentMemory" => self.memory.balloon = Some(read_size(cursor, element)?),
            "maxMemory" => self.memory.read_maximum(cursor, element)?,
            "memoryBacking" => cursor.children(|cursor, child| self.backing.read(cursor, child))?,
            "launchSecurity" => self.launch_security = element.text("type")?,
            "devices" => cursor.children(|cursor, child| self.devices.read(cursor, child))?,
            name => self.raw_arguments |= name.starts_with("qemu:"),
        }
        Ok(())
    }

    fn read_os(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        match element.name() {
            "type" => {
                self.arch = element.text("arch")?;
                self.machine = element.text("machine")?;
                self.os_type = Some(cursor.text()?);
            }
            "loader" => self.firmware.read_loader(cursor, element)?,
            "firmware" => self.firmware.read_features(cursor)?,
            _ => {}
        }
        Ok(())
    }

    fn read_feature(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        match element.name() {
            "acpi" => self.acpi = true,
            // Without an attribute the feature is on.
            "smm" => self.smm = Some(element.yes_no("state")?.unwrap_or(true)),
            "ps2" => self.ps2 = element.yes_no("state")?,
            "ioapic" => {
                self.io_apic = match element.attribute("driver")?.as_deref() {
                    Some("qemu") => Some(IoApicDriver::Qemu),
                    Some("kvm") => Some(IoApicDriver::Kvm),
                    _ => None,
                };
            }
            "gic" => {
                self.gic = Some(Gic {
                    version: element.text("version")?,
                });
            }
            "hyperv" => cursor.children(|_, enlightenment| {
                if enlightenment.attribute("state")?.as_deref() == Some("on") {
                    self.enlightenments.push(enlightenment.name().to_owned());
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    }

    fn read_timer(&mut self, timer: &Element<'_>) -> Result<(), ElementError> {
        match timer.attribute("name")?.as_deref() {
            // libvirt compares the frequency even of a timer that is not present.
            Some("tsc") => {
                let frequency = timer.parsed("frequency", "number of Hz")?;
                self.tsc_frequency = frequency.filter(|hz| *hz > 0).or(self.tsc_frequency);
            }
            Some("hypervclock") => self.hyperv_clock = timer.yes_no("present")? != Some(false),
            _ => {}
        }
        Ok(())
    }
}
