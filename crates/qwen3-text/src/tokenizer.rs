//! Encoding, counting, cutting and decoding.
//!
//! Two ways to encode, because the same characters mean two things. Where a chat template wrote `<|im_end|>` it is the
//! control token. In what a tool, a page or a user wrote it is ten harmless characters
//! ([`Tokenizer::encode_ordinary`]), and so it is for counting and cutting. A rendered conversation holds both and
//! knows which is which ([`Tokenizer::encode_prompt`]).

use std::borrow::Cow;
use std::sync::{Arc, LazyLock, OnceLock};

use tokenizers::tokenizer::normalizer::Range;
use tokenizers::{Model, NormalizedString, Token};

use crate::asset::{self, LoadError, OtherTokenizer, Parts};
use crate::template::Prompt;
use crate::{bytes, ids};

/// No token of the vocabulary stands for more bytes than this; a test holds it against the vocabulary.
const TOKEN_BYTES_MAX: usize = 128;
/// Canonical composition makes text at most this many times shorter (a Hangul syllable: 9 bytes decomposed, 3 composed).
const NFC_SHRINK_MAX: usize = 3;

/// Qwen3's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer {
    parts: Arc<Parts>,
    spellings: Arc<OnceLock<Spellings>>,
}

/// The bytes of every token, one after another. Made by the first decoding: a process that only counts needs none.
struct Spellings {
    bytes: Vec<u8>,
    /// Where the bytes of each id start, and at last where all end.
    starts: Vec<usize>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

/// Decoding met an id that no token has (Qwen3's padding ids, from 151,669 on, are such).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token id must be in the vocabulary, got {id}")]
pub struct UnknownId {
    /// The id.
    pub id: u32,
}

impl Tokenizer {
    /// Parses the embedded file: some tenths of a second and tens of MB, so do it once; see [`Tokenizer::shared`].
    pub fn load() -> Result<Self, LoadError> {
        Ok(Self {
            parts: Arc::new(asset::load()?),
            spellings: Arc::default(),
        })
    }

    /// Whether a model's `tokenizer.json` is this tokenizer's, which is the only one there is here. Takes a second where
    /// the file is not the very same ([`TOKENIZER_SHA256`](crate::TOKENIZER_SHA256)).
    ///
    /// # Errors
    /// How it differs.
    pub fn is_file(json: &str) -> Result<(), OtherTokenizer> {
        asset::compare(json)
    }

    /// The one of this process, loaded by the first call. The first call blocks: keep it off async threads.
    pub fn shared() -> Result<&'static Self, &'static LoadError> {
        static SHARED: LazyLock<Result<Tokenizer, LoadError>> = LazyLock::new(Tokenizer::load);
        SHARED.as_ref()
    }

    /// The ids of a rendered conversation: the control texts that the template wrote become their own ids, and those
    /// that its content spells stay text. Equal to [`Tokenizer::encode_as_transformers`] where content spells none.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Vec<u32> {
        let text = prompt.text();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut done = 0;
        for control in prompt.controls() {
            ids.extend(self.encode_ordinary(&text[done..control.start]));
            ids.extend(ids::control_at(&text[control.start..]).map(|(id, _)| id));
            done = control.end;
        }
        ids.extend(self.encode_ordinary(&text[done..]));
        ids
    }

    /// The ids that transformers gives a rendered conversation: whoever wrote a control text, it becomes the control
    /// token, so that a web page can end a turn and open another. For comparison with other servers.
    pub fn encode_as_transformers(&self, prompt: &Prompt) -> Vec<u32> {
        self.encode(prompt.text())
    }

    /// The ids of trusted text: control tokens and markers (`<|im_start|>`, `<tool_call>`, …) become their own ids.
    /// Nothing is added before or after.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while let Some((at, id, control)) = ids::find_control(rest) {
            ids.extend(self.encode_ordinary(&rest[..at]));
            ids.push(id);
            rest = &rest[at + control.len()..];
        }
        ids.extend(self.encode_ordinary(rest));
        ids
    }

    /// The ids of untrusted text: no part of it becomes a control token, whatever it spells.
    pub fn encode_ordinary(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for word in self.words(&composed(text)) {
            ids.extend(self.tokens(word).iter().map(|token| token.id));
        }
        ids
    }

    /// The number of ids that [`Tokenizer::encode_ordinary`] gives.
    pub fn count(&self, text: &str) -> usize {
        let text = composed(text);
        self.words(&text).map(|word| self.tokens(word).len()).sum()
    }

    /// As [`Tokenizer::count`], or `None` as soon as there are more than `max_tokens`: the work is bounded by the
    /// limit, not by the text.
    pub fn count_at_most(&self, text: &str, max_tokens: usize) -> Option<usize> {
        if text.len() > max_tokens.saturating_mul(TOKEN_BYTES_MAX * NFC_SHRINK_MAX) {
            return None;
        }
        let mut left = max_tokens;
        for line in lines(text) {
            for word in self.words(&composed(line)) {
                // A page may hold one endless word: its length alone tells that it does not fit.
                if word.len() > left.saturating_mul(TOKEN_BYTES_MAX) {
                    return None;
                }
                left = left.checked_sub(self.tokens(word).len())?;
            }
        }
        Some(max_tokens - left)
    }

    /// The longest start of `text`, ending after one of its tokens and on a character border, that has at most
    /// `max_tokens` tokens by itself. The work is bounded by the limit, not by the text.
    pub fn prefix_within<'t>(&self, text: &'t str, max_tokens: usize) -> &'t str {
        // Text has three or four bytes a token; a window of eight rarely has to grow.
        let mut window_bytes = max_tokens.saturating_mul(8).saturating_add(64);
        loop {
            let head = &text[..text.floor_char_boundary(window_bytes)];
            let ends = self.token_ends(head, max_tokens.saturating_add(1));
            if ends.len() > max_tokens {
                return self.settle(head, &ends[..max_tokens]);
            }
            if head.len() == text.len() {
                return text;
            }
            window_bytes = window_bytes.saturating_mul(2);
        }
    }

    /// The text of `ids`, control tokens included. Bytes that are no UTF-8 (a cut within a character) become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, UnknownId> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            out.extend_from_slice(self.token_bytes(id).ok_or(UnknownId { id })?);
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// The bytes that an id stands for, of a control token its spelling; `None` for an id that no token has. They may
    /// be a part of a character. The first call, and the first decoding, make the table of all: a tenth of a second.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let spellings = self.spellings.get_or_init(|| Spellings::of(&self.parts));
        let at = usize::try_from(id).ok()?;
        let end = *spellings.starts.get(at + 1)?;
        Some(&spellings.bytes[spellings.starts[at]..end])
    }

    /// The words of NFC text, as the model's pattern splits it. The pattern covers every character.
    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let found = self.parts.split.find_iter(text);
        found.map(move |(start, end)| &text[start..end])
    }

    fn tokens(&self, word: &str) -> Vec<Token> {
        // The model fails only at a byte that has no token, and a test finds all 256 in the vocabulary.
        let tokens = self.parts.model.tokenize(&bytes::to_alphabet(word));
        tokens.unwrap_or_default()
    }

    /// Where the first `limit` tokens of `text` end: byte offsets on character borders, not decreasing.
    fn token_ends(&self, text: &str, limit: usize) -> Vec<usize> {
        let mut ends = Vec::new();
        let mut bytes_done = 0;
        let nfc = (!text.is_ascii()).then(|| normalized(text));
        let seen = nfc.as_ref().map_or(text, NormalizedString::get);
        for token in self
            .words(seen)
            .flat_map(|word| self.tokens(word))
            .take(limit)
        {
            bytes_done += token.value.chars().count();
            ends.push(bytes_done);
        }
        if let Some(nfc) = &nfc {
            for end in &mut ends {
                let border = nfc.get().floor_char_boundary(*end);
                let original = nfc.convert_offsets(Range::Normalized(0..border));
                *end = original.map_or(0, |range| text.floor_char_boundary(range.end));
            }
        }
        ends
    }

    /// The longest start of `text` that ends at one of `ends` and has at most as many tokens as there are ends.
    /// A start may have another number of tokens than it had within the whole, when the cut falls into a character.
    fn settle<'t>(&self, text: &'t str, ends: &[usize]) -> &'t str {
        let fits = |end: &&usize| self.count(&text[..**end]) <= ends.len();
        let end = ends.iter().rev().find(fits).copied().unwrap_or(0);
        &text[..end]
    }
}

impl Spellings {
    fn of(parts: &Parts) -> Self {
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for id in 0..ids::VOCABULARY {
            match ids::CONTROL.iter().find(|(control, _)| *control == id) {
                Some((_, text)) => bytes.extend_from_slice(text.as_bytes()),
                None => {
                    let word = parts.model.id_to_token(id).unwrap_or_default();
                    bytes.extend(word.chars().filter_map(bytes::byte_of));
                }
            }
            starts.push(bytes.len());
        }
        Self { bytes, starts }
    }
}

fn normalized(text: &str) -> NormalizedString {
    let mut normalized = NormalizedString::from(text);
    normalized.nfc();
    normalized
}

/// `text` in canonical composition, as the model sees it.
fn composed(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(normalized(text).get().to_owned())
    }
}

/// `text` in pieces whose token counts add up to the count of the whole: the pattern of Qwen3 always ends a word after
/// the last line break of a run of whitespace, and nothing composes across one.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = rest
            .match_indices('\n')
            .map(|(at, _)| at + 1)
            .find(|&end| is_line_border(&rest[end..]))
            .unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        rest = after;
        (!line.is_empty()).then_some(line)
    })
}

/// Whether a line break just before `after` is the last of its run of whitespace.
fn is_line_border(after: &str) -> bool {
    let mut blank = after.chars().take_while(|c| c.is_whitespace());
    !blank.any(|c| c == '\n' || c == '\r')
}

#[cfg(test)]
mod tests;
