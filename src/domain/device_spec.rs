//! The properties of each device that the emulator and the machine type must support.

use crate::xml::{Element, ElementError};

/// One element of `<devices>`, with the attributes that libvirt compares with the abilities of the
/// emulator. An absent attribute is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The element's name: `disk`, `video`, `controller` …
    pub kind: String,
    /// The attribute `type`.
    pub device_type: Option<String>,
    /// The attribute `model`, or that of a child `<model>`.
    pub model: Option<String>,
    /// `<hostdev mode=…>`.
    pub mode: Option<String>,
    /// `<disk device=…>`: `disk`, `cdrom`, `floppy`, `lun`.
    pub role: Option<String>,
    /// The attribute `bus` of the device or of its `<target>`.
    pub bus: Option<String>,
    /// `<target dev=…>`.
    pub target: Option<String>,
    /// `<driver type=…>`.
    pub driver: Option<String>,
    pub backend: Option<DeviceBackend>,
    /// The number of a controller.
    pub index: Option<String>,
    pub alias: Option<String>,
    /// The hardware address of a network interface.
    pub mac: Option<String>,
}

/// `<backend>` of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceBackend {
    /// `type=` or `model=`.
    pub name: Option<String>,
    pub version: Option<String>,
}

impl DeviceSpec {
    /// Reads the start tag of a device.
    pub(super) fn new(element: &Element<'_>) -> Result<Self, ElementError> {
        Ok(Self {
            kind: element.name().to_owned(),
            device_type: element.text("type")?,
            model: element.text("model")?,
            mode: element.text("mode")?,
            role: element.text("device")?,
            bus: element.text("bus")?,
            index: element.text("index")?,
            ..Self::default()
        })
    }

    /// Reads the start tag of a child.
    pub(super) fn read_child(&mut self, child: &Element<'_>) -> Result<(), ElementError> {
        match child.name() {
            "model" => self.model = child.text("type")?.or(self.model.take()),
            "target" => {
                self.target = child.text("dev")?;
                self.bus = child.text("bus")?.or(self.bus.take());
            }
            "driver" => self.driver = child.text("type")?,
            "alias" => self.alias = child.text("name")?,
            "mac" => self.mac = child.text("address")?,
            "backend" => {
                let (kind, model) = (child.text("type")?, child.text("model")?);
                // The type of a backend of `<rng>` is that of its character device.
                let name = if self.kind == "rng" {
                    model
                } else {
                    kind.or(model)
                };
                self.backend = Some(DeviceBackend {
                    name,
                    version: child.text("version")?,
                });
            }
            _ => {}
        }
        Ok(())
    }
}
