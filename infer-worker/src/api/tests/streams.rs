//! Answers that are streamed.

use espalier_core::chat::Message;
use espalier_core::spec::Sampling;
use espalier_runtime::model::{ChatRequest, ChatTurn, ModelClient, ModelEndpoint};
use serde_json::{Map, json};
use tokio_util::sync::CancellationToken;

use super::scripted::ADAPTER_DIGEST;
use super::*;

/// What OpenAI's clients make of a stream: the deltas of a choice, put together.
fn content_of(events: &[Value], choice: u64) -> String {
    let deltas = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    let mine = deltas.filter(|delta| delta["index"] == choice);
    mine.filter_map(|delta| delta["delta"]["content"].as_str())
        .collect()
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_cost() {
    let server = Server::start().await;
    let more = json!({"stream_options": {"include_usage": true}});
    let events = server.chat_events("<think>h</think>é!", more).await;
    let chunk = |delta: Value, finish: Value| {
        json!({"id": "chatcmpl-t-000001", "object": "chat.completion.chunk", "created": 7, "model": "toy",
            "system_fingerprint": null, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
    };
    let mut usage = chunk(json!({}), json!(null));
    usage["choices"] = json!([]);
    usage["usage"] = json!({"prompt_tokens": 19, "completion_tokens": 7, "total_tokens": 26,
        "prompt_tokens_details": {"cached_tokens": 1}});
    let expected = [
        chunk(json!({"role": "assistant", "content": ""}), json!(null)),
        chunk(json!({"reasoning_content": "h"}), json!(null)),
        chunk(json!({"content": "é"}), json!(null)),
        chunk(json!({"content": "!"}), json!(null)),
        chunk(json!({}), json!("stop")),
        usage,
    ];
    assert_eq!(events, expected);
}

#[tokio::test]
async fn a_call_is_streamed_with_its_id_once() {
    let server = Server::start().await;
    let events = server.chat_events(CALL, json!({"tools": tools()})).await;
    let deltas: Vec<&Value> = events
        .iter()
        .map(|event| &event["choices"][0]["delta"])
        .collect();
    let first = json!({"index": 0, "id": "call_t000001_0_0", "type": "function",
        "function": {"name": "open", "arguments": ""}});
    let part = |text: &str| json!({"index": 0, "function": {"arguments": text}});
    assert_eq!(
        *deltas[1],
        json!({"tool_calls": [first, part("{\"u"), part("\":\"é\"}")]})
    );
    assert_eq!(events[2]["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(events.len(), 3, "and nothing else");
}

#[tokio::test]
async fn no_part_of_a_stop_string_is_streamed() {
    let server = Server::start().await;
    let events = server
        .chat_events("one\nENd\nEND two", json!({"stop": "\nEND"}))
        .await;
    assert_eq!(content_of(&events, 0), "one\nENd");
    assert!(
        events
            .iter()
            .all(|event| event["choices"][0]["delta"]["content"] != "\n")
    );
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "stop"
    );
    let events = server
        .chat_events("endless", json!({"stop": "xx", "n": 2}))
        .await;
    assert_eq!(
        (content_of(&events, 0), content_of(&events, 1)),
        (String::new(), String::new())
    );
    server.backend.aborted(2).await;
}

#[tokio::test]
async fn several_answers_are_told_side_by_side() {
    let server = Server::start().await;
    let events = server.chat_events("a long answer", json!({"n": 2})).await;
    assert_eq!(
        (content_of(&events, 0), content_of(&events, 1)),
        ("a long answer".to_owned(), "a long answer".to_owned())
    );
    let index = |event: &Value| event["choices"][0]["index"].as_u64();
    let first_of_1 = events
        .iter()
        .skip(2)
        .position(|event| index(event) == Some(1))
        .unwrap();
    let last_of_0 = events
        .iter()
        .skip(2)
        .rposition(|event| index(event) == Some(0))
        .unwrap();
    assert!(first_of_1 < last_of_0, "one after the other");
    let finishes = events
        .iter()
        .filter(|event| event["choices"][0]["finish_reason"] == "stop");
    assert_eq!(finishes.count(), 2);
}

#[tokio::test]
async fn every_token_is_told_once_also_those_without_text() {
    let server = Server::start().await;
    let more = json!({"return_token_ids": true, "logprobs": true});
    let events = server.chat_events("é", more).await;
    assert_eq!(events[0]["prompt_token_ids"], json!([195, 169]));
    let ids = events
        .iter()
        .filter_map(|event| event["choices"][0]["token_ids"].as_array());
    let ids: Vec<Vec<u64>> = ids
        .map(|ids| ids.iter().map(|id| id.as_u64().unwrap()).collect())
        .collect();
    assert_eq!(
        ids,
        [vec![195, 169], vec![256]],
        "a token without text comes with the next text"
    );
    let logprobs = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(logprobs.map(Vec::len).sum::<usize>(), 3);
}

#[tokio::test]
async fn an_answer_that_breaks_ends_with_an_error() {
    let server = Server::start().await;
    let events = server.chat_events("broken", json!({})).await;
    assert_eq!(content_of(&events[..events.len() - 1], 0), "br");
    assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let server = Server::start_with(None, Duration::from_millis(20)).await;
    let sent = server.chat("slow", json!({"stream": true})).send();
    let mut response = sent.await.unwrap();
    let mut text = String::new();
    while let Some(piece) = response.chunk().await.unwrap() {
        text.push_str(std::str::from_utf8(&piece).unwrap());
        if text.lines().filter(|line| line.starts_with(':')).count() == 3 {
            server.backend.go.notify_one();
        }
    }
    assert_eq!(content_of(&events(&text), 0), "slow");
}

#[tokio::test]
async fn completions_stream_their_text() {
    let server = Server::start().await;
    let body = json!({"model": "toy", "prompt": "hi", "stream": true});
    let response = server.post("/v1/completions", &body).send().await.unwrap();
    let events = events(&response.text().await.unwrap());
    let texts: Vec<_> = events
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["h", "i", ""]);
    assert_eq!(events[0]["object"], "text_completion");
    assert_eq!(events[2]["choices"][0]["finish_reason"], "stop");
}

/// One turn, as our own client reads it.
async fn turn(server: &Server, model: &str, script: &str, streaming: bool) -> ChatTurn {
    let client = ModelClient::new(ModelEndpoint {
        streaming,
        ..ModelEndpoint::new(format!("{}/v1", server.url))
    });
    let messages = [Message::User {
        content: script.to_owned(),
    }];
    let tools: Vec<espalier_core::chat::ToolDef> = serde_json::from_value(tools()).unwrap();
    let sampling = Sampling {
        thinking: true,
        temperature: 0.7,
        top_p: 0.9,
        top_k: 20,
        min_p: 0.0,
        presence_penalty: 0.0,
        seed: None,
        completion_tokens_max: 500,
    };
    let extra = Map::new();
    let Value::Object(vllm_extra) = json!({"return_token_ids": true, "logprobs": true}) else {
        unreachable!()
    };
    let request = ChatRequest {
        model,
        messages: &messages,
        tools: &tools,
        sampling: &sampling,
        extra: &extra,
        vllm_extra: &vllm_extra,
        affinity: "a",
        project: "",
    };
    client
        .unwrap()
        .chat(&request, &CancellationToken::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn our_own_client_reads_both_forms_alike() {
    let server = Server::start().await;
    let script = format!("<think>hm</think>I go. {CALL}{CALL}");
    for streaming in [true, false] {
        let turn = turn(&server, "toy", &script, streaming).await;
        assert_eq!(turn.adapter_sha256, None);
        assert_eq!(
            (&*turn.content, turn.reasoning.as_deref()),
            ("I go. ", Some("hm"))
        );
        let calls: Vec<_> = turn
            .tool_calls
            .iter()
            .map(|call| (&*call.name, &*call.arguments))
            .collect();
        assert_eq!(calls, [("open", "{\"u\":\"é\"}"); 2]);
        assert_ne!(turn.tool_calls[0].id, turn.tool_calls[1].id);
        assert_eq!(turn.finish_reason, "tool_calls");
        let ids = turn.token_ids.unwrap();
        assert_eq!(turn.prompt_token_ids.unwrap().len(), script.len());
        assert_eq!((ids.first(), ids.last()), (Some(&259), Some(&256)));
        assert_eq!(turn.logprobs.unwrap().len(), ids.len());
        assert_eq!(turn.usage.unwrap().completion_tokens, ids.len() as u64);
    }
}

#[tokio::test]
async fn our_own_client_learns_which_adapter_answered() {
    let server = Server::start().await;
    let adapter = json!({"name": "a/b", "path": "/a"});
    let loaded = server.post("/v1/adapters", &adapter).send().await.unwrap();
    assert_eq!(loaded.status(), 200);
    for streaming in [true, false] {
        let turn = turn(&server, "a/b", "hi", streaming).await;
        assert_eq!(
            (&*turn.model, turn.adapter_sha256.as_deref()),
            ("a/b", Some(ADAPTER_DIGEST))
        );
    }
}
