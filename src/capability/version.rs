use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::units::ParseError;

/// A version of libvirt or of a hypervisor: `11.3.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    /// libvirt calls it "release" or "micro".
    pub micro: u32,
}

impl Version {
    pub const fn new(major: u32, minor: u32, micro: u32) -> Self {
        Self {
            major,
            minor,
            micro,
        }
    }

    /// Decodes a number from `virConnectGetVersion` or `virConnectGetLibVersion`:
    /// `major * 1,000,000 + minor * 1,000 + release` (libvirt-host.h). 0 means unknown.
    pub fn from_libvirt(number: u64) -> Option<Self> {
        let part = |n: u64| u32::try_from(n).ok();
        match number {
            0 => None,
            n => Some(Self::new(
                part(n / 1_000_000)?,
                part(n / 1_000 % 1_000)?,
                part(n % 1_000)?,
            )),
        }
    }
}

impl FromStr for Version {
    type Err = ParseError;

    /// Parses two or three numbers separated by dots. A distribution's suffix, after `-`, `+` or
    /// `~`, is ignored.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || {
            ParseError::new(
                text,
                "is not a valid version, expected a format like 11.3.0",
            )
        };
        let core = text.split(['-', '+', '~']).next().unwrap_or_default();
        let parts = core
            .split('.')
            .map(|part| {
                // `parse` alone accepts a leading '+'.
                let digits = part.bytes().all(|b| b.is_ascii_digit());
                part.parse().ok().filter(|_| digits).ok_or_else(bad)
            })
            .collect::<Result<Vec<u32>, _>>()?;
        match parts[..] {
            [major, minor] => Ok(Self::new(major, minor, 0)),
            [major, minor, micro] => Ok(Self::new(major, minor, micro)),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirt_version_number_is_decoded() {
        assert_eq!(
            Version::from_libvirt(11_003_000),
            Some(Version::new(11, 3, 0))
        );
        assert_eq!(
            Version::from_libvirt(7_002_019),
            Some(Version::new(7, 2, 19))
        );
        assert_eq!(Version::from_libvirt(0), None);
    }

    #[test]
    fn version_with_or_without_suffix_is_parsed() {
        assert_eq!("11.3.0".parse(), Ok(Version::new(11, 3, 0)));
        assert_eq!("10.10.0-7.el9".parse(), Ok(Version::new(10, 10, 0)));
        assert_eq!("9.0".parse(), Ok(Version::new(9, 0, 0)));
        for bad in ["", "11", "a.b", "1.2.3.4", "1..2", "-1.2", "99999999999.1"] {
            assert!(bad.parse::<Version>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn version_parts_compare_as_numbers() {
        assert!(Version::new(10, 9, 0) < Version::new(10, 10, 0));
    }
}
