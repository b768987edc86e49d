//! `<features>` and `<devices>` of a domain, as far as they need something of the node or leave
//! room for hotplug.

use serde::Serialize;

use super::Requirement;
use crate::xml::{Cursor, Element, ElementError};

/// Who emulates the I/O APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoApic {
    /// QEMU: "split", which interrupt remapping needs.
    Qemu,
    /// KVM.
    Kvm,
}

/// `<iommu>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Iommu {
    /// Which IOMMU.
    pub model: IommuModel,
    /// Interrupt remapping.
    pub intremap: Option<bool>,
    /// Extended interrupt mode of Intel's.
    pub eim: Option<bool>,
    /// The same of AMD's.
    pub xtsup: Option<bool>,
}

/// Which virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IommuModel {
    /// Intel's, which also runs on AMD's hosts: it is QEMU's own.
    Intel,
    /// AMD's (libvirt 11.5).
    Amd,
    /// The paravirtual one.
    Virtio,
    /// Arm's.
    Smmuv3,
    /// One newer than this list, or none.
    Other(String),
}

impl IommuModel {
    fn from_libvirt(model: &str) -> Self {
        match model {
            "intel" => Self::Intel,
            "amd" => Self::Amd,
            "virtio" => Self::Virtio,
            "smmuv3" => Self::Smmuv3,
            other => Self::Other(other.to_owned()),
        }
    }

    /// libvirt's word.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Intel => "intel",
            Self::Amd => "amd",
            Self::Virtio => "virtio",
            Self::Smmuv3 => "smmuv3",
            Self::Other(other) => other,
        }
    }
}

/// Devices of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostDevices {
    /// PCI devices, also network interfaces that are one: they go by VFIO.
    pub pci: u32,
    /// Mediated devices, by VFIO as well.
    pub mediated: u32,
    /// USB, SCSI and others.
    pub others: u32,
    /// Whether one asks for iommufd (libvirt 12.1).
    pub iommufd: bool,
}

impl HostDevices {
    /// How many go by VFIO.
    pub fn vfio(self) -> u32 {
        self.pci.saturating_add(self.mediated)
    }
}

/// PCI controllers and what sits on them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PciControllers {
    /// The indexes of `pcie-root-port`s: a device can be plugged into one that is free.
    pub root_ports: Vec<u32>,
    /// The buses that devices and other controllers sit on.
    #[serde(skip)]
    pub taken: Vec<u32>,
    /// How many of the two devices that libvirt adds by itself and that want PCI, a USB
    /// controller and a balloon, are declined by `model='none'`.
    #[serde(skip)]
    pub declined: u32,
}

impl PciControllers {
    /// The root ports that nothing sits on.
    pub fn free_root_ports(&self) -> usize {
        let free = |port: &&u32| !self.taken.contains(port);
        self.root_ports.iter().filter(free).count()
    }
}

pub(super) fn read_features(
    cursor: &mut Cursor<'_>,
    requirement: &mut Requirement,
) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "ioapic" => {
                requirement.io_apic = match child.attribute("driver")?.as_deref() {
                    Some("qemu") => Some(IoApic::Qemu),
                    Some("kvm") => Some(IoApic::Kvm),
                    _ => None,
                };
            }
            "acpi" => requirement.acpi = true,
            "gic" => requirement.gic_version = child.text("version")?,
            "hyperv" => cursor.children(|_, enlightenment| {
                if enlightenment.attribute("state")?.as_deref() == Some("on") {
                    let name = enlightenment.name().to_owned();
                    requirement.enlightenments.push(name);
                }
                Ok(())
            })?,
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

pub(super) fn read(
    cursor: &mut Cursor<'_>,
    requirement: &mut Requirement,
) -> Result<(), ElementError> {
    cursor.children(|cursor, child| match child.name() {
        "iommu" => {
            requirement.iommu = Some(read_iommu(cursor, child)?);
            Ok(())
        }
        name => {
            match (name, child.attribute("type")?.as_deref()) {
                ("hostdev", Some("pci")) | ("interface", Some("hostdev")) => {
                    requirement.host_devices.pci += 1;
                }
                ("hostdev", Some("mdev")) => requirement.host_devices.mediated += 1,
                ("hostdev", _) => requirement.host_devices.others += 1,
                ("controller", Some("pci"))
                    if child.attribute("model")?.as_deref() == Some("pcie-root-port") =>
                {
                    let index: Option<u32> = child.parsed("index", "number of a controller")?;
                    requirement.pci.root_ports.extend(index);
                }
                ("controller", Some("usb")) | ("memballoon", _)
                    if child.attribute("model")?.as_deref() == Some("none") =>
                {
                    requirement.pci.declined += 1;
                }
                _ => {}
            }
            read_device(cursor, requirement)
        }
    })
}

fn read_device(cursor: &mut Cursor<'_>, requirement: &mut Requirement) -> Result<(), ElementError> {
    cursor.children(|_, child| {
        match child.name() {
            "address" if child.attribute("type")?.as_deref() == Some("pci") => {
                let bus = child.attribute("bus")?;
                requirement
                    .pci
                    .taken
                    .extend(bus.as_deref().and_then(bus_number));
            }
            "driver" => {
                requirement.host_devices.iommufd |=
                    child.yes_no("iommufd").unwrap_or(None) == Some(true);
            }
            _ => {}
        }
        Ok(())
    })
}

/// `0x05` or `5`.
fn bus_number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok(),
        None => text.parse().ok(),
    }
}

fn read_iommu(cursor: &mut Cursor<'_>, element: &Element<'_>) -> Result<Iommu, ElementError> {
    let mut iommu = Iommu {
        model: IommuModel::from_libvirt(&element.text("model")?.unwrap_or_default()),
        intremap: None,
        eim: None,
        xtsup: None,
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "driver" => {
                iommu.intremap = child.yes_no("intremap")?;
                iommu.eim = child.yes_no("eim")?;
                iommu.xtsup = child.yes_no("xtsup")?;
            }
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(iommu)
}
