//! `<domainCapabilities>`: what one emulator offers for one architecture, machine and domain type.
//!
//! Shapes after `virDomainCapsFormat` (libvirt 11.3, src/conf/domain_capabilities.c) and
//! docs/formatdomaincaps.rst, up to what 12.x adds. `supported='no'` elements are empty; every
//! enum is an open set.

use std::collections::BTreeMap;

use serde::Serialize;

use super::cpu::{CpuModes, read_cpu_modes};
use super::read::{non_empty, read_values};
use super::vcpus::VcpuMax;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// A `<domainCapabilities>` document.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainCapabilities {
    /// The emulator's path.
    pub emulator: Option<String>,
    /// The domain type: `kvm`, `qemu`, `xen` …
    pub virt_type: Option<String>,
    /// The machine type, with its canonical name.
    pub machine: Option<String>,
    /// The guest architecture.
    pub arch: Option<String>,
    /// For kvm the lower of the machine's maximum and KVM's own
    /// (`virQEMUCapsFillDomainCaps`), else the machine's. It knows nothing of EIM.
    pub max_vcpus: VcpuMax,
    /// Whether I/O threads are supported.
    pub io_threads: Option<bool>,
    /// Firmware and loader: `os`.
    pub os: Section,
    /// The CPU modes and models.
    pub cpu: CpuModes,
    /// Memory backing: `sourceType`.
    pub memory_backing: Section,
    /// Device kinds by element name: `disk`, `hostdev`, `tpm` …
    pub devices: BTreeMap<String, Section>,
    /// Features by element name, except those with a shape of their own below: `genid`, `gic`,
    /// `backup`, `s390-pv`, `tdx`, `launchSecurity` …
    pub features: BTreeMap<String, Section>,
    /// AMD's encrypted guests, if supported.
    pub sev: Option<Sev>,
    /// Intel's enclaves, if supported.
    pub sgx: Option<Sgx>,
    /// Hyper-V enlightenments, if the document says anything of them (libvirt 9.0).
    pub hyperv: Option<Hyperv>,
    /// Elements of no known kind, which were passed over.
    pub unknown_elements: usize,
}

/// An element with `supported`, values, enums and sections within.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Section {
    /// `None` where the element is absent or does not say.
    pub supported: Option<bool>,
    /// Direct `<value>` elements, such as firmware files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
    /// `<enum name=…>` by name. An enum may be there and empty.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub enums: BTreeMap<String, Vec<String>>,
    /// Elements within that are sections themselves, such as `os/loader`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sections: BTreeMap<String, Section>,
}

impl Section {
    /// Whether it says `supported='yes'`.
    pub fn is_supported(&self) -> bool {
        self.supported == Some(true)
    }

    /// Whether the enum `name` lists `value`.
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
    /// The bit in a page table entry that says "encrypted".
    pub c_bit_position: Option<u32>,
    /// Physical address bits that are lost to encryption.
    pub reduced_physical_bits: Option<u32>,
    /// How many SEV guests there can be at a time.
    pub max_guests: Option<u32>,
    /// How many SEV-ES guests there can be at a time; SEV-ES is there if this is above 0.
    pub max_es_guests: Option<u32>,
}

/// `features/sgx` with `supported='yes'`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sgx {
    /// Flexible launch control.
    pub flexible_launch_control: Option<bool>,
    /// SGX version 1.
    pub sgx1: Option<bool>,
    /// SGX version 2.
    pub sgx2: Option<bool>,
    /// The enclave page cache, in KiB.
    pub section_size_kib: Option<u64>,
}

/// `features/hyperv`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hyperv {
    /// Whether there are any.
    pub supported: bool,
    /// The enlightenments' names: `relaxed`, `stimer` …
    pub enlightenments: Vec<String>,
    /// What libvirt sets by itself for each (libvirt 11.10 or so).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub defaults: BTreeMap<String, String>,
}

impl DomainCapabilities {
    /// Reads a `<domainCapabilities>` document; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none, or one in which a known value is malformed.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["domainCapabilities"], |cursor, _| {
            let mut facts = Self::default();
            cursor.children(|cursor, child| {
                match child.name() {
                    "path" => facts.emulator = non_empty(cursor.text()?),
                    "domain" => facts.virt_type = non_empty(cursor.text()?),
                    "machine" => facts.machine = non_empty(cursor.text()?),
                    "arch" => facts.arch = non_empty(cursor.text()?),
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

    /// Whether `launchSecurity` offers this type of confidential guest: `sev-snp`, `tdx` …
    pub fn launches(&self, sectype: &str) -> bool {
        self.features
            .get("launchSecurity")
            .is_some_and(|section| section.is_supported() && section.offers("sectype", sectype))
    }

    /// Whether `features` has this element with `supported='yes'`.
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
            "sev" => facts.sev = read_sev(cursor)?.filter(|_| supported == Some(true)),
            "sgx" => facts.sgx = read_sgx(cursor)?.filter(|_| supported == Some(true)),
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
    let mut sections = BTreeMap::new();
    cursor.children(|cursor, child| {
        sections.insert(child.name().to_owned(), read_section(cursor, child)?);
        Ok(())
    })?;
    Ok(sections)
}

fn read_section(cursor: &mut Cursor<'_>, element: &Element<'_>) -> Result<Section, ElementError> {
    let mut section = Section {
        supported: element.yes_no("supported")?,
        ..Section::default()
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "value" => section.values.push(cursor.text()?),
            "enum" => {
                let name = child.text("name")?.unwrap_or_default();
                section
                    .enums
                    .entry(name)
                    .or_default()
                    .extend(read_values(cursor)?);
            }
            name => {
                section
                    .sections
                    .insert(name.to_owned(), read_section(cursor, child)?);
            }
        }
        Ok(())
    })?;
    Ok(section)
}

fn read_sev(cursor: &mut Cursor<'_>) -> Result<Option<Sev>, ElementError> {
    let mut sev = Sev::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "cbitpos" => sev.c_bit_position = Some(cursor.parsed("number")?),
            "reducedPhysBits" => sev.reduced_physical_bits = Some(cursor.parsed("number")?),
            "maxGuests" => sev.max_guests = Some(cursor.parsed("number")?),
            "maxESGuests" => sev.max_es_guests = Some(cursor.parsed("number")?),
            "cpu0Id" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(Some(sev))
}

fn read_sgx(cursor: &mut Cursor<'_>) -> Result<Option<Sgx>, ElementError> {
    let yes_no = |text: String| match text.as_str() {
        "yes" => Ok(Some(true)),
        "no" => Ok(Some(false)),
        _ => Err(ElementError::new("is neither 'yes' nor 'no'")),
    };
    let mut sgx = Sgx::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "flc" => sgx.flexible_launch_control = yes_no(cursor.text()?)?,
            "sgx1" => sgx.sgx1 = yes_no(cursor.text()?)?,
            "sgx2" => sgx.sgx2 = yes_no(cursor.text()?)?,
            "section_size" => sgx.section_size_kib = Some(cursor.parsed("number of KiB")?),
            "sections" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(Some(sgx))
}

fn read_hyperv(cursor: &mut Cursor<'_>, supported: bool) -> Result<Hyperv, ElementError> {
    let mut hyperv = Hyperv {
        supported,
        ..Hyperv::default()
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "enum" if child.attribute("name")?.as_deref() == Some("features") => {
                hyperv.enlightenments = read_values(cursor)?;
            }
            "defaults" => cursor.children(|cursor, default| {
                hyperv
                    .defaults
                    .insert(default.name().to_owned(), cursor.text()?);
                Ok(())
            })?,
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(hyperv)
}
