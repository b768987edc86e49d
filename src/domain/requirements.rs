//! [`NodeRequirements`]: the properties of its node that a running domain depends on.

use super::definition::DomainDefinition;
use crate::xml::DocumentError;

/// The machine type, CPU model and CPU features that a running domain depends on. libvirt writes
/// the canonical machine type and, for host-model, the resolved model into the live XML.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRequirements {
    /// The machine type by canonical name.
    pub machine: Option<String>,
    /// `None` with host-passthrough.
    pub cpu_model: Option<String>,
    pub cpu_features: Vec<String>,
}

impl NodeRequirements {
    /// Reads a domain's live XML; `document` names it in errors.
    ///
    /// # Errors
    /// A document that is not a domain, or in which a known value is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        DomainDefinition::parse(document, bytes, |definition| {
            let cpu = definition.cpu;
            let features = cpu.required().chain(cpu.forced()).map(str::to_owned);
            Ok(Self {
                machine: definition.machine,
                cpu_features: features.collect(),
                cpu_model: cpu.model,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_domain_requires_machine_model_and_required_features() {
        let xml = "
<domain type='kvm' id='1'>
  <name>vm1</name>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <cpu mode='custom' match='exact' check='full'>
    <model fallback='forbid'>EPYC-Genoa</model>
    <feature policy='require' name='x2apic'/>
    <feature policy='disable' name='pku'/>
  </cpu>
  <devices><disk><driver name='qemu'/></disk></devices>
</domain>";
        let requirements = NodeRequirements::parse("vm1", xml.as_bytes()).unwrap();
        assert_eq!(requirements.machine.as_deref(), Some("pc-q35-10.0"));
        assert_eq!(requirements.cpu_model.as_deref(), Some("EPYC-Genoa"));
        assert_eq!(requirements.cpu_features, ["x2apic"]);
    }

    #[test]
    fn domain_without_cpu_requires_no_model() {
        let requirements =
            NodeRequirements::parse("vm", b"<domain><os><type>hvm</type></os></domain>").unwrap();
        assert_eq!(requirements, NodeRequirements::default());
    }
}
