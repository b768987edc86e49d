//! `<capabilities>`: the host, and what guests its emulators can run.
//!
//! Shapes after `virCapabilitiesFormatHostXML` and `virCapabilitiesFormatGuestXML`
//! (libvirt 11.3, src/conf/capabilities.c) and capability.rng of 7.0 to 12.x. An element that is
//! absent means that the driver says nothing, not that there is nothing.

use serde::Serialize;

use super::guest::{GuestCapabilities, read_guest};
use super::read::non_empty;
use crate::xml::{self, Cursor, DocumentError, Element, ElementError};

/// The `<capabilities>` document.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    /// The machine that libvirt runs on.
    pub host: HostCapabilities,
    /// One entry for each pair of guest type and architecture.
    pub guests: Vec<GuestCapabilities>,
    /// Elements of no known kind, which were passed over.
    pub unknown_elements: usize,
}

/// `/capabilities/host`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostCapabilities {
    /// The machine's UUID.
    pub uuid: Option<String>,
    /// The CPU as libvirt decodes it. It is *not* what guests get: that is the host model of the
    /// domain capabilities.
    pub cpu: Option<HostCpu>,
    /// Whether `/sys/kernel/iommu_groups` has an entry (`virHostHasIOMMU`, libvirt
    /// src/util/virutil.c).
    pub iommu: Option<bool>,
    /// NUMA cells, by libvirt's order.
    pub cells: Vec<NumaCell>,
    /// Security drivers: `selinux`, `apparmor`, `dac`, `none`.
    pub security_models: Vec<String>,
    /// Whom emulators run as, by the security driver `dac`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emulator_owner: Option<EmulatorOwner>,
    /// Whether live migration is offered, and over which transports.
    pub migration: Option<Migration>,
}

/// A user and a group by number: `+64055:+107` in libvirt's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EmulatorOwner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl EmulatorOwner {
    /// From libvirt's spelling (`virSecurityDACGetBaseLabel`); `None` if it is another.
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
    /// The architecture, `x86_64`.
    pub arch: Option<String>,
    /// The closest model that libvirt knows.
    pub model: Option<String>,
    /// The vendor, `Intel`.
    pub vendor: Option<String>,
    /// The microcode's version.
    pub microcode: Option<u64>,
    /// The time stamp counter.
    pub tsc: Option<TscCounter>,
    /// Sockets, dies, clusters, cores and threads.
    pub topology: Option<CpuTopology>,
    /// Physical address bits.
    pub physical_address_bits: Option<u32>,
    /// Features beyond the model.
    pub features: Vec<String>,
    /// Page sizes in KiB.
    pub page_sizes_kib: Vec<u64>,
}

/// `counter[@name='tsc']`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TscCounter {
    /// Its frequency in Hz.
    pub frequency_hz: u64,
    /// Whether a guest's counter can run at another frequency.
    pub scaling: Option<bool>,
}

/// The shape of a CPU. Where libvirt does not say, 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuTopology {
    /// Sockets in each NUMA cell.
    pub sockets: u32,
    /// Dies in each socket.
    pub dies: u32,
    /// Clusters in each die.
    pub clusters: u32,
    /// Cores in each cluster.
    pub cores: u32,
    /// Threads in each core.
    pub threads: u32,
}

/// `/capabilities/host/topology/cells/cell`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NumaCell {
    /// The cell's number.
    pub id: u32,
    /// Its memory in KiB; `None` for a cell without any.
    pub memory_kib: Option<u64>,
    /// How many pages of each size it has: size in KiB and count.
    pub pages: Vec<Pages>,
    /// The CPUs in it, by number.
    pub cpus: Vec<u32>,
}

/// A count of pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pages {
    /// The size of a page in KiB.
    pub size_kib: u64,
    /// How many there are.
    pub count: u64,
}

/// `/capabilities/host/migration_features`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    /// Whether a domain can be migrated while it runs.
    pub live: bool,
    /// URI schemes: `tcp`, `rdma`.
    pub transports: Vec<String>,
}

impl Capabilities {
    /// Reads a `<capabilities>` document; `document` is what errors call it.
    ///
    /// # Errors
    /// A document that is none, or one in which a known value is malformed.
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
    let mut host = HostCapabilities::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "uuid" => host.uuid = Some(cursor.text()?),
            "cpu" => host.cpu = Some(read_cpu(cursor)?),
            "iommu" => host.iommu = child.yes_no("support")?,
            "topology" => host.cells = read_topology(cursor)?,
            "secmodel" => read_secmodel(cursor, &mut host)?,
            "migration_features" => host.migration = Some(read_migration(cursor)?),
            // Facts that no label and no check stands on.
            "power_management" | "netprefix" | "cache" | "memory_bandwidth" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(host)
}

fn read_cpu(cursor: &mut Cursor<'_>) -> Result<HostCpu, ElementError> {
    let mut cpu = HostCpu::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "arch" => cpu.arch = non_empty(cursor.text()?),
            "model" => cpu.model = non_empty(cursor.text()?),
            "vendor" => cpu.vendor = non_empty(cursor.text()?),
            "microcode" => cpu.microcode = child.parsed("version", "number")?,
            "counter" if child.attribute("name")?.as_deref() == Some("tsc") => {
                cpu.tsc = match child.parsed("frequency", "number of Hz")? {
                    Some(frequency_hz) => Some(TscCounter {
                        frequency_hz,
                        scaling: child.yes_no("scaling")?,
                    }),
                    None => None,
                };
            }
            "topology" => cpu.topology = Some(read_cpu_topology(child)?),
            "maxphysaddr" => cpu.physical_address_bits = child.parsed("bits", "number of bits")?,
            "feature" => cpu.features.extend(child.text("name")?),
            "pages" => cpu.page_sizes_kib.extend(page_size(child)?),
            "features" | "signature" | "counter" => {}
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(cpu)
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

/// `<cells>` in `<topology>`.
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
            "model" => host.security_models.extend(non_empty(cursor.text()?)),
            // One for each domain type, all the same; other drivers' are no numbers.
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
    let mut migration = Migration::default();
    cursor.children(|cursor, child| {
        match child.name() {
            "live" => migration.live = true,
            "uri_transports" => cursor.children(|cursor, transport| {
                match transport.name() {
                    "uri_transport" => migration.transports.extend(non_empty(cursor.text()?)),
                    _ => cursor.ignore_unknown(),
                }
                Ok(())
            })?,
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(migration)
}

/// `<pages unit='KiB' size='2048'>` in KiB. libvirt always writes KiB; another unit is not
/// guessed at.
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
