//! [`NodeRequirements`]: the properties of its node that a running domain depends on.

use super::definition::DomainDefinition;
use crate::xml::DocumentError;

/// The capabilities of its node that a running domain depends on. libvirt writes the canonical
/// machine type and, for host-model, the resolved model into the live XML.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRequirements {
    /// The machine type by canonical name.
    pub machine: Option<String>,
    /// `None` with host-passthrough.
    pub cpu_model: Option<String>,
    pub cpu_features: Vec<String>,
    /// The enabled Hyper-V enlightenments, by libvirt's names.
    pub enlightenments: Vec<String>,
    /// The kind of confidential guest: `sev`, `sev-snp`, `tdx`, `s390-pv`.
    pub launch_security: Option<String>,
    /// True if vCPUs have a real-time scheduler.
    pub real_time: bool,
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
                enlightenments: definition.enlightenments,
                launch_security: definition.launch_security,
                real_time: definition.placement.real_time,
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
    fn real_time_hyperv_and_encryption_are_requirements() {
        let requirements = |xml: &str| NodeRequirements::parse("vm", xml.as_bytes()).unwrap();
        let all = requirements(
            "<domain><cputune><vcpupin vcpu='0' cpuset='1'/>\
             <vcpusched vcpus='0' scheduler='fifo' priority='1'/></cputune>\
             <features><hyperv mode='custom'><relaxed state='on'/><vapic state='off'/></hyperv>\
             </features><launchSecurity type='sev-snp'/></domain>",
        );
        assert!(all.real_time);
        assert_eq!(all.enlightenments, ["relaxed"]);
        assert_eq!(all.launch_security.as_deref(), Some("sev-snp"));
        let batch = "<domain><cputune><vcpusched vcpus='0' scheduler='batch'/></cputune></domain>";
        assert!(!requirements(batch).real_time);
    }

    #[test]
    fn domain_without_cpu_requires_no_model() {
        let requirements =
            NodeRequirements::parse("vm", b"<domain><os><type>hvm</type></os></domain>").unwrap();
        assert_eq!(requirements, NodeRequirements::default());
    }
}
