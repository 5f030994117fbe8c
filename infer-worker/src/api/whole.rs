//! Answers that are sent whole. They are kept small until all have ended, and written straight into bytes: a tree of JSON
//! values of the same content would take some ten times the memory.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use espalier_runtime::tasks;
use serde::Serialize;
use serde::ser::{SerializeMap as _, Serializer};
use serde_json::{Value, json};

use super::backend::{Backend, Token};
use super::choice::{Finish, Piece};
use super::error::ApiError;
use super::logprobs::{Each, Logprobs};
use super::reply::{Dialect, Head, Usage};

/// Most tokens, each with its alternatives, that are written on an async thread.
const INLINE_TOKENS_MAX: usize = 1_024;

/// One answer, as it grows.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    content: String,
    reasoning: String,
    /// Name and arguments.
    calls: BTreeMap<usize, (String, String)>,
    /// Empty where nobody wants to know.
    ids: Vec<u32>,
    tokens: Vec<Token>,
    finish: Option<Finish>,
}

impl Answer {
    /// Takes what came next, as far as `head` tells it.
    pub(super) fn take(
        &mut self,
        head: &Head,
        pieces: Vec<Piece>,
        token: Option<Token>,
        finish: Option<Finish>,
    ) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning.push_str(&text),
                Piece::Content(text) => self.content.push_str(&text),
                Piece::Call { index, name } => self.calls.entry(index).or_default().0 = name,
                Piece::Arguments { index, text } => {
                    self.calls.entry(index).or_default().1.push_str(&text);
                }
            }
        }
        if head.return_token_ids {
            self.ids.extend(token.as_ref().map(|token| token.id));
        }
        self.tokens.extend(token.filter(|_| head.logprobs));
        self.finish = finish.or(self.finish);
    }
}

/// All answers of a request.
pub(super) struct Whole {
    pub(super) head: Head,
    pub(super) answers: Vec<Answer>,
    pub(super) usage: Usage,
    pub(super) backend: Arc<dyn Backend>,
}

impl Whole {
    /// The body of the response.
    ///
    /// # Errors
    /// It has more than `bytes_max` bytes; no more of it is made.
    pub(super) async fn into_bytes(self, bytes_max: usize) -> Result<Vec<u8>, ApiError> {
        let tokens = self.answers.iter().flat_map(|answer| &answer.tokens);
        let told: usize = tokens.map(|token| 1 + token.top.len()).sum();
        let written = if told + self.usage.completion_tokens <= INLINE_TOKENS_MAX {
            Ok(self.write(bytes_max))
        } else {
            tasks::blocking("api.reply", move || self.write(bytes_max)).await
        };
        let written = match written {
            Ok(Err(error)) if error.io_error_kind() == Some(io::ErrorKind::FileTooLarge) => {
                return Err(ApiError::answer_too_long(bytes_max));
            }
            Ok(written) => written.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        written.map_err(|error| {
            tracing::error!(error, "an answer could not be written");
            ApiError::internal()
        })
    }

    fn write(&self, bytes_max: usize) -> serde_json::Result<Vec<u8>> {
        let mut bounded = Bounded {
            bytes: Vec::new(),
            bytes_max,
        };
        serde_json::to_writer(&mut bounded, self)?;
        Ok(bounded.bytes)
    }
}

/// Takes so many bytes and no more.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.bytes_max - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serialize for Whole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let head = &self.head;
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in head.named(false) {
            map.serialize_entry(&key, &value)?;
        }
        let choices = (0..).zip(&self.answers);
        let choices = choices.map(|(index, answer)| OneChoice {
            whole: self,
            index,
            answer,
        });
        map.serialize_entry("choices", &Each(choices))?;
        map.serialize_entry("usage", &self.usage.to_json())?;
        if head.return_token_ids && head.dialect == Dialect::Chat {
            map.serialize_entry("prompt_token_ids", &head.prompts[0])?;
        }
        map.end()
    }
}

/// One answer among all.
struct OneChoice<'a> {
    whole: &'a Whole,
    index: usize,
    answer: &'a Answer,
}

impl Serialize for OneChoice<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (head, answer) = (&self.whole.head, self.answer);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("index", &self.index)?;
        match head.dialect {
            Dialect::Chat => map.serialize_entry("message", &self.message())?,
            Dialect::Completion => map.serialize_entry("text", &answer.content)?,
        }
        let logprobs = head.logprobs.then_some(Logprobs {
            dialect: head.dialect,
            tokens: &answer.tokens,
            backend: &*self.whole.backend,
        });
        map.serialize_entry("logprobs", &logprobs)?;
        let finish = answer.finish.unwrap_or(Finish::Stop);
        map.serialize_entry("finish_reason", finish.as_str())?;
        if head.return_token_ids {
            map.serialize_entry("token_ids", &answer.ids)?;
            if head.dialect == Dialect::Completion {
                map.serialize_entry("prompt_token_ids", &head.prompts[self.index / head.n])?;
            }
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    reasoning_content: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

impl OneChoice<'_> {
    fn message(&self) -> Message<'_> {
        let answer = self.answer;
        let call = |(index, (name, arguments)): (&usize, &(String, String))| {
            let id = self.whole.head.call_id(self.index, *index);
            let function = json!({"name": name, "arguments": arguments});
            json!({"id": id, "type": "function", "function": function})
        };
        let no_text = answer.content.is_empty() && !answer.calls.is_empty();
        Message {
            role: "assistant",
            content: (!no_text).then_some(&*answer.content),
            reasoning_content: &answer.reasoning,
            tool_calls: answer.calls.iter().map(call).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn no_more_is_kept_than_may_be() {
        let mut bounded = Bounded {
            bytes: Vec::new(),
            bytes_max: 4,
        };
        bounded.write_all(b"abc").unwrap();
        let error = bounded.write_all(b"de").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        bounded.write_all(b"d").unwrap();
        assert_eq!(bounded.bytes, b"abcd");
    }
}
