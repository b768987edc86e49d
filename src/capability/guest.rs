//! `/capabilities/guest`: the machine types of each guest architecture.
//!
//! `maxCpus` is QEMU's `cpu-max` of `query-machines`, left out when 0 and *not* cut by what KVM
//! can do (`virQEMUCapsGetMachineTypesCaps`, libvirt src/qemu/qemu_capabilities.c). A type that
//! has an alias has two entries: the alias with `canonical`, and the canonical name alone.

use serde::Serialize;

use super::read::non_empty;
use super::vcpus::VcpuMax;
use crate::xml::{Cursor, Element, ElementError};

/// `/capabilities/guest`: one guest type of one architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestCapabilities {
    /// `hvm`, `xen`, `exe` …
    pub os_type: String,
    /// The guest's architecture, `x86_64`.
    pub arch: String,
    /// 32 or 64.
    pub word_size: Option<u32>,
    /// The emulator's path.
    pub emulator: Option<String>,
    /// The machine types, aliases as well, in libvirt's order.
    pub machines: Vec<MachineType>,
    /// The domain types.
    pub domains: Vec<GuestDomain>,
}

/// `/capabilities/guest/arch/domain`: a domain type, which may have an emulator and machine types
/// of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GuestDomain {
    /// `kvm`, `qemu`, `hvf`, `xen` …
    #[serde(rename = "type")]
    pub virt_type: String,
    /// Its emulator, where it differs.
    pub emulator: Option<String>,
    /// Its machine types, where they differ.
    pub machines: Vec<MachineType>,
}

/// A machine type or an alias of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MachineType {
    /// The name: `pc-q35-10.0`, or `q35` for an alias.
    pub name: String,
    /// The real name, if this is an alias.
    pub canonical: Option<String>,
    /// The most vCPUs that the machine type allows.
    pub max_vcpus: VcpuMax,
    /// Whether the hypervisor is going to drop it (printed since libvirt 7.1 or so).
    pub deprecated: bool,
}

impl MachineType {
    /// The name that does not change its meaning from node to node.
    pub fn canonical_name(&self) -> &str {
        self.canonical.as_deref().unwrap_or(&self.name)
    }
}

pub(super) fn read_guest(cursor: &mut Cursor<'_>) -> Result<GuestCapabilities, ElementError> {
    let mut guest = GuestCapabilities::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "os_type" => guest.os_type = cursor.text()?,
            "arch" => {
                guest.arch = child.text("name")?.unwrap_or_default();
                read_arch(cursor, &mut guest)?;
            }
            // pae, acpi, disksnapshot …: facts that no label and no check stands on.
            "features" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(guest)
}

fn read_arch(cursor: &mut Cursor<'_>, guest: &mut GuestCapabilities) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "wordsize" => guest.word_size = Some(cursor.parsed("number")?),
            "emulator" => guest.emulator = non_empty(cursor.text()?),
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
    let mut domain = GuestDomain {
        virt_type,
        ..GuestDomain::default()
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "emulator" => domain.emulator = non_empty(cursor.text()?),
            "machine" => domain.machines.extend(read_machine(cursor, child)?),
            "loader" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(domain)
}

fn read_machine(
    cursor: &mut Cursor<'_>,
    element: &Element<'_>,
) -> Result<Option<MachineType>, ElementError> {
    let canonical = element.text("canonical")?.and_then(non_empty);
    let max_vcpus = VcpuMax::read(element, "maxCpus")?;
    let deprecated = element.yes_no("deprecated")?.unwrap_or(false);
    Ok(non_empty(cursor.text()?).map(|name| MachineType {
        name,
        canonical,
        max_vcpus,
        deprecated,
    }))
}
