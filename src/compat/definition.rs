//! Writes the smallest definition with given properties.

use quick_xml::Writer;
use quick_xml::events::BytesText;

use crate::domain::VcpuTopology;
use crate::units::Bytes;

/// The properties of a domain that is described by flags instead of XML.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MinimalDefinition {
    /// The domain type, `kvm`.
    pub virt_type: String,
    /// libvirt's default is the host's architecture.
    pub arch: Option<String>,
    /// x86 guests learn of hotplug by ACPI, Arm guests have it only with UEFI, others never.
    pub acpi: bool,
    /// The machine type or an alias.
    pub machine: Option<String>,
    /// The maximum number of vCPUs.
    pub vcpus: u32,
    /// The number of vCPUs at start; the default is the maximum.
    pub current: Option<u32>,
    pub topology: Option<VcpuTopology>,
    pub memory: Bytes,
    /// A CPU mode without a model.
    pub cpu_mode: Option<String>,
    pub cpu_model: Option<String>,
    /// Required CPU features.
    pub features: Vec<String>,
}

impl MinimalDefinition {
    /// Returns the XML, for [`super::Requirement::parse`] and libvirt.
    pub fn to_xml(&self) -> String {
        let mut writer = Writer::new(Vec::new());
        let written = self.write(&mut writer);
        debug_assert!(written.is_ok(), "writing to memory does not fail");
        String::from_utf8(writer.into_inner()).unwrap_or_default()
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let domain = writer
            .create_element("domain")
            .with_attribute(("type", self.virt_type.as_str()));
        domain.write_inner_content(|writer| {
            let name = writer.create_element("name");
            name.write_text_content(BytesText::new("a-domain"))?;
            let memory = writer
                .create_element("memory")
                .with_attribute(("unit", "B"));
            memory.write_text_content(BytesText::new(&self.memory.get().to_string()))?;
            let mut vcpu = writer.create_element("vcpu");
            let current = self.current.map(|current| current.to_string());
            if let Some(current) = &current {
                vcpu = vcpu.with_attribute(("current", current.as_str()));
            }
            vcpu.write_text_content(BytesText::new(&self.vcpus.to_string()))?;
            writer.create_element("os").write_inner_content(|writer| {
                let mut kind = writer.create_element("type");
                for (name, value) in [("arch", &self.arch), ("machine", &self.machine)] {
                    if let Some(value) = value {
                        kind = kind.with_attribute((name, value.as_str()));
                    }
                }
                kind.write_text_content(BytesText::new("hvm")).map(|_| ())
            })?;
            if self.acpi {
                let features = writer.create_element("features");
                features.write_inner_content(|writer| {
                    writer.create_element("acpi").write_empty().map(|_| ())
                })?;
            }
            self.write_cpu(writer)
        })?;
        Ok(())
    }

    fn write_cpu(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let mode = match (&self.cpu_mode, &self.cpu_model) {
            (Some(mode), _) => Some(mode.as_str()),
            (None, Some(_)) => Some("custom"),
            (None, None) => None,
        };
        if mode.is_none() && self.topology.is_none() && self.features.is_empty() {
            return Ok(());
        }
        let mut cpu = writer.create_element("cpu");
        if let Some(mode) = mode {
            cpu = cpu.with_attribute(("mode", mode));
        }
        // A user who requests a model or a feature wants all of it.
        if self.cpu_model.is_some() || mode == Some("host-model") {
            cpu = cpu.with_attribute(("check", "partial"));
        }
        cpu.write_inner_content(|writer| {
            if let Some(model) = &self.cpu_model {
                let element = writer.create_element("model");
                let element = element.with_attribute(("fallback", "forbid"));
                element.write_text_content(BytesText::new(model))?;
            }
            if let Some(shape) = self.topology {
                let parts = [
                    ("sockets", shape.sockets),
                    ("dies", shape.dies),
                    ("cores", shape.cores),
                    ("threads", shape.threads),
                ];
                let parts = parts.map(|(name, count)| (name, count.to_string()));
                let mut element = writer.create_element("topology");
                for (name, count) in &parts {
                    element = element.with_attribute((*name, count.as_str()));
                }
                element.write_empty()?;
            }
            for feature in &self.features {
                let attributes = [("policy", "require"), ("name", feature.as_str())];
                let element = writer.create_element("feature");
                element.with_attributes(attributes).write_empty()?;
            }
            Ok(())
        })?;
        Ok(())
    }
}
