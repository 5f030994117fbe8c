//! Log-probabilities as each dialect tells them. The texts of ids are made while they are written.

use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};
use serde_json::{Map, Value, json};

use super::backend::{Backend, Token};
use super::reply::Dialect;

/// JSON has no infinities; vLLM writes this number in their place.
const LOGPROB_MIN: f32 = -9_999.0;

/// Of some tokens of an answer.
pub(super) struct Logprobs<'a> {
    pub(super) dialect: Dialect,
    pub(super) tokens: &'a [Token],
    pub(super) backend: &'a dyn Backend,
}

impl Serialize for Logprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tokens = self.tokens.iter();
        let mut map = serializer.serialize_map(None)?;
        match self.dialect {
            Dialect::Chat => {
                map.serialize_entry("content", &Each(tokens.map(|token| self.one(token))))?;
            }
            Dialect::Completion => {
                let texts = tokens.clone().map(|token| self.text(token.id));
                map.serialize_entry("tokens", &Each(texts))?;
                let own = tokens.clone().map(|token| shown(token.logprob));
                map.serialize_entry("token_logprobs", &Each(own))?;
                let tops = tokens.map(|token| self.top_by_text(token));
                map.serialize_entry("top_logprobs", &Each(tops))?;
            }
        }
        map.end()
    }
}

/// One id, as chats tell it.
#[derive(Serialize)]
struct One {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<One>>,
}

impl Logprobs<'_> {
    fn one(&self, token: &Token) -> One {
        let top = token.top.iter();
        One {
            top_logprobs: Some(top.map(|&(id, logprob)| self.plain(id, logprob)).collect()),
            ..self.plain(token.id, token.logprob)
        }
    }

    fn plain(&self, id: u32, logprob: f32) -> One {
        let bytes = self.backend.token_bytes(id);
        One {
            token: String::from_utf8_lossy(&bytes).into_owned(),
            logprob: shown(logprob),
            bytes,
            top_logprobs: None,
        }
    }

    fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.backend.token_bytes(id)).into_owned()
    }

    /// Ids may have the same text, and an object has each key once.
    fn top_by_text(&self, token: &Token) -> Map<String, Value> {
        let top = token.top.iter();
        top.map(|&(id, logprob)| (self.text(id), json!(shown(logprob))))
            .collect()
    }
}

/// `max` also replaces NaN.
fn shown(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// A sequence of what an iterator gives, one after the other.
pub(super) struct Each<I>(pub(super) I);

impl<I: Iterator<Item: Serialize> + Clone> Serialize for Each<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.clone())
    }
}
