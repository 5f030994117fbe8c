//! The tokenizer file inside the binary.

use crate::file::{File, Parts, TokenizerError};

/// Made by `assets/make.sh`; see `assets/README.md`.
const TOKENIZER_ZST: &[u8] = include_bytes!("../assets/tokenizer.json.zst");

/// SHA-256 of the tokenizer file, unpacked, in hexadecimal: names the tokenizer in what is measured with it.
pub const TOKENIZER_SHA256: &str =
    "a63080b4b30dc861fe1b0e420c53a241304dc81aff3d9bb315e6e33e2a1ab794";
/// SHA-256 of the file that models of Qwen3 bring: the same but for whitespace.
const SOURCE_SHA256: &str = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4";
/// Tokens of its byte pairs.
const TOKENS: usize = 151_643;

/// Why the embedded tokenizer could not be made. It does not depend on input: it is a defect of the build.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The embedded bytes are not zstd.
    #[error("embedded tokenizer file does not decompress")]
    Decompress(#[source] std::io::Error),
    /// The file is none that can be used.
    #[error("embedded tokenizer file cannot be used")]
    File(#[source] Box<TokenizerError>),
}

/// What encoding and decoding need of it.
pub(crate) fn load() -> Result<Parts, LoadError> {
    let parts = file()?.into_parts(TOKENIZER_SHA256.to_owned());
    parts.map_err(|error| LoadError::File(Box::new(error)))
}

/// Whether a file of this digest is the embedded one.
pub(crate) fn has_digest(sha256: &str) -> bool {
    [TOKENIZER_SHA256, SOURCE_SHA256].contains(&sha256)
}

/// Whether `other` gives every text the ids that the embedded file gives it, however it is written. Takes a second where
/// it may.
pub(crate) fn is_same(other: &File) -> bool {
    other.tokens() == TOKENS && file().is_ok_and(|own| own.is_same(other))
}

fn file() -> Result<File, LoadError> {
    let json = decompress()?;
    File::parse(&json).map_err(|error| LoadError::File(Box::new(error)))
}

fn decompress() -> Result<Vec<u8>, LoadError> {
    zstd::decode_all(TOKENIZER_ZST).map_err(LoadError::Decompress)
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::file::sha256_hex;
    use crate::ids::{CONTROL, SPECIALS};
    use crate::{Ids, Tokenizer};

    /// The file as JSON.
    pub(crate) fn json() -> serde_json::Value {
        serde_json::from_slice(&super::decompress().unwrap()).unwrap()
    }

    #[test]
    fn the_asset_is_the_file_its_readme_names() {
        let hex = sha256_hex(&super::decompress().unwrap());
        assert_eq!(hex, super::TOKENIZER_SHA256);
        let readme = include_str!("../assets/README.md");
        for digest in [super::TOKENIZER_SHA256, super::SOURCE_SHA256] {
            assert!(
                readme.contains(digest),
                "assets/README.md does not name {digest}"
            );
        }
    }

    #[test]
    fn control_texts_are_those_of_the_file_and_ids_are_qwen3s() {
        let file = json();
        let added = file["added_tokens"].as_array().unwrap();
        assert_eq!(added.len(), CONTROL.len());
        for (n, (token, text)) in added.iter().zip(CONTROL).enumerate() {
            let id = super::TOKENS + n;
            assert_eq!(
                (&token["id"], &token["content"]),
                (&id.into(), &text.into())
            );
            assert_eq!(token["special"], n < SPECIALS, "{text}");
        }
        let tokenizer = Tokenizer::shared().unwrap();
        assert_eq!(tokenizer.vocabulary(), 151_669);
        let expected = Ids {
            end_of_text: 151_643,
            turn_open: 151_644,
            turn_close: 151_645,
            call_open: 151_657,
            call_close: 151_658,
            thought_open: 151_667,
            thought_close: 151_668,
        };
        assert_eq!(*tokenizer.ids(), expected);
    }
}
