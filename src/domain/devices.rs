//! Devices, as far as hotplug needs to know them.

use serde::{Deserialize, Serialize};

use crate::xml::{Cursor, Element, ElementError};

/// The guest agent's channel name, which libvirt itself looks for (`qemuFindAgentConfig`).
const AGENT: &str = "org.qemu.guest_agent.0";

/// Whether there is a way to the guest agent, and someone at its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentChannel {
    /// The domain has no channel for an agent.
    #[default]
    Absent,
    /// It has one, and nobody in the guest has opened it.
    Disconnected,
    /// It has one, and the guest has opened it.
    Connected,
    /// It has one, and libvirt does not say.
    Unknown,
}

impl AgentChannel {
    /// Whether it is worth asking the agent.
    pub fn may_answer(self) -> bool {
        matches!(self, Self::Connected | Self::Unknown)
    }
}

/// `<memballoon>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Balloon {
    /// Whether there is one; `model='none'` is none.
    pub present: bool,
    /// Every how many seconds the guest's driver is asked for statistics; without a period the
    /// guest's total is not known.
    pub stats_period: Option<u32>,
}

/// A device that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The element's name: `disk`, `interface`, `hostdev` …
    pub kind: String,
    /// The alias; `ua-…` are the user's own and outlive a restart.
    pub alias: String,
}

/// What the devices say.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) agent: AgentChannel,
    pub(super) balloon: Balloon,
    pub(super) devices: Vec<Device>,
}

impl Draft {
    /// Any device but memory.
    pub(super) fn read(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        let kind = element.name().to_owned();
        let is_balloon = kind == "memballoon";
        if is_balloon {
            self.balloon.present = element.attribute("model")?.as_deref() != Some("none");
        }
        cursor.children(|_, child| {
            match child.name() {
                "alias" => {
                    if let Some(alias) = child.text("name")? {
                        self.devices.push(Device {
                            kind: kind.clone(),
                            alias,
                        });
                    }
                }
                "stats" if is_balloon => {
                    let period = child.parsed("period", "number of seconds")?;
                    self.balloon.stats_period = period.filter(|period| *period > 0);
                }
                "target" if kind == "channel" && is_agent(child)? => {
                    self.agent = match child.attribute("state")?.as_deref() {
                        Some("connected") => AgentChannel::Connected,
                        Some("disconnected") => AgentChannel::Disconnected,
                        _ => AgentChannel::Unknown,
                    };
                }
                _ => {}
            }
            Ok(())
        })
    }
}

fn is_agent(target: &Element<'_>) -> Result<bool, ElementError> {
    Ok(target.attribute("name")?.as_deref() == Some(AGENT))
}
