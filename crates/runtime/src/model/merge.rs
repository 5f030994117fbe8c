//! From the pieces of an answer to one turn of the assistant. Pure.
//!
//! Servers disagree about pieces of tool calls: OpenAI and vLLM send an index, the id and name once, and the
//! arguments in parts; others send each call whole, leave out the index or the id, repeat the id with every part, or
//! give every call index 0. All of these come out the same.

use std::collections::HashSet;

use serde_json::Value;

use super::error::ModelError;
use super::wire::{CallDelta, Choice, Chunk, Delta, TokenLogprob, WireUsage};
use super::{ADAPTER_FINGERPRINT, RawToolCall, Usage};

/// Most tool calls of one answer: far more than any rollout lets run in a turn. Each becomes a message, and a server
/// that sends calls without end would have every piece compared with all of them.
const CALLS_MAX: usize = 128;

/// An answer as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Merge {
    pub(super) id: Option<String>,
    pub(super) model: Option<String>,
    pub(super) adapter_sha256: Option<String>,
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) finish_reason: Option<String>,
    pub(super) usage: Option<Usage>,
    pub(super) prompt_token_ids: Option<Vec<u32>>,
    pub(super) token_ids: Option<Vec<u32>>,
    pub(super) logprobs: Option<Vec<f32>>,
    calls: Vec<PartialCall>,
    had_choice: bool,
}

#[derive(Debug)]
struct PartialCall {
    index: Option<u32>,
    id: String,
    name: String,
    arguments: String,
}

impl Merge {
    /// Adds a piece. Says whether it held something that the model said.
    pub(super) fn apply(&mut self, chunk: Chunk) -> Result<bool, ModelError> {
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            return Err(stream_error(&error));
        }
        self.id = self.id.take().or(chunk.id);
        self.model = self.model.take().or(chunk.model);
        let adapter = chunk.system_fingerprint.as_deref().and_then(adapter_of);
        self.adapter_sha256 = self.adapter_sha256.take().or(adapter);
        self.prompt_token_ids = self.prompt_token_ids.take().or(chunk.prompt_token_ids);
        if let Some(usage) = chunk.usage.and_then(read_usage) {
            self.usage = Some(usage);
        }
        let mut spoke = false;
        let choices = chunk.choices.unwrap_or_default();
        // One choice is asked for; others could only be mixed up with it.
        for choice in choices.into_iter().filter(|choice| choice.index == 0) {
            self.had_choice = true;
            spoke |= self.apply_choice(choice);
        }
        if self.calls.len() > CALLS_MAX {
            let what = format!("more than {CALLS_MAX} tool calls in one answer");
            return Err(ModelError::Malformed { what });
        }
        Ok(spoke)
    }

    /// Whether the server has said why the model stopped.
    pub(super) fn is_finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// Whether there was a choice at all.
    pub(super) fn had_choice(&self) -> bool {
        self.had_choice
    }

    /// The calls, each with an id that is its own: neither twice in this turn nor in `used`, the ids of the
    /// conversation so far. Ids that have to be made up follow from `turn` alone.
    pub(super) fn take_calls(&mut self, used: &HashSet<&str>, turn: usize) -> Vec<RawToolCall> {
        let mut given = HashSet::new();
        let calls = std::mem::take(&mut self.calls).into_iter().enumerate();
        calls
            .map(|(position, call)| {
                let mut id = call.id;
                let mut attempt = 0;
                while id.is_empty() || used.contains(id.as_str()) || given.contains(&id) {
                    id = match attempt {
                        0 => format!("call_{turn}_{position}"),
                        more => format!("call_{turn}_{position}_{more}"),
                    };
                    attempt += 1;
                }
                given.insert(id.clone());
                RawToolCall {
                    id,
                    name: call.name,
                    arguments: call.arguments,
                }
            })
            .collect()
    }

    fn apply_choice(&mut self, choice: Choice) -> bool {
        if let Some(ids) = choice.token_ids {
            self.token_ids.get_or_insert_default().extend(ids);
        }
        if let Some(tokens) = choice.logprobs.and_then(|logprobs| logprobs.content) {
            // JSON cannot hold the infinity that a number beyond `f32` becomes: the trace could not be read again.
            let finite = |token: TokenLogprob| token.logprob.clamp(f32::MIN, f32::MAX);
            let logprobs = tokens.into_iter().map(finite);
            self.logprobs.get_or_insert_default().extend(logprobs);
        }
        if let Some(reason) = choice.finish_reason.filter(|reason| !reason.is_empty()) {
            self.finish_reason = Some(reason);
        }
        choice.delta.is_some_and(|delta| self.apply_delta(delta))
    }

    fn apply_delta(&mut self, delta: Delta) -> bool {
        let content = delta.content.unwrap_or_default();
        // Servers in transition send both names: with the same text, or one of them empty.
        let reasoning = [delta.reasoning_content, delta.reasoning];
        let reasoning = reasoning.into_iter().flatten();
        let reasoning = reasoning.max_by_key(String::len).unwrap_or_default();
        let calls = delta.tool_calls.unwrap_or_default();
        let spoke = !(content.is_empty() && reasoning.is_empty() && calls.is_empty());
        self.content.push_str(&content);
        self.reasoning.push_str(&reasoning);
        for call in calls {
            self.apply_call(call);
        }
        spoke
    }

    fn apply_call(&mut self, delta: CallDelta) {
        let id = delta.id.unwrap_or_default();
        let function = delta.function.unwrap_or_default();
        let name = function.name.unwrap_or_default();
        let arguments = match function.arguments {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text,
            Some(object) => object.to_string(),
        };
        match self.continued(delta.index, &id, &name) {
            Some(call) => {
                if call.id.is_empty() {
                    call.id = id;
                }
                if call.name != name {
                    call.name.push_str(&name);
                }
                call.arguments.push_str(&arguments);
            }
            None => self.calls.push(PartialCall {
                index: delta.index,
                id,
                name,
                arguments,
            }),
        }
    }

    /// The call that a piece belongs to, or none if it begins one.
    fn continued(&mut self, index: Option<u32>, id: &str, name: &str) -> Option<&mut PartialCall> {
        let call = match index {
            // The last one of that index, for servers that give every call the same.
            Some(_) => self
                .calls
                .iter_mut()
                .rev()
                .find(|call| call.index == index)?,
            None => self.calls.last_mut()?,
        };
        let other_id = !id.is_empty() && !call.id.is_empty() && call.id != id;
        // Without index and id, a name is all that can mark a beginning.
        let named_anew = index.is_none() && id.is_empty() && !name.is_empty();
        // A whole call has no more parts: a name after it begins the next, also under an index that all share. With an
        // index and the same id it is the end of the call, repeated.
        let repeats = index.is_some() && !id.is_empty();
        let next_after_whole = !repeats && !name.is_empty() && is_whole(call);
        (!other_id && !named_anew && !next_after_whole).then_some(call)
    }
}

/// Whether a call has a name and arguments that are complete JSON, so that another name cannot be more of it.
fn is_whole(call: &PartialCall) -> bool {
    !call.name.is_empty() && serde_json::from_str::<Value>(&call.arguments).is_ok()
}

/// The digest of the adapter that a fingerprint names; none for those of other servers.
fn adapter_of(fingerprint: &str) -> Option<String> {
    let digest = fingerprint.strip_prefix(ADAPTER_FINGERPRINT)?;
    let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    (digest.len() == 64 && digest.bytes().all(is_hex)).then(|| digest.to_owned())
}

fn read_usage(usage: WireUsage) -> Option<Usage> {
    Some(Usage {
        prompt_tokens: usage.prompt_tokens?,
        completion_tokens: usage.completion_tokens.unwrap_or(0),
    })
}

/// Codes are numbers at some servers and names at others; without a number, the words decide whether the conversation
/// is too long, which no further try would change.
fn stream_error(error: &Value) -> ModelError {
    let code = error.get("code").and_then(Value::as_u64);
    let is_too_long = super::error::says_too_long(&error.to_string());
    let code = code.unwrap_or(if is_too_long { 400 } else { 500 });
    let status = u16::try_from(code)
        .ok()
        .filter(|code| (400..600).contains(code));
    let body = error.to_string();
    // Not cut yet: whoever takes a secret out of it must find it whole.
    let message = super::read::error_words(&body);
    super::error::from_status(status.unwrap_or(500), message, &body, "", None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merge(chunks: &[Value]) -> Merge {
        let mut merge = Merge::default();
        for chunk in chunks {
            let chunk = serde_json::from_value(chunk.clone()).unwrap();
            merge.apply(chunk).unwrap();
        }
        merge
    }

    fn calls_of(deltas: &[Value]) -> Vec<(String, String, String)> {
        let chunks: Vec<Value> = deltas
            .iter()
            .map(|calls| json!({"choices": [{"index": 0, "delta": {"tool_calls": calls}}]}))
            .collect();
        merge(&chunks)
            .take_calls(&HashSet::new(), 3)
            .into_iter()
            .map(|call| (call.id, call.name, call.arguments))
            .collect()
    }

    fn call(id: &str, name: &str, arguments: &str) -> (String, String, String) {
        (id.to_owned(), name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn openai_sends_id_and_name_once_and_arguments_in_parts() {
        let calls = calls_of(&[
            json!([{"index": 0, "id": "a", "type": "function", "function": {"name": "open", "arguments": ""}}]),
            json!([{"index": 0, "function": {"arguments": "{\"u\":"}}]),
            json!([{"index": 1, "id": "b", "type": "function", "function": {"name": "click", "arguments": ""}}]),
            json!([{"index": 0, "function": {"arguments": "1}"}}]),
            json!([{"index": 1, "function": {"arguments": "{}"}}]),
        ]);
        assert_eq!(
            calls,
            [call("a", "open", "{\"u\":1}"), call("b", "click", "{}")]
        );
    }

    #[test]
    fn ids_and_names_may_come_again_with_every_part() {
        let calls = calls_of(&[
            json!([{"index": 0, "id": "a", "function": {"name": "open", "arguments": "{\"u\""}}]),
            json!([{"index": 0, "id": "a", "function": {"name": "open", "arguments": ":1}"}}]),
        ]);
        assert_eq!(calls, [call("a", "open", "{\"u\":1}")]);
    }

    #[test]
    fn whole_calls_may_lack_index_or_id_or_share_an_index() {
        let same_index = calls_of(&[
            json!([{"index": 0, "id": "a", "function": {"name": "open", "arguments": "{}"}}]),
            json!([{"index": 0, "id": "b", "function": {"name": "open", "arguments": "{}"}}]),
        ]);
        assert_eq!(
            same_index,
            [call("a", "open", "{}"), call("b", "open", "{}")]
        );
        let no_ids = calls_of(&[
            json!([{"index": 0, "function": {"name": "open", "arguments": "{\"u\":1}"}}]),
            json!([{"index": 0, "function": {"name": "open", "arguments": "{\"u\":"}}]),
            json!([{"index": 0, "function": {"arguments": "2}"}}]),
        ]);
        let expected = [("call_3_0", "{\"u\":1}"), ("call_3_1", "{\"u\":2}")];
        assert_eq!(
            no_ids,
            expected.map(|(id, arguments)| call(id, "open", arguments))
        );
        let bare = json!({"function": {"name": "open", "arguments": {"u": 1}}});
        let bare_calls = calls_of(&[json!([bare.clone(), bare])]);
        let made_up = ["call_3_0", "call_3_1"].map(|id| call(id, "open", "{\"u\":1}"));
        assert_eq!(bare_calls, made_up);
        let no_index = calls_of(&[
            json!([{"id": "a", "function": {"name": "open", "arguments": "{\"u\""}}]),
            json!([{"function": {"arguments": ":1}"}}]),
            json!([{"id": "b", "function": {"name": "click"}}]),
        ]);
        assert_eq!(
            no_index,
            [call("a", "open", "{\"u\":1}"), call("b", "click", "")]
        );
    }

    #[test]
    fn an_id_that_is_taken_is_replaced() {
        let twice = json!([
            {"index": 0, "id": "c", "function": {"name": "x", "arguments": "{}"}},
            {"index": 1, "id": "c", "function": {"name": "y", "arguments": "{}"}},
        ]);
        let chunk = json!({"choices": [{"delta": {"tool_calls": twice}}]});
        let mut merged = merge(&[chunk]);
        let used = HashSet::from(["c", "call_5_1"]);
        let ids: Vec<String> = merged
            .take_calls(&used, 5)
            .into_iter()
            .map(|call| call.id)
            .collect();
        assert_eq!(ids, ["call_5_0", "call_5_1_1"]);
    }

    #[test]
    fn a_vllm_stream_with_token_ids_and_logprobs() {
        let merged = merge(&[
            json!({"id": "r1", "model": "qwen3", "prompt_token_ids": [1, 2], "choices":
                [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}),
            json!({"choices": [{"index": 0, "delta": {"reasoning": "hm"}, "token_ids": [3],
                "logprobs": {"content": [{"token": "hm", "logprob": -0.5}]}}]}),
            json!({"choices": [{"index": 0, "delta": {"content": "hi"}, "token_ids": [4, 5],
                "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}, "finish_reason": "stop"}]}),
            json!({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}),
        ]);
        assert_eq!(
            (merged.reasoning.as_str(), merged.content.as_str()),
            ("hm", "hi")
        );
        assert_eq!(merged.finish_reason.as_deref(), Some("stop"));
        assert_eq!(merged.prompt_token_ids.as_deref(), Some(&[1, 2][..]));
        assert_eq!(merged.token_ids.as_deref(), Some(&[3, 4, 5][..]));
        assert_eq!(merged.logprobs.as_deref(), Some(&[-0.5, -1.0, -2.0][..]));
        let usage = Usage {
            prompt_tokens: 2,
            completion_tokens: 3,
        };
        assert_eq!(merged.usage, Some(usage));
    }

    #[test]
    fn only_our_own_fingerprint_names_an_adapter() {
        let digest = "0123456789abcdef".repeat(4);
        let piece = |fingerprint: Value| json!({"system_fingerprint": fingerprint, "choices": [{"delta": {"content": "x"}}]});
        let ours = piece(json!(format!("{ADAPTER_FINGERPRINT}{digest}")));
        let merged = merge(&[ours.clone(), ours]);
        assert_eq!(merged.adapter_sha256.as_deref(), Some(&*digest));
        for other in [
            Value::Null,
            json!(""),
            json!("fp_44709d6fcb"),
            json!(digest),
            json!(format!("{ADAPTER_FINGERPRINT}{}", &digest[1..])),
            json!(format!("{ADAPTER_FINGERPRINT}{}", digest.to_uppercase())),
        ] {
            assert_eq!(
                merge(&[piece(other.clone())]).adapter_sha256,
                None,
                "{other}"
            );
        }
    }

    #[test]
    fn an_impossible_logprob_stays_a_number_of_json() {
        let logprobs = json!({"content": [{"logprob": -1e300}, {"logprob": -1.5}]});
        let chunk = json!({"choices": [{"delta": {}, "logprobs": logprobs}]});
        assert_eq!(
            merge(&[chunk]).logprobs.as_deref(),
            Some(&[f32::MIN, -1.5][..])
        );
    }

    #[test]
    fn both_names_of_reasoning_in_one_piece_are_one_thought() {
        let chunk = json!({"choices": [{"message":
            {"content": null, "reasoning": "hm", "reasoning_content": "hm"}, "finish_reason": "stop"}]});
        assert_eq!(merge(&[chunk]).reasoning, "hm");
        for (content, reasoning) in [("", "hm"), ("hm", "")] {
            let delta = json!({"reasoning_content": content, "reasoning": reasoning});
            let chunk = json!({"choices": [{"delta": delta}]});
            assert_eq!(merge(&[chunk]).reasoning, "hm");
        }
    }

    #[test]
    fn a_conversation_that_is_found_too_long_inside_a_stream_is_not_tried_again() {
        for error in [
            json!({"message": "m", "code": "context_length_exceeded"}),
            json!({"message": "This model's maximum context length is 8 tokens", "code": 400}),
        ] {
            let chunk = serde_json::from_value(json!({"error": error})).unwrap();
            let error = Merge::default().apply(chunk).unwrap_err();
            assert_eq!(error.as_str(), "context_length");
        }
    }

    #[test]
    fn calls_without_end_are_no_answer() {
        let call = json!({"function": {"name": "open", "arguments": "{}"}});
        let answer = |n| {
            let calls = vec![call.clone(); n];
            json!({"choices": [{"delta": {"tool_calls": calls}}]})
        };
        merge(&[answer(CALLS_MAX)]);
        let chunk = serde_json::from_value(answer(CALLS_MAX + 1)).unwrap();
        let error = Merge::default().apply(chunk).unwrap_err();
        assert_eq!(error.as_str(), "malformed");
    }

    #[test]
    fn an_error_inside_a_stream_is_an_error() {
        let chunk =
            serde_json::from_value(json!({"error": {"message": "out of memory", "code": 503}}));
        let error = Merge::default().apply(chunk.unwrap()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model endpoint answered 503: out of memory"
        );
    }
}
