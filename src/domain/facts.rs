//! A domain's live XML as facts.

use serde::{Deserialize, Serialize};

use super::devices::{self, AgentChannel, Balloon, Device};
use super::memory::{self, Memory};
use super::state::DomainState;
use super::vcpus::{self, Vcpus};
use crate::xml::{self, Cursor, DocumentError, ElementError};

/// A domain, as its live XML and libvirt's word about its state tell.
///
/// Shapes after docs/formatdomain.rst of libvirt 9.0 to 12.x. What is not known is passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// The name: tenants' text.
    pub name: String,
    /// The UUID.
    pub uuid: Option<String>,
    /// The number while it runs; another one after each start.
    pub id: Option<u32>,
    /// The domain type: `kvm`, `qemu` …
    pub virt_type: String,
    /// The state when the XML was fetched.
    pub state: DomainState,
    /// The guest architecture.
    pub arch: Option<String>,
    /// The machine type; canonical in live XML.
    pub machine: Option<String>,
    /// Whether the guest has ACPI, through which x86 and arm guests learn of hotplug.
    pub acpi: bool,
    /// The CPU.
    pub cpu: Cpu,
    /// The vCPUs.
    pub vcpus: Vcpus,
    /// The memory.
    pub memory: Memory,
    /// The balloon.
    pub balloon: Balloon,
    /// The way to the guest agent.
    pub agent: AgentChannel,
    /// Every other device that has an alias.
    pub devices: Vec<Device>,
}

/// `<cpu>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cpu {
    /// `custom`, `host-passthrough` …
    pub mode: Option<String>,
    /// The model's name.
    pub model: Option<String>,
    /// How the vCPUs are arranged, if the definition says.
    pub topology: Option<Topology>,
}

/// `<topology>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
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

impl Domain {
    /// Reads a domain's XML; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none, has no name, or in which a known value is malformed.
    pub fn parse(document: &str, bytes: &[u8], state: DomainState) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domain"], |cursor, root| {
            let mut draft = Draft::default();
            draft.read(cursor)?;
            Ok(Self {
                name: draft
                    .name
                    .ok_or_else(|| ElementError::new("has no <name>"))?,
                uuid: draft.uuid,
                id: root.parsed("id", "number of a domain")?,
                virt_type: root.text("type")?.unwrap_or_default(),
                state,
                arch: draft.arch,
                machine: draft.machine,
                acpi: draft.acpi,
                cpu: draft.cpu,
                vcpus: draft.vcpus.finish()?,
                memory: draft.memory.finish()?,
                balloon: draft.devices.balloon,
                agent: draft.devices.agent,
                devices: draft.devices.devices,
            })
        })
    }

    /// How many vCPUs are plugged and unplugged together: a core's threads on pseries, else one
    /// (`qemuValidateDefGetVcpuHotplugGranularity`, libvirt 11.3).
    pub fn vcpu_granularity(&self) -> u32 {
        let is_pseries = self
            .machine
            .as_deref()
            .is_some_and(|machine| machine.starts_with("pseries"));
        match self.cpu.topology {
            Some(topology) if is_pseries => topology.threads.max(1),
            _ => 1,
        }
    }
}

#[derive(Default)]
struct Draft {
    name: Option<String>,
    uuid: Option<String>,
    arch: Option<String>,
    machine: Option<String>,
    acpi: bool,
    cpu: Cpu,
    vcpus: vcpus::Draft,
    memory: memory::Draft,
    devices: devices::Draft,
}

impl Draft {
    fn read(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| match child.name() {
            "name" => cursor.text().map(|name| self.name = Some(name)),
            "uuid" => cursor.text().map(|uuid| self.uuid = Some(uuid)),
            "os" => self.read_os(cursor),
            "features" => self.read_features(cursor),
            "cpu" => {
                self.cpu.mode = child.text("mode")?;
                self.read_cpu(cursor)
            }
            "vcpu" => self.vcpus.read_count(cursor, child),
            "vcpus" => self.vcpus.read_each(cursor),
            "memory" => {
                self.memory.total = Some(memory::read_size(cursor, child)?);
                Ok(())
            }
            "currentMemory" => {
                self.memory.memory.balloon = Some(memory::read_size(cursor, child)?);
                Ok(())
            }
            "maxMemory" => self.memory.read_maximum(cursor, child),
            "memoryBacking" => self.read_backing(cursor),
            "devices" => self.read_devices(cursor),
            _ => Ok(()),
        })
    }

    fn read_os(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, child| {
            if child.name() == "type" {
                self.arch = child.text("arch")?;
                self.machine = child.text("machine")?;
            }
            Ok(())
        })
    }

    fn read_features(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, child| {
            self.acpi |= child.name() == "acpi";
            Ok(())
        })
    }

    fn read_backing(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, child| {
            self.memory.memory.huge_pages |= child.name() == "hugepages";
            Ok(())
        })
    }

    fn read_cpu(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            match child.name() {
                "model" => self.cpu.model = Some(cursor.text()?).filter(|model| !model.is_empty()),
                "topology" => {
                    let count = |name| {
                        let count = child.parsed(name, "number")?;
                        Ok(count.unwrap_or(1))
                    };
                    self.cpu.topology = Some(Topology {
                        sockets: count("sockets")?,
                        dies: count("dies")?,
                        clusters: count("clusters")?,
                        cores: count("cores")?,
                        threads: count("threads")?,
                    });
                }
                "numa" => self.memory.read_cells(cursor)?,
                _ => {}
            }
            Ok(())
        })
    }

    fn read_devices(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| match child.name() {
            "memory" => self.memory.read_device(cursor, child),
            _ => self.devices.read(cursor, child),
        })
    }
}
