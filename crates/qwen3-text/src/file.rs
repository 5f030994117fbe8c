//! A `tokenizer.json` as Hugging Face writes it, checked and read into what encoding and decoding need.
//!
//! The `tokenizers` crate could read the file whole, but its pipeline keeps an alignment of 16 bytes for each byte of
//! text at every step and turns `<tool_call>` in a web page into the control token. So only its BPE model, its regex
//! and its normaliser are used, and the parts of the file are read here. Whatever a file asks for that is not done here
//! is refused, so that a text never has other ids here than elsewhere.

mod split;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::utils::SysRegex;

use crate::bytes;
use crate::ids::{CONTROL, CONTROLS, Ids};

/// Words whose ids are remembered, for each thread that encodes. A page repeats its words; 2,000 of them hold a page,
/// and a pool of 512 blocking threads must not remember 10,000 (the crate's default) each.
const CACHED_WORDS: usize = 2_000;
/// Longest value that an error shows, in bytes.
const SHOWN_BYTES_MAX: usize = 100;

/// Why a `tokenizer.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not the JSON that a tokenizer of byte pairs has.
    #[error("it is no tokenizer of byte pairs")]
    Json(#[source] serde_json::Error),
    /// A part breaks a rule.
    #[error("`{field}` {rule}")]
    Rule {
        /// The part of the file.
        field: String,
        /// What it must be, and what it is.
        rule: String,
    },
    /// The merges or the split pattern were refused.
    #[error("`{part}` cannot be used")]
    Build {
        /// The part of the file.
        part: &'static str,
        /// What the tokenizers crate said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is Qwen3's, or there is none, and the embedded one is broken.
    #[error("the embedded tokenizer cannot be loaded")]
    Own(#[source] &'static crate::LoadError),
}

/// What encoding and decoding need.
pub(crate) struct Parts {
    pub(crate) model: BPE,
    pub(crate) split: SysRegex,
    /// Whether text is composed first (NFC).
    pub(crate) is_composed: bool,
    /// Whether no word goes on after the last line break of a run of whitespace.
    pub(crate) ends_lines: bool,
    /// Every id below it has a token, and no other.
    pub(crate) vocabulary: u32,
    /// The ids of [`CONTROL`].
    pub(crate) controls: [u32; CONTROLS],
    pub(crate) ids: Ids,
    /// No token but control tokens stands for more bytes than this.
    pub(crate) token_bytes_max: usize,
    /// Of the file.
    pub(crate) sha256: String,
}

/// The file, of which nothing is checked but its form.
#[derive(Deserialize)]
pub(crate) struct File {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default, rename = "type")]
    kind: Value,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    ignore_merges: Value,
    vocab: Vocab,
    merges: Vec<Merge>,
}

/// Newer files hold pairs, older ones texts with a blank between.
#[derive(PartialEq)]
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of tokens")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                let pair = text.split_once(' ');
                let (left, right) = pair.ok_or_else(|| E::custom("a merge must have a blank"))?;
                Ok(Merge(left.to_owned(), right.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Merge, A::Error> {
                let missing = || A::Error::custom("a merge must have two tokens");
                let left = pair.next_element()?.ok_or_else(missing)?;
                let right = pair.next_element()?.ok_or_else(missing)?;
                Ok(Merge(left, right))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl File {
    pub(crate) fn parse(json: &[u8]) -> Result<Self, TokenizerError> {
        serde_json::from_slice(json).map_err(TokenizerError::Json)
    }

    /// How many tokens its byte pairs have.
    pub(crate) fn tokens(&self) -> usize {
        self.model.vocab.len()
    }

    /// Whether both give every text the same ids.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let patterns = (pattern(&self.pre_tokenizer), pattern(&other.pre_tokenizer));
        self.model.vocab == other.model.vocab
            && self.model.merges == other.model.merges
            && self.added() == other.added()
            && self.normalizer == other.normalizer
            && matches!(patterns, (Ok(one), Ok(two)) if one == two)
    }

    fn added(&self) -> HashMap<&str, u32> {
        let added = self.added_tokens.iter();
        added.map(|token| (&*token.content, token.id)).collect()
    }

    /// The parts that encoding needs; `sha256` is the file's.
    ///
    /// # Errors
    /// The first thing in it that makes no sense, or that is not done here.
    pub(crate) fn into_parts(self, sha256: String) -> Result<Parts, TokenizerError> {
        let is_composed = is_composed(&self.normalizer)?;
        self.check_settings()?;
        let controls = controls(&self.added_tokens)?;
        let Model { vocab, merges, .. } = self.model;
        let vocabulary = check_ids(&vocab, &controls)?;
        let token_bytes_max = check_words(&vocab)?;
        check_merges(&vocab, &merges)?;
        let pattern = pattern(&self.pre_tokenizer)?;
        let words = SysRegex::new(pattern);
        let merges = merges.into_iter().map(|Merge(left, right)| (left, right));
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges.collect())
            .cache_capacity(CACHED_WORDS)
            .build();
        let failed = |part| move |source| TokenizerError::Build { part, source };
        Ok(Parts {
            model: model.map_err(failed("model"))?,
            split: words.map_err(failed("pre_tokenizer"))?,
            is_composed,
            ends_lines: pattern == split::QWEN3,
            vocabulary,
            controls,
            ids: Ids::of(&controls),
            token_bytes_max,
            sha256,
        })
    }

    /// What would change ids and is not done here.
    fn check_settings(&self) -> Result<(), TokenizerError> {
        let model = &self.model;
        if !model.kind.is_null() && model.kind != "BPE" {
            return refuse("model.type", "must be \"BPE\"", &model.kind);
        }
        for (name, value) in [
            ("dropout", &model.dropout),
            (
                "continuing_subword_prefix",
                &model.continuing_subword_prefix,
            ),
            ("end_of_word_suffix", &model.end_of_word_suffix),
            ("ignore_merges", &model.ignore_merges),
        ] {
            let is_off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::String(text) => text.is_empty(),
                _ => false,
            };
            if !is_off {
                return refuse(&format!("model.{name}"), "must be off", value);
            }
        }
        let post = &self.post_processor;
        match post.is_null() || post["type"] == "ByteLevel" {
            true => Ok(()),
            false => refuse("post_processor", "must be null or of ByteLevel", post),
        }
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rule<T>(field: &str, rule: String) -> Result<T, TokenizerError> {
    let field = field.to_owned();
    Err(TokenizerError::Rule { field, rule })
}

fn refuse<T>(field: &str, must: &str, value: &Value) -> Result<T, TokenizerError> {
    let mut shown = value.to_string();
    if shown.len() > SHOWN_BYTES_MAX {
        shown.truncate(shown.floor_char_boundary(SHOWN_BYTES_MAX));
        shown.push('…');
    }
    rule(field, format!("{must}, got {shown}"))
}

fn is_composed(normalizer: &Value) -> Result<bool, TokenizerError> {
    match normalizer {
        Value::Null => Ok(false),
        _ if normalizer["type"] == "NFC" => Ok(true),
        _ => refuse("normalizer", "must be null or NFC", normalizer),
    }
}

/// The pattern of a pre-tokenizer that splits text by it, in a time that is bounded by the text, and writes the parts in the
/// alphabet of bytes.
fn pattern(pre_tokenizer: &Value) -> Result<&str, TokenizerError> {
    let steps = pre_tokenizer["pretokenizers"].as_array();
    let steps = steps.filter(|_| pre_tokenizer["type"] == "Sequence");
    let Some([split, alphabet]) = steps.map(Vec::as_slice) else {
        let must = "must be a Sequence of Split and ByteLevel";
        return refuse("pre_tokenizer", must, pre_tokenizer);
    };
    let off = Value::Bool(false);
    for (n, step, name, expected) in [
        (0, split, "type", "Split".into()),
        (0, split, "behavior", "Isolated".into()),
        (0, split, "invert", off.clone()),
        (1, alphabet, "type", "ByteLevel".into()),
        (1, alphabet, "add_prefix_space", off.clone()),
        (1, alphabet, "use_regex", off),
    ] {
        if step[name] != expected {
            let field = format!("pre_tokenizer.pretokenizers[{n}].{name}");
            return refuse(&field, &format!("must be {expected}"), &step[name]);
        }
    }
    let field = "pre_tokenizer.pretokenizers[0].pattern";
    match split["pattern"]["Regex"].as_str() {
        Some(pattern) if split::is_bounded(pattern) => Ok(pattern),
        Some(pattern) => refuse(field, split::RULE, &pattern.into()),
        None => refuse(field, "must be a Regex", &split["pattern"]),
    }
}

/// The ids of the control texts, which must be all that is added.
fn controls(added: &[AddedToken]) -> Result<[u32; CONTROLS], TokenizerError> {
    let field = "added_tokens";
    let mut ids = [None; CONTROLS];
    for token in added {
        let text = &*token.content;
        let Some(place) = CONTROL.iter().position(|control| *control == text) else {
            return refuse(field, "must be those of Qwen3", &text.into());
        };
        for (flag, is_set) in [
            ("single_word", token.single_word),
            ("lstrip", token.lstrip),
            ("rstrip", token.rstrip),
            ("normalized", token.normalized),
        ] {
            if is_set {
                return rule(
                    field,
                    format!("must have `{flag}` false, got true of {text}"),
                );
            }
        }
        if ids[place].replace(token.id).is_some() {
            return rule(field, format!("must be named once, got {text} twice"));
        }
    }
    let mut found = [0; CONTROLS];
    for (place, id) in ids.iter().enumerate() {
        match id {
            Some(id) => found[place] = *id,
            None => return rule(field, format!("must have {}, got none", CONTROL[place])),
        }
    }
    Ok(found)
}

/// How many ids there are: each below it must have one token. Control texts may be among the words, by the same ids.
fn check_ids(vocab: &Vocab, controls: &[u32; CONTROLS]) -> Result<u32, TokenizerError> {
    let mut words: HashMap<u32, &str> = HashMap::with_capacity(vocab.len() + CONTROLS);
    let controls = CONTROL.into_iter().zip(controls.iter().copied());
    for (text, id) in controls {
        if let Some(other) = vocab.get(text).filter(|other| **other != id) {
            return rule(
                "model.vocab",
                format!("must give {text} the id {id} of `added_tokens`, got {other}"),
            );
        }
        if let Some(other) = words.insert(id, text) {
            return rule(
                "added_tokens",
                format!("must have an id each, got {id} for {other} and {text}"),
            );
        }
    }
    for (text, &id) in vocab.iter() {
        if let Some(other) = words.insert(id, text).filter(|other| other != text) {
            return rule(
                "model.vocab",
                format!("must have an id for each word, got {id} for {other} and {text}"),
            );
        }
    }
    let count = words.len();
    let size = u32::try_from(count).unwrap_or(u32::MAX);
    match words.keys().max().filter(|last| **last >= size) {
        None => Ok(size),
        Some(last) => rule(
            "model.vocab",
            format!("must have all ids below {count}, which is how many there are, got {last}"),
        ),
    }
}

/// The most bytes that a word stands for. Every byte must have a word, and words but control texts be written in the
/// alphabet.
fn check_words(vocab: &Vocab) -> Result<usize, TokenizerError> {
    let field = "model.vocab";
    let mut longest = 0;
    for word in vocab.keys() {
        if CONTROL.contains(&&**word) {
            continue;
        }
        let is_written =
            |word: &str| !word.is_empty() && word.chars().all(|c| bytes::byte_of(c).is_some());
        if !is_written(word) {
            let word = Value::from(word.as_str());
            return refuse(field, "must be written in the alphabet of bytes", &word);
        }
        longest = longest.max(word.chars().count());
    }
    match bytes::alphabet().find(|byte| !vocab.contains_key(&byte.to_string())) {
        Some(byte) => rule(
            field,
            format!("must have a word for every byte, got none for {byte}"),
        ),
        None => Ok(longest),
    }
}

/// Merges must make words of words, and no control text: what a page spells must not become one.
fn check_merges(vocab: &Vocab, merges: &[Merge]) -> Result<(), TokenizerError> {
    let mut word = String::new();
    for Merge(left, right) in merges {
        word.clear();
        word.push_str(left);
        word.push_str(right);
        let parts = [left, right, &word];
        if !parts.into_iter().all(|part| vocab.contains_key(part)) {
            let must = "must be of words of `model.vocab` and make one";
            return refuse(
                "model.merges",
                must,
                &Value::from([&**left, right].as_slice()),
            );
        }
        if CONTROL.contains(&&*word) {
            return refuse("model.merges", "must make no control text", &(*word).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
