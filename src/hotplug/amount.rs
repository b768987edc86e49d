use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::kind::ResourceKind;
use crate::units::Bytes;

/// An amount of a resource that a domain has, or that is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Amount {
    #[serde(rename_all = "camelCase")]
    Vcpus {
        /// Plugged vCPUs.
        vcpus: u32,
        /// CPUs that the guest uses, if its agent reports them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        online: Option<u32>,
    },
    #[serde(rename_all = "camelCase")]
    Memory {
        /// Boot memory and the memory that the guest has of its memory devices.
        memory: Bytes,
        /// The guest's own total, if its balloon driver reports it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest_total: Option<Bytes>,
    },
}

impl Amount {
    pub fn kind(self) -> ResourceKind {
        match self {
            Self::Vcpus { .. } => ResourceKind::Vcpus,
            Self::Memory { .. } => ResourceKind::Memory,
        }
    }

    /// Returns the amount that the hypervisor reports, without the guest's own.
    pub(super) fn without_guest(self) -> Self {
        match self {
            Self::Vcpus { vcpus, .. } => Self::Vcpus {
                vcpus,
                online: None,
            },
            Self::Memory { memory, .. } => Self::Memory {
                memory,
                guest_total: None,
            },
        }
    }

    /// Compares the totals; `None` for amounts of different kinds.
    pub fn compare(self, other: Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Vcpus { vcpus, .. }, Self::Vcpus { vcpus: other, .. }) => {
                Some(vcpus.cmp(&other))
            }
            (Self::Memory { memory, .. }, Self::Memory { memory: other, .. }) => {
                Some(memory.cmp(&other))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus { vcpus, online } => {
                write!(f, "{vcpus}")?;
                online.map_or(Ok(()), |online| write!(f, " ({online} online)"))
            }
            Self::Memory {
                memory,
                guest_total,
            } => {
                write!(f, "{memory}")?;
                guest_total.map_or(Ok(()), |total| write!(f, " (the guest sees {total})"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_parts_are_left_out() {
        let amount = Amount::Vcpus {
            vcpus: 4,
            online: None,
        };
        let json = serde_json::to_string(&amount).unwrap();
        assert_eq!(json, r#"{"vcpus":4}"#);
        assert_eq!(serde_json::from_str::<Amount>(&json).unwrap(), amount);
        assert_eq!(amount.to_string(), "4");
        let amount = Amount::Memory {
            memory: Bytes::from_mib(1024).unwrap(),
            guest_total: Some(Bytes::new(938_512 << 10)),
        };
        let json = serde_json::to_string(&amount).unwrap();
        assert_eq!(json, r#"{"memory":"1GiB","guestTotal":"938512KiB"}"#);
        assert_eq!(serde_json::from_str::<Amount>(&json).unwrap(), amount);
        assert_eq!(amount.to_string(), "1GiB (the guest sees 938512KiB)");
    }
}
