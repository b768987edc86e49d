use std::fmt;

use serde::Serialize;

use crate::xml::{Element, ElementError};

/// libvirt's value for "no limit": `INT_MAX`. pseries machines of QEMU 6.2 to 7.1 have it.
pub const UNLIMITED: u32 = 2_147_483_647;

/// A maximum number of vCPUs, as libvirt reports it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VcpuMax {
    /// libvirt reports no maximum. This is not the same as zero.
    #[default]
    Unknown,
    AtMost(u32),
    /// libvirt reports [`UNLIMITED`].
    Unlimited,
}

impl VcpuMax {
    /// Converts libvirt's number, where 0 means unknown.
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Unknown,
            n if n >= UNLIMITED => Self::Unlimited,
            n => Self::AtMost(n),
        }
    }

    pub(super) fn read(element: &Element<'_>, attribute: &str) -> Result<Self, ElementError> {
        let number = element.parsed(attribute, "number of vCPUs")?;
        Ok(number.map_or(Self::Unknown, Self::from_number))
    }

    /// Returns the lower of two maximums. An unknown maximum does not lower the other.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        match (self, other) {
            (Self::Unknown, max) | (max, Self::Unknown) => max,
            (Self::Unlimited, max) | (max, Self::Unlimited) => max,
            (Self::AtMost(a), Self::AtMost(b)) => Self::AtMost(a.min(b)),
        }
    }

    /// Returns the number, [`UNLIMITED`] for no limit.
    pub fn number(self) -> Option<u32> {
        match self {
            Self::Unknown => None,
            Self::AtMost(n) => Some(n),
            Self::Unlimited => Some(UNLIMITED),
        }
    }
}

impl fmt::Display for VcpuMax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown"),
            Self::AtMost(number) => write!(f, "{number}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

impl Serialize for VcpuMax {
    /// Serializes the number, or null if unknown.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.number().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn min_ignores_unknown_maximum() {
        use VcpuMax::{AtMost, Unknown, Unlimited};
        assert_eq!(AtMost(4).min(AtMost(2)), AtMost(2));
        assert_eq!(Unknown.min(AtMost(2)), AtMost(2));
        assert_eq!(Unlimited.min(AtMost(2)), AtMost(2));
        assert_eq!(AtMost(2).min(Unlimited), AtMost(2));
        assert_eq!(Unknown.min(Unlimited), Unlimited);
        assert_eq!(Unknown.min(Unknown), Unknown);
    }

    #[test]
    fn zero_is_unknown_and_int_max_is_unlimited() {
        assert_eq!(VcpuMax::from_number(0), VcpuMax::Unknown);
        assert_eq!(VcpuMax::from_number(2_147_483_647).to_string(), "unlimited");
        assert_eq!(VcpuMax::from_number(255).to_string(), "255");
    }
}
