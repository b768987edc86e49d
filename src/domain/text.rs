//! Text that others wrote: domains' names, libvirt's and guests' words.

/// The text as it can be shown anywhere: on one line, with nothing in it that moves the cursor or
/// turns the order of what is read around. What would do so is escaped.
pub fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match is_plain(c) {
            true => shown.push(c),
            false => shown.extend(c.escape_default()),
        }
    }
    shown
}

/// Not a control character, a line or paragraph separator, or one of Unicode's marks that change
/// the direction of what follows.
pub fn is_plain(c: char) -> bool {
    let separates = matches!(c, '\u{2028}' | '\u{2029}');
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !separates && !turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_one_line_in_the_order_in_which_it_was_written() {
        assert_eq!(plain("a 'vm' ü 虚拟 🐧 \\n"), "a 'vm' ü 虚拟 🐧 \\n");
        assert_eq!(
            plain("a\nb\r\x1b[2J\u{85}\u{2028}\u{202e}cba\u{2069}\0"),
            r"a\nb\r\u{1b}[2J\u{85}\u{2028}\u{202e}cba\u{2069}\u{0}"
        );
    }
}
