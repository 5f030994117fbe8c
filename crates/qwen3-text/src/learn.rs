//! A small vocabulary, learned from text, for a small model.

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::tokenizer::Trainer;
use tokenizers::utils::SysRegex;

use crate::bytes;
use crate::ids::{CONTROL, SPECIALS};

/// Why no vocabulary can be learned.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The pattern is none.
    #[error("`words` must be a regular expression")]
    Words(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The texts were refused.
    #[error("byte pairs cannot be learned from the texts")]
    Texts(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Learns byte pairs (Sennrich et al., 2016) from texts that are cut into words by the pattern, up to `size` tokens, and
/// gives a `tokenizer.json` with them, and with Qwen3's control tokens behind them. Control texts within the texts are
/// left out.
///
/// # Errors
/// The pattern is no regular expression, or there is nothing to learn.
pub fn learn<'t>(
    texts: impl Iterator<Item = &'t str> + Send,
    words: &str,
    size: usize,
) -> Result<String, LearnError> {
    let pattern = SysRegex::new(words).map_err(LearnError::Words)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(bytes::alphabet().collect())
        .build();
    let cut = |text: &str| {
        let mut found = Vec::new();
        let mut rest = text;
        while let Some((at, _, control)) = crate::ids::find_control(rest) {
            push_words(&pattern, &rest[..at], &mut found);
            rest = &rest[at + control.len()..];
        }
        push_words(&pattern, rest, &mut found);
        Ok(found)
    };
    trainer.feed(texts, cut).map_err(LearnError::Texts)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(LearnError::Texts)?;
    let model = serde_json::to_value(&model).map_err(|error| LearnError::Texts(error.into()))?;
    Ok(format!("{:#}\n", file(model, words)))
}

fn push_words(pattern: &SysRegex, text: &str, words: &mut Vec<String>) {
    words.extend(
        pattern
            .find_iter(text)
            .map(|(from, to)| bytes::to_alphabet(&text[from..to])),
    );
}

fn file(model: Value, words: &str) -> Value {
    let first = model["vocab"].as_object().map_or(0, serde_json::Map::len);
    let added: Vec<Value> = CONTROL
        .iter()
        .enumerate()
        .map(|(n, text)| {
            json!({"id": first + n, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": n < SPECIALS})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    #[test]
    fn what_is_learned_is_a_tokenizer_that_knows_its_words() {
        let texts = ["the amber fox and the amber owl<|im_end|>"; 8];
        let json = learn(texts.into_iter(), r"\p{L}+|\s|[^\p{L}\s]+", 300).unwrap();
        let tokenizer = Tokenizer::from_json(&json).unwrap();
        assert_eq!(tokenizer.encode_ordinary("amber").len(), 1);
        assert_eq!(
            tokenizer.encode("amber<|im_end|>")[1],
            tokenizer.ids().turn_close
        );
        let ids = tokenizer.encode_ordinary("zürich 42");
        assert_eq!(tokenizer.decode(&ids).unwrap(), "zürich 42");
        assert!(learn(texts.into_iter(), "(", 300).is_err());
    }
}
