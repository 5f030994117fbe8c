//! Ids to text as they come, for streams.

use crate::tokenizer::{Tokenizer, UnknownId};

/// Decodes one id after another. The texts that it gives, joined, are what [`Tokenizer::decode`] gives for all ids.
///
/// A character may be spread over tokens: its bytes are held back (at most three) until it is whole or can no longer
/// become so. Nothing is decoded twice, so the work for an id depends on that id alone.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The start of a character, at most three bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// At the start of a text.
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self {
            tokenizer,
            pending: Vec::new(),
        }
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Adds an id; gives the text that is certain since. An unknown id changes nothing.
    pub fn push(&mut self, id: u32) -> Result<String, UnknownId> {
        let mut text = String::new();
        self.push_onto(id, &mut text)?;
        Ok(text)
    }

    /// As [`Detokenizer::push`], written at the end of `text`.
    pub fn push_onto(&mut self, id: u32, text: &mut String) -> Result<(), UnknownId> {
        let bytes = self.tokenizer.token_bytes(id).ok_or(UnknownId { id })?;
        if self.pending.is_empty() {
            let held = decode_onto(bytes, text);
            self.pending.extend_from_slice(held);
        } else {
            self.pending.extend_from_slice(bytes);
            let held = decode_onto(&self.pending, text).len();
            self.pending.drain(..self.pending.len() - held);
        }
        Ok(())
    }

    /// Ends the text: what was held back is U+FFFD. The next id starts another text.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Writes the text of `bytes`, what is no UTF-8 as U+FFFD; returns the end that may become a character.
fn decode_onto<'b>(bytes: &'b [u8], text: &mut String) -> &'b [u8] {
    let mut rest = bytes;
    loop {
        let error = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, after) = rest.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid));
        let Some(wrong) = error.error_len() else {
            return after;
        };
        text.push(char::REPLACEMENT_CHARACTER);
        rest = &after[wrong..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokenizer() -> &'static Tokenizer {
        Tokenizer::shared().unwrap()
    }

    /// What each push gave, and at last what `finish` gave.
    fn pieces(ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer().clone());
        let mut pieces: Vec<String> = ids
            .iter()
            .map(|&id| detokenizer.push(id).unwrap())
            .collect();
        pieces.push(detokenizer.finish());
        assert!(detokenizer.pending.is_empty());
        pieces
    }

    #[test]
    fn a_character_comes_whole_and_late_rather_than_broken() {
        let ids = tokenizer().encode("𝒳!");
        let pieces = pieces(&ids);
        assert!(ids.len() > 2);
        let (last, early) = pieces[..pieces.len() - 2].split_last().unwrap();
        assert!(early.iter().all(String::is_empty), "{pieces:?}");
        assert_eq!(last, "𝒳");
    }

    #[test]
    fn half_a_character_is_replaced_at_the_end_or_by_what_follows() {
        let ids = tokenizer().encode("𝒳");
        assert_eq!(pieces(&ids[..1]), ["", "\u{FFFD}"]);
        let exclaimed = [ids[0], tokenizer().encode("!")[0]];
        assert_eq!(pieces(&exclaimed), ["", "\u{FFFD}!", ""]);
    }

    #[test]
    fn an_unknown_id_changes_nothing() {
        let ids = tokenizer().encode("𝒳");
        let mut detokenizer = Detokenizer::new(tokenizer().clone());
        for (n, &id) in ids.iter().enumerate() {
            let refused = detokenizer.push(151_669 + n as u32);
            assert_eq!(refused.unwrap_err().id, 151_669 + n as u32);
            let text = detokenizer.push(id).unwrap();
            assert_eq!(text, if n + 1 == ids.len() { "𝒳" } else { "" });
        }
    }

    proptest! {
        /// Ids at random meet every broken form of UTF-8; the first 256 are single bytes.
        #[test]
        fn pieces_make_the_whole(ids in prop::collection::vec(prop_oneof![0u32..256, 0u32..151_669], 0..60)) {
            prop_assert_eq!(pieces(&ids).concat(), tokenizer().decode(&ids).unwrap());
        }

        #[test]
        fn pieces_of_text_make_the_text(text in r"(\PC|[\x00-\x7f]|🙂|日){0,40}") {
            let ids = tokenizer().encode(&text);
            prop_assert_eq!(pieces(&ids).concat(), tokenizer().decode(&ids).unwrap());
        }
    }
}
