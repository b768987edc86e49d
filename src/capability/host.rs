//! `<capabilities>`: the host, and the guests that its emulators can run.
//!
//! The types follow `virCapabilitiesFormatHostXML` and `virCapabilitiesFormatGuestXML`
//! (libvirt 11.3, src/conf/capabilities.c) and capability.rng of libvirt 7.0 to 12.x. An absent
//! element means that the driver reports nothing about it, not that the host lacks it.

use serde::Serialize;

use super::guest::{GuestCapabilities, read_guest};
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    pub host: HostCapabilities,
    /// One entry per guest OS type and architecture.
    pub guests: Vec<GuestCapabilities>,
    /// Number of unknown elements that were skipped.
    pub unknown_elements: usize,
}

/// `/capabilities/host`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCapabilities {
    pub uuid: Option<String>,
    /// The CPU as libvirt decodes it. A guest's `host-model` CPU is *not* this one: it is in the
    /// domain capabilities.
    pub cpu: Option<HostCpu>,
    /// True if `/sys/kernel/iommu_groups` has an entry (`virHostHasIOMMU`, libvirt
    /// src/util/virutil.c).
    pub iommu: Option<bool>,
    pub cells: Vec<NumaCell>,
    /// `selinux`, `apparmor`, `dac`, `none`
    pub security_models: Vec<String>,
    /// The account that emulators run as, from the base label of the security driver `dac`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emulator_owner: Option<EmulatorOwner>,
    pub migration: Option<Migration>,
}

/// A numeric user and group; libvirt writes `+64055:+107`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EmulatorOwner {
    pub uid: u32,
    pub gid: u32,
}

impl EmulatorOwner {
    /// Parses the format of `virSecurityDACGetBaseLabel`; `None` for any other.
    fn parse(text: &str) -> Option<Self> {
        let (uid, gid) = text.trim().split_once(':')?;
        let number = |text: &str| text.strip_prefix('+')?.parse().ok();
        Some(Self {
            uid: number(uid)?,
            gid: number(gid)?,
        })
    }
}

/// `/capabilities/host/cpu`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCpu {
    pub arch: Option<String>,
    /// The closest named model.
    pub model: Option<String>,
    pub vendor: Option<String>,
    /// Microcode version
    pub microcode: Option<u64>,
    pub tsc: Option<TscCounter>,
    pub topology: Option<CpuTopology>,
    pub physical_address_bits: Option<u32>,
    /// Features in addition to those of the model.
    pub features: Vec<String>,
    pub page_sizes_kib: Vec<u64>,
}

/// `counter[@name='tsc']`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TscCounter {
    pub frequency_hz: u64,
    /// True if a guest's counter can run at another frequency.
    pub scaling: Option<bool>,
}

/// `topology` of the host CPU. A count that libvirt omits is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuTopology {
    /// Sockets per NUMA cell
    pub sockets: u32,
    /// Dies per socket
    pub dies: u32,
    /// Clusters per die
    pub clusters: u32,
    /// Cores per cluster
    pub cores: u32,
    /// Threads per core
    pub threads: u32,
}

/// `/capabilities/host/topology/cells/cell`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NumaCell {
    pub id: u32,
    /// `None` for a cell without memory.
    pub memory_kib: Option<u64>,
    pub pages: Vec<Pages>,
    /// CPU numbers
    pub cpus: Vec<u32>,
}

/// Number of memory pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pages {
    pub size_kib: u64,
    pub count: u64,
}

/// `/capabilities/host/migration_features`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    pub live: bool,
    /// URI schemes: `tcp`, `rdma`
    pub transports: Vec<String>,
}

impl Capabilities {
    /// Parses a `<capabilities>` document; `document` names it in errors.
    pub fn parse(document: &str, bytes: &[u8]) -> Result<Self, DocumentError> {
        xml::read(document, bytes, &["capabilities"], |cursor, _| {
            let mut capabilities = Self::default();
            cursor.children(|cursor, child| {
                match child.name() {
                    "host" => capabilities.host = read_host(cursor)?,
                    "guest" => capabilities.guests.push(read_guest(cursor)?),
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })?;
            capabilities.unknown_elements = cursor.unknown_elements();
            Ok(capabilities)
        })
    }
}

fn read_host(cursor: &mut Cursor<'_>) -> Result<HostCapabilities, ElementError> {
    cursor.fill(HostCapabilities::default(), |cursor, child, host| {
        match child.name() {
            "uuid" => host.uuid = Some(cursor.text()?),
            "cpu" => host.cpu = Some(read_cpu(cursor)?),
            "iommu" => host.iommu = child.yes_no("support")?,
            "topology" => host.cells = read_topology(cursor)?,
            "secmodel" => read_secmodel(cursor, host)?,
            "migration_features" => host.migration = Some(read_migration(cursor)?),
            // No label or check uses them.
            "power_management" | "netprefix" | "cache" | "memory_bandwidth" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_cpu(cursor: &mut Cursor<'_>) -> Result<HostCpu, ElementError> {
    cursor.fill(HostCpu::default(), |cursor, child, cpu| {
        match child.name() {
            "arch" => cpu.arch = cursor.non_empty_text()?,
            "model" => cpu.model = cursor.non_empty_text()?,
            "vendor" => cpu.vendor = cursor.non_empty_text()?,
            "microcode" => cpu.microcode = child.parsed("version", "number")?,
            "counter" if child.attribute("name")?.as_deref() == Some("tsc") => {
                let scaling = child.yes_no("scaling")?;
                let frequency = child.parsed("frequency", "number of Hz")?;
                cpu.tsc = frequency.map(|frequency_hz| TscCounter {
                    frequency_hz,
                    scaling,
                });
            }
            "topology" => cpu.topology = Some(read_cpu_topology(child)?),
            "maxphysaddr" => cpu.physical_address_bits = child.parsed("bits", "number of bits")?,
            "feature" => cpu.features.extend(child.text("name")?),
            "pages" => cpu.page_sizes_kib.extend(page_size(child)?),
            "features" | "signature" | "counter" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_cpu_topology(element: &Element<'_>) -> Result<CpuTopology, ElementError> {
    let part = |name| Ok::<u32, ElementError>(element.parsed(name, "number")?.unwrap_or(1));
    Ok(CpuTopology {
        sockets: part("sockets")?,
        dies: part("dies")?,
        clusters: part("clusters")?,
        cores: part("cores")?,
        threads: part("threads")?,
    })
}

fn read_topology(cursor: &mut Cursor<'_>) -> Result<Vec<NumaCell>, ElementError> {
    let mut cells = Vec::new();
    cursor.children(|cursor, child| match child.name() {
        "cells" => cursor.children(|cursor, cell| {
            match cell.name() {
                "cell" => cells.push(read_cell(cursor, cell)?),
                _ => cursor.ignore_unknown(),
            }
            Ok(())
        }),
        // Latency and bandwidth between cells (HMAT).
        "interconnects" => Ok(()),
        _ => {
            cursor.ignore_unknown();
            Ok(())
        }
    })?;
    Ok(cells)
}

fn read_cell(cursor: &mut Cursor<'_>, element: &Element<'_>) -> Result<NumaCell, ElementError> {
    let id = element.parsed("id", "number")?.unwrap_or_default();
    let mut cell = NumaCell {
        id,
        memory_kib: None,
        pages: Vec::new(),
        cpus: Vec::new(),
    };
    cursor.children(|cursor, child| {
        match child.name() {
            "memory" => cell.memory_kib = kib(child, cursor.parsed("number")?),
            "pages" => {
                if let Some(size_kib) = page_size(child)? {
                    cell.pages.push(Pages {
                        size_kib,
                        count: cursor.parsed("number")?,
                    });
                }
            }
            "cpus" => cursor.children(|cursor, cpu| {
                match cpu.name() {
                    "cpu" => cell.cpus.extend(cpu.parsed::<u32>("id", "number")?),
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })?,
            "distances" | "cache" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(cell)
}

fn read_secmodel(cursor: &mut Cursor<'_>, host: &mut HostCapabilities) -> Result<(), ElementError> {
    cursor.children(|cursor, child| {
        match child.name() {
            "model" => host.security_models.extend(cursor.non_empty_text()?),
            // One per domain type, all equal. Other drivers' labels are not numeric.
            "baselabel" => {
                let owner = EmulatorOwner::parse(&cursor.text()?);
                host.emulator_owner = owner.or(host.emulator_owner);
            }
            "doi" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

fn read_migration(cursor: &mut Cursor<'_>) -> Result<Migration, ElementError> {
    cursor.fill(Migration::default(), |cursor, child, migration| {
        match child.name() {
            "live" => migration.live = true,
            "uri_transports" => migration.transports = cursor.texts_of("uri_transport")?,
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })
}

/// Reads `<pages unit='KiB' size='2048'>`. libvirt always writes KiB; an unknown unit yields `None`.
fn page_size(element: &Element<'_>) -> Result<Option<u64>, ElementError> {
    Ok(element
        .parsed("size", "number")?
        .and_then(|size| kib(element, size)))
}

fn kib(element: &Element<'_>, amount: u64) -> Option<u64> {
    match element.attribute("unit").ok().flatten().as_deref() {
        None | Some("KiB" | "k" | "K") => Some(amount),
        Some("MiB" | "M") => amount.checked_mul(1024),
        Some("GiB" | "G") => amount.checked_mul(1024 * 1024),
        Some(_) => None,
    }
}
