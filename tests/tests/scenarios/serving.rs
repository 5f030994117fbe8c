//! The inference worker as a process, on a tiny model with random weights: what clients ask for is what they get. What
//! the model says means nothing, so that all form in it is the server's.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use espalier_tests::harness::s3::S3Server;
use espalier_tests::harness::serving::{Serving, chat, fingerprint};
use espalier_tests::harness::tiny;
use serde_json::{Value, json};

fn tools() -> Value {
    let tool = |name: &str, values: &[&str]| {
        let schema = json!({
            "type": "object", "properties": {"to": {"enum": values}}, "required": ["to"],
            "additionalProperties": false,
        });
        json!({"type": "function", "function": {"name": name, "description": "Goes.", "parameters": schema}})
    };
    json!([
        tool("go", &["north", "south"]),
        tool("look", &["up", "down"])
    ])
}

/// The one call of an answer: its name and its arguments, which must be JSON.
fn call(answer: &Value) -> (String, Value) {
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 1, "{choice}");
    assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
    let function = &calls[0]["function"];
    let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    (function["name"].as_str().unwrap().to_owned(), arguments)
}

#[tokio::test]
async fn a_chat_is_answered_whole_and_streamed_alike() {
    let serving = Serving::start(&[]).await;
    let (_, models) = serving.get("/v1/models").await;
    assert!(models.contains("\"id\":\"tiny\""), "{models}");
    let whole = serving.chat("hello", json!({"seed": 1})).await;
    let choice = &whole["choices"][0];
    assert_eq!(
        (&whole["object"], &choice["finish_reason"]),
        (&json!("chat.completion"), &json!("length"))
    );
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let more = json!({"seed": 1, "stream_options": {"include_usage": true}});
    let events = serving.stream("hello", more).await;
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 12);
    let of = |field: &str| -> String {
        let deltas = events
            .iter()
            .filter_map(|event| event["choices"][0]["delta"][field].as_str());
        deltas.collect()
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    assert_eq!(of("content"), text(&choice["message"]["content"]));
    assert_eq!(
        of("reasoning_content"),
        text(&choice["message"]["reasoning_content"])
    );
    let again = serving.chat("hello", json!({"seed": 2})).await;
    assert_eq!(again["choices"], whole["choices"], "greedy needs no seed");
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached, Some(0), "a prompt of less than a block");
    assert_eq!(serving.get("/health").await.0, 200);
}

#[tokio::test]
async fn a_grammar_makes_a_model_that_knows_nothing_call_tools() {
    let serving = Serving::start(&[]).await;
    let named = json!({"type": "function", "function": {"name": "look"}});
    for (choice, names) in [(json!("required"), &["go", "look"][..]), (named, &["look"])] {
        for temperature in [0.0, 1.0] {
            let more = json!({
                "tools": tools(), "tool_choice": choice, "parallel_tool_calls": false, "max_tokens": 200,
                "temperature": temperature, "seed": 3, "chat_template_kwargs": {"enable_thinking": false},
            });
            let (name, arguments) = call(&serving.chat("go north", more.clone()).await);
            assert!(names.contains(&&*name), "{name}");
            let values = if name == "go" {
                ["north", "south"]
            } else {
                ["up", "down"]
            };
            assert!(
                values.contains(&arguments["to"].as_str().unwrap()),
                "{arguments}"
            );
            let events = serving.stream("go north", more).await;
            let deltas = events
                .iter()
                .filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array());
            let deltas: Vec<&Value> = deltas.flatten().collect();
            assert_eq!(deltas[0]["function"]["name"], json!(name));
            let pieces = deltas
                .iter()
                .filter_map(|delta| delta["function"]["arguments"].as_str());
            let streamed: Value = serde_json::from_str(&pieces.collect::<String>()).unwrap();
            assert_eq!(streamed, arguments);
        }
    }
    let more = json!({"tools": tools(), "tool_choice": "none", "max_tokens": 40});
    let answer = serving.chat("go north", more).await;
    assert!(answer["choices"][0]["message"].get("tool_calls").is_none());
}

#[tokio::test]
async fn a_schema_binds_what_is_said() {
    let serving = Serving::start(&[]).await;
    let schema = json!({
        "type": "object", "required": ["sort", "count", "good"], "additionalProperties": false,
        "properties": {
            "sort": {"enum": ["pear", "apple"]}, "good": {"type": "boolean"},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}});
    let more = json!({
        "response_format": format, "max_tokens": 300, "temperature": 1, "seed": 5, "n": 3,
        "chat_template_kwargs": {"enable_thinking": false},
    });
    let answer = serving.chat("fruit", more).await;
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "stop", "{choice}");
        let fruit: Value =
            serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(
            ["pear", "apple"].contains(&fruit["sort"].as_str().unwrap()),
            "{fruit}"
        );
        assert!(
            fruit["count"].as_u64().unwrap() <= 99 && fruit["good"].is_boolean(),
            "{fruit}"
        );
    }
    let broken =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}});
    let (status, error) = serving
        .ask(
            "/v1/chat/completions",
            &chat("x", json!({"response_format": broken})),
        )
        .await;
    assert_eq!(
        (status, &error["error"]["param"]),
        (400, &json!("response_format"))
    );
}

#[tokio::test]
async fn ids_and_logprobs_are_exact_in_and_out() {
    let serving = Serving::start(&[]).await;
    let more = json!({"return_token_ids": true, "logprobs": true, "top_logprobs": 3});
    let answer = serving.chat("ids", more).await;
    let (prompt, choice) = (&answer["prompt_token_ids"], &answer["choices"][0]);
    let ids = choice["token_ids"].as_array().unwrap();
    assert_eq!(ids.len(), 12);
    let logprobs = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(logprobs.len(), 12);
    for entry in logprobs {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(
            (top.len(), &top[0]["logprob"]),
            (3, &entry["logprob"]),
            "greedy takes the first"
        );
        assert!(entry["logprob"].as_f64().unwrap() < 0.0);
    }
    // The same ids, whoever rendered them, and however the answer is cut.
    let body = chat(
        "",
        json!({"messages": null, "prompt_token_ids": prompt, "return_token_ids": true}),
    );
    let (status, same) = serving.ask("/v1/chat/completions", &body).await;
    assert_eq!(
        (status, &same["choices"][0]["token_ids"]),
        (200, &choice["token_ids"])
    );
    let longer: Vec<&Value> = prompt.as_array().unwrap().iter().chain(&ids[..5]).collect();
    let body = json!({"model": "tiny", "prompt": longer, "max_tokens": 7, "temperature": 0, "logprobs": 0,
        "return_token_ids": true});
    let (status, rest) = serving.ask("/v1/completions", &body).await;
    assert_eq!(
        (status, rest["choices"][0]["token_ids"].as_array().unwrap()),
        (200, &ids[5..].to_vec())
    );
    let exact: Vec<f64> = logprobs[5..]
        .iter()
        .map(|entry| entry["logprob"].as_f64().unwrap())
        .collect();
    assert_eq!(
        rest["choices"][0]["logprobs"]["token_logprobs"],
        json!(exact),
        "to the bit"
    );
}

#[tokio::test]
async fn seeds_repeat_and_answers_of_one_request_differ() {
    let serving = Serving::start(&[]).await;
    let more = json!({"temperature": 1, "seed": 11, "n": 4, "return_token_ids": true});
    let ids = |answer: &Value| -> Vec<Value> {
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["token_ids"].clone())
            .collect()
    };
    let first = ids(&serving.chat("seed", more.clone()).await);
    let distinct: BTreeSet<String> = first.iter().map(Value::to_string).collect();
    assert_eq!(distinct.len(), 4);
    assert_eq!(ids(&serving.chat("seed", more).await), first);
    // The bias leaves one id, whose text is the stop.
    let more = json!({"logit_bias": {"13": 100}, "stop": ["..."], "max_tokens": 50});
    let stopped = serving.chat("stop", more).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["message"]["content"], "");
    let more = json!({"logit_bias": {"13": 100}, "stop_token_ids": [13], "return_token_ids": true});
    let stopped = &serving.chat("stop", more).await["choices"][0];
    assert_eq!(
        (&stopped["finish_reason"], &stopped["token_ids"]),
        (&json!("stop"), &json!([13]))
    );
    assert_eq!(
        stopped["message"]["content"], "",
        "an id that ends the answer has no text"
    );
    let ends = json!({"logit_bias": {"151645": 100}, "return_token_ids": true});
    let ended = &serving.chat("end", ends.clone()).await["choices"][0];
    assert_eq!(
        (&ended["finish_reason"], &ended["token_ids"]),
        (&json!("stop"), &json!([151_645]))
    );
    let mut on = ends;
    on["ignore_eos"] = json!(true);
    let on = &serving.chat("end", on).await["choices"][0];
    assert_eq!(
        (
            &on["finish_reason"],
            on["token_ids"].as_array().unwrap().len()
        ),
        (&json!("length"), 12)
    );
}

#[tokio::test]
async fn a_model_is_found_in_a_bucket_and_an_adapter_too() {
    let server = S3Server::start().await;
    let folder = tempfile::TempDir::new().unwrap();
    let (model, adapter) = (folder.path().join("m"), folder.path().join("a"));
    tiny::write_model(&model);
    tiny::write_adapter(&adapter, 5);
    let environment = server.environment();
    for (name, from) in [("tiny", &model), ("lora", &adapter)] {
        upload(&server, name, from).await;
    }
    let url = S3Server::store_url("tiny");
    let serving = Serving::start_on(folder, &url, &[], &environment).await;
    let base = serving.chat("hello", json!({})).await;
    let (status, loaded) = serving
        .load_adapter("lora", Path::new(&S3Server::store_url("lora")))
        .await;
    assert_eq!((status, &loaded["rank"]), (200, &json!(4)), "{loaded}");
    let adapted = serving.chat("hello", json!({"model": "lora"})).await;
    assert_ne!(adapted["choices"], base["choices"]);
    assert_eq!(adapted["system_fingerprint"], fingerprint(&loaded));
}

/// Puts every file of a folder under a prefix of the bucket.
async fn upload(server: &S3Server, prefix: &str, folder: &Path) {
    let [(_, endpoint), (_, key), (_, secret), (_, region)] = server.environment();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (_, bucket) = S3Server::store_url(prefix)
            .split_once("//")
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--user"])
            .arg(format!("{key}:{secret}"));
        curl.arg("--aws-sigv4").arg(format!("aws:amz:{region}:s3"));
        curl.arg("--upload-file")
            .arg(&path)
            .arg(format!("{endpoint}/{bucket}/{file}"));
        let output = tokio::task::spawn_blocking(move || curl.output().unwrap())
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[tokio::test]
async fn the_official_python_package_drives_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join("target/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run `make setup-test`",
        python.display()
    );
    let serving = Serving::start(&["--api-key", "sk-of-a-test"]).await;
    let mut command = Command::new(python);
    command
        .arg(root.join("tests/openai_client.py"))
        .arg(format!("{}/v1", serving.url))
        .arg("sk-of-a-test");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(told.contains("9 checks passed"), "{told}");
}

#[tokio::test]
async fn whoever_reaches_an_open_server_loads_no_adapter() {
    let serving = Serving::start(&["--host", "0.0.0.0"]).await;
    let folder = serving.path("adapter");
    tiny::write_adapter(&folder, 5);
    let (status, answer) = serving.load_adapter("tuned", &folder).await;
    assert_eq!(status, 403, "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("--api-key"), "{message}");
    // Answers are for everybody all the same.
    serving.chat("hello", json!({})).await;
}
