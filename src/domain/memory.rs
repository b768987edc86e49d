//! A domain's memory: what it booted with, what is plugged, and how much more could be.

use serde::{Deserialize, Serialize};

use super::IdSet;
use crate::units::{Bytes, KiB};
use crate::xml::{Cursor, Element, ElementError};

/// The memory of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// What the domain booted with.
    pub boot: Bytes,
    /// `<currentMemory>`: what the balloon leaves the guest of what it has.
    pub balloon: Option<Bytes>,
    /// `<maxMemory>`: what it booted with and all devices may together be; fixed at start.
    /// Without it nothing can be plugged.
    pub maximum: Option<Bytes>,
    /// The slots for DIMMs.
    pub slots: u32,
    /// The guest's NUMA cells.
    pub cells: Vec<NumaCell>,
    /// The memory devices in the document's order.
    pub devices: Vec<MemoryDevice>,
    /// Whether the memory comes from huge pages, which the host's free memory does not count.
    pub huge_pages: bool,
}

/// `<numa><cell>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaCell {
    /// The cell's number.
    pub id: u32,
    /// Its CPUs, up to the maximum.
    pub cpus: IdSet,
    /// What it booted with.
    pub memory: Bytes,
}

/// What kind a memory device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryModel {
    /// A plain module: all or nothing.
    Dimm,
    /// Memory whose amount the host asks for and the guest's driver plugs by blocks.
    VirtioMem,
    /// Not the guest's main memory: `nvdimm`, `virtio-pmem`, `sgx-epc`, or one newer than this list.
    Other(String),
}

/// `<devices><memory>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryDevice {
    /// What kind it is.
    pub model: MemoryModel,
    /// The name that libvirt and events call it by; a live device has one.
    pub alias: Option<String>,
    /// The size; for virtio-mem the most that it can give.
    pub size: Bytes,
    /// virtio-mem: what the host asks the guest to take.
    pub requested: Option<Bytes>,
    /// virtio-mem: what the guest has taken.
    pub current: Option<Bytes>,
    /// virtio-mem: sizes are multiples of this.
    pub block: Option<Bytes>,
    /// The guest's NUMA cell that it belongs to.
    pub node: Option<u32>,
    /// A DIMM's slot.
    pub slot: Option<u32>,
}

impl Memory {
    /// What the domain is meant to have: what it booted with, its DIMMs, and what virtio-mem
    /// devices are asked for.
    pub fn asked(&self) -> Bytes {
        self.devices
            .iter()
            .fold(self.boot, |sum, device| sum.saturating_add(device.asked()))
    }

    /// What it has: what it booted with, its DIMMs, and what the guest took of virtio-mem.
    pub fn plugged(&self) -> Bytes {
        self.devices.iter().fold(self.boot, |sum, device| {
            sum.saturating_add(device.plugged())
        })
    }

    /// The devices of virtio-mem.
    pub fn virtio_mem(&self) -> impl DoubleEndedIterator<Item = &MemoryDevice> {
        self.devices
            .iter()
            .filter(|device| device.model == MemoryModel::VirtioMem)
    }

    /// The DIMMs.
    pub fn dimms(&self) -> impl Iterator<Item = &MemoryDevice> {
        self.devices
            .iter()
            .filter(|device| device.model == MemoryModel::Dimm)
    }

    /// The device of that alias.
    pub fn device(&self, alias: &str) -> Option<&MemoryDevice> {
        self.devices
            .iter()
            .find(|device| device.alias.as_deref() == Some(alias))
    }
}

impl MemoryDevice {
    /// What it is meant to add to the guest's main memory.
    pub fn asked(&self) -> Bytes {
        match self.model {
            MemoryModel::Dimm => self.size,
            MemoryModel::VirtioMem => self.requested.unwrap_or_default(),
            MemoryModel::Other(_) => Bytes::ZERO,
        }
    }

    /// What it adds to the guest's main memory, used or not.
    pub fn plugged(&self) -> Bytes {
        match self.model {
            MemoryModel::Dimm => self.size,
            MemoryModel::VirtioMem => self.current.unwrap_or_default(),
            MemoryModel::Other(_) => Bytes::ZERO,
        }
    }
}

/// What the elements say, until all are read.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) total: Option<Bytes>,
    pub(super) memory: Memory,
}

impl Draft {
    /// `<maxMemory slots='4' unit='KiB'>`.
    pub(super) fn read_maximum(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        self.memory.slots = element.parsed("slots", "number of slots")?.unwrap_or(0);
        self.memory.maximum = Some(read_size(cursor, element)?);
        Ok(())
    }

    /// `<cpu><numa>`.
    pub(super) fn read_cells(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            if child.name() != "cell" {
                cursor.ignore_unknown();
                return Ok(());
            }
            let ordinal = u32::try_from(self.memory.cells.len()).unwrap_or(u32::MAX);
            let memory = child.parsed("memory", "size")?.unwrap_or(0);
            self.memory.cells.push(NumaCell {
                id: child.parsed("id", "number of a cell")?.unwrap_or(ordinal),
                cpus: child.parsed("cpus", "list of CPUs")?.unwrap_or_default(),
                memory: scaled(memory, child.attribute("unit")?.as_deref())?,
            });
            Ok(())
        })
    }

    /// `<memory model=…>` among the devices.
    pub(super) fn read_device(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        let model = match element.attribute("model")?.as_deref() {
            Some("dimm") => MemoryModel::Dimm,
            Some("virtio-mem") => MemoryModel::VirtioMem,
            other => MemoryModel::Other(other.unwrap_or_default().to_owned()),
        };
        let mut device = MemoryDevice {
            model,
            alias: None,
            size: Bytes::ZERO,
            requested: None,
            current: None,
            block: None,
            node: None,
            slot: None,
        };
        cursor.children(|cursor, child| {
            match child.name() {
                "target" => read_target(cursor, &mut device)?,
                "alias" => device.alias = child.text("name")?,
                // those of virtio devices are on PCI
                "address" if child.attribute("type")?.as_deref() == Some("dimm") => {
                    device.slot = child.parsed("slot", "number of a slot")?;
                }
                _ => {}
            }
            Ok(())
        })?;
        self.memory.devices.push(device);
        Ok(())
    }

    /// All together. `<memory>` is the sum of what the domain booted with and the sizes of all
    /// devices (`virDomainDefGetMemoryTotal`, libvirt 11.3); the cells, where there are any, hold
    /// what it booted with and nothing else.
    pub(super) fn finish(self) -> Result<Memory, ElementError> {
        let Self { total, mut memory } = self;
        let sum = |sizes: &mut dyn Iterator<Item = Bytes>| {
            sizes.fold(Bytes::ZERO, |sum, size| sum.saturating_add(size))
        };
        let in_cells = sum(&mut memory.cells.iter().map(|cell| cell.memory));
        let in_devices = sum(&mut memory.devices.iter().map(|device| device.size));
        memory.boot = match (in_cells, total) {
            (Bytes::ZERO, None) => return Err(ElementError::new("has no <memory>")),
            (Bytes::ZERO, Some(total)) => total.checked_sub(in_devices).ok_or_else(|| {
                ElementError::new(format!(
                    "has {total} of memory, and devices of {in_devices} in it"
                ))
            })?,
            (in_cells, _) => in_cells,
        };
        Ok(memory)
    }
}

fn read_target(cursor: &mut Cursor<'_>, device: &mut MemoryDevice) -> Result<(), ElementError> {
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

/// A size with a `unit` attribute.
pub(super) fn read_size(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<Bytes, ElementError> {
    let number = cursor.parsed("size")?;
    scaled(number, element.attribute("unit")?.as_deref())
}

/// libvirt's units (`virScaleInteger`): KiB if none is said, single letters are powers of 1024
/// and those with a B of 1000. libvirt itself always writes KiB.
pub(crate) fn scaled(number: u64, unit: Option<&str>) -> Result<Bytes, ElementError> {
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
    let too_large = || ElementError::new(format!("{number} {unit} are more than there can be"));
    let bytes = number
        .checked_mul(factor)
        .map(Bytes::new)
        .ok_or_else(too_large)?;
    // libvirt rounds up to KiB
    let kib = bytes.round_up(Bytes::new(1024)).ok_or_else(too_large)?;
    KiB::try_from(kib).map(Bytes::from).map_err(|_| too_large())
}
