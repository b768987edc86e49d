//! `<cpu>` of a domain: mode, model, features and topology.

use quick_xml::events::BytesText;
use serde::{Deserialize, Serialize};

use super::memory::MemoryDefinition;
use crate::capability::PolicyFeature;
use crate::xml::{Cursor, Element, ElementError};

/// The CPU of a running domain, as far as hotplug and diagnosis need it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DomainCpu {
    /// `custom`, `host-passthrough` …
    pub mode: Option<String>,
    pub model: Option<String>,
    pub topology: Option<VcpuTopology>,
}

/// The arrangement of vCPUs: `<topology>` in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuTopology {
    pub sockets: u32,
    /// Dies per socket.
    pub dies: u32,
    /// Clusters per die.
    pub clusters: u32,
    /// Cores per cluster.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

impl Default for VcpuTopology {
    fn default() -> Self {
        Self {
            sockets: 1,
            dies: 1,
            clusters: 1,
            cores: 1,
            threads: 1,
        }
    }
}

impl VcpuTopology {
    fn read(element: &Element<'_>) -> Result<Self, ElementError> {
        let count = |name| {
            let count = element.parsed(name, "number")?;
            Ok(count.unwrap_or(1))
        };
        Ok(Self {
            sockets: count("sockets")?,
            dies: count("dies")?,
            clusters: count("clusters")?,
            cores: count("cores")?,
            threads: count("threads")?,
        })
    }

    /// Returns the number of vCPUs in this topology.
    pub fn product(self) -> u128 {
        [
            self.sockets,
            self.dies,
            self.clusters,
            self.cores,
            self.threads,
        ]
        .into_iter()
        .map(u128::from)
        .product()
    }

    /// Returns the largest APIC ID among the first `vcpus` vCPUs.
    ///
    /// Each level below the socket occupies the bits that the next power of two needs, so counts
    /// that are not powers of two leave holes (`x86_apicid_from_cpu_idx`, QEMU
    /// include/hw/i386/topology.h).
    pub fn highest_apic_id(self, vcpus: u64) -> Option<u128> {
        let levels = [self.threads, self.cores, self.clusters, self.dies].map(u128::from);
        let mut index = u128::from(vcpus.checked_sub(1)?);
        let (mut id, mut shift) = (0_u128, 0_u32);
        for count in levels {
            let rest = index.checked_rem(count)?;
            id |= rest << shift;
            index /= count;
            shift += count.next_power_of_two().trailing_zeros();
        }
        Some(id | (index << shift))
    }
}

/// A domain's `<cpu>` element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuRequirement {
    /// `custom`, `host-model`, `host-passthrough`, `maximum`; `None` is the emulator's default.
    pub mode: Option<String>,
    pub model: Option<String>,
    /// `forbid`, or `allow` (libvirt's default), with which libvirt may choose a similar model.
    pub fallback: Option<String>,
    /// The attribute `match`: `minimum`, `exact` (libvirt's default) or `strict`.
    pub matching: Option<String>,
    /// `None` leaves the check to libvirt, see [`Self::effective_check`].
    pub check: Option<CpuCheck>,
    /// The vendor that the host's CPU must have.
    pub vendor: Option<String>,
    /// Features added to or removed from the model, with their policies.
    pub features: Vec<PolicyFeature>,
    /// `migratable=` of host-passthrough and maximum.
    pub migratable: Option<bool>,
    pub physical_address: Option<PhysicalAddress>,
    pub topology: Option<VcpuTopology>,
    /// The first attribute of `<topology>` that libvirt requires and that is missing.
    pub missing_topology_attribute: Option<&'static str>,
}

/// `<maxphysaddr>`: the width of the guest's physical addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PhysicalAddress {
    /// `emulate` or `passthrough`.
    pub mode: Option<String>,
    pub bits: Option<u32>,
    pub limit: Option<u32>,
}

/// libvirt's verification of the CPU before a start: `<cpu check=…>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuCheck {
    /// No verification: QEMU drops the features that it does not have.
    None,
    /// Compares the definition with libvirt's knowledge of the host.
    Partial,
    /// Compares the CPU that QEMU created with the definition.
    Full,
}

impl CpuRequirement {
    /// Reads `<cpu>`; the NUMA cells in it go to `memory`.
    pub(super) fn read(
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
        memory: &mut MemoryDefinition,
    ) -> Result<Self, ElementError> {
        let mut cpu = Self {
            mode: element.text("mode")?,
            matching: element.text("match")?,
            migratable: element.yes_no("migratable")?,
            check: match element.attribute("check")?.as_deref() {
                Some("none") => Some(CpuCheck::None),
                Some("partial") => Some(CpuCheck::Partial),
                Some("full") => Some(CpuCheck::Full),
                _ => None,
            },
            ..Self::default()
        };
        cursor.children(|cursor, child| {
            match child.name() {
                "model" => {
                    cpu.fallback = child.text("fallback")?;
                    cpu.model = Some(cursor.text()?).filter(|model| !model.is_empty());
                }
                "vendor" => cpu.vendor = Some(cursor.text()?).filter(|vendor| !vendor.is_empty()),
                "feature" => {
                    let policy = child.text("policy")?;
                    let name = child.text("name")?.filter(|name| !name.is_empty());
                    let feature = name.map(|name| PolicyFeature { name, policy });
                    cpu.features.extend(feature);
                }
                "topology" => {
                    cpu.topology = Some(VcpuTopology::read(child)?);
                    cpu.missing_topology_attribute = missing_topology_attribute(child)?;
                }
                "maxphysaddr" => {
                    cpu.physical_address = Some(PhysicalAddress {
                        mode: child.text("mode")?,
                        bits: child.parsed("bits", "number of bits")?,
                        limit: child.parsed("limit", "number of bits")?,
                    });
                }
                "numa" => memory.read_cells(cursor)?,
                _ => {}
            }
            Ok(())
        })?;
        // A model without a mode is a custom one (`virCPUDefParseXML`).
        if cpu.mode.is_none() && cpu.model.is_some() {
            cpu.mode = Some("custom".to_owned());
        }
        Ok(cpu)
    }

    /// Returns the named model with its features as a `<cpu>` for `virConnectCompareHypervisorCPU`;
    /// `None` without a model.
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

    /// Returns the check that libvirt makes, with its default where the definition has none: it
    /// compares no software-emulated CPU with the host, and neither host-passthrough nor maximum
    /// (`qemuDomainDefCPUPostParse`).
    pub fn effective_check(&self, is_tcg: bool) -> CpuCheck {
        self.check.unwrap_or(match self.mode.as_deref() {
            Some("host-model") => CpuCheck::Partial,
            Some("custom") if self.model.is_some() && !is_tcg => CpuCheck::Partial,
            _ => CpuCheck::None,
        })
    }

    /// True if the domain tolerates the absence of some feature of its model.
    pub fn tolerates_missing_features(&self) -> bool {
        self.with_policy(&["disable", "forbid", "optional", "force"])
            .next()
            .is_some()
    }

    /// Returns the features without which the domain does not start.
    pub fn required(&self) -> impl Iterator<Item = &str> {
        self.with_policy(&["require"])
    }

    /// Returns the features that the guest sees even if the host lacks them.
    pub fn forced(&self) -> impl Iterator<Item = &str> {
        self.with_policy(&["force"])
    }

    /// Returns the features that the host must not have.
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

/// Returns the first missing attribute of the three that libvirt requires (`virCPUDefParseXML`).
fn missing_topology_attribute(element: &Element<'_>) -> Result<Option<&'static str>, ElementError> {
    for name in ["sockets", "cores", "threads"] {
        if element.attribute(name)?.is_none() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
