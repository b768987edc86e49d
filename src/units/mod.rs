//! Quantities as types. No size crosses a module boundary as a bare number.

mod macros;
mod parse_error;
mod timestamp;
mod words;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub(crate) use self::macros::{string_conversions, words};
pub use self::parse_error::ParseError;
pub use self::timestamp::Timestamp;
pub use self::words::{bounded, counted, json_bytes, seconds, shortened, whole_number};

const KIB: u64 = 1024;

/// Units that are parsed and written, the largest first. All are powers of 1024.
const UNITS: [(&str, u64); 7] = [
    ("EiB", 1 << 60),
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", KIB),
    ("B", 1),
];

/// A size in bytes.
///
/// Parsed from a number with a binary unit, in the usual spelling (`1024MiB`, `1.5GiB`) or as a
/// Kubernetes quantity (`2Gi`, `512Mi`). Written and serialized with the largest unit that leaves
/// no fraction, so that it can be parsed again.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(u64);

impl Bytes {
    pub const ZERO: Self = Self(0);

    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Returns `None` above 16 EiB.
    pub fn from_mib(mib: u64) -> Option<Self> {
        mib.checked_mul(KIB * KIB).map(Self)
    }

    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns `None` above 16 EiB.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// Adds, with a maximum of 16 EiB, for comparisons.
    pub fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Returns `None` if `other` is larger.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// Returns zero if `other` is larger.
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    pub fn abs_diff(self, other: Self) -> Self {
        Self(self.0.abs_diff(other.0))
    }

    /// Returns false if `unit` is zero.
    pub fn is_multiple_of(self, unit: Self) -> bool {
        unit.0 != 0 && self.0.is_multiple_of(unit.0)
    }

    /// Returns the largest multiple of `unit` that is not above this size; the size itself if
    /// `unit` is zero.
    pub fn round_down(self, unit: Self) -> Self {
        match unit.0 {
            0 => self,
            unit => Self(self.0 - self.0 % unit),
        }
    }

    /// Returns the smallest multiple of `unit` that is not below this size; `None` above 16 EiB.
    pub fn round_up(self, unit: Self) -> Option<Self> {
        if self.is_multiple_of(unit) || unit.0 == 0 {
            Some(self)
        } else {
            self.round_down(unit).checked_add(unit)
        }
    }

    /// Formats the size as a Kubernetes quantity: `2Gi`, `938512Ki`.
    pub fn quantity(self) -> String {
        self.to_string().trim_end_matches('B').to_owned()
    }

    /// Divides and rounds down; zero if `parts` is zero.
    pub fn part(self, parts: u64) -> Self {
        Self(self.0.checked_div(parts).unwrap_or(0))
    }
}

impl From<KiB> for Bytes {
    fn from(kib: KiB) -> Self {
        // cannot saturate: a KiB is only made where its bytes fit
        Self(kib.0.saturating_mul(KIB))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, size) = UNITS
            .into_iter()
            .find(|(_, size)| self.0 != 0 && self.0.is_multiple_of(*size))
            .unwrap_or(("B", 1));
        f.pad(&format!("{}{unit}", self.0 / size))
    }
}

string_conversions!(Bytes);

const NO_UNIT: &str = "has no unit: write it like 2GiB, 512MiB or 2Gi";
const DECIMAL_UNIT: &str = "has a unit of 1000 bytes or an ambiguous one: write a binary unit, \
                            like 2GiB, 512MiB or 2Gi";
const NEGATIVE: &str = "is negative: a size is the total, like 2GiB or 2Gi";
const TOO_LARGE: &str = "is more than any machine has: write it like 2GiB or 2Gi";
const FRACTION: &str = "is not a whole number of bytes";
const MALFORMED: &str = "is not a size: write a number and a binary unit, like 2GiB, 512MiB or 2Gi";

impl FromStr for Bytes {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = |what| ParseError::new(text, what);
        if text.starts_with('-') {
            return Err(error(NEGATIVE));
        }
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(fraction) || (number.contains('.') && fraction.is_empty()) {
            return Err(error(MALFORMED));
        }
        let size = match UNITS.iter().find(|(name, _)| is_unit(unit, name)) {
            Some((_, size)) => *size,
            None if unit.is_empty() => return Err(error(NO_UNIT)),
            None if is_decimal_unit(unit) => return Err(error(DECIMAL_UNIT)),
            None => return Err(error(MALFORMED)),
        };
        let bytes = whole.parse::<u64>().ok();
        let bytes = bytes.and_then(|whole| whole.checked_mul(size));
        let bytes = bytes.ok_or_else(|| error(TOO_LARGE))?;
        let rest = fraction_of(fraction, size).ok_or_else(|| error(FRACTION))?;
        let sum = bytes.checked_add(rest).map(Self);
        sum.ok_or_else(|| error(TOO_LARGE))
    }
}

/// True for `GiB` and for Kubernetes' `Gi`.
fn is_unit(unit: &str, name: &str) -> bool {
    unit == name || (name != "B" && unit == name.trim_end_matches('B'))
}

/// True for `G`, `GB`, ` GB` and `gb`: `G` is 1000³ in Kubernetes and 1024³ in libvirt.
fn is_decimal_unit(unit: &str) -> bool {
    let unit = unit.trim_start().to_ascii_lowercase();
    matches!(
        unit.strip_suffix('b').unwrap_or(&unit),
        "k" | "m" | "g" | "t" | "p" | "e"
    )
}

/// Returns `0.<fraction>` of `size` if that is a whole number. Exact, unlike a float.
fn fraction_of(fraction: &str, size: u64) -> Option<u64> {
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Some(0);
    }
    let scale = u32::try_from(fraction.len())
        .ok()
        .and_then(|digits| 10_u128.checked_pow(digits))?;
    let scaled = fraction.parse::<u128>().ok()?.checked_mul(size.into())?;
    match scaled % scale {
        0 => u64::try_from(scaled / scale).ok(),
        _ => None,
    }
}

/// A size in KiB, the unit of libvirt's domain XML and calls. Serialized as [`Bytes`].
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "Bytes", into = "Bytes")]
pub struct KiB(u64);

impl KiB {
    /// Returns `None` if the size in bytes exceeds 64 bits.
    pub fn new(kib: u64) -> Option<Self> {
        kib.checked_mul(KIB).map(|_| Self(kib))
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for KiB {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Bytes::from(*self), f)
    }
}

impl TryFrom<Bytes> for KiB {
    type Error = ParseError;

    fn try_from(bytes: Bytes) -> Result<Self, ParseError> {
        if !bytes.0.is_multiple_of(KIB) {
            let what = "is not a whole number of KiB";
            return Err(ParseError::new(&bytes.to_string(), what));
        }
        Ok(Self(bytes.0 / KIB))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        text.parse::<Bytes>().unwrap_err().to_string()
    }

    #[test]
    fn binary_units_and_quantities_are_parsed() {
        for (text, bytes) in [
            ("2GiB", 2 << 30),
            ("2Gi", 2 << 30),
            ("1024MiB", 1 << 30),
            ("512Mi", 512 << 20),
            ("1.5Gi", 3 << 29),
            ("0.5KiB", 512),
            ("414224KiB", 414_224 << 10),
            ("007Ti", 7 << 40),
            ("15Ei", 15 << 60),
            ("0Gi", 0),
            ("1000B", 1000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn other_sizes_are_rejected_with_remedy() {
        assert_eq!(
            error("1024"),
            "'1024' has no unit: write it like 2GiB, 512MiB or 2Gi"
        );
        for decimal in ["2 GB", "2GB", "512M", "1k", "2gb", "3T"] {
            assert!(error(decimal).contains(DECIMAL_UNIT), "{decimal}");
        }
        assert!(error("-1").starts_with("'-1' is negative"));
        assert!(error("-1Gi").starts_with("'-1Gi' is negative"));
        for malformed in [
            "", "Gi", "1e9Gi", "2 GiB", "2GiB ", " 2Gi", "+2Gi", "1.Gi", ".5Gi", "1.2.3Gi", "2gi",
            "2Gib", "0x10Gi", "1_000Mi", "２Gi", "2G\niB", "1,5Gi",
        ] {
            assert!(error(malformed).contains(MALFORMED), "{malformed:?}");
        }
        assert!(error("16Ei").contains(TOO_LARGE));
        assert!(error("99999999999999999999Ki").contains(TOO_LARGE));
        assert!(error("0.3KiB").contains(FRACTION));
        assert!(error(&"9".repeat(5000)).len() < 120);
    }

    #[test]
    fn size_is_written_with_largest_whole_unit() {
        assert_eq!(Bytes(2 << 30).to_string(), "2GiB");
        assert_eq!(Bytes(1536 << 20).to_string(), "1536MiB");
        assert_eq!(Bytes(1025).to_string(), "1025B");
        assert_eq!(Bytes::ZERO.to_string(), "0B");
        assert_eq!(KiB(414_224).to_string(), "414224KiB");
        assert_eq!(format!("{:>6}", Bytes(1 << 30)), "  1GiB");
    }

    #[test]
    fn conversions_are_checked() {
        assert_eq!(KiB::try_from(Bytes(2048)), Ok(KiB(2)));
        assert!(KiB::try_from(Bytes(2049)).is_err());
        assert_eq!(KiB::new(u64::MAX), None);
        assert_eq!(Bytes(10).round_up(Bytes(4)), Some(Bytes(12)));
        assert_eq!(Bytes(u64::MAX).round_up(Bytes(4)), None);
        assert_eq!(Bytes(10).round_down(Bytes(0)), Bytes(10));
        assert!(!Bytes(10).is_multiple_of(Bytes(0)));
    }

    proptest! {
        #[test]
        fn written_size_is_parsed_again(bytes: u64) {
            prop_assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let read = text.parse::<Bytes>();
            prop_assert!(read.is_err() || text.starts_with(|c: char| c.is_ascii_digit()));
        }

        #[test]
        fn no_mix_of_digits_and_units_panics(text in "-?[0-9]{0,22}(\\.[0-9]{0,22})?( )?[KMGTPEkmg]?i?B?") {
            drop(text.parse::<Bytes>());
        }
    }
}
