//! `<domainCapabilities>`: the abilities of one emulator for one architecture, machine type and
//! domain type.
//!
//! The types follow `virDomainCapsFormat` (libvirt 11.3, src/conf/domain_capabilities.c) and
//! docs/formatdomaincaps.rst up to libvirt 12.x. An element with `supported='no'` is empty. Newer
//! libvirts may add values to any enum.

use std::collections::BTreeMap;

use serde::Serialize;

use super::cpu::{CpuModes, read_cpu_modes};
use super::vcpus::VcpuMax;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainCapabilities {
    /// Path of the emulator binary.
    pub emulator: Option<String>,
    /// `kvm`, `qemu`, `xen` …
    pub virt_type: Option<String>,
    /// Canonical name of the machine type.
    pub machine: Option<String>,
    pub arch: Option<String>,
    /// The machine type's maximum; with `kvm`, the lower of that and KVM's own
    /// (`virQEMUCapsFillDomainCaps`). It does not account for EIM.
    pub max_vcpus: VcpuMax,
    pub io_threads: Option<bool>,
    /// Firmware and loader
    pub os: Section,
    pub cpu: CpuModes,
    pub memory_backing: Section,
    /// By element name: `disk`, `hostdev`, `tpm` …
    pub devices: BTreeMap<String, Section>,
    /// By element name: `genid`, `gic`, `backup`, `s390-pv`, `tdx`, `launchSecurity` … Features
    /// with a type of their own are in the fields below.
    pub features: BTreeMap<String, Section>,
    /// AMD encrypted guests; `None` unless supported.
    pub sev: Option<Sev>,
    /// Intel enclaves; `None` unless supported.
    pub sgx: Option<Sgx>,
    /// `None` before libvirt 9.0, which introduced the element.
    pub hyperv: Option<Hyperv>,
    /// Number of unknown elements that were skipped.
    pub unknown_elements: usize,
}

/// An element with `supported` that contains values, enums and nested sections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Section {
    /// `None` if the element or the attribute is absent.
    pub supported: Option<bool>,
    /// Direct `<value>` children, such as firmware files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// `<enum name=…>` by name. An enum may be empty.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub enums: BTreeMap<String, Vec<String>>,
    /// Nested sections, such as `os/loader`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sections: BTreeMap<String, Section>,
}

impl Section {
    pub fn is_supported(&self) -> bool {
        self.supported == Some(true)
    }

    /// True if the enum `name` lists `value`.
    pub fn offers(&self, name: &str, value: &str) -> bool {
        self.enums
            .get(name)
            .is_some_and(|values| values.iter().any(|have| have == value))
    }
}

/// `features/sev` with `supported='yes'`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sev {
    /// The bit that marks an encrypted page in a page table entry.
    pub c_bit_position: Option<u32>,
    /// Number of physical address bits that encryption takes.
    pub reduced_physical_bits: Option<u32>,
    /// Maximum number of concurrent SEV guests.
    pub max_guests: Option<u32>,
    /// Maximum number of concurrent SEV-ES guests. SEV-ES is available if it is above 0.
    pub max_es_guests: Option<u32>,
}

/// `features/sgx` with `supported='yes'`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sgx {
    pub flexible_launch_control: Option<bool>,
    pub sgx1: Option<bool>,
    pub sgx2: Option<bool>,
    /// Size of the enclave page cache.
    pub section_size_kib: Option<u64>,
}

/// `features/hyperv`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hyperv {
    pub supported: bool,
    /// `relaxed`, `stimer` …
    pub enlightenments: Vec<String>,
    /// Default of each enlightenment (since about libvirt 11.10).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub defaults: BTreeMap<String, String>,
}

impl DomainCapabilities {
    /// Parses a `<domainCapabilities>` document; `document` names it in errors.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domainCapabilities"], |cursor, _| {
            let mut facts = Self::default();
            cursor.children(|cursor, child| {
                match child.name() {
                    "path" => facts.emulator = cursor.non_empty_text()?,
                    "domain" => facts.virt_type = cursor.non_empty_text()?,
                    "machine" => facts.machine = cursor.non_empty_text()?,
                    "arch" => facts.arch = cursor.non_empty_text()?,
                    "vcpu" => facts.max_vcpus = VcpuMax::read(child, "max")?,
                    "iothreads" => facts.io_threads = child.yes_no("supported")?,
                    "os" => facts.os = read_section(cursor, child)?,
                    "cpu" => facts.cpu = read_cpu_modes(cursor)?,
                    "memoryBacking" => facts.memory_backing = read_section(cursor, child)?,
                    "devices" => facts.devices = read_sections(cursor)?,
                    "features" => read_features(cursor, &mut facts)?,
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })?;
            facts.unknown_elements = cursor.unknown_elements();
            Ok(facts)
        })
    }

    /// True if `launchSecurity` offers this type of confidential guest: `sev-snp`, `tdx` …
    pub fn launches(&self, sectype: &str) -> bool {
        self.features
            .get("launchSecurity")
            .is_some_and(|section| section.is_supported() && section.offers("sectype", sectype))
    }

    /// True if `features` has this element with `supported='yes'`.
    pub fn has_feature(&self, name: &str) -> bool {
        self.features.get(name).is_some_and(Section::is_supported)
    }
}

fn read_features(
    cursor: &mut Cursor<'_>,
    facts: &mut DomainCapabilities,
) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        let supported = child.yes_no("supported")?;
        match child.name() {
            "sev" => facts.sev = Some(read_sev(cursor)?).filter(|_| supported == Some(true)),
            "sgx" => facts.sgx = Some(read_sgx(cursor)?).filter(|_| supported == Some(true)),
            "hyperv" => facts.hyperv = Some(read_hyperv(cursor, supported == Some(true))?),
            name => {
                let section = read_section(cursor, child)?;
                facts.features.insert(name.to_owned(), section);
            }
        }
        Ok(())
    })
}

fn read_sections(cursor: &mut Cursor<'_>) -> Result<BTreeMap<String, Section>, ElementError> {
    cursor.fill(BTreeMap::new(), |cursor, child, sections| {
        sections.insert(child.name().to_owned(), read_section(cursor, child)?);
        Ok(())
    })
}

fn read_section(cursor: &mut Cursor<'_>, element: &Element<'_>) -> Result<Section, ElementError> {
    let section = Section {
        supported: element.yes_no("supported")?,
        ..Section::default()
    };
    cursor.fill(section, |cursor, child, section| {
        match child.name() {
            "value" => section.values.push(cursor.text()?),
            "enum" => {
                let values = section.enums.entry(child.text("name")?.unwrap_or_default());
                values.or_default().extend(cursor.texts_of("value")?);
            }
            name => {
                let nested = read_section(cursor, child)?;
                section.sections.insert(name.to_owned(), nested);
            }
        }
        Ok(())
    })
}

fn read_sev(cursor: &mut Cursor<'_>) -> Result<Sev, ElementError> {
    cursor.fill(Sev::default(), |cursor, child, sev| {
        match child.name() {
            "cbitpos" => sev.c_bit_position = Some(cursor.parsed("number")?),
            "reducedPhysBits" => sev.reduced_physical_bits = Some(cursor.parsed("number")?),
            "maxGuests" => sev.max_guests = Some(cursor.parsed("number")?),
            "maxESGuests" => sev.max_es_guests = Some(cursor.parsed("number")?),
            "cpu0Id" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_sgx(cursor: &mut Cursor<'_>) -> Result<Sgx, ElementError> {
    let yes_no = |text: String| match text.as_str() {
        "yes" => Ok(Some(true)),
        "no" => Ok(Some(false)),
        _ => Err(ElementError::new("must be 'yes' or 'no'")),
    };
    cursor.fill(Sgx::default(), |cursor, child, sgx| {
        match child.name() {
            "flc" => sgx.flexible_launch_control = yes_no(cursor.text()?)?,
            "sgx1" => sgx.sgx1 = yes_no(cursor.text()?)?,
            "sgx2" => sgx.sgx2 = yes_no(cursor.text()?)?,
            "section_size" => sgx.section_size_kib = Some(cursor.parsed("number of KiB")?),
            "sections" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_hyperv(cursor: &mut Cursor<'_>, supported: bool) -> Result<Hyperv, ElementError> {
    let hyperv = Hyperv {
        supported,
        ..Hyperv::default()
    };
    cursor.fill(hyperv, |cursor, child, hyperv| {
        match child.name() {
            "enum" if child.attribute("name")?.as_deref() == Some("features") => {
                hyperv.enlightenments = cursor.texts_of("value")?;
            }
            "defaults" => cursor.children(|cursor, default| {
                let (name, value) = (default.name().to_owned(), cursor.text()?);
                hyperv.defaults.insert(name, value);
                Ok(())
            })?,
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}
