//! Sets of CPU numbers in libvirt's notation: `0-2,5`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::{ParseError, string_conversions};

/// Maximum CPU number, sixteen times that of the largest machine type (4096). It bounds the memory
/// that a range can expand to.
const MAX_ID: u32 = 65_535;

/// CPU numbers in ascending order, formatted like libvirt's bitmaps (`virBitmapFormat`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IdSet(BTreeSet<u32>);

impl IdSet {
    /// Returns the number of CPUs.
    pub fn len(&self) -> u32 {
        // cannot saturate: there are at most MAX_ID + 1
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, id: u32) -> bool {
        self.0.contains(&id)
    }

    /// Adds a number; one above [`MAX_ID`] is ignored.
    pub fn insert(&mut self, id: u32) {
        if id <= MAX_ID {
            self.0.insert(id);
        }
    }

    /// Returns the numbers in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Returns the numbers with the noun for them: `CPU 1`, `CPUs 1-2`.
    pub fn named(&self, noun: &str) -> String {
        let plural = if self.len() == 1 { "" } else { "s" };
        format!("{noun}{plural} {self}")
    }

    /// Returns the numbers that `other` lacks.
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }
}

impl FromIterator<u32> for IdSet {
    /// Ignores numbers above [`MAX_ID`].
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        Self(ids.into_iter().filter(|id| *id <= MAX_ID).collect())
    }
}

impl FromStr for IdSet {
    type Err = ParseError;

    /// An empty text is an empty set, as libvirt writes it.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let malformed = || ParseError::new(text, "is not a valid list of CPUs such as 0-2,5");
        let mut ids = BTreeSet::new();
        let number = |text: &str| {
            // `parse` alone would accept a sign
            let digits = Some(text).filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
            digits.parse::<u32>().ok().filter(|id| *id <= MAX_ID)
        };
        for part in text.split(',').map(str::trim) {
            if part.is_empty() && text.trim().is_empty() {
                break;
            }
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first = number(first).ok_or_else(malformed)?;
            let last = number(last).ok_or_else(malformed)?;
            if first > last {
                return Err(malformed());
            }
            ids.extend(first..=last);
        }
        Ok(Self(ids))
    }
}

impl fmt::Display for IdSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.iter().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if(|next| *next == last + 1) {
                last = next;
            }
            write!(f, "{comma}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

string_conversions!(IdSet);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_parsed_and_formatted_like_libvirts() {
        for (text, shown, len) in [
            ("0-2", "0-2", 3),
            ("0", "0", 1),
            ("", "", 0),
            ("5,0-2,3", "0-3,5", 5),
            ("0,2,4", "0,2,4", 3),
        ] {
            let set: IdSet = text.parse().unwrap();
            let plural = if len == 1 { "" } else { "s" };
            assert_eq!(set.named("CPU"), format!("CPU{plural} {shown}"));
            assert_eq!((set.to_string().as_str(), set.len()), (shown, len));
        }
        for bad in [
            "a", "2-1", "-1", "0-", ",", "0,,1", "0-99999", "+1", "0-2-4",
        ] {
            assert!(bad.parse::<IdSet>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn formatted_set_parses_to_itself(ids in proptest::collection::btree_set(0_u32..300, 0..60)) {
            let set: IdSet = ids.into_iter().collect();
            prop_assert_eq!(set.to_string().parse(), Ok(set));
        }
    }
}
