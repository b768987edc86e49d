//! A domain's virtual processors: `<vcpu>` and `<vcpus>`.

use serde::{Deserialize, Serialize};

use super::IdSet;
use crate::xml::{Cursor, Element, ElementError};

/// Maximum number of vCPUs that is accepted, above that of any hypervisor: it bounds the memory
/// that a number in a document can make us allocate.
const MAX_VCPUS: u32 = 65_536;

/// The virtual processors of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Vcpus {
    /// Fixed at start.
    pub maximum: u32,
    /// All vCPUs up to the maximum, by number.
    pub each: Vec<Vcpu>,
}

/// One virtual processor, plugged or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Vcpu {
    pub id: u32,
    /// True if it is plugged. The guest may use it or not.
    pub enabled: bool,
    /// True if it can be plugged or unplugged while the domain runs. Those present at start
    /// cannot, unless the definition marks them so.
    pub hotpluggable: bool,
    /// The position in the order of plugging, from 1.
    pub order: Option<u32>,
}

impl Vcpus {
    /// Returns the number of plugged vCPUs.
    pub fn plugged(&self) -> u32 {
        self.plugged_ids().len()
    }

    /// Returns the numbers of the plugged vCPUs.
    pub fn plugged_ids(&self) -> IdSet {
        self.each
            .iter()
            .filter(|vcpu| vcpu.enabled)
            .map(|vcpu| vcpu.id)
            .collect()
    }

    /// Returns the number of plugged vCPUs that cannot be unplugged.
    pub fn fixed(&self) -> u32 {
        self.count(|vcpu| vcpu.enabled && !vcpu.hotpluggable)
    }

    /// Returns the numbers of the plugged vCPUs that cannot be unplugged.
    pub fn fixed_ids(&self) -> IdSet {
        let fixed = |vcpu: &&Vcpu| vcpu.enabled && !vcpu.hotpluggable;
        self.each.iter().filter(fixed).map(|vcpu| vcpu.id).collect()
    }

    /// Returns the number of vCPUs that can still be plugged.
    pub fn free(&self) -> u32 {
        self.count(|vcpu| !vcpu.enabled && vcpu.hotpluggable)
    }

    fn count(&self, wanted: impl Fn(&Vcpu) -> bool) -> u32 {
        let count = self.each.iter().filter(|vcpu| wanted(vcpu)).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// `<vcpu>` and `<vcpus>` as written, possibly contradictory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VcpuDefinition {
    pub maximum: Option<u64>,
    /// The number at start; `None` means the maximum.
    pub current: Option<u64>,
    /// The entries of `<vcpus>`.
    pub each: Vec<Vcpu>,
}

impl VcpuDefinition {
    /// Reads `<vcpu current='1'>4</vcpu>`.
    pub(super) fn read_count(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        self.current = element.parsed("current", "number of vCPUs")?;
        self.maximum = Some(cursor.parsed("number of vCPUs")?);
        Ok(())
    }

    /// Reads `<vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>…</vcpus>`.
    pub(super) fn read_each(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, child| {
            if child.name() != "vcpu" {
                return Ok(());
            }
            let id = child.parsed("id", "number of a vCPU")?;
            let enabled = child.yes_no("enabled")?.unwrap_or(false);
            self.each.push(Vcpu {
                id: id.ok_or_else(|| ElementError::new("has no id"))?,
                enabled,
                hotpluggable: child.yes_no("hotpluggable")?.unwrap_or(!enabled),
                order: child.parsed("order", "position in the plugging order")?,
            });
            Ok(())
        })
    }

    /// True if `maximum` is acceptable and not below `current`.
    pub fn is_consistent(&self) -> bool {
        let (maximum, current) = self.numbers();
        current <= maximum && maximum <= MAX_VCPUS.into()
    }

    fn numbers(&self) -> (u64, u64) {
        let maximum = self.maximum.unwrap_or(0);
        (maximum, self.current.unwrap_or(maximum))
    }

    /// Returns the domain's vCPUs. libvirt writes `<vcpus>` only after the first change or if the
    /// definition has it; without it the first `current` vCPUs are plugged and fixed, the others
    /// free (`virDomainDefVcpusParse` and `qemuDomainSetVcpusLive`, libvirt 11.3).
    pub(super) fn resolve(self) -> Result<Vcpus, ElementError> {
        let (maximum, current) = self.numbers();
        let bounded = u32::try_from(maximum).ok().filter(|max| *max <= MAX_VCPUS);
        let Some(maximum) = bounded else {
            return Err(ElementError::new(format!(
                "has {maximum} vCPUs, more than the limit of {MAX_VCPUS}"
            )));
        };
        if current > maximum.into() {
            return Err(ElementError::new(format!(
                "has {current} vCPUs at start, more than its maximum of {maximum}"
            )));
        }
        if self.each.iter().any(|vcpu| vcpu.id >= maximum) {
            return Err(ElementError::new(format!(
                "has a vCPU whose number is not below the maximum of {maximum}"
            )));
        }
        let is_listed = !self.each.is_empty();
        let mut each: Vec<Vcpu> = (0..maximum)
            .map(|id| Vcpu {
                id,
                enabled: !is_listed && u64::from(id) < current,
                hotpluggable: !is_listed && u64::from(id) >= current,
                order: None,
            })
            .collect();
        for vcpu in self.each {
            if let Some(place) = each.get_mut(vcpu.id as usize) {
                *place = vcpu;
            }
        }
        Ok(Vcpus { maximum, each })
    }
}
