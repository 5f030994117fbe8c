//! Encoding, counting, cutting and decoding.
//!
//! Two ways to encode, because the same characters mean two things. Where a chat template wrote `<|im_end|>` it is the
//! control token. In what a tool, a page or a user wrote it is ten harmless characters
//! ([`Tokenizer::encode_ordinary`]), and so it is for counting and cutting. A rendered conversation holds both and
//! knows which is which ([`Tokenizer::encode_prompt`]).

use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::sync::{Arc, LazyLock, OnceLock};

use tokenizers::tokenizer::normalizer::Range;
use tokenizers::{Model, NormalizedString, Token};

use crate::asset::{self, LoadError, TOKENIZER_SHA256};
use crate::bytes;
use crate::file::{File, Parts, TokenizerError, sha256_hex};
use crate::ids::{CONTROL, Ids, SPECIALS, control_at, find_control};
use crate::template::Prompt;

/// The file of a model's folder that holds its tokenizer.
const FILE: &str = "tokenizer.json";
/// Largest `tokenizer.json` that is read, in bytes: Qwen3's has 11 MB.
pub const TOKENIZER_BYTES_MAX: u64 = 64 << 20;

/// Canonical composition makes text at most this many times shorter (a Hangul syllable: 9 bytes decomposed, 3 composed).
const NFC_SHRINK_MAX: usize = 3;

/// A byte-level BPE tokenizer with Qwen3's control tokens: Qwen3's own, or the one that a model brings. Cloning shares it.
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
        let sha256 = &self.parts.sha256;
        f.debug_struct("Tokenizer")
            .field("sha256", sha256)
            .finish_non_exhaustive()
    }
}

/// Decoding met an id that no token has: those from [`Tokenizer::vocabulary`] on are such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token id must be in the vocabulary, got {id}")]
pub struct UnknownId {
    /// The id.
    pub id: u32,
}

impl Tokenizer {
    /// Parses the embedded file: some tenths of a second and tens of MB, so do it once; see [`Tokenizer::shared`].
    pub fn load() -> Result<Self, LoadError> {
        Ok(Self::of(asset::load()?))
    }

    fn of(parts: Parts) -> Self {
        Self {
            parts: Arc::new(parts),
            spellings: Arc::default(),
        }
    }

    /// Qwen3's, of this process, loaded by the first call. The first call blocks: keep it off async threads.
    pub fn shared() -> Result<&'static Self, &'static LoadError> {
        static SHARED: LazyLock<Result<Tokenizer, LoadError>> = LazyLock::new(Tokenizer::load);
        SHARED.as_ref()
    }

    /// The tokenizer of a `tokenizer.json` of Hugging Face: byte-level BPE after NFC or nothing, of words split by a
    /// pattern that takes a bounded time, with the control texts of Qwen3, whatever their ids, and no others. A file that gives every text the ids
    /// that Qwen3's gives it is [`Tokenizer::shared`], however it is written; to find that takes a second. Blocks.
    ///
    /// # Errors
    /// What in it is of another kind.
    pub fn from_json(json: &str) -> Result<Self, TokenizerError> {
        let sha256 = sha256_hex(json.as_bytes());
        let own = || Self::shared().cloned().map_err(TokenizerError::Own);
        if asset::has_digest(&sha256) {
            return own();
        }
        let file = File::parse(json.as_bytes())?;
        if asset::is_same(&file) {
            return own();
        }
        Ok(Self::of(file.into_parts(sha256)?))
    }

    /// The tokenizer of the model in `folder`: that of its `tokenizer.json`, and Qwen3's where it has none. Blocks.
    ///
    /// # Errors
    /// As for [`Tokenizer::from_json`] and [`Tokenizer::file_of`].
    pub fn of_folder(folder: &Path) -> Result<Self, TokenizerError> {
        match Self::file_of(folder)? {
            Some(json) => Self::from_json(&json),
            None => Self::shared().cloned().map_err(TokenizerError::Own),
        }
    }

    /// The `tokenizer.json` in `folder`, of at most [`TOKENIZER_BYTES_MAX`] bytes; none if there is none. Blocks.
    ///
    /// # Errors
    /// It cannot be read, or is too large.
    pub fn file_of(folder: &Path) -> Result<Option<String>, TokenizerError> {
        let path = folder.join(FILE);
        let read = || {
            let bytes = std::fs::metadata(&path)?.len();
            if bytes > TOKENIZER_BYTES_MAX {
                let rule = format!("must have at most {TOKENIZER_BYTES_MAX} bytes, has {bytes}");
                return Err(io::Error::other(rule));
            }
            std::fs::read_to_string(&path)
        };
        match read() {
            Ok(json) => Ok(Some(json)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TokenizerError::Read { path, source }),
        }
    }

    /// Whether it is Qwen3's.
    pub fn is_qwen3(&self) -> bool {
        self.sha256() == TOKENIZER_SHA256
    }

    /// SHA-256 of its file in hexadecimal; [`TOKENIZER_SHA256`](crate::TOKENIZER_SHA256) for Qwen3's.
    pub fn sha256(&self) -> &str {
        &self.parts.sha256
    }

    /// Every id below this has a token, and no other id has: a model may have more, for padding, which no text has and
    /// which must never be sampled.
    pub fn vocabulary(&self) -> u32 {
        self.parts.vocabulary
    }

    /// The ids with a meaning of their own.
    pub fn ids(&self) -> &Ids {
        &self.parts.ids
    }

    /// All ids that byte pairs never make.
    pub fn controls(&self) -> &[u32] {
        &self.parts.controls
    }

    /// Whether transformers calls this id of Qwen3's special, and leaves it out of decoded answers. The markers of tools
    /// and thoughts are not among them.
    pub fn is_special(&self, id: u32) -> bool {
        self.parts.controls[..SPECIALS].contains(&id)
    }

    /// The ids of a rendered conversation: the control texts that the template wrote become their own ids, and those
    /// that its content spells stay text. Equal to [`Tokenizer::encode_as_transformers`] where content spells none.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Vec<u32> {
        let text = prompt.text();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut done = 0;
        for control in prompt.controls() {
            ids.extend(self.encode_ordinary(&text[done..control.start]));
            let place = control_at(&text[control.start..]);
            ids.extend(place.map(|(place, _)| self.parts.controls[place]));
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
        while let Some((at, place, control)) = find_control(rest) {
            ids.extend(self.encode_ordinary(&rest[..at]));
            ids.push(self.parts.controls[place]);
            rest = &rest[at + control.len()..];
        }
        ids.extend(self.encode_ordinary(rest));
        ids
    }

    /// The ids of untrusted text: no part of it becomes a control token, whatever it spells.
    pub fn encode_ordinary(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for word in self.words(&self.composed(text)) {
            ids.extend(self.tokens(word).iter().map(|token| token.id));
        }
        ids
    }

    /// The number of ids that [`Tokenizer::encode_ordinary`] gives.
    pub fn count(&self, text: &str) -> usize {
        let text = self.composed(text);
        self.words(&text).map(|word| self.tokens(word).len()).sum()
    }

    /// As [`Tokenizer::count`], or `None` as soon as there are more than `max_tokens`: the work is bounded by the
    /// limit, not by the text.
    pub fn count_at_most(&self, text: &str, max_tokens: usize) -> Option<usize> {
        let token_bytes_max = self.parts.token_bytes_max;
        if text.len() > max_tokens.saturating_mul(token_bytes_max * NFC_SHRINK_MAX) {
            return None;
        }
        let mut left = max_tokens;
        for line in self.lines(text) {
            for word in self.words(&self.composed(line)) {
                // A page may hold one endless word: its length alone tells that it does not fit.
                if word.len() > left.saturating_mul(token_bytes_max) {
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

    /// The words of composed text, as the pattern splits it: what it finds, and what is between.
    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let found = self.parts.split.find_iter(text);
        let mut done = 0;
        let pieces = found.chain([(text.len(), text.len())]);
        let pieces = pieces.flat_map(move |(start, end)| {
            let between = &text[done..start];
            done = end;
            [between, &text[start..end]]
        });
        pieces.filter(|word| !word.is_empty())
    }

    /// `text` as the model sees it.
    fn composed<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self.composition(text) {
            None => Cow::Borrowed(text),
            Some(composed) => Cow::Owned(composed.get().to_owned()),
        }
    }

    /// The composition of `text`, where it may differ from it.
    fn composition(&self, text: &str) -> Option<NormalizedString> {
        (self.parts.is_composed && !text.is_ascii()).then(|| {
            let mut composed = NormalizedString::from(text);
            composed.nfc();
            composed
        })
    }

    /// `text` in pieces whose token counts add up to the count of the whole: where a word never goes on after a run of
    /// whitespace, nothing composes across the last line break of it either. Else it is one piece.
    fn lines<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let ends_lines = self.parts.ends_lines;
        let mut rest = text;
        std::iter::from_fn(move || {
            let end = rest
                .match_indices('\n')
                .map(|(at, _)| at + 1)
                .find(|&end| ends_lines && is_line_border(&rest[end..]))
                .unwrap_or(rest.len());
            let (line, after) = rest.split_at(end);
            rest = after;
            (!line.is_empty()).then_some(line)
        })
    }

    fn tokens(&self, word: &str) -> Vec<Token> {
        // The model fails only at a byte that has no token, and files are refused that have none for one.
        let tokens = self.parts.model.tokenize(&bytes::to_alphabet(word));
        tokens.unwrap_or_default()
    }

    /// Where the first `limit` tokens of `text` end: byte offsets on character borders, not decreasing.
    fn token_ends(&self, text: &str, limit: usize) -> Vec<usize> {
        let mut ends = Vec::new();
        let mut bytes_done = 0;
        let nfc = self.composition(text);
        let seen = nfc.as_ref().map_or(text, NormalizedString::get);
        for token in self
            .words(seen)
            .flat_map(|word| self.tokens(word))
            .take(limit)
        {
            bytes_done += token.value.chars().count();
            ends.push(bytes_done);
        }
        for end in &mut ends {
            let border = seen.floor_char_boundary(*end);
            *end = match &nfc {
                None => border,
                Some(nfc) => {
                    let original = nfc.convert_offsets(Range::Normalized(0..border));
                    original.map_or(0, |range| text.floor_char_boundary(range.end))
                }
            };
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
        for id in 0..parts.vocabulary {
            match parts.controls.iter().position(|control| *control == id) {
                Some(place) => bytes.extend_from_slice(CONTROL[place].as_bytes()),
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

/// Whether a line break just before `after` is the last of its run of whitespace.
fn is_line_border(after: &str) -> bool {
    let mut blank = after.chars().take_while(|c| c.is_whitespace());
    !blank.any(|c| c == '\n' || c == '\r')
}

#[cfg(test)]
pub(crate) mod tests;
