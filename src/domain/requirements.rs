//! What a running domain needs of its node: machine type, CPU model and features.

use crate::xml::{self, Cursor, DocumentError, ElementError};

/// What a running domain needs of its node. libvirt writes the canonical machine name and, for
/// the host-model mode, the real model into the live definition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeRequirements {
    /// The machine type by canonical name.
    pub machine: Option<String>,
    /// The named CPU model; none with host-passthrough.
    pub cpu_model: Option<String>,
    /// The CPU features that the domain requires.
    pub cpu_features: Vec<String>,
}

impl NodeRequirements {
    /// Reads a domain's live XML; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domain"], |cursor, _| {
            let mut needs = Self::default();
            cursor.children(|cursor, child| match child.name() {
                "os" => read_os(cursor, &mut needs),
                "cpu" => read_cpu(cursor, &mut needs),
                _ => Ok(()),
            })?;
            Ok(needs)
        })
    }
}

fn read_os(cursor: &mut Cursor<'_>, needs: &mut NodeRequirements) -> Result<(), ElementError> {
    cursor.children(|_, child| {
        if child.name() == "type" {
            needs.machine = child.text("machine")?;
        }
        Ok(())
    })
}

fn read_cpu(cursor: &mut Cursor<'_>, needs: &mut NodeRequirements) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "model" => needs.cpu_model = Some(cursor.text()?).filter(|model| !model.is_empty()),
            "feature" => {
                let policy = child.attribute("policy")?;
                if matches!(policy.as_deref(), None | Some("require" | "force")) {
                    needs.cpu_features.extend(child.text("name")?);
                }
            }
            _ => {}
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_needs_its_machine_model_and_required_features() {
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
        let needs = NodeRequirements::parse("vm1", xml.as_bytes()).unwrap();
        assert_eq!(needs.machine.as_deref(), Some("pc-q35-10.0"));
        assert_eq!(needs.cpu_model.as_deref(), Some("EPYC-Genoa"));
        assert_eq!(needs.cpu_features, ["x2apic"]);
    }

    #[test]
    fn a_domain_without_a_cpu_needs_no_model() {
        let needs =
            NodeRequirements::parse("vm", b"<domain><os><type>hvm</type></os></domain>").unwrap();
        assert_eq!(needs, NodeRequirements::default());
    }
}
