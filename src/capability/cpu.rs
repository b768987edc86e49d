//! CPU modes and models: `/domainCapabilities/cpu`, and the `<cpu>` of hypervisor-cpu-baseline.

use std::collections::BTreeMap;

use quick_xml::events::BytesText;
use serde::Serialize;

use super::read::{non_empty, read_values};
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// `/domainCapabilities/cpu`. A mode that the document does not name is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuModes {
    /// The host's CPU as it is.
    pub host_passthrough: Option<PlainMode>,
    /// The most that the hypervisor can give.
    pub maximum: Option<PlainMode>,
    /// The named model closest to the host.
    pub host_model: Option<HostModel>,
    /// Whether named models are supported.
    pub custom: Option<bool>,
    /// The named models, in libvirt's order.
    pub models: Vec<CpuModel>,
}

/// A mode without a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PlainMode {
    /// Whether it can be used.
    pub supported: bool,
    /// Whether a domain with it can be migrated if it asks so: `hostPassthroughMigratable` or
    /// `maximumMigratable` lists `on`.
    pub migratable: bool,
}

/// The host-model mode.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostModel {
    /// Whether it can be used.
    pub supported: bool,
    /// The model's name; a host-model without one exists in the field.
    pub model: Option<String>,
    /// The vendor's name; a space in it has been seen.
    pub vendor: Option<String>,
    /// The most physical address bits a guest can have.
    pub physical_address_limit: Option<u32>,
    /// Features beside the model, in libvirt's order.
    pub features: Vec<PolicyFeature>,
}

/// `feature` with its policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyFeature {
    /// libvirt's name of the feature: `sse4.2`.
    pub name: String,
    /// `require`, `disable` …; s390x leaves it out at times.
    pub policy: Option<String>,
}

/// A named model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuModel {
    /// The name: `EPYC-Genoa`.
    pub name: String,
    /// Whether it runs here as it is; `None` where libvirt does not print the attribute.
    pub usable: Option<Usable>,
    /// The vendor; libvirt prints `unknown` for none.
    pub vendor: Option<String>,
    /// The versioned name that this one is an alias of (libvirt 10.10).
    pub canonical: Option<String>,
    /// Whether the hypervisor is going to drop it.
    pub deprecated: bool,
    /// The features that keep it from running here, if it is not usable (libvirt 10.9).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<String>,
}

/// `usable` of a named model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Usable {
    /// It runs here as it is.
    Yes,
    /// It does not.
    No,
    /// The hypervisor cannot tell, or libvirt says something newer than this program.
    Unknown,
}

/// A `<cpu>` definition: what hypervisor-cpu-baseline prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuDefinition {
    /// The model, if any.
    pub model: Option<String>,
    /// The vendor, if any.
    pub vendor: Option<String>,
    /// The features with their policies.
    pub features: Vec<PolicyFeature>,
}

impl HostModel {
    /// The host model as the `<cpu>` definition that hypervisor-cpu-baseline takes, as virsh makes
    /// it of the domain capabilities (`vshExtractCPUDefXMLs`). `None` without a model.
    pub fn to_cpu_xml(&self) -> Option<String> {
        let model = self.model.as_deref().filter(|_| self.supported)?;
        let mut writer = quick_xml::Writer::new(Vec::new());
        writer
            .create_element("cpu")
            .write_inner_content(|writer| {
                writer
                    .create_element("model")
                    .write_text_content(BytesText::new(model))?;
                if let Some(vendor) = &self.vendor {
                    writer
                        .create_element("vendor")
                        .write_text_content(BytesText::new(vendor))?;
                }
                for feature in &self.features {
                    let policy = feature.policy.as_deref().unwrap_or("require");
                    let attributes = [("policy", policy), ("name", feature.name.as_str())];
                    writer
                        .create_element("feature")
                        .with_attributes(attributes)
                        .write_empty()?;
                }
                Ok(())
            })
            .ok()?;
        String::from_utf8(writer.into_inner()).ok()
    }
}

impl CpuDefinition {
    /// Reads a `<cpu>` document; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none, or one in which a known value is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["cpu"], |cursor, _| {
            let mut cpu = Self::default();
            cursor.children(|cursor, child| {
                match child.name() {
                    "model" => cpu.model = non_empty(cursor.text()?),
                    "vendor" => cpu.vendor = non_empty(cursor.text()?),
                    "feature" => cpu.features.extend(read_feature(child)?),
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })?;
            Ok(cpu)
        })
    }
}

pub(super) fn read_cpu_modes(cursor: &mut Cursor<'_>) -> Result<CpuModes, ElementError> {
    let mut modes = CpuModes::default();
    cursor.children(|cursor, mode| {
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
    })?;
    Ok(modes)
}

fn read_plain_mode(cursor: &mut Cursor<'_>, supported: bool) -> Result<PlainMode, ElementError> {
    let mut migratable = false;
    cursor.children(|cursor, child| {
        match (child.name(), child.attribute("name")?.as_deref()) {
            ("enum", Some("hostPassthroughMigratable" | "maximumMigratable")) => {
                migratable = read_values(cursor)?.iter().any(|value| value == "on");
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
    let mut host_model = HostModel {
        supported,
        ..HostModel::default()
    };
    cursor.children(|cursor, child| {
        match child.name() {
            // The first wins where there are several.
            "model" => host_model.model = host_model.model.take().or(non_empty(cursor.text()?)),
            "vendor" => host_model.vendor = non_empty(cursor.text()?),
            "maxphysaddr" => {
                host_model.physical_address_limit = child.parsed("limit", "number of bits")?;
            }
            "feature" => host_model.features.extend(read_feature(child)?),
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(host_model)
}

fn read_feature(element: &Element<'_>) -> Result<Option<PolicyFeature>, ElementError> {
    let policy = element.text("policy")?.and_then(non_empty);
    let name = element.text("name")?.and_then(non_empty);
    Ok(name.map(|name| PolicyFeature { name, policy }))
}

/// The models of the custom mode. `<blockers model=…>` are siblings that follow their model.
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
    let usable = element
        .attribute("usable")?
        .map(|usable| match usable.as_ref() {
            "yes" => Usable::Yes,
            "no" => Usable::No,
            _ => Usable::Unknown,
        });
    let vendor = element.text("vendor")?.filter(|vendor| vendor != "unknown");
    let canonical = element.text("canonical")?.and_then(non_empty);
    let deprecated = element.yes_no("deprecated")?.unwrap_or(false);
    Ok(non_empty(cursor.text()?).map(|name| CpuModel {
        name,
        usable,
        vendor,
        canonical,
        deprecated,
        blockers: Vec::new(),
    }))
}

fn read_blockers(cursor: &mut Cursor<'_>) -> Result<Vec<String>, ElementError> {
    let mut features = Vec::new();
    cursor.children(|cursor, child| {
        match child.name() {
            "feature" => features.extend(child.text("name")?.and_then(non_empty)),
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(features)
}
