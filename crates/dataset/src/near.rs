//! Which conversations teach nearly the same: signatures of what is said in them, and an index of those.
//!
//! A signature is a one-permutation MinHash over runs of tokens of what users and the model say: what tools answer is
//! the page, which rollouts of one site share whatever they do. Two signatures agree in about as many places as the
//! sets of runs have in common (Li, Owen, Zhang: *One Permutation Hashing*, 2012; empty places borrow from the next
//! one, Shrivastava and Li 2014). The index finds candidates by bands of places that agree in full.

use std::collections::HashMap;

use espalier_core::chat::Message;
use espalier_qwen3_text::Tokenizer;
use sha2::{Digest, Sha256};

use crate::source::Source;

/// Places of a signature: with 64 the estimate of 0.9 is off by 0.04.
const PLACES: usize = 64;
const PLACE_BITS: u32 = PLACES.trailing_zeros();
/// Tokens of a run.
const RUN: usize = 5;
/// Places of a band: with 16 bands of 4, of pairs that have 0.7 in common one in a hundred is missed.
const BAND: usize = 4;
/// Candidates that are looked at in one band: more would only be copies of each other.
const CANDIDATES_MAX: usize = 64;

/// What a conversation says, in 256 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signature([u32; PLACES]);

impl Signature {
    /// That of a conversation.
    pub(crate) fn of(source: &Source, tokenizer: &Tokenizer) -> Self {
        let mut places = [u32::MAX; PLACES];
        for text in source.messages.iter().flat_map(said) {
            let ids = tokenizer.encode_ordinary(&text);
            for run in ids.windows(RUN.min(ids.len()).max(1)) {
                let hash = mixed(run);
                let place = (hash >> (u64::BITS - PLACE_BITS)) as usize;
                // The highest value stands for an empty place.
                let value = (hash as u32).min(u32::MAX - 1);
                places[place] = places[place].min(value);
            }
        }
        Self(filled(places))
    }

    /// The share of places that agree.
    pub(crate) fn likeness(&self, other: &Self) -> f64 {
        let pairs = self.0.iter().zip(&other.0);
        let same = pairs.filter(|(a, b)| a == b).count();
        same as f64 / PLACES as f64
    }
}

/// What a message says by itself: its text, thoughts and calls.
fn said(message: &Message) -> Vec<String> {
    match message {
        Message::User { content } => vec![content.clone()],
        Message::Assistant {
            content,
            reasoning_content,
            tool_calls,
        } => {
            let calls = tool_calls.iter().map(|call| {
                let arguments = serde_json::Value::Object(call.function.arguments.clone());
                format!("{} {arguments}", call.function.name)
            });
            let texts = reasoning_content.iter().chain([content]).cloned();
            texts.chain(calls).collect()
        }
        Message::System { .. } | Message::Tool { .. } => Vec::new(),
    }
}

/// FNV-1a, and the finalizer of SplitMix64, whose high bits are as good as its low ones.
fn mixed(run: &[u32]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for &id in run {
        hash = (hash ^ u64::from(id)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Empty places take the value of the next one that is not, told apart by how far it is.
fn filled(places: [u32; PLACES]) -> [u32; PLACES] {
    let mut full = places;
    for (at, place) in full.iter_mut().enumerate() {
        let next = (0..PLACES).find(|far| places[(at + far) % PLACES] != u32::MAX);
        if let Some(far @ 1..) = next {
            let borrowed = places[(at + far) % PLACES];
            *place = borrowed.wrapping_add(crate::render::index(far).wrapping_mul(0x9e37_79b9));
        }
    }
    full
}

/// Signatures that were seen, found by likeness. Finds the same whatever the machine.
#[derive(Debug, Default)]
pub(crate) struct Index {
    signatures: Vec<Signature>,
    bands: HashMap<(usize, [u32; BAND]), Vec<u32>>,
}

impl Index {
    /// Earlier signatures that are at least so like this one, in order.
    pub(crate) fn like(&self, signature: &Signature, threshold: f64) -> Vec<usize> {
        let known = bands(signature).filter_map(|band| self.bands.get(&band));
        let mut found: Vec<usize> = known.flatten().map(|&at| at as usize).collect();
        found.sort_unstable();
        found.dedup();
        found.retain(|&at| self.signatures[at].likeness(signature) >= threshold);
        found
    }

    /// Adds one; its number counts from 0.
    pub(crate) fn add(&mut self, signature: Signature) -> usize {
        let at = self.signatures.len();
        for band in bands(&signature) {
            let candidates = self.bands.entry(band).or_default();
            if candidates.len() < CANDIDATES_MAX {
                candidates.push(crate::render::index(at));
            }
        }
        self.signatures.push(signature);
        at
    }
}

fn bands(signature: &Signature) -> impl Iterator<Item = (usize, [u32; BAND])> {
    let (bands, _) = signature.0.as_chunks::<BAND>();
    bands.iter().copied().enumerate()
}

/// SHA-256 of messages and tools: equal for conversations that are the same but for names and dates.
pub(crate) fn digest(source: &Source) -> [u8; 32] {
    let mut hash = Sha256::new();
    let both = serde_json::json!([source.messages, source.tools]);
    hash.update(both.to_string());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Facts;

    fn source(words: &[String]) -> Source {
        Source {
            id: String::new(),
            timestamp: String::new(),
            model: String::new(),
            messages: vec![
                Message::User {
                    content: "Find the price.".into(),
                },
                Message::Tool {
                    tool_call_id: "c".into(),
                    content: "the same long page ".repeat(500),
                },
                Message::assistant(words.join(" "), None, vec![]),
            ],
            tools: vec![],
            facts: Facts::default(),
            thinking: true,
            keep_hints: None,
            calls: vec![],
        }
    }

    fn words(seed: u32, count: u32) -> Vec<String> {
        let word = |n: u32| format!("w{}", mixed(&[seed, n]) % 9973);
        (0..count).map(word).collect()
    }

    fn signature(words: &[String]) -> Signature {
        Signature::of(&source(words), Tokenizer::shared().unwrap())
    }

    #[test]
    fn likeness_is_what_two_texts_have_in_common() {
        let text = words(1, 400);
        let whole = signature(&text);
        assert_eq!(whole.likeness(&whole), 1.0);
        let mut changed = text.clone();
        changed[200] = "other".into();
        assert!(whole.likeness(&signature(&changed)) > 0.9);
        changed.truncate(200);
        let half = whole.likeness(&signature(&changed));
        assert!((0.3..0.7).contains(&half), "{half}");
        let other = whole.likeness(&signature(&words(2, 400)));
        assert!(other < 0.15, "{other}");
    }

    #[test]
    fn the_index_finds_what_is_like() {
        let mut index = Index::default();
        for seed in 0..50 {
            let signature = signature(&words(seed, 100));
            assert_eq!(index.like(&signature, 0.8), [0; 0], "{seed}");
            assert_eq!(index.add(signature), seed as usize);
        }
        let mut near = words(17, 100);
        near.push("more".into());
        assert_eq!(index.like(&signature(&near), 0.8), [17]);
        assert_eq!(index.like(&signature(&near), 1.01), [0; 0]);
    }

    #[test]
    fn short_and_empty_texts_have_signatures() {
        let empty = signature(&[]);
        assert_eq!(empty, signature(&[]));
        assert_ne!(empty, signature(&words(3, 1)));
    }

    #[test]
    fn digests_tell_other_messages_and_tools() {
        let one = source(&words(1, 3));
        let mut other = one.clone();
        other.id = "another".into();
        assert_eq!(digest(&one), digest(&other));
        other.tools.push(serde_json::json!({"name": "f"}));
        assert_ne!(digest(&one), digest(&other));
    }
}
