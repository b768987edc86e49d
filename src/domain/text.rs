//! Text from outside: domain names, messages of libvirt and of guests.

/// Returns the text as one line that is safe to print: control characters, line separators and
/// marks that change the text direction are escaped.
pub fn plain(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    shown
}

/// True unless the character is a control character, a line or paragraph separator, or a Unicode
/// mark that changes the direction of the following text.
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
    fn control_and_direction_characters_are_escaped() {
        assert_eq!(plain("a 'vm' ü 虚拟 🐧 \\n"), "a 'vm' ü 虚拟 🐧 \\n");
        assert_eq!(
            plain("a\nb\r\x1b[2J\u{85}\u{2028}\u{202e}cba\u{2069}\0"),
            r"a\nb\r\u{1b}[2J\u{85}\u{2028}\u{202e}cba\u{2069}\u{0}"
        );
    }
}
