use thiserror::Error;

use super::shortened;

/// Maximum number of characters of the input that an error quotes.
const MAX_QUOTED: usize = 40;

/// A text that is not what it should be. `Display` quotes the text and appends the problem.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{text}' {what}")]
pub struct ParseError {
    /// The problem and, if useful, the remedy: "is not a verdict".
    pub what: &'static str,
    /// The text, escaped and shortened.
    pub text: String,
}

impl ParseError {
    pub fn new(text: &str, what: &'static str) -> Self {
        let quoted = shortened(text, MAX_QUOTED);
        let text = quoted.chars().flat_map(char::escape_debug).collect();
        Self { what, text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_or_unprintable_text_is_shortened_and_escaped() {
        let error = ParseError::new("a\nb", "is not a verdict");
        assert_eq!(error.to_string(), "'a\\nb' is not a verdict");
        let error = ParseError::new(&"9".repeat(5000), "is not a verdict");
        assert!(error.to_string().len() < 70, "{error}");
    }
}
