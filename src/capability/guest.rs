//! `/capabilities/guest`: the machine types of each guest architecture.
//!
//! `maxCpus` is `cpu-max` of QEMU's `query-machines`. libvirt omits 0 and does *not* apply KVM's
//! limit (`virQEMUCapsGetMachineTypesCaps`, libvirt src/qemu/qemu_capabilities.c). A machine type
//! with an alias has two entries: one for the alias, with `canonical`, and one for the canonical
//! name.

use serde::Serialize;

use super::vcpus::VcpuMax;
use crate::xml::{Cursor, Element, ElementError};

/// `/capabilities/guest`: one guest OS type on one architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestCapabilities {
    /// `hvm`, `xen`, `exe` …
    pub os_type: String,
    pub arch: String,
    pub word_size: Option<u32>,
    /// Path of the emulator binary.
    pub emulator: Option<String>,
    /// Includes aliases, in libvirt's order.
    pub machines: Vec<MachineType>,
    pub domains: Vec<GuestDomain>,
}

/// `/capabilities/guest/arch/domain`: a domain type, which may override the emulator and the machine
/// types.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestDomain {
    /// `kvm`, `qemu`, `hvf`, `xen` …
    #[serde(rename = "type")]
    pub virt_type: String,
    /// Set only if it differs from the guest's emulator.
    pub emulator: Option<String>,
    /// Filled only if they differ from the guest's machine types.
    pub machines: Vec<MachineType>,
}

/// A machine type or an alias of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineType {
    /// `pc-q35-10.0`, or `q35` for an alias.
    pub name: String,
    /// Set if this is an alias.
    pub canonical: Option<String>,
    pub max_vcpus: VcpuMax,
    /// True if QEMU plans to remove the machine type. libvirt reports this since about 7.1.
    pub deprecated: bool,
}

impl MachineType {
    /// Returns the name that means the same on every node, which an alias does not.
    pub fn canonical_name(&self) -> &str {
        self.canonical.as_deref().unwrap_or(&self.name)
    }
}

pub(super) fn read_guest(cursor: &mut Cursor<'_>) -> Result<GuestCapabilities, ElementError> {
    cursor.fill(GuestCapabilities::default(), |cursor, child, guest| {
        match child.name() {
            "os_type" => guest.os_type = cursor.text()?,
            "arch" => {
                guest.arch = child.text("name")?.unwrap_or_default();
                read_arch(cursor, guest)?;
            }
            // pae, acpi, disksnapshot …: no label or check uses them.
            "features" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_arch(cursor: &mut Cursor<'_>, guest: &mut GuestCapabilities) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "wordsize" => guest.word_size = Some(cursor.parsed("number")?),
            "emulator" => guest.emulator = cursor.non_empty_text()?,
            "machine" => guest.machines.extend(read_machine(cursor, child)?),
            "domain" => guest.domains.push(read_domain(cursor, child)?),
            "loader" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_domain(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<GuestDomain, ElementError> {
    let virt_type = element.text("type")?.unwrap_or_default();
    let domain = GuestDomain {
        virt_type,
        ..GuestDomain::default()
    };
    cursor.fill(domain, |cursor, child, domain| {
        match child.name() {
            "emulator" => domain.emulator = cursor.non_empty_text()?,
            "machine" => domain.machines.extend(read_machine(cursor, child)?),
            "loader" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_machine(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<Option<MachineType>, ElementError> {
    let canonical = element.non_empty("canonical")?;
    let max_vcpus = VcpuMax::read(element, "maxCpus")?;
    let deprecated = element.yes_no("deprecated")?.unwrap_or(false);
    Ok(cursor.non_empty_text()?.map(|name| MachineType {
        name,
        canonical,
        max_vcpus,
        deprecated,
    }))
}
