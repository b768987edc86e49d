//! Validated label keys and values.
//!
//! The rules are those of Kubernetes (`apimachinery/pkg/util/validation`: `IsQualifiedName`,
//! `IsValidLabelValue`). A key is `prefix/name`. The prefix is a DNS-1123 subdomain of at most 253
//! characters. A name or value has at most 63 characters of `[A-Za-z0-9._-]` and begins and ends
//! with a letter or digit; a value may also be empty.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::string_conversions;

const NAME_MAX: usize = 63;
const PREFIX_MAX: usize = 253;

/// The rule that an invalid label key or value breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidLabel {
    #[error("the name is empty")]
    EmptyName,
    #[error("the name is longer than 63 characters")]
    NameTooLong,
    #[error(
        "the name may only contain letters, digits, '-', '_' and '.', and must begin and end with a letter or digit"
    )]
    NameSyntax,
    /// Includes a missing prefix.
    #[error("the prefix must be a DNS subdomain of at most 253 characters")]
    Prefix,
    #[error("the value is longer than 63 characters")]
    ValueTooLong,
    #[error(
        "the value may only contain letters, digits, '-', '_' and '.', and must begin and end with a letter or digit"
    )]
    ValueSyntax,
}

impl InvalidLabel {
    pub const ALL: [Self; 6] = [
        Self::EmptyName,
        Self::NameTooLong,
        Self::NameSyntax,
        Self::Prefix,
        Self::ValueTooLong,
        Self::ValueSyntax,
    ];

    /// Returns the label value in metrics, which JSON output also uses.
    pub fn code(self) -> &'static str {
        match self {
            Self::EmptyName => "empty-name",
            Self::NameTooLong => "name-too-long",
            Self::NameSyntax => "invalid-name",
            Self::Prefix => "invalid-prefix",
            Self::ValueTooLong => "value-too-long",
            Self::ValueSyntax => "invalid-value",
        }
    }
}

/// A label key with a prefix: `machine.virtnode.io/pc-q35-10.0`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabelKey(Arc<str>);

impl LabelKey {
    pub fn new(prefix: &str, name: &str) -> Result<Self, InvalidLabel> {
        check_prefix(prefix)?;
        match name {
            "" => Err(InvalidLabel::EmptyName),
            name if name.len() > NAME_MAX => Err(InvalidLabel::NameTooLong),
            name if !is_name(name) => Err(InvalidLabel::NameSyntax),
            name => {
                let mut key = String::with_capacity(prefix.len() + 1 + name.len());
                key.push_str(prefix);
                key.push('/');
                key.push_str(name);
                Ok(Self(key.into()))
            }
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn prefix(&self) -> &str {
        self.0.split_once('/').map_or("", |(prefix, _)| prefix)
    }

    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }
}

impl FromStr for LabelKey {
    type Err = InvalidLabel;

    fn from_str(text: &str) -> Result<Self, InvalidLabel> {
        let (prefix, name) = text.split_once('/').ok_or(InvalidLabel::Prefix)?;
        Self::new(prefix, name)
    }
}

impl fmt::Display for LabelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabelValue(Arc<str>);

impl LabelValue {
    pub fn new(text: &str) -> Result<Self, InvalidLabel> {
        match text {
            "" => Ok(Self("".into())),
            text if text.len() > NAME_MAX => Err(InvalidLabel::ValueTooLong),
            text if !is_name(text) => Err(InvalidLabel::ValueSyntax),
            text => Ok(Self(text.into())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabelValue {
    type Err = InvalidLabel;

    fn from_str(text: &str) -> Result<Self, InvalidLabel> {
        Self::new(text)
    }
}

string_conversions!(LabelKey, LabelValue);

impl fmt::Display for LabelValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends(bytes.first())
        && ends(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn check_prefix(prefix: &str) -> Result<(), InvalidLabel> {
    let part = |part: &str| {
        let bytes = part.as_bytes();
        let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        bytes.first().is_some_and(alnum)
            && bytes.last().is_some_and(alnum)
            && bytes.iter().all(|b| alnum(b) || *b == b'-')
    };
    if prefix.len() <= PREFIX_MAX && prefix.split('.').all(part) {
        Ok(())
    } else {
        Err(InvalidLabel::Prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_that_the_api_server_rejects_is_invalid() {
        let name = |name: &str| LabelKey::new("machine.virtnode.io", name);
        assert!(name("pc-q35-10.0").is_ok());
        assert!(name("sse4.2").is_ok());
        assert!(name("tsc_adjust").is_ok());
        assert!(name(&"x".repeat(63)).is_ok());
        assert_eq!(name(""), Err(InvalidLabel::EmptyName));
        assert_eq!(name(&"x".repeat(64)), Err(InvalidLabel::NameTooLong));
        for bad in [
            "Zhaoxin CentaurHauls",
            "a+b",
            "-a",
            "a-",
            ".a",
            "a/b",
            "ä",
            "a\n",
        ] {
            assert_eq!(name(bad), Err(InvalidLabel::NameSyntax), "{bad:?}");
        }
    }

    #[test]
    fn prefix_that_is_not_a_dns_subdomain_is_invalid() {
        for bad in [
            "",
            "A.io",
            "a..io",
            "-a.io",
            "a_b.io",
            "a.io-",
            &"a".repeat(254),
        ] {
            assert_eq!(
                LabelKey::new(bad, "x"),
                Err(InvalidLabel::Prefix),
                "{bad:?}"
            );
        }
        assert_eq!("no-slash".parse::<LabelKey>(), Err(InvalidLabel::Prefix));
        assert_eq!(
            "a.io/b/c".parse::<LabelKey>(),
            Err(InvalidLabel::NameSyntax)
        );
    }

    #[test]
    fn empty_value_is_valid_and_blank_value_is_not() {
        assert_eq!(LabelValue::new("").map(String::from), Ok(String::new()));
        assert_eq!(LabelValue::new(" "), Err(InvalidLabel::ValueSyntax));
        assert_eq!(
            LabelValue::new(&"1".repeat(64)),
            Err(InvalidLabel::ValueTooLong)
        );
    }

    #[test]
    fn key_splits_into_prefix_and_name() {
        let key: LabelKey = "machine.virtnode.io/pc-q35-10.0".parse().unwrap();
        assert_eq!(
            (key.prefix(), key.name()),
            ("machine.virtnode.io", "pc-q35-10.0")
        );
    }
}
