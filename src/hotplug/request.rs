//! What can be asked for.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::resource::{ResourceKind, Wanted, resource};
use super::{Amount, Observation};
use crate::units::{Bytes, ParseError, Timestamp};

/// A target for one resource of one domain. Always absolute: asking twice is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum HotplugRequest {
    /// So many vCPUs in all.
    Vcpus {
        /// How many.
        count: u32,
        /// Whether those that the guest leaves offline are brought online through its agent.
        #[serde(default)]
        online: bool,
    },
    /// So much memory in all: what the domain booted with and what is plugged.
    Memory {
        /// How much.
        size: Bytes,
    },
}

impl HotplugRequest {
    pub fn kind(&self) -> ResourceKind {
        resource(self).kind()
    }

    /// Returns the requested amount.
    pub fn amount(&self) -> Amount {
        resource(self).requested()
    }

    /// Returns the amount of the requested resource that the domain has.
    pub fn amount_of(&self, seen: &Observation) -> Amount {
        resource(self).amount(seen)
    }

    /// Returns the evidence that costs calls of its own.
    pub fn wanted(&self) -> Wanted {
        resource(self).wanted()
    }
}

/// What must be proven for `Verified`. In rising order.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum Require {
    /// The hypervisor did it.
    Accepted,
    /// The guest's firmware interface or driver confirmed it.
    Acknowledged,
    /// The guest uses it; for an unplug, it is gone everywhere.
    #[default]
    Online,
}

impl Require {
    /// Every level, in rising order.
    pub const ALL: [Self; 3] = [Self::Accepted, Self::Acknowledged, Self::Online];

    /// The word in the API's objects; the command line writes it in lower case.
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

    /// `Online`, or `online`.
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

/// How much proof, by when, and how long to wait for a guest that is slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terms {
    /// What must be proven.
    pub require: Require,
    /// When there must be a verdict.
    pub deadline: Timestamp,
    /// How long to wait before a sign against success counts.
    pub patience: Patience,
}

/// How long a guest may take before a state that could still change becomes the verdict. The
/// deadline cuts all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Patience {
    /// For what is there to be brought online: by a udev rule, an agent of its own, a person.
    pub offline: Duration,
    /// For a CPU that the guest confirmed to appear. Linux answers after it has registered the
    /// CPU, so this only covers the way through the agent.
    pub appear: Duration,
    /// For a virtio-mem device to move again. Linux tries again after 5 s, then ever more seldom
    /// (`VIRTIO_MEM_RETRY_TIMER_MIN_MS`, drivers/virtio/virtio_mem.c).
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
    fn a_request_is_one_resource_with_a_total() {
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
                size: Bytes::from_mib(2048).unwrap()
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
    fn levels_have_the_words_of_the_command_line_and_of_the_objects() {
        assert_eq!("online".parse(), Ok(Require::Online));
        assert_eq!("Acknowledged".parse(), Ok(Require::Acknowledged));
        assert!("ONLINE".parse::<Require>().is_err());
        assert!(
            Require::Accepted < Require::Acknowledged && Require::Acknowledged < Require::Online
        );
    }
}
