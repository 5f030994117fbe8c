//! Answers that come whole.

use serde_json::json;

use super::scripted::{ADAPTER_DIGEST, Scripted, ids_of};
use super::*;
use crate::api::choice::{Finish, Piece};
use crate::api::reply::{Dialect, Head, Usage};
use crate::api::whole::{Answer, Whole};

#[tokio::test]
async fn an_answer_has_thoughts_text_and_cost() {
    let server = Server::start().await;
    let body = server.chat_json("<think>hm</think>héllo", json!({})).await;
    let expected = json!({
        "id": "chatcmpl-t-000001", "object": "chat.completion", "created": 7, "model": "toy",
        "system_fingerprint": null,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "héllo", "reasoning_content": "hm"},
            "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 23, "completion_tokens": 11, "total_tokens": 34,
            "prompt_tokens_details": {"cached_tokens": 1}},
    });
    assert_eq!(body, expected);
}

#[tokio::test]
async fn calls_have_ids_names_and_arguments() {
    let server = Server::start().await;
    let script = format!("<think>hm</think>{CALL}{CALL}");
    let body = server.chat_json(&script, json!({"tools": tools()})).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], json!(null));
    let calls = &choice["message"]["tool_calls"];
    let call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "open", "arguments": "{\"u\":\"é\"}"}});
    assert_eq!(
        *calls,
        json!([call("call_t000001_0_0"), call("call_t000001_0_1")])
    );
    let one = server
        .chat_json(
            &script,
            json!({"tools": tools(), "parallel_tool_calls": false}),
        )
        .await;
    assert_eq!(
        one["choices"][0]["message"]["tool_calls"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(one["choices"][0]["finish_reason"], "tool_calls");
    server.backend.aborted(1).await;
}

#[tokio::test]
async fn without_tools_a_call_is_text() {
    let server = Server::start().await;
    for more in [json!({}), json!({"tools": tools(), "tool_choice": "none"})] {
        let body = server.chat_json(CALL, more).await;
        assert_eq!(body["choices"][0]["message"]["content"], CALL);
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
    }
    let asked = server.backend.asked.lock().unwrap();
    assert_eq!(asked[0].1.bias, []);
    assert_eq!(asked[1].1.bias, [(257, -1e9)], "no call can be drawn");
}

#[tokio::test]
async fn ids_in_and_out_with_logprobs() {
    let server = Server::start().await;
    let prompt = ids_of("aé");
    let more = json!({"prompt_token_ids": prompt, "return_token_ids": true, "logprobs": true, "top_logprobs": 2});
    let body = server.chat_json("unused", more).await;
    assert_eq!(body["prompt_token_ids"], json!(prompt));
    let choice = &body["choices"][0];
    assert_eq!(choice["token_ids"], json!([97, 195, 169, 256]));
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    let top = |token: &str, byte: u8| json!({"token": token, "logprob": -9999.0, "bytes": [byte]});
    let expected = json!({"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [top("a", 97), top("b", 98)]});
    assert_eq!(logprobs[0], expected);
    assert_eq!(logprobs.len(), 4);
    assert_eq!(logprobs[1]["bytes"], json!([195]));
}

#[tokio::test]
async fn a_forced_turn_is_the_answer_however_long_others_may_be() {
    let server = Server::start().await;
    let turn = json!({"role": "assistant", "content": "five"});
    let more = json!({"forced_message": turn, "return_token_ids": true, "logprobs": true, "max_tokens": 1});
    let body = server.chat_json("five", more).await;
    let choice = &body["choices"][0];
    assert_eq!(choice["token_ids"], json!([102, 105, 118, 101, 256]));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 5);
    // The script would say something else.
    let more = json!({"forced_message": turn, "return_token_ids": true});
    let body = server.chat_json("fish", more).await;
    assert_eq!(body["choices"][0]["token_ids"], json!([102, 105]));
}

#[tokio::test]
async fn a_forced_turn_may_call_tools() {
    let server = Server::start().await;
    let said = json!({"name": "open", "arguments": "{\"u\":\"é\"}"});
    let turn = json!({"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": said}]});
    let more = json!({"forced_message": turn, "tools": tools(), "return_token_ids": true, "logprobs": true});
    let script = "<tool_call>\n{\"name\":\"open\",\"arguments\":{\"u\":\"é\"}}\n</tool_call>";
    let body = server.chat_json(script, more).await;
    let choice = &body["choices"][0];
    let ids = [&ids_of(script)[..], &[256]].concat();
    assert_eq!(choice["token_ids"], json!(ids));
    let told = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(told.len(), ids.len());
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["tool_calls"][0]["function"], said);
}

#[tokio::test]
async fn a_long_answer_is_written_as_a_short_one_is() {
    let server = Server::start().await;
    let more = json!({"logprobs": true, "top_logprobs": 20, "n": 2, "return_token_ids": true});
    let body = server.chat_json(&"ab".repeat(50), more).await;
    let other = json!({"token": "b", "logprob": -9999.0, "bytes": [98]});
    for choice in body["choices"].as_array().unwrap() {
        assert_eq!(choice["message"]["content"], "ab".repeat(50));
        assert_eq!(choice["token_ids"].as_array().unwrap().len(), 101);
        let logprobs = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(logprobs.len(), 101);
        assert_eq!(
            (&logprobs[98]["token"], &logprobs[98]["top_logprobs"][1]),
            (&json!("a"), &other)
        );
    }
}

#[tokio::test]
async fn stop_strings_and_limits_end_answers() {
    let server = Server::start().await;
    let body = server
        .chat_json("one two three", json!({"stop": [" t"]}))
        .await;
    assert_eq!(body["choices"][0]["message"]["content"], "one");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let body = server.chat_json("one two", json!({"max_tokens": 3})).await;
    assert_eq!(body["choices"][0]["message"]["content"], "one");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 3);
    server
        .chat_json("one", json!({"max_completion_tokens": 100_000}))
        .await;
    let asked = server.backend.asked.lock().unwrap();
    assert_eq!(
        asked.last().unwrap().2,
        997,
        "what the context has room for"
    );
}

#[tokio::test]
async fn several_answers_have_seeds_of_their_own_and_stop_apart() {
    let server = Server::start().await;
    let body = server.chat_json("hi", json!({"n": 3, "seed": 5})).await;
    let choices = body["choices"].as_array().unwrap();
    let indexes: Vec<_> = choices
        .iter()
        .map(|choice| choice["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indexes, [0, 1, 2]);
    assert!(
        choices
            .iter()
            .all(|choice| choice["message"]["content"] == "hi")
    );
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    assert_eq!(body["usage"]["completion_tokens"], 9);
    let seeds = || {
        server
            .backend
            .asked
            .lock()
            .unwrap()
            .iter()
            .map(|asked| asked.1.seed)
            .collect::<Vec<_>>()
    };
    assert_eq!(seeds(), [5, 6, 7]);
    for _ in 0..2 {
        server.chat_json("hi", json!({})).await;
    }
    let stride = 0x9E37_79B9_7F4A_7C15_u64;
    let next = [100 + stride, 100_u64.wrapping_add(stride.wrapping_mul(2))];
    assert_eq!(
        seeds()[3..],
        next,
        "without a seed, it is the next of the server's"
    );
}

#[tokio::test]
async fn cached_tokens_are_counted_once_a_prompt_whoever_ends_the_answer() {
    let server = Server::start().await;
    let cached = async |path: &str, body: Value| {
        let response = server.post(path, &body).send().await.unwrap();
        let body: Value = response.json().await.unwrap();
        body["usage"]["prompt_tokens_details"]["cached_tokens"].clone()
    };
    // The script's cache has one token, and one more for each seed above 0.
    let stopped = chat_body("endless", json!({"seed": 2, "stop": "xx"}));
    assert_eq!(cached("/v1/chat/completions", stopped).await, 3);
    let several = json!({"prompt": ["ab", "cd"], "n": 2, "seed": 0});
    assert_eq!(cached("/v1/completions", several).await, 1 + 3);
}

#[tokio::test]
async fn a_forced_call_and_a_schema_bind_the_answer() {
    let server = Server::start().await;
    let forced = json!({"tools": tools(), "tool_choice": "required"});
    let body = server
        .chat_json(&format!("<think>x</think>{CALL}"), forced.clone())
        .await;
    assert_eq!(body["choices"][0]["finish_reason"], "tool_calls");
    let body = server.chat_json("no call", forced).await;
    assert_eq!(
        body["choices"][0]["message"]["content"], "",
        "not even its first word is allowed"
    );
    let schema =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}});
    let body = server
        .chat_json("78", json!({"response_format": schema}))
        .await;
    assert_eq!(body["choices"][0]["message"]["content"], "7");
    let body = json!({"prompt": "78", "guided_json": {"enum": [7]}});
    let response = server.post("/v1/completions", &body).send().await.unwrap();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["choices"][0]["text"], "7");
}

#[tokio::test]
async fn completions_go_on_with_texts() {
    let server = Server::start().await;
    let body = json!({"model": "toy", "prompt": ["ab", [99, 100]], "n": 2, "logprobs": 1, "return_token_ids": true});
    let response = server.post("/v1/completions", &body).send().await.unwrap();
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        (&body["object"], &body["id"]),
        (&json!("text_completion"), &json!("cmpl-t-000001"))
    );
    let choices = body["choices"].as_array().unwrap();
    let texts: Vec<_> = choices
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["ab", "ab", "cd", "cd"]);
    assert_eq!(choices[2]["prompt_token_ids"], json!([99, 100]));
    assert_eq!(choices[2]["token_ids"], json!([99, 100, 256]));
    let logprobs = json!({"tokens": ["c", "d", "<|im_end|>"], "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"a": -9999.0}, {"a": -9999.0}, {"a": -9999.0}]});
    assert_eq!(choices[3]["logprobs"], logprobs);
    assert_eq!(body["usage"]["total_tokens"], 4 + 12);
}

#[tokio::test]
async fn adapters_have_vllms_names_too() {
    let server = Server::start().await;
    let text = async |path: &str, body: Value| {
        let response = server.post(path, &body).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let body = json!({"lora_name": "a", "lora_path": "/a", "load_inplace": true});
    let (status, told) = text("/v1/load_lora_adapter", body).await;
    assert_eq!(
        (status, &*told),
        (200, "Success: LoRA adapter 'a' added successfully.")
    );
    server.chat_json("hi", json!({"model": "a"})).await;
    let (status, told) = text("/v1/load_lora_adapter", json!({"lora_name": "b c"})).await;
    assert_eq!(status, 400);
    assert!(told.contains("\"param\":\"lora_name\""), "{told}");
    let (status, _) = text("/v1/unload_lora_adapter", json!({"lora_name": "a"})).await;
    assert_eq!(status, 200);
    assert_eq!(
        text("/v1/unload_lora_adapter", json!({"lora_name": "a"}))
            .await
            .0,
        404
    );
}

#[tokio::test]
async fn adapters_come_are_named_and_go() {
    let server = Server::start().await;
    let adapter = json!({"name": "a/b", "path": "/a"});
    for version in 1..=2 {
        let response = server.post("/v1/adapters", &adapter).send().await.unwrap();
        let body: Value = response.json().await.unwrap();
        let expected = json!({"id": "a/b", "object": "adapter", "created": 2, "path": "/a", "digest": ADAPTER_DIGEST, "rank": 8,
            "version": version});
        assert_eq!(body, expected);
    }
    let doubtful = json!({"name": "doubtful", "path": "/a"});
    let response = server.post("/v1/adapters", &doubtful).send().await.unwrap();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["warning"], "may be another's");
    let doubtful = format!("{}/v1/adapters/doubtful", server.url);
    server.client.delete(doubtful).send().await.unwrap();
    let body = server.chat_json("hi", json!({"model": "a/b"})).await;
    assert_eq!(
        (&body["model"], &body["system_fingerprint"]),
        (
            &json!("a/b"),
            &json!(format!("adapter-sha256:{ADAPTER_DIGEST}"))
        )
    );
    let asked = server.backend.asked.lock().unwrap()[0].0.clone();
    assert_eq!(
        (&*asked.name, asked.digest.as_deref()),
        ("a/b", Some(ADAPTER_DIGEST))
    );
    let get = async |path: &str| -> Value {
        server
            .client
            .get(format!("{}{path}", server.url))
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap()
    };
    let models = get("/v1/models").await;
    let toy = json!({"id": "toy", "object": "model", "created": 1, "owned_by": "espalier", "root": "toy",
        "parent": null, "max_model_len": 1000});
    assert_eq!(models["data"][0], toy);
    assert_eq!(
        (&models["data"][1]["id"], &models["data"][1]["parent"]),
        (&json!("a/b"), &json!("toy"))
    );
    assert_eq!(
        get("/v1/adapters").await["data"].as_array().unwrap().len(),
        1
    );
    let gone = || {
        server
            .client
            .delete(format!("{}/v1/adapters/a/b", server.url))
            .send()
    };
    assert_eq!(gone().await.unwrap().status(), 200);
    assert_eq!(gone().await.unwrap().status(), 404);
    assert_eq!(
        server
            .chat("hi", json!({"model": "a/b"}))
            .send()
            .await
            .unwrap()
            .status(),
        404
    );
}

#[tokio::test]
async fn health_and_metrics_need_no_key() {
    let server = Server::start_with(Some("sk-1"), Duration::from_secs(60)).await;
    let get = async |path: &str| {
        server
            .client
            .get(format!("{}{path}", server.url))
            .send()
            .await
            .unwrap()
    };
    assert_eq!(get("/health").await.status(), 200);
    let answered = server
        .chat("hi", json!({}))
        .bearer_auth("sk-1")
        .send()
        .await
        .unwrap();
    assert_eq!(answered.status(), 200);
    let refused = server
        .chat("hi", json!({}))
        .bearer_auth("sk-2")
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), 401);
    let page = get("/metrics").await.text().await.unwrap();
    for line in [
        "vllm:num_requests_running{model_name=\"toy\"} 3",
        "vllm:prompt_tokens_total{model_name=\"toy\"} 2",
        "vllm:generation_tokens_total{model_name=\"toy\"} 3",
        "vllm:request_success_total{model_name=\"toy\",finished_reason=\"stop\"} 1",
        "vllm:request_failure_total{model_name=\"toy\",status=\"401\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
}

#[tokio::test]
async fn no_more_of_an_answer_is_made_than_may_be_sent() {
    let head = Head {
        dialect: Dialect::Chat,
        id: "chatcmpl-1".to_owned(),
        created_s: 0,
        model: "toy".to_owned(),
        adapter_digest: None,
        logprobs: false,
        return_token_ids: false,
        prompts: vec![vec![1]],
        n: 1,
    };
    let written = async |bytes_max| {
        let mut answer = Answer::default();
        let text = Piece::Content("x".repeat(2_000));
        answer.take(&head, vec![text], None, Some(Finish::Stop));
        let whole = Whole {
            head: head.clone(),
            answers: vec![answer],
            usage: Usage::default(),
            backend: Arc::new(Scripted::default()),
        };
        whole.into_bytes(bytes_max).await
    };
    let bytes = written(usize::MAX).await.unwrap();
    assert_eq!(written(bytes.len()).await, Ok(bytes.clone()));
    let error = written(bytes.len() - 1).await.unwrap_err();
    assert_eq!(error.status(), 400);
    assert_eq!(error.to_json()["error"]["code"], "answer_too_long");
}
