//! Quantities in words for people.

use std::fmt::Display;
use std::time::Duration;

/// Formats a duration with one decimal: `0.4 s`.
pub fn seconds(span: Duration) -> String {
    let tenths = (span.as_millis() + 50) / 100;
    format!("{}.{} s", tenths / 10, tenths % 10)
}

/// Formats a number of things: `1 vCPU`, `3 vCPUs`.
pub fn counted<N: Display + PartialEq + From<u8>>(count: N, thing: &str) -> String {
    let plural = if count == N::from(1) { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

/// Cuts a text after `max` characters and marks the cut with an ellipsis.
pub fn shortened(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_rounded_and_counted() {
        assert_eq!(seconds(Duration::from_millis(449)), "0.4 s");
        assert_eq!(seconds(Duration::from_millis(12_960)), "13.0 s");
        assert_eq!(counted(1_u32, "vCPU"), "1 vCPU");
        assert_eq!(counted(0_usize, "vCPU"), "0 vCPUs");
        assert_eq!(shortened("aéé", 2), "aé…");
        assert_eq!(shortened("aé", 2), "aé");
    }
}
