//! CPU modes and models: `/domainCapabilities/cpu`, and the `<cpu>` from hypervisor-cpu-baseline.

use std::collections::BTreeMap;

use quick_xml::escape::escape;
use serde::Serialize;

use crate::units::words;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// `/domainCapabilities/cpu`. A mode that the document does not mention is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuModes {
    pub host_passthrough: Option<PlainMode>,
    pub maximum: Option<PlainMode>,
    /// The named model closest to the host CPU, with the features that differ.
    pub host_model: Option<HostModel>,
    /// True if named models are supported.
    pub custom: Option<bool>,
    /// In libvirt's order.
    pub models: Vec<CpuModel>,
}

/// A CPU mode without a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlainMode {
    pub supported: bool,
    /// True if a domain can request migratability: `hostPassthroughMigratable` or
    /// `maximumMigratable` lists `on`.
    pub migratable: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostModel {
    pub supported: bool,
    /// Some real documents have a host-model without a model.
    pub model: Option<String>,
    /// May contain a space.
    pub vendor: Option<String>,
    /// Maximum number of physical address bits of a guest.
    pub physical_address_limit: Option<u32>,
    /// Differences from the model, in libvirt's order.
    pub features: Vec<PolicyFeature>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyFeature {
    /// `sse4.2`
    pub name: String,
    /// `require`, `disable` … libvirt sometimes omits it on s390x.
    pub policy: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuModel {
    /// `EPYC-Genoa`
    pub name: String,
    /// `None` if libvirt omits the attribute.
    pub usable: Option<Usable>,
    /// libvirt writes `unknown` for a model without a vendor.
    pub vendor: Option<String>,
    /// The versioned name, if this is an alias (libvirt 10.10).
    pub canonical: Option<String>,
    /// True if QEMU plans to remove the model.
    pub deprecated: bool,
    /// The features that the host lacks, if the model is not usable (libvirt 10.9).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<String>,
}

words! {
    /// `usable` of a named model: whether the host supports all of its features.
    pub enum Usable {
        Yes = "yes",
        No = "no",
        /// libvirt reports `unknown`, or a value that is newer than this program.
        Unknown = "unknown",
    }
    else "is not one of yes, no, unknown"
}

/// A `<cpu>` definition, as hypervisor-cpu-baseline returns it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuDefinition {
    pub model: Option<String>,
    pub vendor: Option<String>,
    pub features: Vec<PolicyFeature>,
}

impl CpuModes {
    /// True if the host model adds a feature to its named model.
    pub fn adds_to_host_model(&self, feature: &str) -> bool {
        let listed = self.host_model.iter().flat_map(|host| &host.features);
        listed
            .filter(|listed| !matches!(listed.policy.as_deref(), Some("disable" | "forbid")))
            .any(|listed| listed.name == feature)
    }
}

impl HostModel {
    /// Writes the `<cpu>` definition that hypervisor-cpu-baseline expects, as virsh extracts it
    /// from the domain capabilities (`vshExtractCPUDefXMLs`). `None` without a model.
    pub fn to_cpu_xml(&self) -> Option<String> {
        let model = self.model.as_deref().filter(|_| self.supported)?;
        let mut xml = format!("<cpu><model>{}</model>", escape(model));
        if let Some(vendor) = &self.vendor {
            xml += &format!("<vendor>{}</vendor>", escape(vendor.as_str()));
        }
        for feature in &self.features {
            let policy = feature.policy.as_deref().unwrap_or("require");
            let (policy, name) = (escape(policy), escape(feature.name.as_str()));
            xml += &format!("<feature policy=\"{policy}\" name=\"{name}\"/>");
        }
        Some(xml + "</cpu>")
    }
}

impl CpuDefinition {
    /// Parses a `<cpu>` document; `document` names it in errors.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["cpu"], |cursor, _| {
            cursor.fill(Self::default(), |cursor, child, cpu| {
                match child.name() {
                    "model" => cpu.model = cursor.non_empty_text()?,
                    "vendor" => cpu.vendor = cursor.non_empty_text()?,
                    "feature" => cpu.features.extend(read_feature(child)?),
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })
        })
    }
}

pub(super) fn read_cpu_modes(cursor: &mut Cursor<'_>) -> Result<CpuModes, ElementError> {
    cursor.fill(CpuModes::default(), |cursor, mode, modes| {
        if mode.name() != "mode" {
            cursor.ignore_unknown();
            return Ok(());
        }
        let supported = mode.yes_no("supported")?.unwrap_or(false);
        match mode.attribute("name")?.as_deref() {
            Some("host-passthrough") => {
                modes.host_passthrough = Some(read_plain_mode(cursor, supported)?);
            }
            Some("maximum") => modes.maximum = Some(read_plain_mode(cursor, supported)?),
            Some("host-model") => modes.host_model = Some(read_host_model(cursor, supported)?),
            Some("custom") => {
                modes.custom = Some(supported);
                modes.models = read_models(cursor)?;
            }
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_plain_mode(cursor: &mut Cursor<'_>, supported: bool) -> Result<PlainMode, ElementError> {
    let mut migratable = false;
    cursor.children(|cursor, child| {
        match (child.name(), child.attribute("name")?.as_deref()) {
            ("enum", Some("hostPassthroughMigratable" | "maximumMigratable")) => {
                migratable = cursor.texts_of("value")?.iter().any(|value| value == "on");
            }
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(PlainMode {
        supported,
        migratable,
    })
}

fn read_host_model(cursor: &mut Cursor<'_>, supported: bool) -> Result<HostModel, ElementError> {
    let host_model = HostModel {
        supported,
        ..HostModel::default()
    };
    cursor.fill(host_model, |cursor, child, host_model| {
        match child.name() {
            // The first of several models wins.
            "model" => host_model.model = host_model.model.take().or(cursor.non_empty_text()?),
            "vendor" => host_model.vendor = cursor.non_empty_text()?,
            "maxphysaddr" => {
                host_model.physical_address_limit = child.parsed("limit", "number of bits")?;
            }
            "feature" => host_model.features.extend(read_feature(child)?),
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_feature(element: &Element<'_>) -> Result<Option<PolicyFeature>, ElementError> {
    let policy = element.non_empty("policy")?;
    let name = element.non_empty("name")?;
    Ok(name.map(|name| PolicyFeature { name, policy }))
}

/// Reads the models of the custom mode. `<blockers model=…>` usually follows its model as a sibling.
fn read_models(cursor: &mut Cursor<'_>) -> Result<Vec<CpuModel>, ElementError> {
    let mut models: Vec<CpuModel> = Vec::new();
    let mut blockers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    cursor.children(|cursor, child| {
        match child.name() {
            "model" => models.extend(read_model(cursor, child)?),
            "blockers" => {
                let model = child.text("model")?.unwrap_or_default();
                let features = read_blockers(cursor)?;
                match models.last_mut() {
                    Some(last) if last.name == model => last.blockers = features,
                    _ => drop(blockers.insert(model, features)),
                }
            }
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    for model in &mut models {
        if let Some(features) = blockers.remove(&model.name) {
            model.blockers = features;
        }
    }
    Ok(models)
}

fn read_model(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<Option<CpuModel>, ElementError> {
    let usable = element.attribute("usable")?;
    let usable = usable.map(|usable| usable.parse().unwrap_or(Usable::Unknown));
    let vendor = element.text("vendor")?.filter(|vendor| vendor != "unknown");
    let canonical = element.non_empty("canonical")?;
    let deprecated = element.yes_no("deprecated")?.unwrap_or(false);
    Ok(cursor.non_empty_text()?.map(|name| CpuModel {
        name,
        usable,
        vendor,
        canonical,
        deprecated,
        blockers: Vec::new(),
    }))
}

fn read_blockers(cursor: &mut Cursor<'_>) -> Result<Vec<String>, ElementError> {
    cursor.fill(Vec::new(), |cursor, child, features| {
        match child.name() {
            "feature" => features.extend(child.non_empty("name")?),
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}
