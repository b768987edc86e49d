//! Host CPUs, host NUMA nodes and memory backing of a domain.

use super::IdSet;
use super::memory::scaled;
use crate::units::Bytes;
use crate::xml::{Cursor, Element, ElementError};

/// The host CPUs and NUMA nodes that a definition names. Sets are kept as text, because libvirt
/// allows exclusions such as `0-3,^2`; see [`parse_set`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPlacement {
    /// `<vcpu cpuset=…>`.
    pub cpuset: Option<String>,
    /// `<cputune><vcpupin>`: number of the vCPU and host CPUs.
    pub vcpu_pins: Vec<(u64, String)>,
    /// `<emulatorpin>` and `<iothreadpin>`: element and host CPUs.
    pub other_pins: Vec<(String, String)>,
    /// `<numatune><memory nodeset=…>`.
    pub nodeset: Option<String>,
    /// `<numatune><memnode>`: the guest's cell and host nodes.
    pub cell_nodesets: Vec<(u64, String)>,
    /// True if numad chooses CPUs or nodes.
    pub automatic: bool,
}

/// Returns the numbers in libvirt's notation of a bitmap; `None` if it is malformed or too large.
pub fn parse_set(text: &str) -> Option<IdSet> {
    let mut included = Vec::new();
    let mut excluded = IdSet::default();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        match part.strip_prefix('^') {
            Some(number) => excluded.insert(number.parse().ok()?),
            None => included.extend(part.parse::<IdSet>().ok()?.iter()),
        }
    }
    let included: IdSet = included.into_iter().collect();
    Some(included.without(&excluded))
}

impl HostPlacement {
    /// Reads the attributes of `<vcpu>`.
    pub(super) fn read_vcpu(&mut self, element: &Element<'_>) -> Result<(), ElementError> {
        self.cpuset = element.non_empty("cpuset")?;
        self.automatic |= element.attribute("placement")?.as_deref() == Some("auto");
        Ok(())
    }

    /// Reads a child of `<cputune>`.
    pub(super) fn read_tune(&mut self, element: &Element<'_>) -> Result<(), ElementError> {
        let Some(cpus) = element.non_empty("cpuset")? else {
            return Ok(());
        };
        match element.name() {
            "vcpupin" => {
                let vcpu = element.parsed("vcpu", "number of a vCPU")?;
                self.vcpu_pins.extend(vcpu.map(|vcpu| (vcpu, cpus)));
            }
            name @ ("emulatorpin" | "iothreadpin") => {
                self.other_pins.push((name.to_owned(), cpus));
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads a child of `<numatune>`.
    pub(super) fn read_numatune(&mut self, element: &Element<'_>) -> Result<(), ElementError> {
        self.automatic |= element.attribute("placement")?.as_deref() == Some("auto");
        let nodes = element.non_empty("nodeset")?;
        match element.name() {
            "memory" => self.nodeset = nodes,
            "memnode" => {
                let cell = element.parsed("cellid", "number of a cell")?;
                self.cell_nodesets.extend(cell.zip(nodes));
            }
            _ => {}
        }
        Ok(())
    }
}

/// `<memoryBacking>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryBacking {
    /// `<source type=…>`: `memfd`, `file`, `anonymous`.
    pub source: Option<String>,
    /// `<access mode='shared'/>`, or a NUMA cell with `memAccess='shared'`.
    pub is_shared: bool,
    /// `<allocation mode='ondemand'/>`.
    pub on_demand: bool,
    pub huge_pages: bool,
    /// The requested sizes of huge pages; empty with huge pages means the default size.
    pub page_sizes: Vec<Bytes>,
}

impl MemoryBacking {
    /// Reads a child of `<memoryBacking>`.
    pub(super) fn read(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        let mode = element.attribute("mode")?;
        match element.name() {
            "source" => self.source = element.text("type")?,
            "access" => self.is_shared |= mode.as_deref() == Some("shared"),
            "allocation" => self.on_demand = mode.as_deref() == Some("ondemand"),
            "hugepages" => {
                self.huge_pages = true;
                cursor.children(|_, page| {
                    if let Some(size) = page.parsed("size", "page size")? {
                        let unit = page.attribute("unit")?;
                        self.page_sizes.push(scaled(size, unit.as_deref())?);
                    }
                    Ok(())
                })?;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_has_ranges_and_exclusions() {
        let parse = |text| parse_set(text).map(|set| set.to_string());
        assert_eq!(parse("0-3,^2").as_deref(), Some("0-1,3"));
        assert_eq!(parse("4, 6-7").as_deref(), Some("4,6-7"));
        assert_eq!(parse("4-"), None);
        assert_eq!(parse("a"), None);
    }
}
