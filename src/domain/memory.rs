//! A domain's memory: at boot, plugged, and the room left.

use serde::{Deserialize, Serialize};

use super::IdSet;
use crate::units::{Bytes, KiB};
use crate::xml::{Cursor, Element, ElementError};

/// The memory of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// The memory that the domain booted with.
    pub boot: Bytes,
    /// `<currentMemory>`: the amount that the balloon leaves to the guest.
    pub balloon: Option<Bytes>,
    /// `<maxMemory>`: the maximum of boot memory and all devices together, fixed at start.
    /// Without it nothing can be plugged.
    pub maximum: Option<Bytes>,
    /// The number of DIMM slots.
    pub slots: u32,
    /// The guest's NUMA cells.
    pub cells: Vec<GuestNumaCell>,
    /// The memory devices in the document's order.
    pub devices: Vec<MemoryDevice>,
    /// True if huge pages back the memory; the host's free memory does not include them.
    pub huge_pages: bool,
}

/// `<numa><cell>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNumaCell {
    pub id: u32,
    /// The cell's vCPUs, up to the maximum.
    pub cpus: IdSet,
    /// The memory that the cell booted with.
    pub memory: Bytes,
}

/// The model of a memory device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryModel {
    /// A module that the guest uses entirely or not at all.
    Dimm,
    /// The host requests an amount, and the guest's driver plugs it block by block.
    VirtioMem,
    /// Not part of the guest's main memory: `nvdimm`, `virtio-pmem`, `sgx-epc`, or a newer model.
    Other(String),
}

/// `<devices><memory>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryDevice {
    pub model: MemoryModel,
    /// libvirt's name of the device in calls and events; every live device has one.
    pub alias: Option<String>,
    /// For virtio-mem the maximum.
    pub size: Bytes,
    /// virtio-mem: the amount that the host requests.
    pub requested: Option<Bytes>,
    /// virtio-mem: the amount that the guest has plugged.
    pub current: Option<Bytes>,
    /// virtio-mem: the block size, of which every amount is a multiple.
    pub block: Option<Bytes>,
    /// The guest's NUMA cell.
    pub node: Option<u32>,
    /// A DIMM's slot.
    pub slot: Option<u32>,
}

impl Memory {
    /// Returns the amount that the host wants the guest to have: boot memory, DIMMs, and the
    /// requested sizes of virtio-mem devices.
    pub fn asked(&self) -> Bytes {
        self.devices
            .iter()
            .fold(self.boot, |sum, device| sum.saturating_add(device.asked()))
    }

    /// Returns the amount that the domain has: boot memory, DIMMs, and the current sizes of
    /// virtio-mem devices.
    pub fn plugged(&self) -> Bytes {
        self.devices.iter().fold(self.boot, |sum, device| {
            sum.saturating_add(device.plugged())
        })
    }

    /// Returns the part of `<maxMemory>` that neither boot memory nor a device takes.
    pub fn unused_maximum(&self) -> Bytes {
        let taken = self
            .devices
            .iter()
            .fold(self.boot, |sum, device| sum.saturating_add(device.size));
        self.maximum.unwrap_or_default().saturating_sub(taken)
    }

    /// Returns the virtio-mem devices.
    pub fn virtio_mem(&self) -> impl DoubleEndedIterator<Item = &MemoryDevice> {
        self.devices
            .iter()
            .filter(|device| device.model == MemoryModel::VirtioMem)
    }

    /// Returns the DIMMs.
    pub fn dimms(&self) -> impl Iterator<Item = &MemoryDevice> {
        self.devices
            .iter()
            .filter(|device| device.model == MemoryModel::Dimm)
    }

    /// Returns the device with that alias.
    pub fn device(&self, alias: &str) -> Option<&MemoryDevice> {
        self.devices
            .iter()
            .find(|device| device.alias.as_deref() == Some(alias))
    }
}

impl MemoryDevice {
    /// Returns an empty device of the model with libvirt's name.
    pub(super) fn new(model: &str) -> Self {
        Self {
            model: match model {
                "dimm" => MemoryModel::Dimm,
                "virtio-mem" => MemoryModel::VirtioMem,
                other => MemoryModel::Other(other.to_owned()),
            },
            alias: None,
            size: Bytes::ZERO,
            requested: None,
            current: None,
            block: None,
            node: None,
            slot: None,
        }
    }

    /// Returns the amount that the host wants this device to add to the guest's main memory.
    pub fn asked(&self) -> Bytes {
        match self.model {
            MemoryModel::Dimm => self.size,
            MemoryModel::VirtioMem => self.requested.unwrap_or_default(),
            MemoryModel::Other(_) => Bytes::ZERO,
        }
    }

    /// Returns the amount that this device adds to the guest's main memory, used or not.
    pub fn plugged(&self) -> Bytes {
        match self.model {
            MemoryModel::Dimm => self.size,
            MemoryModel::VirtioMem => self.current.unwrap_or_default(),
            MemoryModel::Other(_) => Bytes::ZERO,
        }
    }
}

/// The memory elements of a definition, but for the devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryDefinition {
    /// `<memory>`.
    pub total: Option<Bytes>,
    /// `<currentMemory>`.
    pub balloon: Option<Bytes>,
    /// `<maxMemory>`.
    pub maximum: Option<Bytes>,
    pub slots: u32,
    pub cells: Vec<GuestNumaCell>,
    /// True if a cell has `memAccess='shared'`.
    pub has_shared_cell: bool,
}

impl MemoryDefinition {
    /// Reads `<maxMemory slots='4' unit='KiB'>`.
    pub(super) fn read_maximum(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        self.slots = element.parsed("slots", "number of slots")?.unwrap_or(0);
        self.maximum = Some(read_size(cursor, element)?);
        Ok(())
    }

    /// Reads `<cpu><numa>`.
    pub(super) fn read_cells(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, child| {
            if child.name() == "cell" {
                let ordinal = u32::try_from(self.cells.len()).unwrap_or(u32::MAX);
                let memory = child.parsed("memory", "size")?.unwrap_or(0);
                let access = child.attribute("memAccess")?;
                self.has_shared_cell |= access.as_deref() == Some("shared");
                self.cells.push(GuestNumaCell {
                    id: child.parsed("id", "number of a cell")?.unwrap_or(ordinal),
                    cpus: child.parsed("cpus", "list of CPUs")?.unwrap_or_default(),
                    memory: scaled(memory, child.attribute("unit")?.as_deref())?,
                });
            }
            Ok(())
        })
    }

    /// Returns the domain's memory. `<memory>` is the sum of boot memory and the sizes of all
    /// devices (`virDomainDefGetMemoryTotal`, libvirt 11.3); NUMA cells hold boot memory only.
    pub(super) fn resolve(
        self,
        devices: Vec<MemoryDevice>,
        huge_pages: bool,
    ) -> Result<Memory, ElementError> {
        let sum = |sizes: &mut dyn Iterator<Item = Bytes>| {
            sizes.fold(Bytes::ZERO, |sum, size| sum.saturating_add(size))
        };
        let in_cells = sum(&mut self.cells.iter().map(|cell| cell.memory));
        let in_devices = sum(&mut devices.iter().map(|device| device.size));
        let boot = match (in_cells, self.total) {
            (Bytes::ZERO, None) => return Err(ElementError::new("has no <memory>")),
            (Bytes::ZERO, Some(total)) => total.checked_sub(in_devices).ok_or_else(|| {
                ElementError::new(format!(
                    "has {total} of memory, which is less than its memory devices of {in_devices}"
                ))
            })?,
            (in_cells, _) => in_cells,
        };
        Ok(Memory {
            boot,
            balloon: self.balloon,
            maximum: self.maximum,
            slots: self.slots,
            cells: self.cells,
            devices,
            huge_pages,
        })
    }
}

/// Reads `<target>` of a memory device.
pub(super) fn read_target(
    cursor: &mut Cursor<'_>,
    device: &mut MemoryDevice,
) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "size" => device.size = read_size(cursor, child)?,
            "requested" => device.requested = Some(read_size(cursor, child)?),
            "current" => device.current = Some(read_size(cursor, child)?),
            "block" => device.block = Some(read_size(cursor, child)?),
            "node" => device.node = Some(cursor.parsed("number of a cell")?),
            _ => {}
        }
        Ok(())
    })
}

/// Reads a size with a `unit` attribute.
pub(super) fn read_size(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<Bytes, ElementError> {
    let number = cursor.parsed("size")?;
    scaled(number, element.attribute("unit")?.as_deref())
}

/// Scales by libvirt's units (`virScaleInteger`): KiB by default; single letters are powers of
/// 1024, those followed by a B powers of 1000. libvirt itself always writes KiB.
pub(super) fn scaled(number: u64, unit: Option<&str>) -> Result<Bytes, ElementError> {
    let unit = unit.unwrap_or("KiB");
    let factor = match unit.to_ascii_lowercase().as_str() {
        "b" | "byte" | "bytes" => Some(1),
        "k" | "kib" => Some(1 << 10),
        "m" | "mib" => Some(1 << 20),
        "g" | "gib" => Some(1 << 30),
        "t" | "tib" => Some(1 << 40),
        "p" | "pib" => Some(1 << 50),
        "e" | "eib" => Some(1 << 60),
        "kb" => Some(1_000),
        "mb" => Some(1_000_000),
        "gb" => Some(1_000_000_000),
        "tb" => Some(1_000_000_000_000),
        "pb" => Some(1_000_000_000_000_000),
        "eb" => Some(1_000_000_000_000_000_000),
        _ => None,
    };
    let factor = factor.ok_or_else(|| ElementError::new("has an unknown unit of size"))?;
    let too_large = || ElementError::new(format!("{number} {unit} exceed the largest size"));
    let bytes = number
        .checked_mul(factor)
        .map(Bytes::new)
        .ok_or_else(too_large)?;
    // libvirt rounds up to KiB
    let kib = bytes.round_up(Bytes::new(1024)).ok_or_else(too_large)?;
    KiB::try_from(kib).map(Bytes::from).map_err(|_| too_large())
}
