//! A domain's virtual processors: `<vcpu>` and `<vcpus>`.

use serde::{Deserialize, Serialize};

use super::IdSet;
use crate::xml::{Cursor, Element, ElementError};

/// More than any hypervisor has, to bound what a number in a document can cost.
const MOST: u32 = 65_536;

/// The virtual processors of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Vcpus {
    /// The most that can be plugged while the domain runs; fixed when it was started.
    pub maximum: u32,
    /// All up to the maximum, by number.
    pub each: Vec<Vcpu>,
}

/// One virtual processor, plugged or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Vcpu {
    /// Its number.
    pub id: u32,
    /// Whether it is plugged. That says nothing about the guest.
    pub enabled: bool,
    /// Whether it can be plugged or unplugged while the domain runs. Those that a domain is
    /// started with cannot, unless its definition says otherwise.
    pub hotpluggable: bool,
    /// The place in the order of plugging, from 1.
    pub order: Option<u32>,
}

impl Vcpus {
    /// How many are plugged.
    pub fn plugged(&self) -> u32 {
        self.plugged_ids().len()
    }

    /// Which are plugged.
    pub fn plugged_ids(&self) -> IdSet {
        self.each
            .iter()
            .filter(|vcpu| vcpu.enabled)
            .map(|vcpu| vcpu.id)
            .collect()
    }

    /// How many are plugged and stay so for as long as the domain runs.
    pub fn fixed(&self) -> u32 {
        self.count(|vcpu| vcpu.enabled && !vcpu.hotpluggable)
    }

    /// How many can be plugged on top of those that are.
    pub fn free(&self) -> u32 {
        self.count(|vcpu| !vcpu.enabled && vcpu.hotpluggable)
    }

    fn count(&self, wanted: impl Fn(&Vcpu) -> bool) -> u32 {
        let count = self.each.iter().filter(|vcpu| wanted(vcpu)).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// What the two elements say, until both are read: their order is not fixed.
#[derive(Debug, Default)]
pub(super) struct Draft {
    maximum: Option<u32>,
    current: Option<u32>,
    each: Vec<Vcpu>,
}

impl Draft {
    /// `<vcpu current='1'>4</vcpu>`.
    pub(super) fn read_count(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        self.current = element.parsed("current", "number of vCPUs")?;
        let maximum: u32 = cursor.parsed("number of vCPUs")?;
        if maximum > MOST {
            return Err(ElementError::new(format!(
                "{maximum} vCPUs are more than there can be"
            )));
        }
        self.maximum = Some(maximum);
        Ok(())
    }

    /// `<vcpus><vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>…</vcpus>`.
    pub(super) fn read_each(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|cursor, child| {
            if child.name() != "vcpu" {
                cursor.ignore_unknown();
                return Ok(());
            }
            let id = child.parsed("id", "number of a vCPU")?;
            let id: u32 = id.ok_or_else(|| ElementError::new("has no id"))?;
            let enabled = child.yes_no("enabled")?.unwrap_or(false);
            self.each.push(Vcpu {
                id,
                enabled,
                hotpluggable: child.yes_no("hotpluggable")?.unwrap_or(!enabled),
                order: child.parsed("order", "place in an order")?,
            });
            Ok(())
        })
    }

    /// Both together. Without `<vcpus>`, which libvirt writes only after the first change or
    /// where the definition has it, the first `current` are plugged and fixed, the others free
    /// (`virDomainDefVcpusParse` and `qemuDomainSetVcpusLive`, libvirt 11.3).
    pub(super) fn finish(self) -> Result<Vcpus, ElementError> {
        let maximum = self.maximum.unwrap_or(0);
        let current = self.current.unwrap_or(maximum);
        if current > maximum {
            return Err(ElementError::new(format!(
                "has {current} vCPUs of {maximum} at most"
            )));
        }
        if self.each.iter().any(|vcpu| vcpu.id >= maximum) {
            return Err(ElementError::new(format!(
                "has a vCPU whose number is not below the maximum of {maximum}"
            )));
        }
        let mut each: Vec<Vcpu> = (0..maximum)
            .map(|id| Vcpu {
                id,
                enabled: self.each.is_empty() && id < current,
                hotpluggable: self.each.is_empty() && id >= current,
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
