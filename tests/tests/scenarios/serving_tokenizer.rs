//! A model that brings a tokenizer of its own: the inference worker serves it as it serves Qwen3, over its ids.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use espalier_qwen3_text::Tokenizer;
use espalier_tests::harness::serving::{Serving, chat};
use espalier_tests::harness::tiny;
use serde_json::{Value, json};
use tempfile::TempDir;

async fn serve() -> (Serving, Tokenizer) {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model");
    tiny::write_small_model(&model);
    let name = model.display().to_string();
    let serving = Serving::start_on(folder, &name, &[], &[]).await;
    (
        serving,
        Tokenizer::from_json(tiny::SMALL_TOKENIZER).unwrap(),
    )
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn tool(name: &str, values: &[&str]) -> Value {
    let schema = json!({
        "type": "object", "required": ["to", "steps"], "additionalProperties": false,
        "properties": {"to": {"enum": values}, "steps": {"type": "integer", "minimum": 0, "maximum": 99}},
    });
    json!({"type": "function", "function": {"name": name, "description": "Goes.", "parameters": schema}})
}

#[tokio::test]
async fn a_prompt_and_its_answer_are_of_the_models_own_ids() {
    let (serving, tokenizer) = serve().await;
    let more = json!({"return_token_ids": true, "temperature": 1, "seed": 3, "top_k": 0, "top_p": 1, "max_tokens": 200,
        "ignore_eos": true});
    let answer = serving.chat("12 + 7 <|im_end|>", more).await;
    let prompt = ids(&answer["prompt_token_ids"]);
    assert_eq!(
        tokenizer.decode(&prompt).unwrap(),
        "<|im_start|>user\n12 + 7 <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    );
    // What the content spells stays text.
    let turn_close = tokenizer.ids().turn_close;
    let turns = prompt.iter().filter(|id| **id == turn_close);
    assert_eq!(turns.count(), 1);
    let choice = &answer["choices"][0];
    let said = ids(&choice["token_ids"]);
    assert_eq!(said.len(), 200);
    assert!(
        said.iter().all(|id| *id < tokenizer.vocabulary()),
        "padding was drawn: {said:?}"
    );
    let body =
        json!({"model": "tiny", "prompt": "<think>a", "max_tokens": 1, "return_token_ids": true});
    let (_, answer) = serving.ask("/v1/completions", &body).await;
    let prompt = ids(&answer["choices"][0]["prompt_token_ids"]);
    assert_eq!(prompt, tokenizer.encode("<think>a"));
    // Padding, and what only Qwen3 has, is refused.
    for id in [2100, 2111, 9707] {
        let body = chat("", json!({"messages": null, "prompt_token_ids": [id]}));
        let (status, said) = serving.ask("/v1/chat/completions", &body).await;
        let said = said.to_string();
        assert!(status == 400 && said.contains("below 2100"), "{said}");
    }
}

#[tokio::test]
async fn ends_and_thoughts_are_told_by_the_models_own_ids() {
    let (serving, tokenizer) = serve().await;
    let ids_of = *tokenizer.ids();
    let biased = |id: u32| json!({"logit_bias": {id.to_string(): 100}, "return_token_ids": true, "max_tokens": 3});
    let ended = &serving.chat("end", biased(ids_of.turn_close)).await["choices"][0];
    assert_eq!(
        (&ended["finish_reason"], ids(&ended["token_ids"])),
        (&json!("stop"), vec![ids_of.turn_close])
    );
    let word = tokenizer.encode_ordinary("user")[0];
    let thinking = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n";
    let mut body = chat("", biased(word));
    body["messages"] = json!(null);
    body["prompt_token_ids"] = json!(tokenizer.encode(thinking));
    let (status, answer) = serving.ask("/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "useruseruser", "{message}");
}

#[tokio::test]
async fn a_named_tool_is_called_in_json_that_parses() {
    let (serving, tokenizer) = serve().await;
    let tools = json!([tool("go", &["north", "südwest"]), tool("look", &["up"])]);
    for temperature in [0.0, 1.0] {
        for seed in 0..3 {
            let more = json!({
                "tools": tools, "tool_choice": {"type": "function", "function": {"name": "go"}}, "max_tokens": 300,
                "temperature": temperature, "seed": seed, "parallel_tool_calls": false, "return_token_ids": true,
                "chat_template_kwargs": {"enable_thinking": false},
            });
            let answer = serving.chat("go north", more.clone()).await;
            let choice = &answer["choices"][0];
            assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
            let function = &choice["message"]["tool_calls"][0]["function"];
            assert_eq!(function["name"], "go");
            let arguments: Value =
                serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
            let to = arguments["to"].as_str().unwrap();
            assert!(["north", "südwest"].contains(&to), "{arguments}");
            assert!((0..100).contains(&arguments["steps"].as_i64().unwrap()));
            let said = ids(&choice["token_ids"]);
            let marks = tokenizer.ids();
            assert!(said.contains(&marks.call_open) && said.contains(&marks.call_close));
            // One call is asked for: nothing comes behind it but the end of the turn.
            let ends = [marks.call_close, marks.turn_close, marks.end_of_text];
            assert!(said.last().is_some_and(|last| ends.contains(last)));
            let text = tokenizer.decode(&said).unwrap();
            let call = text.split_once("<tool_call>\n").unwrap().1;
            let call: Value =
                serde_json::from_str(call.split_once("\n</tool_call>").unwrap().0).unwrap();
            assert_eq!(call, json!({"name": "go", "arguments": arguments}));
            let events = serving.stream("go north", more).await;
            let pieces = events.iter().filter_map(|event| {
                event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str()
            });
            let streamed: Value = serde_json::from_str(&pieces.collect::<String>()).unwrap();
            assert_eq!(streamed, arguments);
        }
    }
}

#[tokio::test]
async fn a_schema_binds_what_is_said_over_a_small_vocabulary() {
    let (serving, _) = serve().await;
    let schema = json!({
        "type": "object", "required": ["sort", "count"], "additionalProperties": false,
        "properties": {"sort": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    });
    let more = json!({
        "response_format": {"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}},
        "max_tokens": 300, "temperature": 1, "seed": 5, "n": 3, "chat_template_kwargs": {"enable_thinking": false},
    });
    let answer = serving.chat("fruit", more).await;
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let content = choice["message"]["content"].as_str().unwrap();
        let fruit: Value = serde_json::from_str(content).unwrap();
        assert!(
            fruit["sort"].is_string() && fruit["count"].is_u64(),
            "{fruit}"
        );
    }
}
