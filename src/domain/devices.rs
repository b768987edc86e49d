//! Devices of a domain, as far as they matter for hotplug or need something of the node.

use serde::{Deserialize, Serialize};

use super::device_spec::DeviceSpec;
use super::memory::{MemoryDevice, read_target};
use crate::xml::{Cursor, Element, ElementError};

/// The guest agent's channel name, which libvirt itself looks for (`qemuFindAgentConfig`).
const AGENT: &str = "org.qemu.guest_agent.0";

/// The channel to the guest agent, and its state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentChannel {
    /// The domain has no channel for an agent.
    #[default]
    Absent,
    /// No agent in the guest has opened the channel.
    Disconnected,
    /// The agent has opened the channel.
    Connected,
    /// libvirt does not report the channel's state.
    Unknown,
}

impl AgentChannel {
    /// True if a call to the agent may succeed.
    pub fn may_answer(self) -> bool {
        matches!(self, Self::Connected | Self::Unknown)
    }
}

/// `<memballoon>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Balloon {
    /// False also for `model='none'`.
    pub present: bool,
    /// Seconds between two queries of the guest driver's statistics. Without a period libvirt
    /// does not report the guest's total memory.
    pub stats_period: Option<u32>,
}

/// A device, other than memory, that has an alias.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AliasedDevice {
    /// The element's name: `disk`, `interface`, `hostdev` …
    pub kind: String,
    /// Aliases that begin with `ua-` are the user's and survive a restart.
    pub alias: String,
}

/// `<iommu>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuDevice {
    pub model: IommuModel,
    /// Interrupt remapping.
    pub intremap: Option<bool>,
    /// Extended interrupt mode of Intel's IOMMU.
    pub eim: Option<bool>,
    /// Extended interrupt mode of AMD's IOMMU.
    pub xtsup: Option<bool>,
}

/// The model of a virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IommuModel {
    /// Emulated by QEMU, so it works on AMD hosts too.
    Intel,
    /// libvirt 11.5.
    Amd,
    Virtio,
    Smmuv3,
    /// A model newer than this list, or no model.
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

    /// Returns libvirt's name of the model.
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

/// Numbers of host devices that are passed through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostDevices {
    /// PCI devices, including network interfaces of type `hostdev`: all use VFIO.
    pub pci: u32,
    /// Mediated devices, which use VFIO too.
    pub mediated: u32,
    /// USB, SCSI and others.
    pub others: u32,
    /// True if a device asks for iommufd (libvirt 12.1).
    pub iommufd: bool,
}

impl HostDevices {
    /// Returns the number of devices that use VFIO.
    pub fn vfio(self) -> u32 {
        self.pci.saturating_add(self.mediated)
    }
}

/// PCI controllers and the buses in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PciControllers {
    /// The indexes of `pcie-root-port`s: a device can be plugged into a free one.
    pub root_ports: Vec<u32>,
    /// The buses that devices and other controllers occupy.
    pub used_buses: Vec<u32>,
    /// True if a USB controller with `model='none'` suppresses the one that libvirt adds by default.
    pub no_usb: bool,
    /// The same for a balloon.
    pub no_balloon: bool,
}

impl PciControllers {
    /// Returns the number of root ports without a device.
    pub fn free_root_ports(&self) -> usize {
        let is_free = |port: &&u32| !self.used_buses.contains(port);
        self.root_ports.iter().filter(is_free).count()
    }
}

/// `<devices>`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeviceDefinitions {
    pub agent: AgentChannel,
    pub balloon: Balloon,
    /// Memory devices in the document's order.
    pub memory: Vec<MemoryDevice>,
    /// Every other device that has an alias.
    pub aliased: Vec<AliasedDevice>,
    pub host: HostDevices,
    pub pci: PciControllers,
    pub iommu: Option<IommuDevice>,
    /// Every device, in the document's order.
    pub specs: Vec<DeviceSpec>,
}

impl DeviceDefinitions {
    /// Reads one device.
    pub(super) fn read(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        let kind = element.name();
        self.count(element)?;
        let model = element.text("model")?.unwrap_or_default();
        let mut memory = (kind == "memory").then(|| MemoryDevice::new(&model));
        let mut iommu = (kind == "iommu").then(|| IommuDevice {
            model: IommuModel::from_libvirt(&model),
            intremap: None,
            eim: None,
            xtsup: None,
        });
        let mut alias = None;
        let mut spec = DeviceSpec::new(element)?;
        cursor.children(|cursor, child| {
            spec.read_child(child)?;
            match child.name() {
                "alias" => alias = child.text("name")?,
                "address" => match child.attribute("type")?.as_deref() {
                    Some("pci") => {
                        let bus = child.attribute("bus")?;
                        let bus = bus.as_deref().and_then(parse_bus);
                        self.pci.used_buses.extend(bus);
                    }
                    Some("dimm") => {
                        if let Some(memory) = &mut memory {
                            memory.slot = child.parsed("slot", "number of a slot")?;
                        }
                    }
                    _ => {}
                },
                "driver" => match &mut iommu {
                    Some(iommu) => {
                        iommu.intremap = child.yes_no("intremap")?;
                        iommu.eim = child.yes_no("eim")?;
                        iommu.xtsup = child.yes_no("xtsup")?;
                    }
                    None => {
                        self.host.iommufd |= child.yes_no("iommufd").unwrap_or(None) == Some(true);
                    }
                },
                "stats" if kind == "memballoon" => {
                    let period = child.parsed("period", "number of seconds")?;
                    self.balloon.stats_period = period.filter(|period| *period > 0);
                }
                "target" => match &mut memory {
                    Some(memory) => read_target(cursor, memory)?,
                    None if kind == "channel" => self.read_channel(child)?,
                    None => {}
                },
                _ => {}
            }
            Ok(())
        })?;
        if let Some(memory) = memory {
            self.memory.push(MemoryDevice { alias, ..memory });
        } else if let Some(alias) = alias {
            let kind = kind.to_owned();
            self.aliased.push(AliasedDevice { kind, alias });
        }
        self.iommu = iommu.or(self.iommu.take());
        self.specs.push(spec);
        Ok(())
    }

    /// Records the properties in the device's start tag.
    fn count(&mut self, element: &Element<'_>) -> Result<(), ElementError> {
        let model = element.attribute("model")?;
        let is_none = model.as_deref() == Some("none");
        match (element.name(), element.attribute("type")?.as_deref()) {
            ("hostdev", Some("pci")) | ("interface", Some("hostdev")) => self.host.pci += 1,
            ("hostdev", Some("mdev")) => self.host.mediated += 1,
            ("hostdev", _) => self.host.others += 1,
            ("controller", Some("pci")) if model.as_deref() == Some("pcie-root-port") => {
                let index: Option<u32> = element.parsed("index", "number of a controller")?;
                self.pci.root_ports.extend(index);
            }
            ("controller", Some("usb")) if is_none => self.pci.no_usb = true,
            ("memballoon", _) => {
                self.balloon.present = !is_none;
                self.pci.no_balloon |= is_none;
            }
            _ => {}
        }
        Ok(())
    }

    fn read_channel(&mut self, target: &Element<'_>) -> Result<(), ElementError> {
        if target.attribute("name")?.as_deref() == Some(AGENT) {
            self.agent = match target.attribute("state")?.as_deref() {
                Some("connected") => AgentChannel::Connected,
                Some("disconnected") => AgentChannel::Disconnected,
                _ => AgentChannel::Unknown,
            };
        }
        Ok(())
    }
}

/// Parses `0x05` or `5`.
fn parse_bus(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok(),
        None => text.parse().ok(),
    }
}
