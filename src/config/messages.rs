//! Messages about a configuration file, in the words of its readers: the library's own name YAML's
//! tokens, Rust's types and its options.

use std::borrow::Cow;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

pub(super) struct Messages;

impl MessageFormatter for Messages {
    fn format_message<'a>(&self, error: &'a Error) -> Cow<'a, str> {
        let message = match error {
            Error::SerdeUnknownField {
                field, expected, ..
            } => format!(
                "'{field}' is not a setting; the settings here are {}",
                expected.join(", ")
            ),
            Error::SerdeUnknownVariant {
                variant, expected, ..
            } => format!(
                "'{variant}' is not a valid value; write one of {}",
                expected.join(", ")
            ),
            Error::SerdeMissingField { field, .. } => format!("the setting '{field}' is missing"),
            Error::DuplicateMappingKey { key: Some(key), .. } => {
                format!("the setting '{key}' is given twice: remove one of them")
            }
            Error::DuplicateMappingKey { key: None, .. } => {
                "a setting is given twice: remove one of them".to_owned()
            }
            Error::InvalidScalar { ty: "boolean", .. } | Error::InvalidBooleanStrict { .. } => {
                "write true or false here".to_owned()
            }
            Error::InvalidScalar { .. } => "write a whole number here, 0 or more".to_owned(),
            Error::Unexpected { expected, .. } => match *expected {
                "mapping start" => "write settings here, each as `name: value`".to_owned(),
                "sequence start" => "write a list here, like [a, b]".to_owned(),
                "string scalar" | "scalar" => "write a single value here".to_owned(),
                _ => return UserMessageFormatter.format_message(error),
            },
            Error::NullIntoString { .. } => "a value is missing here".to_owned(),
            Error::MultipleDocuments { .. } => {
                "the file has more than one YAML document: remove the `---` between them".to_owned()
            }
            _ => return UserMessageFormatter.format_message(error),
        };
        message.into()
    }
}
