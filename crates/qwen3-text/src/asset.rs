//! The tokenizer file inside the binary, and its parsing into what encoding needs.
//!
//! The `tokenizers` crate could read the file whole, but its pipeline keeps an alignment of 16 bytes for each byte of
//! text at every step and turns `<tool_call>` in a web page into the control token. So only its BPE model, its regex
//! and its normaliser are used, and the parts of the file are read here. Its added tokens are `ids::CONTROL`.

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::utils::SysRegex;

/// Made by `assets/make.sh`; see `assets/README.md`.
const TOKENIZER_ZST: &[u8] = include_bytes!("../assets/tokenizer.json.zst");

/// SHA-256 of the tokenizer file, unpacked, in hexadecimal: names the tokenizer in what is measured with it.
pub const TOKENIZER_SHA256: &str =
    "a63080b4b30dc861fe1b0e420c53a241304dc81aff3d9bb315e6e33e2a1ab794";

/// Words whose ids are remembered, for each thread that encodes. A page repeats its words; 2,000 of them hold a page,
/// and a pool of 512 blocking threads must not remember 10,000 (the crate's default) each.
const CACHED_WORDS: usize = 2_000;

/// Why the embedded tokenizer could not be made. It does not depend on input: it is a defect of the build.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The embedded bytes are not zstd.
    #[error("embedded tokenizer file does not decompress")]
    Decompress(#[source] std::io::Error),
    /// The file is not the JSON that a byte-level BPE tokenizer has.
    #[error("embedded tokenizer file has an unexpected form")]
    Parse(#[source] serde_json::Error),
    /// The vocabulary, merges or split pattern were refused.
    #[error("embedded tokenizer file has unusable `{part}`")]
    Build {
        /// The part of the file.
        part: &'static str,
        /// What the tokenizers crate said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What encoding and decoding need.
pub(crate) struct Parts {
    pub(crate) model: BPE,
    pub(crate) split: SysRegex,
}

#[derive(Deserialize)]
struct File {
    normalizer: Normalizer,
    pre_tokenizer: PreTokenizer,
    model: Model,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Normalizer {
    #[serde(rename = "NFC")]
    Nfc,
}

#[derive(Deserialize)]
struct PreTokenizer {
    /// A split by a pattern, then the byte alphabet.
    pretokenizers: (Split, ByteLevel),
}

#[derive(Deserialize)]
struct Split {
    pattern: Pattern,
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum ByteLevel {
    ByteLevel,
}

#[derive(Deserialize)]
struct Model {
    vocab: Vocab,
    merges: Merges,
}

pub(crate) fn load() -> Result<Parts, LoadError> {
    let json = decompress()?;
    let file: File = serde_json::from_slice(&json).map_err(LoadError::Parse)?;
    drop(json);
    // The forms that the types above admit are the only ones that encoding implements.
    let (Normalizer::Nfc, (split, ByteLevel::ByteLevel)) =
        (file.normalizer, file.pre_tokenizer.pretokenizers);
    let Pattern::Regex(pattern) = split.pattern;
    let split = SysRegex::new(&pattern).map_err(|source| LoadError::Build {
        part: "pre_tokenizer",
        source,
    })?;
    let model = BPE::builder()
        .vocab_and_merges(file.model.vocab, file.model.merges)
        .cache_capacity(CACHED_WORDS)
        .build()
        .map_err(|source| LoadError::Build {
            part: "model",
            source,
        })?;
    Ok(Parts { model, split })
}

/// A tokenizer file of another tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum OtherTokenizer {
    /// The file is not the JSON that a byte-level BPE tokenizer has.
    #[error("it is no tokenizer file of this kind")]
    Parse(#[source] serde_json::Error),
    /// A part differs.
    #[error("its `{part}` differs")]
    Part {
        /// The part of the file.
        part: &'static str,
    },
    /// The embedded file cannot be read.
    #[error("the embedded tokenizer cannot be compared")]
    Own(#[source] Box<LoadError>),
}

/// What of a tokenizer file decides which ids a text has.
#[derive(Deserialize)]
struct Meaning {
    model: MeaningOfModel,
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct MeaningOfModel {
    vocab: std::collections::HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Newer files hold pairs, older ones texts with a blank between.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

#[derive(Deserialize, PartialEq)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}

/// Whether `json` gives every text the ids that the embedded file gives it.
pub(crate) fn compare(json: &str) -> Result<(), OtherTokenizer> {
    if hex(json.as_bytes()) == TOKENIZER_SHA256 {
        return Ok(());
    }
    let other: Meaning = serde_json::from_str(json).map_err(OtherTokenizer::Parse)?;
    let own = decompress().map_err(|error| OtherTokenizer::Own(Box::new(error)))?;
    let own: Meaning = serde_json::from_slice(&own)
        .map_err(|error| OtherTokenizer::Own(Box::new(LoadError::Parse(error))))?;
    let merges = |file: &Meaning, other: &Meaning| {
        let pairs = file.model.merges.iter().map(Merge::pair);
        pairs.eq(other.model.merges.iter().map(Merge::pair))
    };
    for (part, same) in [
        ("model.vocab", own.model.vocab == other.model.vocab),
        ("model.merges", merges(&own, &other)),
        ("added_tokens", own.added_tokens == other.added_tokens),
    ] {
        if !same {
            return Err(OtherTokenizer::Part { part });
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decompress() -> Result<Vec<u8>, LoadError> {
    zstd::decode_all(TOKENIZER_ZST).map_err(LoadError::Decompress)
}

#[cfg(test)]
mod tests {
    use crate::ids::{CONTROL, SPECIAL, VOCABULARY};

    #[test]
    fn the_asset_is_the_file_its_readme_names() {
        let hex = super::hex(&super::decompress().unwrap());
        assert_eq!(hex, super::TOKENIZER_SHA256);
        let readme = include_str!("../assets/README.md");
        assert!(
            readme.contains(&hex),
            "assets/README.md does not name {hex}"
        );
    }

    #[test]
    fn a_file_of_the_same_tokenizer_is_known_however_it_is_written() {
        let own = super::decompress().unwrap();
        let mut file: serde_json::Value = serde_json::from_slice(&own).unwrap();
        for merge in file["model"]["merges"].as_array_mut().unwrap() {
            if let Some([left, right]) = merge.as_array().map(Vec::as_slice) {
                *merge = format!("{} {}", left.as_str().unwrap(), right.as_str().unwrap()).into();
            }
        }
        super::compare(&file.to_string()).unwrap();
        file["added_tokens"][0]["content"] = "<|other|>".into();
        let error = super::compare(&file.to_string()).unwrap_err();
        assert_eq!(error.to_string(), "its `added_tokens` differs");
        file["model"]["vocab"]["new"] = 151_643.into();
        let error = super::compare(&file.to_string()).unwrap_err();
        assert_eq!(error.to_string(), "its `model.vocab` differs");
    }

    #[test]
    fn control_texts_and_ids_are_those_of_the_file() {
        let file: serde_json::Value =
            serde_json::from_slice(&super::decompress().unwrap()).unwrap();
        let added = file["added_tokens"].as_array().unwrap();
        assert_eq!(added.len(), CONTROL.len());
        for (token, (id, text)) in added.iter().zip(CONTROL) {
            assert_eq!(
                (&token["id"], &token["content"]),
                (&id.into(), &text.into())
            );
            assert_eq!(token["special"], SPECIAL.contains(&id), "{text}");
        }
        assert_eq!(CONTROL[25].0 + 1, VOCABULARY);
    }
}
