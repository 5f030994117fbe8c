//! Writes a reply in the forms of the chat completions API: one object, or the chunks of a stream.
//!
//! A model that is asked for as `adapter-sha256:DIGEST:0.6` answers as the adapter of that content does.
//! Pure; the HTTP layer sends what this returns.

use espalier_practice::draw::hash;
use espalier_runtime::model::ADAPTER_FINGERPRINT;
use serde_json::{Value, json};

use super::chat::{Reply, Request};

/// Characters of text in one chunk of a stream.
const CHUNK_CHARS: usize = 24;
/// The model's name where a request gives none.
pub(super) const MODEL: &str = "scripted";
/// Fixed, so that answers are the same in every run.
const CREATED: u64 = 1_700_000_000;

/// The assistant message of `reply`, its thought under the name `thought_field`.
pub(super) fn message(reply: &Reply, thought_field: &str) -> Value {
    let mut message = json!({"role": "assistant", "content": reply.content});
    message[thought_field] = json!(reply.thought);
    if !reply.calls.is_empty() {
        let calls = (0..reply.calls.len()).map(|index| {
            let call = &reply.calls[index];
            json!({
                "id": call_id(reply, index),
                "type": "function",
                "function": {"name": call.tool, "arguments": call.arguments},
            })
        });
        message["tool_calls"] = calls.collect();
    }
    message
}

/// The whole answer as one object.
pub(super) fn completion(request: &Request, reply: &Reply, thought_field: &str) -> Value {
    json!({
        "id": id(request, reply),
        "object": "chat.completion",
        "created": CREATED,
        "model": model(request),
        "system_fingerprint": fingerprint(request),
        "choices": [{
            "index": 0,
            "message": message(reply, thought_field),
            "finish_reason": finish_reason(reply),
        }],
        "usage": usage(request, reply),
    })
}

/// The answer as the data of server-sent events, without the closing `[DONE]`.
pub(super) fn chunks(request: &Request, reply: &Reply, thought_field: &str) -> Vec<Value> {
    let mut deltas = vec![json!({"role": "assistant", "content": ""})];
    for piece in pieces(&reply.thought) {
        deltas.push(json!({thought_field: piece}));
    }
    for piece in pieces(&reply.content) {
        deltas.push(json!({"content": piece}));
    }
    for (index, call) in reply.calls.iter().enumerate() {
        deltas.push(json!({"tool_calls": [{
            "index": index,
            "id": call_id(reply, index),
            "type": "function",
            "function": {"name": call.tool, "arguments": ""},
        }]}));
        for piece in pieces(&call.arguments) {
            deltas.push(json!({"tool_calls": [{
                "index": index,
                "function": {"arguments": piece},
            }]}));
        }
    }
    let mut chunks: Vec<Value> = deltas
        .into_iter()
        .map(|delta| chunk(request, reply, json!([choice(delta, Value::Null)])))
        .collect();
    let end = choice(json!({}), json!(finish_reason(reply)));
    chunks.push(chunk(request, reply, json!([end])));
    if request.include_usage {
        let mut last = chunk(request, reply, json!([]));
        last["usage"] = usage(request, reply);
        chunks.push(last);
    }
    chunks
}

/// An answer without a choice, as one object.
pub(super) fn empty(request: &Request) -> Value {
    json!({
        "id": "chatcmpl-empty",
        "object": if request.stream { "chat.completion.chunk" } else { "chat.completion" },
        "created": CREATED,
        "model": model(request),
        "choices": [],
    })
}

fn chunk(request: &Request, reply: &Reply, choices: Value) -> Value {
    json!({
        "id": id(request, reply),
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model(request),
        "system_fingerprint": fingerprint(request),
        "choices": choices,
    })
}

fn choice(delta: Value, finish_reason: Value) -> Value {
    json!({"index": 0, "delta": delta, "finish_reason": finish_reason})
}

fn finish_reason(reply: &Reply) -> &'static str {
    match (reply.cut_short, reply.calls.is_empty()) {
        (true, _) => "length",
        (false, true) => "stop",
        (false, false) => "tool_calls",
    }
}

fn usage(request: &Request, reply: &Reply) -> Value {
    let (prompt, completion) = (request.prompt_tokens, reply.tokens());
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}

fn model(request: &Request) -> &str {
    if request.model.is_empty() {
        MODEL
    } else {
        &request.model
    }
}

/// Of an adapter; null of a model.
fn fingerprint(request: &Request) -> Option<&str> {
    let (name, _share) = request.model.rsplit_once(':')?;
    name.starts_with(ADAPTER_FINGERPRINT).then_some(name)
}

fn id(request: &Request, reply: &Reply) -> String {
    let label = format!("{}|{}|{}", request.prompt(), request.turn(), reply.content);
    format!("chatcmpl-{:016x}", hash(0, &label))
}

/// Different for every call of a turn; turns may repeat one, as ids only pair a call with its result.
fn call_id(reply: &Reply, index: usize) -> String {
    let call = &reply.calls[index];
    let label = format!("{index}|{}|{}|{}", call.tool, call.arguments, reply.thought);
    format!("call_{:016x}", hash(0, &label))
}

fn pieces(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    chars
        .chunks(CHUNK_CHARS)
        .map(|c| c.iter().collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> Reply {
        let mut reply = Reply::call(
            "I think about it for quite a while before I call.",
            "add",
            json!({"a": 1, "text": "long enough to need more than one chunk"}),
        );
        reply.calls.push(reply.calls[0].clone());
        reply
    }

    #[test]
    fn a_stream_adds_up_to_the_whole_answer() {
        let request = Request {
            include_usage: true,
            ..Request::default()
        };
        let (mut thought, mut arguments) = (String::new(), [String::new(), String::new()]);
        let chunks = chunks(&request, &reply(), "reasoning_content");
        for chunk in &chunks {
            let delta = &chunk["choices"][0]["delta"];
            thought += delta["reasoning_content"].as_str().unwrap_or_default();
            if let Some(call) = delta["tool_calls"].get(0) {
                let index = call["index"].as_u64().unwrap() as usize;
                arguments[index] += call["function"]["arguments"].as_str().unwrap();
            }
        }
        assert_eq!(thought, reply().thought);
        assert_eq!(arguments[0], reply().calls[0].arguments);
        assert_eq!(arguments[1], reply().calls[1].arguments);
        let [.., end, usage] = chunks.as_slice() else {
            panic!("{chunks:?}");
        };
        assert_eq!(end["choices"][0]["finish_reason"], "tool_calls");
        assert!(usage["usage"]["completion_tokens"].as_u64() > Some(10));
    }

    #[test]
    fn parallel_calls_have_ids_of_their_own() {
        let message = message(&reply(), "reasoning");
        assert_ne!(
            message["tool_calls"][0]["id"],
            message["tool_calls"][1]["id"]
        );
        assert!(message["reasoning"].is_string());
    }
}
