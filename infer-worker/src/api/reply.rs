//! Answers as OpenAI's clients read them: whole, and as the chunks of a stream.

use std::collections::BTreeMap;

use espalier_runtime::model::ADAPTER_FINGERPRINT;
use serde_json::{Map, Value, json};

use super::backend::{Backend, Token};
use super::choice::{Finish, Piece};

/// JSON has no infinities; vLLM writes this number in their place.
const LOGPROB_MIN: f32 = -9_999.0;

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

    fn envelope(&self, streamed: bool, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": self.object(streamed),
            "created": self.created_s,
            "model": self.model,
            // What made the answer, beyond the model's name: OpenAI's field for that.
            "system_fingerprint": self.adapter_digest.as_ref().map(|digest| format!("{ADAPTER_FINGERPRINT}{digest}")),
            "choices": choices,
        })
    }

    /// The id of a call, unique in the conversation because it holds the answer's.
    fn call_id(&self, choice: usize, call: usize) -> String {
        let (_, unique) = self.id.split_once('-').unwrap_or(("", &self.id));
        format!("call_{}_{choice}_{call}", unique.replace('-', ""))
    }

    /// The first chunk of an answer: who speaks, and with `return_token_ids` what it was asked.
    pub(super) fn opening(&self, choice: usize) -> Option<Value> {
        let mut chunk = match self.dialect {
            Dialect::Chat => {
                let delta = json!({"role": "assistant", "content": ""});
                self.envelope(
                    true,
                    vec![json!({"index": choice, "delta": delta, "finish_reason": null})],
                )
            }
            Dialect::Completion if self.return_token_ids => self.envelope(
                true,
                vec![json!({"index": choice, "text": "", "finish_reason": null})],
            ),
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
            out["logprobs"] = self.logprobs_of(tokens, backend);
        }
        if self.return_token_ids {
            out["token_ids"] = ids_of(tokens);
        }
        out["finish_reason"] = json!(finish.map(Finish::as_str));
        Some(self.envelope(true, vec![out]))
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
        let mut chunk = self.envelope(true, Vec::new());
        chunk["usage"] = usage.to_json();
        chunk
    }

    /// All answers in one.
    pub(super) fn whole(&self, answers: &[Answer], usage: Usage, backend: &dyn Backend) -> Value {
        let choices = answers
            .iter()
            .enumerate()
            .map(|(i, answer)| self.whole_choice(i, answer, backend));
        let mut reply = self.envelope(false, choices.collect());
        reply["usage"] = usage.to_json();
        if self.return_token_ids && self.dialect == Dialect::Chat {
            reply["prompt_token_ids"] = json!(self.prompts[0]);
        }
        reply
    }

    fn whole_choice(&self, i: usize, answer: &Answer, backend: &dyn Backend) -> Value {
        let mut out = json!({"index": i});
        match self.dialect {
            Dialect::Chat => out["message"] = self.message(i, answer),
            Dialect::Completion => out["text"] = json!(text_of(&answer.pieces)),
        }
        out["logprobs"] = match self.logprobs {
            true => self.logprobs_of(&answer.tokens, backend),
            false => Value::Null,
        };
        out["finish_reason"] = json!(answer.finish.as_str());
        if self.return_token_ids {
            out["token_ids"] = ids_of(&answer.tokens);
            if self.dialect == Dialect::Completion {
                out["prompt_token_ids"] = json!(self.prompts[i / self.n]);
            }
        }
        out
    }

    fn message(&self, choice: usize, answer: &Answer) -> Value {
        let (mut content, mut reasoning) = (String::new(), String::new());
        let mut calls: BTreeMap<usize, (&str, String)> = BTreeMap::new();
        for piece in &answer.pieces {
            match piece {
                Piece::Reasoning(text) => reasoning.push_str(text),
                Piece::Content(text) => content.push_str(text),
                Piece::Call { index, name } => {
                    calls.insert(*index, (name, String::new()));
                }
                Piece::Arguments { index, text } => {
                    calls.entry(*index).or_default().1.push_str(text);
                }
            }
        }
        let calls: Vec<Value> = calls
            .into_iter()
            .map(|(index, (name, arguments))| {
                let function = json!({"name": name, "arguments": arguments});
                json!({"id": self.call_id(choice, index), "type": "function", "function": function})
            })
            .collect();
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            if content.is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = json!(calls);
        }
        message
    }

    fn logprobs_of(&self, tokens: &[Token], backend: &dyn Backend) -> Value {
        match self.dialect {
            Dialect::Chat => {
                json!({"content": tokens.iter().map(|token| chat_logprob(token, backend)).collect::<Vec<_>>()})
            }
            Dialect::Completion => completion_logprobs(tokens, backend),
        }
    }
}

/// A complete answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) pieces: Vec<Piece>,
    pub(super) tokens: Vec<Token>,
    pub(super) finish: Finish,
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

fn one_logprob(id: u32, logprob: f32, backend: &dyn Backend) -> Value {
    let bytes = backend.token_bytes(id);
    let token = String::from_utf8_lossy(&bytes);
    json!({"token": token, "logprob": shown(logprob), "bytes": bytes})
}

/// `max` also replaces NaN.
fn shown(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

fn chat_logprob(token: &Token, backend: &dyn Backend) -> Value {
    let mut out = one_logprob(token.id, token.logprob, backend);
    let top = token
        .top
        .iter()
        .map(|&(id, logprob)| one_logprob(id, logprob, backend));
    out["top_logprobs"] = top.collect();
    out
}

fn completion_logprobs(tokens: &[Token], backend: &dyn Backend) -> Value {
    let text = |id: u32| String::from_utf8_lossy(&backend.token_bytes(id)).into_owned();
    let top = |token: &Token| {
        let top = token
            .top
            .iter()
            .map(|&(id, logprob)| (text(id), json!(shown(logprob))));
        Value::Object(top.collect())
    };
    json!({
        "tokens": tokens.iter().map(|token| text(token.id)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| shown(token.logprob)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
    })
}
