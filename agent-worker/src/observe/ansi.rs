//! Terminal escapes: Playwright colours its error messages, command line tools colour everything.

use std::borrow::Cow;

const ESC: char = '\u{1b}';

/// A string command (a window title, a hyperlink) that has not ended after this many bytes is no command: a lone
/// introducer must neither hide the rest of a result nor make every later one search it to the end.
const STRING_BYTES_MAX: usize = 2048;

/// `text` without ANSI escape sequences.
pub(crate) fn strip(text: &str) -> Cow<'_, str> {
    if !text.contains(ESC) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(ESC) {
        out.push_str(&rest[..at]);
        let after = &rest[at + ESC.len_utf8()..];
        rest = &after[sequence_len(after)..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The bytes that belong to the sequence after its escape character (ECMA-48, 5.3 to 5.6).
fn sequence_len(after: &str) -> usize {
    let bytes = after.as_bytes();
    match bytes.first() {
        Some(b'[') => 1 + control_len(&bytes[1..]),
        Some(b']' | b'P' | b'X' | b'^' | b'_') => string_len(bytes),
        Some(0x20..=0x2f) => 1 + control_len(&bytes[1..]),
        Some(0x30..=0x7e) => 1,
        _ => 0,
    }
}

/// Parameters and intermediates, then one final byte where there is one.
fn control_len(bytes: &[u8]) -> usize {
    let parameters = bytes
        .iter()
        .take_while(|b| matches!(b, 0x20..=0x3f))
        .count();
    let ends = matches!(bytes.get(parameters), Some(0x40..=0x7e));
    parameters + usize::from(ends)
}

fn string_len(bytes: &[u8]) -> usize {
    let seen = &bytes[..bytes.len().min(STRING_BYTES_MAX)];
    let bell = seen.iter().position(|&b| b == 0x07).map(|at| at + 1);
    let terminator = seen
        .windows(2)
        .position(|w| w == b"\x1b\\")
        .map(|at| at + 2);
    match (bell, terminator) {
        (Some(a), Some(b)) => a.min(b),
        (a, b) => a.or(b).unwrap_or(1),
    }
}

#[cfg(test)]
mod tests {
    use super::strip;

    #[test]
    fn escapes_go_and_text_stays() {
        let cases = [
            ("plain ü", "plain ü"),
            ("\x1b[31mred\x1b[0m \x1b[1;38;5;9mbold\x1b[m", "red bold"),
            (
                "\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
                "alink",
            ),
            ("\x1b(Ba\x1b7b\x1bMc", "abc"),
            ("a\x1b", "a"),
            ("a\x1b[", "a"),
            ("a\x1b[31", "a"),
            ("a\x1b[3ü", "aü"),
            ("a\x1bü", "aü"),
            ("a\x1b]never ends ü", "anever ends ü"),
        ];
        for (text, expected) in cases {
            assert_eq!(strip(text), expected, "{text:?}");
        }
    }

    #[test]
    fn unended_strings_are_searched_a_bounded_way() {
        let text = "\x1b]".repeat(200_000);
        assert_eq!(strip(&text), "");
    }
}
