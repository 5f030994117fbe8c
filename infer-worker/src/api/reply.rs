//! Answers as OpenAI's clients read them: what all of them begin with, and the chunks of a stream.

use espalier_runtime::model::ADAPTER_FINGERPRINT;
use serde_json::{Map, Value, json};

use super::backend::{Backend, Token};
use super::choice::{Finish, Piece};
use super::logprobs::Logprobs;

/// Which API is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Chat,
    Completion,
}

/// What all answers of a request share.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) dialect: Dialect,
    pub(super) id: String,
    pub(super) created_s: u64,
    pub(super) model: String,
    /// SHA-256 of the adapter that answers.
    pub(super) adapter_digest: Option<String>,
    pub(super) logprobs: bool,
    pub(super) return_token_ids: bool,
    /// Of each prompt.
    pub(super) prompts: Vec<Vec<u32>>,
    /// Answers to each prompt.
    pub(super) n: usize,
}

/// Tokens, as they are paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) cached_tokens: usize,
}

impl Usage {
    pub(super) fn to_json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

impl Head {
    fn object(&self, streamed: bool) -> &'static str {
        match (self.dialect, streamed) {
            (Dialect::Chat, false) => "chat.completion",
            (Dialect::Chat, true) => "chat.completion.chunk",
            (Dialect::Completion, _) => "text_completion",
        }
    }

    /// What an answer and each chunk of one begin with.
    pub(super) fn named(&self, streamed: bool) -> Map<String, Value> {
        // What made the answer, beyond the model's name: OpenAI's field for that.
        let adapter = self.adapter_digest.as_ref();
        let fingerprint = adapter.map(|digest| format!("{ADAPTER_FINGERPRINT}{digest}"));
        let fields = [
            ("id", json!(self.id)),
            ("object", json!(self.object(streamed))),
            ("created", json!(self.created_s)),
            ("model", json!(self.model)),
            ("system_fingerprint", json!(fingerprint)),
        ];
        let own = |(key, value): (&str, Value)| (key.to_owned(), value);
        fields.into_iter().map(own).collect()
    }

    fn envelope(&self, choices: Vec<Value>) -> Value {
        let mut chunk = self.named(true);
        chunk.insert("choices".to_owned(), Value::Array(choices));
        Value::Object(chunk)
    }

    /// The id of a call, unique in the conversation because it holds the answer's.
    pub(super) fn call_id(&self, choice: usize, call: usize) -> String {
        let (_, unique) = self.id.split_once('-').unwrap_or(("", &self.id));
        format!("call_{}_{choice}_{call}", unique.replace('-', ""))
    }

    /// The first chunk of an answer: who speaks, and with `return_token_ids` what it was asked.
    pub(super) fn opening(&self, choice: usize) -> Option<Value> {
        let mut chunk = match self.dialect {
            Dialect::Chat => {
                let delta = json!({"role": "assistant", "content": ""});
                self.envelope(vec![
                    json!({"index": choice, "delta": delta, "finish_reason": null}),
                ])
            }
            Dialect::Completion if self.return_token_ids => self.envelope(vec![
                json!({"index": choice, "text": "", "finish_reason": null}),
            ]),
            Dialect::Completion => return None,
        };
        if self.return_token_ids {
            let ids = json!(self.prompts[choice / self.n]);
            match self.dialect {
                Dialect::Chat => chunk["prompt_token_ids"] = ids,
                Dialect::Completion => chunk["choices"][0]["prompt_token_ids"] = ids,
            }
        }
        Some(chunk)
    }

    /// Some pieces of an answer with the tokens that came since the chunk before. None if there is nothing to tell.
    pub(super) fn chunk(
        &self,
        choice: usize,
        pieces: &[Piece],
        tokens: &[Token],
        finish: Option<Finish>,
        backend: &dyn Backend,
    ) -> Option<Value> {
        let told = self.logprobs || self.return_token_ids;
        if pieces.is_empty() && finish.is_none() && (tokens.is_empty() || !told) {
            return None;
        }
        let mut out = json!({"index": choice});
        match self.dialect {
            Dialect::Chat => out["delta"] = self.delta(choice, pieces),
            Dialect::Completion => out["text"] = json!(text_of(pieces)),
        }
        if self.logprobs && !tokens.is_empty() {
            out["logprobs"] = json!(Logprobs {
                dialect: self.dialect,
                tokens,
                backend,
            });
        }
        if self.return_token_ids {
            out["token_ids"] = ids_of(tokens);
        }
        out["finish_reason"] = json!(finish.map(Finish::as_str));
        Some(self.envelope(vec![out]))
    }

    fn delta(&self, choice: usize, pieces: &[Piece]) -> Value {
        let mut delta = Map::new();
        let mut append = |key: &str, text: &str| match delta.get_mut(key) {
            Some(Value::String(known)) => known.push_str(text),
            _ => {
                delta.insert(key.to_owned(), json!(text));
            }
        };
        let mut calls = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => append("reasoning_content", text),
                Piece::Content(text) => append("content", text),
                Piece::Call { index, name } => calls.push(json!({
                    "index": index,
                    "id": self.call_id(choice, *index),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                })),
                Piece::Arguments { index, text } => {
                    calls.push(json!({"index": index, "function": {"arguments": text}}));
                }
            }
        }
        if !calls.is_empty() {
            delta.insert("tool_calls".to_owned(), json!(calls));
        }
        Value::Object(delta)
    }

    /// The last chunk: no answer, only what all of them cost.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Value {
        let mut chunk = self.envelope(Vec::new());
        chunk["usage"] = usage.to_json();
        chunk
    }
}

fn text_of(pieces: &[Piece]) -> String {
    let text = |piece: &Piece| match piece {
        Piece::Content(text) => Some(text.clone()),
        _ => None,
    };
    pieces.iter().filter_map(text).collect()
}

fn ids_of(tokens: &[Token]) -> Value {
    json!(tokens.iter().map(|token| token.id).collect::<Vec<_>>())
}
