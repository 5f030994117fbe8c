//! The alphabet of byte-level BPE: one printable character for each of the 256 bytes.
//!
//! The vocabulary is written in it. Printable Latin-1 bytes stand for themselves; the other 68 take the code points
//! from U+0100 on, in order (GPT-2's `bytes_to_unicode`).

use std::sync::LazyLock;

static BYTE_TO_CHAR: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut unprintable = (0x100..).filter_map(char::from_u32);
    std::array::from_fn(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte as u8),
        _ => unprintable.next().unwrap_or_default(),
    })
});

/// `text` with each of its bytes written as one character of the alphabet.
pub(crate) fn to_alphabet(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    out.extend(text.bytes().map(|byte| BYTE_TO_CHAR[usize::from(byte)]));
    out
}

/// The reverse, by code point: every character of the alphabet is below U+0200.
static CHAR_TO_BYTE: LazyLock<[Option<u8>; 0x200]> = LazyLock::new(|| {
    let mut bytes = [None; 0x200];
    for byte in 0..=255 {
        bytes[BYTE_TO_CHAR[usize::from(byte)] as usize] = Some(byte);
    }
    bytes
});

/// The byte that a character of the alphabet stands for; `None` for any other character.
pub(crate) fn byte_of(character: char) -> Option<u8> {
    CHAR_TO_BYTE.get(character as usize).copied().flatten()
}

/// Every character of the alphabet, by its byte.
pub(crate) fn alphabet() -> impl Iterator<Item = char> {
    BYTE_TO_CHAR.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection_that_keeps_ascii_and_shifts_the_rest() {
        assert_eq!(to_alphabet("a \n~"), "aĠĊ~");
        for byte in 0..=255u8 {
            assert_eq!(byte_of(BYTE_TO_CHAR[usize::from(byte)]), Some(byte));
        }
        assert_eq!(byte_of('日'), None);
    }
}
