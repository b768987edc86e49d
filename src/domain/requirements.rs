//! [`NodeRequirements`]: the properties of its node that a running domain depends on.

use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

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
    /// Only what a label depends on is read, so a malformed value elsewhere costs no label.
    ///
    /// # Errors
    /// A document that is not a domain, or in which a value that is needed is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domain"], |cursor, _| {
            let mut requirements = Self::default();
            cursor.children(|cursor, child| requirements.read_child(cursor, child))?;
            Ok(requirements)
        })
    }

    fn read_child(
        &mut self,
        cursor: &mut Cursor<'_>,
        child: &Element<'_>,
    ) -> Result<(), ElementError> {
        match child.name() {
            "os" => cursor.children(|cursor, child| self.read_os(cursor, child)),
            "cpu" => cursor.children(|cursor, child| self.read_cpu(cursor, child)),
            "features" => cursor.children(|cursor, child| self.read_feature(cursor, child)),
            "cputune" => cursor.children(|cursor, child| {
                self.real_time |= child.name() == "vcpusched" && is_real_time(child)?;
                cursor.skip()
            }),
            "launchSecurity" => {
                self.launch_security = child.text("type")?;
                cursor.skip()
            }
            _ => cursor.skip(),
        }
    }

    fn read_feature(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        if element.name() != "hyperv" {
            return cursor.skip();
        }
        cursor.children(|cursor, enlightenment| {
            if enlightenment.attribute("state")?.as_deref() == Some("on") {
                self.enlightenments.push(enlightenment.name().to_owned());
            }
            cursor.skip()
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

/// True if a `<vcpusched>` gives vCPUs a real-time scheduler.
fn is_real_time(element: &Element<'_>) -> Result<bool, ElementError> {
    let scheduler = element.attribute("scheduler")?;
    Ok(matches!(scheduler.as_deref(), Some("fifo" | "rr")))
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
