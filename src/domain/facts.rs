//! [`Domain`]: the view of a domain's live XML that hotplug and monitoring work on.

use serde::{Deserialize, Serialize};

use super::cpu::DomainCpu;
use super::definition::DomainDefinition;
use super::devices::{AgentChannel, AliasedDevice, Balloon};
use super::memory::Memory;
use super::state::DomainState;
use super::vcpus::Vcpus;
use crate::xml::{DocumentError, ElementError};

/// A domain's live XML and its state. Part of each journal record, so fields are only added, with
/// a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Domain {
    /// Tenant-controlled text.
    pub name: String,
    pub uuid: Option<String>,
    /// libvirt's number of the running domain; each start assigns a new one.
    pub id: Option<u32>,
    /// The domain type: `kvm`, `qemu` …
    pub virt_type: String,
    /// The state at the time of the XML.
    pub state: DomainState,
    pub arch: Option<String>,
    /// The machine type; canonical in live XML.
    pub machine: Option<String>,
    /// x86 and Arm guests learn of hotplug by ACPI.
    pub acpi: bool,
    pub cpu: DomainCpu,
    pub vcpus: Vcpus,
    pub memory: Memory,
    pub balloon: Balloon,
    pub agent: AgentChannel,
    /// Every device, other than memory, that has an alias.
    pub devices: Vec<AliasedDevice>,
}

impl Domain {
    /// Reads a domain's XML; `document` names it in errors.
    ///
    /// # Errors
    /// A document that is not a domain, has no name or memory, or in which a known value is
    /// malformed.
    pub fn parse(document: &str, bytes: &[u8], state: DomainState) -> Result<Self, DocumentError> {
        DomainDefinition::parse(document, bytes, |definition| {
            Self::from_definition(definition, state)
        })
    }

    /// Takes the view of a definition.
    ///
    /// # Errors
    /// A definition without name or memory, or whose numbers contradict each other.
    pub fn from_definition(
        definition: DomainDefinition,
        state: DomainState,
    ) -> Result<Self, ElementError> {
        let DomainDefinition { cpu, devices, .. } = definition;
        let name = definition.name;
        Ok(Self {
            name: name.ok_or_else(|| ElementError::new("has no <name>"))?,
            uuid: definition.uuid,
            id: definition.id,
            virt_type: definition.virt_type.unwrap_or_default(),
            state,
            arch: definition.arch,
            machine: definition.machine,
            acpi: definition.acpi,
            cpu: DomainCpu {
                mode: cpu.mode,
                model: cpu.model,
                topology: cpu.topology,
            },
            vcpus: definition.vcpus.resolve()?,
            memory: definition
                .memory
                .resolve(devices.memory, definition.backing.huge_pages)?,
            balloon: devices.balloon,
            agent: devices.agent,
            devices: devices.aliased,
        })
    }

    /// Returns the number of vCPUs that are plugged or unplugged together: a core's threads on
    /// pseries, otherwise one (`qemuValidateDefGetVcpuHotplugGranularity`, libvirt 11.3).
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
