//! What the door refuses, and in which words.

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

/// Status, and the error's parts.
async fn refused(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    let error = body["error"].clone();
    assert!(
        error["message"].is_string() && error["type"].is_string(),
        "{body}"
    );
    (status, error)
}

#[tokio::test]
async fn wrong_values_name_the_field() {
    let server = Server::start().await;
    for (more, param) in [
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (
            json!({"tools": [{"type": "function", "function": {}}]}),
            "tools[0].function.name",
        ),
        (
            json!({"messages": [{"role": "user", "content": "unrenderable"}]}),
            "messages",
        ),
        (
            json!({"messages": [{"role": "user", "content": ""}]}),
            "messages",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}),
            "response_format",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
            "tool_choice": "required"}),
            "tools",
        ),
    ] {
        let (status, error) = refused(server.chat("hi", more.clone())).await;
        assert_eq!(
            (status, &error["param"]),
            (400, &json!(param)),
            "{more}: {error}"
        );
        assert_eq!(error["type"], "invalid_request_error");
    }
    for (body, param) in [
        (json!({"prompt": 3}), "prompt"),
        (
            json!({"prompt": "x", "structured_outputs": {"json": {"type": "x"}}}),
            "structured_outputs",
        ),
    ] {
        let (status, error) = refused(server.post("/v1/completions", &body)).await;
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{body}");
    }
    for (body, param, status) in [
        (json!({"name": "a b", "path": "/a"}), "name", 400),
        (json!({"name": "a"}), "path", 400),
        (json!({"name": "a", "path": "/a", "rank": 3}), "rank", 400),
        (json!({"name": "a", "path": "/broken"}), "path", 400),
        (json!({"name": "toy", "path": "/a"}), "name", 409),
    ] {
        let (found, error) = refused(server.post("/v1/adapters", &body)).await;
        assert_eq!((found, &error["param"]), (status, &json!(param)), "{body}");
    }
}

#[tokio::test]
async fn a_body_that_is_no_json_is_refused() {
    let server = Server::start().await;
    let post = |body: Vec<u8>| {
        server
            .client
            .post(format!("{}/v1/chat/completions", server.url))
            .header("content-type", "application/json")
            .body(body)
    };
    let (status, error) = refused(post(b"{\"a\": \"\xff\"}".to_vec())).await;
    assert_eq!(status, 400);
    assert!(error["message"].as_str().unwrap().contains("UTF-8"));
    let (status, error) = refused(post(b"{\"temperature\": NaN}".to_vec())).await;
    assert_eq!((status, &error["param"]), (400, &json!("temperature")));
    assert_eq!(refused(post(b"[]".to_vec())).await.0, 400);
    assert_eq!(refused(post(vec![])).await.0, 400);
    let deep = [vec![b'['; 1_000_000], vec![b']'; 1_000_000]].concat();
    assert_eq!(refused(post(deep)).await.0, 400);
    assert_eq!(
        server.chat_json("still up", json!({})).await["choices"][0]["finish_reason"],
        "stop"
    );
}

#[tokio::test]
async fn what_is_too_long_says_how_long_it_may_be() {
    let server = Server::start().await;
    let (status, error) = refused(server.chat(&"x".repeat(1_000), json!({}))).await;
    assert_eq!(
        (status, &error["code"]),
        (413, &json!("context_length_exceeded"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("maximum context length is 1000 tokens"),
        "{message}"
    );
    assert!(message.contains("has 1000 tokens"), "{message}");
    let turn = json!({"role": "assistant", "content": "x".repeat(998)});
    let (status, error) = refused(server.chat("hi", json!({"forced_message": turn}))).await;
    assert_eq!(
        (status, &error["code"], &error["param"]),
        (
            413,
            &json!("context_length_exceeded"),
            &json!("forced_message")
        )
    );
    let (status, error) = refused(server.chat(&"x".repeat(17 << 20), json!({}))).await;
    assert_eq!(status, 413);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("16777216 bytes")
    );
}

#[tokio::test]
async fn an_engine_that_refuses_is_told_by_status() {
    let server = Server::start().await;
    for (script, status, kind) in [
        ("full", 429, "rate_limit_error"),
        ("too many", 400, "invalid_request_error"),
        ("stopped", 503, "server_error"),
        ("invalid", 400, "invalid_request_error"),
        ("given up", 408, "invalid_request_error"),
        ("broken", 500, "server_error"),
    ] {
        let (found, error) = refused(server.chat(script, json!({}))).await;
        assert_eq!((found, &error["type"]), (status, &json!(kind)), "{script}");
    }
    let full = server
        .chat("full", json!({"stream": true}))
        .send()
        .await
        .unwrap();
    assert_eq!(
        (full.status().as_u16(), &full.headers()["retry-after"]),
        (429, &"2".parse().unwrap())
    );
}

#[tokio::test]
async fn unknown_models_and_places_are_not_found() {
    let server = Server::start().await;
    let (status, error) = refused(server.chat("hi", json!({"model": "gpt-4"}))).await;
    assert_eq!(
        (status, &error["code"], &error["param"]),
        (404, &json!("model_not_found"), &json!("model"))
    );
    let get = |path: &str| server.client.get(format!("{}{path}", server.url));
    assert_eq!(refused(get("/v1/nothing")).await.0, 404);
    assert_eq!(refused(get("/v1/chat/completions")).await.0, 405);
}

#[tokio::test]
async fn without_the_key_nothing_is_told() {
    let server = Server::start_with(Some("sk-secret"), Duration::from_secs(60)).await;
    for path in ["/v1/models", "/v1/nothing", "/v1/adapters"] {
        let (status, error) = refused(
            server
                .client
                .get(format!("{}{path}", server.url))
                .bearer_auth("sk-x"),
        )
        .await;
        assert_eq!((status, &error["code"]), (401, &json!("invalid_api_key")));
        assert!(!error.to_string().contains("sk-"));
    }
    let (status, _) = refused(server.chat("hi", json!({"temperature": "wrong"}))).await;
    assert_eq!(status, 401, "the key comes first");
}

#[tokio::test]
async fn fields_without_a_meaning_are_named() {
    let server = Server::start().await;
    let response = server
        .chat("hi", json!({"user": "u", "n": 1}))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-espalier-ignored-fields"], "user");
    let response = server.chat("hi", json!({})).send().await.unwrap();
    assert!(!response.headers().contains_key("x-espalier-ignored-fields"));
}

#[tokio::test]
async fn who_leaves_ends_the_answer() {
    let server = Server::start().await;
    let streamed = server
        .chat("endless", json!({"stream": true, "n": 2}))
        .send()
        .await
        .unwrap();
    drop(streamed);
    server.backend.aborted(2).await;
    let address = server.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let body = chat_body("endless", json!({})).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let asked = async {
        while server.backend.asked.lock().unwrap().len() < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), asked)
        .await
        .unwrap();
    drop(stream);
    server.backend.aborted(3).await;
}

#[tokio::test]
async fn draining_ends_when_the_answers_have_ended() {
    let server = Server::start().await;
    let mut idle = TcpStream::connect(server.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    let response = server
        .chat("slow", json!({"stream": true}))
        .send()
        .await
        .unwrap();
    server.shutdown.drain();
    server.backend.go.notify_one();
    let told = events(&response.text().await.unwrap());
    assert_eq!(told.last().unwrap()["choices"][0]["finish_reason"], "stop");
    server
        .tasks
        .join_all(Duration::from_secs(10))
        .await
        .unwrap();
    assert_eq!(
        idle.read(&mut [0]).await.unwrap(),
        0,
        "an idle connection is closed"
    );
    assert!(server.chat("hi", json!({})).send().await.is_err());
}

#[tokio::test]
async fn what_a_page_in_a_browser_can_send_unasked_is_refused() {
    let server = Server::start().await;
    let client = reqwest::Client::new();
    for path in ["/v1/chat/completions", "/v1/adapters"] {
        let body = json!({"name": "a", "path": "/x", "messages": []}).to_string();
        let request = client.post(format!("{}{path}", server.url)).body(body);
        let plain = request.try_clone().unwrap();
        let plain = plain.header("content-type", "text/plain;charset=UTF-8");
        for request in [plain, request] {
            let (status, error) = refused(request).await;
            assert_eq!(status, 415);
            let message = error["message"].as_str().unwrap();
            assert!(message.contains("application/json"), "{message}");
        }
    }
}
