//! [`NodeRequirements`]: the properties of its node that a running domain depends on.

use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

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
    /// Only `<os>` and `<cpu>` are read, so a malformed value elsewhere costs no label.
    ///
    /// # Errors
    /// A document that is not a domain, or in which a value that is needed is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domain"], |cursor, _| {
            let mut requirements = Self::default();
            cursor.children(|cursor, child| match child.name() {
                "os" => cursor.children(|cursor, child| requirements.read_os(cursor, child)),
                "cpu" => cursor.children(|cursor, child| requirements.read_cpu(cursor, child)),
                _ => cursor.skip(),
            })?;
            Ok(requirements)
        })
    }

    fn read_os(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        if element.name() == "type" {
            self.machine = element.text("machine")?;
        }
        cursor.skip()
    }

    fn read_cpu(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        match element.name() {
            "model" => self.cpu_model = Some(cursor.text()?).filter(|model| !model.is_empty()),
            "feature" => {
                let policy = element.attribute("policy")?;
                // libvirt's default policy is `require`. The guest sees a forced feature as well.
                if matches!(policy.as_deref(), None | Some("require" | "force")) {
                    let name = element.text("name")?.filter(|name| !name.is_empty());
                    self.cpu_features.extend(name);
                }
            }
            _ => cursor.skip()?,
        }
        Ok(())
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

    #[test]
    fn malformed_value_that_no_label_needs_leaves_the_domain_readable() {
        for malformed in [
            "<vcpu current='many'>none</vcpu>",
            "<memory unit='furlong'>-1</memory>",
            "<cputune><vcpupin vcpu='x' cpuset='y'/></cputune>",
            "<clock><timer name='tsc' frequency='fast'/></clock>",
            "<features><smm state='perhaps'/></features>",
            "<devices><memballoon><stats period='often'/></memballoon></devices>",
        ] {
            let xml = format!(
                "<domain id='none'>{malformed}<name>d</name><os><loader readonly='perhaps'/>\
                 <type machine='pc-q35-10.0'>hvm</type></os><cpu migratable='perhaps'>\
                 <topology sockets='x'/><model>EPYC</model><feature name='svm'/></cpu></domain>"
            );
            let requirements = NodeRequirements::parse("d", xml.as_bytes()).unwrap();
            assert_eq!(requirements.machine.as_deref(), Some("pc-q35-10.0"));
            assert_eq!(requirements.cpu_model.as_deref(), Some("EPYC"));
            assert_eq!(requirements.cpu_features, ["svm"]);
        }
    }
}
