//! `<cpu>` of a domain.

use quick_xml::events::BytesText;
use serde::Serialize;

use super::{Shape, VcpuRequirement};
use crate::capability::PolicyFeature;
use crate::xml::{Cursor, Element, ElementError};

/// What a domain asks of its CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuRequirement {
    /// `custom`, `host-model`, `host-passthrough`, `maximum`; none for the emulator's default.
    pub mode: Option<String>,
    /// The named model.
    pub model: Option<String>,
    /// `forbid`, or whether libvirt may take another model that is close: `allow`, its default.
    pub fallback: Option<String>,
    /// `minimum`, `exact` (libvirt's default) or `strict`.
    #[serde(rename = "match")]
    pub matching: Option<String>,
    /// What libvirt is to verify before a start; without it libvirt decides by the mode.
    pub check: Option<Check>,
    /// The vendor that the host must have.
    pub vendor: Option<String>,
    /// The features beside the model, with their policies.
    pub features: Vec<PolicyFeature>,
    /// `migratable=` of host-passthrough and maximum.
    pub migratable: Option<bool>,
}

/// `<cpu check=…>`: what libvirt verifies before a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Check {
    /// Nothing: QEMU drops the features it does not have.
    None,
    /// The definition against what libvirt knows of the host.
    Partial,
    /// The CPU that QEMU really made against the definition.
    Full,
}

impl CpuRequirement {
    /// The named model with its features as the `<cpu>` that libvirt compares with what the
    /// hypervisor has; `None` without a model.
    pub fn to_xml(&self) -> Option<String> {
        let model = self.model.as_deref()?;
        let mut writer = quick_xml::Writer::new(Vec::new());
        let matching = self.matching.as_deref().unwrap_or("exact");
        writer
            .create_element("cpu")
            .with_attributes([("mode", "custom"), ("match", matching)])
            .write_inner_content(|writer| {
                writer
                    .create_element("model")
                    .with_attribute(("fallback", "forbid"))
                    .write_text_content(BytesText::new(model))?;
                for feature in &self.features {
                    let policy = feature.policy.as_deref().unwrap_or("require");
                    writer
                        .create_element("feature")
                        .with_attributes([("policy", policy), ("name", &feature.name)])
                        .write_empty()?;
                }
                Ok(())
            })
            .ok()?;
        String::from_utf8(writer.into_inner()).ok()
    }

    /// What is verified before a start, with libvirt's own choice where the definition has none:
    /// software emulation is not held against the host, host-passthrough and maximum need not be
    /// (`qemuDomainDefCPUPostParse`).
    pub fn effective_check(&self, is_tcg: bool) -> Check {
        self.check.unwrap_or(match self.mode.as_deref() {
            Some("host-model") => Check::Partial,
            Some("custom") if self.model.is_some() && !is_tcg => Check::Partial,
            _ => Check::None,
        })
    }

    /// Whether the domain does without some feature that its model may have.
    pub fn gives_up_features(&self) -> bool {
        let without = ["disable", "forbid", "optional", "force"];
        let policies = self.features.iter().map(|f| f.policy.as_deref());
        policies.flatten().any(|policy| without.contains(&policy))
    }

    /// The features that the domain cannot do without.
    pub fn required(&self) -> impl Iterator<Item = &str> {
        self.with_policy(&["require"])
    }

    /// The features that the guest is to be told of whether they are there or not.
    pub fn forced(&self) -> impl Iterator<Item = &str> {
        self.with_policy(&["force"])
    }

    /// The features that must not be there.
    pub fn forbidden(&self) -> impl Iterator<Item = &str> {
        self.with_policy(&["forbid"])
    }

    fn with_policy(&self, policies: &'static [&'static str]) -> impl Iterator<Item = &str> {
        self.features
            .iter()
            // libvirt's default policy is `require`
            .filter(|f| policies.contains(&f.policy.as_deref().unwrap_or("require")))
            .map(|feature| feature.name.as_str())
    }
}

/// The element; the topology in it belongs to the vCPUs.
pub(super) fn read(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
    vcpus: &mut VcpuRequirement,
) -> Result<CpuRequirement, ElementError> {
    let mut cpu = CpuRequirement {
        mode: element.text("mode")?,
        matching: element.text("match")?,
        migratable: element.yes_no("migratable")?,
        check: match element.attribute("check")?.as_deref() {
            Some("none") => Some(Check::None),
            Some("partial") => Some(Check::Partial),
            Some("full") => Some(Check::Full),
            _ => None,
        },
        ..CpuRequirement::default()
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "model" => {
                cpu.fallback = child.text("fallback")?;
                cpu.model = Some(cursor.text()?).filter(|model| !model.is_empty());
            }
            "vendor" => cpu.vendor = Some(cursor.text()?).filter(|vendor| !vendor.is_empty()),
            "feature" => cpu.features.extend(read_feature(child)?),
            "topology" => {
                vcpus.topology = Some(read_topology(child)?);
                vcpus.topology_lacks = lacking(child)?;
            }
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    // A model without a mode is a custom one (`virCPUDefParseXML`).
    if cpu.mode.is_none() && cpu.model.is_some() {
        cpu.mode = Some("custom".to_owned());
    }
    Ok(cpu)
}

fn read_feature(element: &Element<'_>) -> Result<Option<PolicyFeature>, ElementError> {
    let policy = element.text("policy")?;
    let name = element.text("name")?.filter(|name| !name.is_empty());
    Ok(name.map(|name| PolicyFeature { name, policy }))
}

fn read_topology(element: &Element<'_>) -> Result<Shape, ElementError> {
    let count = |name| {
        let count = element.parsed(name, "number")?;
        Ok::<u32, ElementError>(count.unwrap_or(1))
    };
    Ok(Shape {
        sockets: count("sockets")?,
        dies: count("dies")?,
        clusters: count("clusters")?,
        cores: count("cores")?,
        threads: count("threads")?,
    })
}

/// libvirt wants these three (`virCPUDefParseXML`).
fn lacking(element: &Element<'_>) -> Result<Option<&'static str>, ElementError> {
    for name in ["sockets", "cores", "threads"] {
        if element.attribute(name)?.is_none() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
