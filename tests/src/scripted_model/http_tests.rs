//! The scripted model over real HTTP: shapes, streams, and each fault.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{Config, serve};

/// Runs `scenario` against a model that makes no mistakes.
async fn with_model<F: Future<Output = ()>>(scenario: impl FnOnce(Client) -> F) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client {
        url: format!("http://{}", listener.local_addr().unwrap()),
        http: reqwest::Client::new(),
    };
    let config = Config {
        mistakes: 0.0,
        ..Config::default()
    };
    tokio::select! {
        ended = serve(listener, config, std::future::pending()) => panic!("the model ended: {ended:?}"),
        () = scenario(client) => {}
    }
}

struct Client {
    url: String,
    http: reqwest::Client,
}

impl Client {
    async fn send(&self, body: &Value) -> reqwest::Response {
        let url = format!("{}/v1/chat/completions", self.url);
        self.http.post(url).json(body).send().await.unwrap()
    }

    async fn ask(&self, body: &Value) -> Value {
        self.send(body).await.json().await.unwrap()
    }

    async fn control(&self, body: &Value) -> reqwest::StatusCode {
        let url = format!("{}/control", self.url);
        let response = self.http.post(url).json(body).send().await.unwrap();
        response.status()
    }

    async fn counters(&self) -> Value {
        let url = format!("{}/control", self.url);
        self.http
            .get(url)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap()
    }
}

fn prompt(text: &str, stream: bool) -> Value {
    json!({
        "model": "scripted",
        "stream": stream,
        "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    })
}

const ADD: &str = r#"SCRIPT: [{"tool":"add","arguments":{"a":1,"b":2}}]"#;

/// The data of a stream, the closing mark included.
fn data(text: &str) -> Vec<&str> {
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .collect()
}

#[tokio::test]
async fn an_answer_comes_whole_or_as_a_stream() {
    with_model(async |client| {
        let whole = client.ask(&prompt(ADD, false)).await;
        let choice = &whole["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!(
            choice["message"]["tool_calls"][0]["function"]["name"],
            "add"
        );
        assert!(whole["usage"]["prompt_tokens"].as_u64() > Some(10));

        let response = client.send(&prompt(ADD, true)).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.unwrap();
        let data = data(&text);
        assert_eq!(data.last(), Some(&"[DONE]"));
        let usage: Value = serde_json::from_str(data[data.len() - 2]).unwrap();
        assert_eq!(usage["usage"], whole["usage"]);
        assert_eq!(usage["choices"], json!([]));
    })
    .await;
}

#[tokio::test]
async fn models_and_health_are_told() {
    with_model(async |client| {
        let get = async |path: &str| {
            let url = format!("{}{path}", client.url);
            client
                .http
                .get(url)
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap()
        };
        assert_eq!(get("/health").await, "ok");
        let models: Value = serde_json::from_str(&get("/v1/models").await).unwrap();
        assert_eq!(models["data"][0]["id"], "scripted");
    })
    .await;
}

#[tokio::test]
async fn faults_that_refuse_come_as_often_as_ordered() {
    with_model(async |client| {
        let order = json!({"fault": "http500", "times": 2});
        assert_eq!(client.control(&order).await, 200);
        assert_eq!(client.send(&prompt(ADD, false)).await.status(), 500);
        assert_eq!(client.send(&prompt(ADD, true)).await.status(), 500);
        assert_eq!(client.send(&prompt(ADD, true)).await.status(), 200);

        let limited = prompt("FAULT: http429", false);
        let response = client.send(&limited).await;
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(client.send(&limited).await.status(), 200);

        let html = client.send(&prompt("FAULT: html", false)).await;
        assert_eq!(html.status(), 200);
        assert!(html.text().await.unwrap().starts_with("<!doctype html>"));

        let counters = client.counters().await;
        assert_eq!(counters["faults"], 4);
        assert_eq!(counters["requests"], 6);
        assert_eq!(counters["completions"], 2);
    })
    .await;
}

#[tokio::test]
async fn faults_that_spoil_the_call() {
    with_model(async |client| {
        let call = async |fault: &str| {
            let answer = client
                .ask(&prompt(&format!("{ADD}\nFAULT: {fault}"), false))
                .await;
            let choice = answer["choices"][0].clone();
            (
                choice["message"]["tool_calls"][0]["function"].clone(),
                choice["finish_reason"].clone(),
            )
        };
        let (function, _) = call("bad_arguments").await;
        let arguments = function["arguments"].as_str().unwrap();
        assert!(serde_json::from_str::<Value>(arguments).is_err());
        assert_eq!(call("unknown_tool").await.0["name"], "no_such_tool");
        let (function, finish_reason) = call("unclosed_tool_call").await;
        let arguments = function["arguments"].as_str().unwrap();
        assert!(serde_json::from_str::<Value>(arguments).is_err());
        assert_eq!(finish_reason, "length");
    })
    .await;
}

#[tokio::test]
async fn empty_choices_and_the_other_name_of_thoughts() {
    with_model(async |client| {
        let empty = client.ask(&prompt("FAULT: empty_choices", false)).await;
        assert_eq!(empty["choices"], json!([]));
        let stream = client
            .send(&prompt("FAULT: empty_choices times=2", true))
            .await;
        assert_eq!(data(&stream.text().await.unwrap()).len(), 2);
        let other = client.ask(&prompt("FAULT: reasoning_field", false)).await;
        let message = &other["choices"][0]["message"];
        assert!(message["reasoning"].is_string());
        assert!(message.get("reasoning_content").is_none());
    })
    .await;
}

#[tokio::test]
async fn a_cut_answer_breaks_after_its_first_half() {
    with_model(async |client| {
        for stream in [false, true] {
            let text = format!("{ADD}\nFAULT: cut times=2");
            let mut response = client.send(&prompt(&text, stream)).await;
            assert_eq!(response.status(), 200);
            let mut got = Vec::new();
            let broken = loop {
                match response.chunk().await {
                    Ok(Some(chunk)) => got.extend_from_slice(&chunk),
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            let got = String::from_utf8_lossy(&got);
            assert!(broken && !got.is_empty(), "stream {stream}: {got}");
            assert!(!got.contains("[DONE]"));
        }
    })
    .await;
}

#[tokio::test]
async fn slow_answers_late_and_hang_never() {
    with_model(async |client| {
        let slow = format!("{ADD}\nFAULT: slow delay_ms=300");
        let start = tokio::time::Instant::now();
        assert_eq!(client.send(&prompt(&slow, false)).await.status(), 200);
        assert!(start.elapsed() >= Duration::from_millis(300));
        let hang = prompt("FAULT: hang", false);
        let answer = tokio::time::timeout(Duration::from_millis(500), client.send(&hang));
        assert!(answer.await.is_err());
    })
    .await;
}

#[tokio::test]
async fn control_refuses_what_it_does_not_know() {
    with_model(async |client| {
        assert_eq!(client.control(&json!({"fault": "flood"})).await, 400);
        assert_eq!(client.control(&json!({"mistakes": 1.5})).await, 400);
        assert_eq!(client.control(&json!({"mistakes": 1.0})).await, 200);
        let text = "Open http://localhost:1/shop, what does the \"red cap\" cost?";
        client.ask(&prompt(text, false)).await;
        assert_eq!(client.counters().await["mistakes"], 1);
    })
    .await;
}
