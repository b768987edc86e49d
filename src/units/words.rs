//! Quantities in words for people.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// Formats a duration with one decimal: `0.4 s`.
pub fn seconds(span: Duration) -> String {
    let tenths = (span.as_millis() + 50) / 100;
    format!("{}.{} s", tenths / 10, tenths % 10)
}

/// Returns a parser of whole numbers in a range, for options of the command line.
pub fn whole_number<N>(
    range: RangeInclusive<N>,
) -> impl Fn(&str) -> Result<N, String> + Clone + Send + Sync + 'static
where
    N: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let (first, last) = (range.start(), range.end());
        number.ok_or_else(|| format!("write a whole number from {first} to {last}"))
    }
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

/// Cuts a text so that it takes at most `max` bytes in JSON, and marks the cut with an ellipsis.
pub fn bounded(text: &str, max: usize) -> String {
    const ELLIPSIS: usize = '…'.len_utf8();
    let mut length = 0;
    let mut end = 0;
    for (at, c) in text.char_indices() {
        if length <= max.saturating_sub(ELLIPSIS) {
            end = at;
        }
        length += json_length(c);
    }
    if length <= max {
        text.to_owned()
    } else {
        format!("{}…", &text[..end])
    }
}

/// Returns the number of bytes of a text in JSON, without its quotes.
pub fn json_bytes(text: &str) -> usize {
    text.chars().map(json_length).sum()
}

fn json_length(c: char) -> usize {
    match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        '\0'..='\u{1f}' => 6,
        _ => c.len_utf8(),
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

    #[test]
    fn bounded_text_fits_in_json() {
        assert_eq!(bounded("a\"b", 4), "a\"b");
        for text in ["a\u{1}\n\"\\é🐧".repeat(9), "é".repeat(50), "\0".repeat(50)] {
            for max in 3..200 {
                let cut = bounded(&text, max);
                let json = serde_json::to_string(&cut).unwrap();
                assert!(json.len() - 2 <= max, "{max}: {json}");
                assert_eq!(json.len() - 2, json_bytes(&cut));
                assert!(cut == text || cut.ends_with('…'), "{cut}");
            }
        }
    }
}
