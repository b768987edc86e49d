//! Requests and their terms.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, ParseError, Timestamp};

/// The target for one resource of one domain. Always a total, so repeating a request does no harm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum HotplugRequest {
    /// A total number of vCPUs.
    Vcpus {
        count: u32,
        /// True if CPUs that the guest leaves offline are brought online through its agent.
        #[serde(default)]
        online: bool,
    },
    /// A total amount of memory: boot memory and memory devices.
    Memory {
        size: Bytes,
        /// True if the guest may be left with less than it uses.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
}

/// The level of proof that `Verified` requires, in rising order.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Require {
    /// The hypervisor did its part.
    Accepted,
    /// The guest's firmware interface or driver confirmed it.
    Acknowledged,
    /// The guest uses it; after an unplug, no source shows it.
    #[default]
    Online,
}

impl Require {
    /// All levels, in rising order.
    pub const ALL: [Self; 3] = [Self::Accepted, Self::Acknowledged, Self::Online];

    /// Returns the word of the API's objects. The command line uses lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Acknowledged => "Acknowledged",
            Self::Online => "Online",
        }
    }
}

impl fmt::Display for Require {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Require {
    type Err = ParseError;

    /// Parses `Online` or `online`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        Self::ALL
            .into_iter()
            .find(|level| level.as_str() == text || level.as_str().to_ascii_lowercase() == text)
            .ok_or_else(|| {
                let what = "is not a level of proof: use accepted, acknowledged or online";
                ParseError::new(text, what)
            })
    }
}

/// The required proof, the deadline, and the grace periods for a slow guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terms {
    pub require: Require,
    pub deadline: Timestamp,
    pub patience: Patience,
}

/// Grace periods before a state that may still change becomes the verdict. The deadline limits all
/// of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Patience {
    /// Time for CPUs or memory to come online by a udev rule, an agent in the guest, or a person.
    pub offline: Duration,
    /// Time for a confirmed CPU to appear in the agent's answer. Linux confirms after it has
    /// registered the CPU, so this covers only the delay of the agent.
    pub appear: Duration,
    /// Time for a virtio-mem device to move again. Linux retries after 5 s and then at growing
    /// intervals (`VIRTIO_MEM_RETRY_TIMER_MIN_MS`, drivers/virtio/virtio_mem.c).
    pub stalled: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            offline: Duration::from_secs(10),
            appear: Duration::from_secs(1),
            stalled: Duration::from_secs(15),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_one_resource_with_total() {
        let read = |text: &str| serde_json::from_str::<HotplugRequest>(text);
        assert_eq!(
            read(r#"{"vcpus": {"count": 4, "online": true}}"#).unwrap(),
            HotplugRequest::Vcpus {
                count: 4,
                online: true
            }
        );
        assert_eq!(
            read(r#"{"memory": {"size": "2Gi"}}"#).unwrap(),
            HotplugRequest::Memory {
                size: Bytes::from_mib(2048).unwrap(),
                force: false,
            }
        );
        for bad in [
            r#"{"vcpus": {"count": -1}}"#,
            r#"{"vcpus": {"count": 4, "onlien": true}}"#,
            r#"{"vcpus": {"count": 4}, "memory": {"size": "2Gi"}}"#,
            r#"{"memory": {"size": "2 GB"}}"#,
            r#"{"memory": {"size": 2147483648}}"#,
            r#"{"disk": {}}"#,
            "{}",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn level_is_parsed_in_both_spellings() {
        assert_eq!("online".parse(), Ok(Require::Online));
        assert_eq!("Acknowledged".parse(), Ok(Require::Acknowledged));
        assert!("ONLINE".parse::<Require>().is_err());
        assert!(
            Require::Accepted < Require::Acknowledged && Require::Acknowledged < Require::Online
        );
    }
}
