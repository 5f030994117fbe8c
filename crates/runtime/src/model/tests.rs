mod several;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Mutex;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use espalier_core::error::ErrorClass;
use futures::StreamExt;
use futures::stream;
use serde_json::json;

use super::*;
use crate::shutdown::Shutdown;
use crate::tasks::{OnFailure, Tasks};

const KEY: &str = "sk-very-secret";

/// What the endpoint does with one request.
enum Reply {
    Json(u16, Value),
    Text(u16, &'static str, &'static str),
    Headers(u16, &'static str, String),
    /// Events, sent as they are; then the stream ends.
    Events(Vec<String>),
    /// Some bytes of a stream, and then the connection breaks.
    Broken(Vec<String>),
    /// Some bytes of a stream, and then silence.
    Silent(Vec<String>),
    /// A line that never ends.
    Endless,
    /// No answer at all.
    Hang,
}

#[derive(Clone, Default)]
struct Endpoint(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    replies: VecDeque<Reply>,
    requests: Vec<(HeaderMap, Value)>,
}

impl Endpoint {
    fn requests(&self) -> usize {
        self.0.lock().unwrap().requests.len()
    }

    fn body(&self, n: usize) -> Value {
        self.0.lock().unwrap().requests[n].1.clone()
    }
}

async fn answer(
    State(endpoint): State<Endpoint>,
    headers: HeaderMap,
    axum::Json(body): axum::Json<Value>,
) -> Response {
    let reply = {
        let mut script = endpoint.0.lock().unwrap();
        script.requests.push((headers, body));
        script.replies.pop_front().expect("an unexpected request")
    };
    let code = |status| StatusCode::from_u16(status).unwrap();
    match reply {
        Reply::Json(status, body) => (code(status), axum::Json(body)).into_response(),
        Reply::Text(status, kind, text) => {
            (code(status), [(CONTENT_TYPE, kind)], text).into_response()
        }
        Reply::Headers(status, name, value) => (code(status), [(name, value)], "").into_response(),
        Reply::Events(events) => stream_of(bytes_of(events)),
        Reply::Broken(events) => {
            let broken = stream::once(async { Err(std::io::Error::other("cut")) });
            stream_of(
                bytes_of(events)
                    .map(|bytes| bytes.map_err(|never| match never {}))
                    .chain(broken),
            )
        }
        Reply::Silent(events) => stream_of(bytes_of(events).chain(stream::pending())),
        Reply::Endless => {
            let piece = Bytes::from(vec![b'x'; 1 << 20]);
            stream_of(stream::repeat_with(move || {
                Ok::<_, Infallible>(piece.clone())
            }))
        }
        Reply::Hang => std::future::pending().await,
    }
}

fn bytes_of(events: Vec<String>) -> impl futures::Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::iter(events.into_iter().map(|event| Ok(Bytes::from(event))))
}

fn stream_of<E>(body: impl futures::Stream<Item = Result<Bytes, E>> + Send + 'static) -> Response
where
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let headers = [(CONTENT_TYPE, "text/event-stream; charset=utf-8")];
    (headers, axum::body::Body::from_stream(body)).into_response()
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn done() -> String {
    "data: [DONE]\n\n".to_owned()
}

fn hello() -> Value {
    json!({"id": "r1", "model": "qwen3-real", "choices": [{"index": 0, "message":
        {"role": "assistant", "content": "hello", "tool_calls": null}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2}})
}

fn hello_events() -> Vec<String> {
    vec![
        event(
            &json!({"id": "r1", "model": "qwen3-real", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        ),
        event(&json!({"choices": [{"index": 0, "delta": {"content": "hel"}}]})),
        event(
            &json!({"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}]}),
        ),
        event(&json!({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 2}})),
        done(),
    ]
}

async fn start(replies: impl IntoIterator<Item = Reply>) -> (Endpoint, ModelEndpoint) {
    let endpoint = Endpoint::default();
    endpoint.0.lock().unwrap().replies.extend(replies);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}/v1/", listener.local_addr().unwrap());
    let app = axum::Router::new()
        .route("/v1/chat/completions", axum::routing::post(answer))
        .with_state(endpoint.clone());
    let server = async move { axum::serve(listener, app).await };
    Tasks::new(Shutdown::new()).spawn("endpoint", OnFailure::Log, server);
    let settings = ModelEndpoint {
        api_key: Some(Secret::new(KEY)),
        max_retries: 2,
        ..ModelEndpoint::new(base_url)
    };
    (endpoint, settings)
}

fn client(settings: &ModelEndpoint) -> ModelClient {
    let mut client = ModelClient::new(settings.clone()).unwrap();
    client.backoff = Backoff {
        first: Duration::from_millis(1),
        max: Duration::from_millis(2),
    };
    client
}

fn sampling() -> Sampling {
    Sampling {
        thinking: true,
        temperature: 0.6,
        top_p: 0.95,
        top_k: 20,
        min_p: 0.0,
        presence_penalty: 0.0,
        seed: Some(7),
        completion_tokens_max: 512,
    }
}

async fn ask(settings: &ModelEndpoint) -> Result<ChatTurn, ModelError> {
    let messages = [Message::User {
        content: "hi".to_owned(),
    }];
    let request = ChatRequest {
        model: "qwen3",
        messages: &messages,
        tools: &[],
        sampling: &sampling(),
        extra: &Map::new(),
        vllm_extra: &Map::new(),
        affinity: "p/b/j",
        project: "p",
    };
    client(settings)
        .chat(&request, &CancellationToken::new())
        .await
}

/// One reply and nothing more: whatever is tried again runs out of replies.
async fn fails_at_once(reply: Reply) -> ModelError {
    let (endpoint, settings) = start([reply]).await;
    let error = ask(&settings).await.unwrap_err();
    assert_eq!(endpoint.requests(), 1, "{error}");
    error
}

/// The fault, then a good answer.
async fn passes_after(fault: Reply) -> ChatTurn {
    let (endpoint, mut settings) = start([fault, Reply::Events(hello_events())]).await;
    settings.first_byte_timeout_ms = 300;
    settings.idle_timeout_ms = 300;
    let turn = ask(&settings).await.unwrap();
    assert_eq!((endpoint.requests(), turn.retries), (2, 1));
    assert_eq!(turn.content, "hello");
    turn
}

#[tokio::test]
async fn a_streamed_answer_and_a_whole_one_are_the_same_turn() {
    let (_, settings) = start([Reply::Events(hello_events()), Reply::Json(200, hello())]).await;
    let streamed = ask(&settings).await.unwrap();
    let whole = ask(&settings).await.unwrap();
    assert!(streamed.first_token.unwrap() <= streamed.latency);
    assert_eq!(whole.first_token, None);
    assert_eq!(streamed.usage.unwrap().prompt_tokens, 10);
    assert_eq!(streamed.model, "qwen3-real");
    assert_eq!(streamed.response_id.as_deref(), Some("r1"));
    let alike = |turn: ChatTurn| ChatTurn {
        first_token: None,
        latency: Duration::ZERO,
        ..turn
    };
    assert_eq!(alike(streamed), alike(whole));
}

/// One message of each kind.
fn conversation() -> Vec<Message> {
    let arguments = json!({"url": "é"}).as_object().unwrap().clone();
    let call = espalier_core::chat::ToolCall::new("c1", "open", arguments);
    vec![
        Message::System {
            content: "s".to_owned(),
            hint: true,
        },
        Message::User {
            content: "u".to_owned(),
        },
        Message::assistant("\n\n".to_owned(), Some("hm".to_owned()), vec![call]),
        Message::Tool {
            tool_call_id: "c1".to_owned(),
            content: "ok".to_owned(),
        },
    ]
}

#[tokio::test]
async fn the_request_is_what_openai_and_vllm_read() {
    let (endpoint, mut settings) =
        start([Reply::Json(200, hello()), Reply::Json(200, hello())]).await;
    let messages = conversation();
    let tools: Vec<ToolDef> = serde_json::from_value(json!([{"type": "function", "function":
        {"name": "open", "description": "d", "parameters": {"type": "object"}}}]))
    .unwrap();
    let extra = json!({"temperature": 5, "stream": "no", "user": "u"});
    let vllm_extra = json!({"return_token_ids": true, "user": "v",
        "chat_template_kwargs": {"enable_thinking": true}});
    let request = ChatRequest {
        model: "qwen3",
        messages: &messages,
        tools: &tools,
        sampling: &sampling(),
        extra: extra.as_object().unwrap(),
        vllm_extra: vllm_extra.as_object().unwrap(),
        affinity: "p/b/j",
        project: "p",
    };
    let cancel = CancellationToken::new();
    client(&settings).chat(&request, &cancel).await.unwrap();
    let mut expected = json!({
        "model": "qwen3",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "open", "arguments": "{\"url\":\"é\"}"}}]},
            {"role": "tool", "content": "ok", "tool_call_id": "c1"},
        ],
        "tools": [{"type": "function", "function":
            {"name": "open", "description": "d", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "temperature": 0.6, "top_p": 0.95, "max_tokens": 512, "seed": 7, "top_k": 20,
        "stream": true, "stream_options": {"include_usage": true},
        "return_token_ids": true, "chat_template_kwargs": {"enable_thinking": true}, "user": "u",
    });
    assert_eq!(endpoint.body(0), expected);
    let headers = endpoint.0.lock().unwrap().requests[0].0.clone();
    assert_eq!(headers[AUTHORIZATION], format!("Bearer {KEY}"));

    settings.vllm_extensions = false;
    settings.streaming = false;
    let request = ChatRequest {
        tools: &[],
        ..request
    };
    client(&settings).chat(&request, &cancel).await.unwrap();
    for key in [
        "tools",
        "tool_choice",
        "top_k",
        "stream_options",
        "return_token_ids",
        "chat_template_kwargs",
    ] {
        expected.as_object_mut().unwrap().remove(key);
    }
    expected["messages"][2]
        .as_object_mut()
        .unwrap()
        .remove("reasoning_content");
    expected["stream"] = false.into();
    assert_eq!(endpoint.body(1), expected);
}

#[tokio::test]
async fn an_endpoint_that_has_log_probabilities_is_asked_for_them_unless_the_request_says() {
    let (endpoint, mut settings) =
        start([Reply::Json(200, hello()), Reply::Json(200, hello())]).await;
    settings.logprobs = true;
    for (place, extra, asked) in [(0, json!({}), true), (1, json!({"logprobs": false}), false)] {
        let request = ChatRequest {
            model: "qwen3",
            messages: &conversation(),
            tools: &[],
            sampling: &sampling(),
            extra: extra.as_object().unwrap(),
            vllm_extra: &Map::new(),
            affinity: "p/b/j",
            project: "",
        };
        let cancel = CancellationToken::new();
        client(&settings).chat(&request, &cancel).await.unwrap();
        assert_eq!(endpoint.body(place)["logprobs"], json!(asked));
    }
}

#[tokio::test]
async fn tool_calls_reach_the_caller_as_the_model_wrote_them() {
    let events = vec![
        event(
            &json!({"choices": [{"delta": {"reasoning_content": "hm", "tool_calls":
            [{"index": 0, "id": "c1", "function": {"name": "open", "arguments": "{\"url\": "}}]}}]}),
        ),
        event(&json!({"choices": [{"delta": {}, "finish_reason": "length"}]})),
        done(),
    ];
    let (_, settings) = start([Reply::Events(events)]).await;
    let turn = ask(&settings).await.unwrap();
    let call = RawToolCall {
        id: "c1".to_owned(),
        name: "open".to_owned(),
        arguments: "{\"url\": ".to_owned(),
    };
    assert_eq!(turn.tool_calls, [call]);
    assert_eq!(
        (turn.finish_reason.as_str(), turn.reasoning.as_deref()),
        ("length", Some("hm"))
    );
}

#[tokio::test]
async fn what_may_pass_is_tried_again() {
    for status in [408, 429, 500, 502, 503, 504] {
        passes_after(Reply::Json(status, json!({"error": {"message": "busy"}}))).await;
    }
    passes_after(Reply::Text(200, "text/html", "<html>proxy</html>")).await;
    passes_after(Reply::Text(200, "application/json", "{\"choices\": [")).await;
    passes_after(Reply::Text(200, "application/json", "[1, 2]")).await;
    passes_after(Reply::Text(200, "application/json", "")).await;
    passes_after(Reply::Json(200, json!({"choices": []}))).await;
    passes_after(Reply::Events(vec![event(&json!({"choices": []})), done()])).await;
    passes_after(Reply::Events(vec!["data: {\"choi\n\n".to_owned()])).await;
    passes_after(Reply::Events(vec![event(
        &json!({"error": {"message": "oom", "code": 500}}),
    )]))
    .await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_or_falls_silent_is_tried_again() {
    let begun = || hello_events()[..2].to_vec();
    passes_after(Reply::Events(begun())).await;
    passes_after(Reply::Events([begun(), vec![done()]].concat())).await;
    passes_after(Reply::Broken(begun())).await;
    passes_after(Reply::Silent(begun())).await;
    passes_after(Reply::Hang).await;
}

#[tokio::test]
async fn a_stream_without_done_is_whole_once_it_has_a_reason() {
    let (endpoint, settings) = start([Reply::Events(hello_events()[..3].to_vec())]).await;
    assert_eq!(ask(&settings).await.unwrap().content, "hello");
    assert_eq!(endpoint.requests(), 1);
}

#[tokio::test]
async fn the_tries_are_bounded_and_the_last_error_is_told() {
    let busy = || Reply::Json(503, json!({"error": {"message": "busy"}}));
    let (endpoint, settings) = start([busy(), busy(), busy()]).await;
    let error = ask(&settings).await.unwrap_err();
    assert_eq!(endpoint.requests(), 3);
    assert_eq!(error.to_string(), "the model endpoint answered 503: busy");
    assert_eq!(error.class(), ErrorClass::Infra);
}

#[tokio::test]
async fn what_cannot_pass_is_not_tried_again() {
    let bad = fails_at_once(Reply::Json(400, json!({"error": {"message": "bad seed"}}))).await;
    assert_eq!(
        bad.to_string(),
        "the model endpoint refused the request with status 400: bad seed"
    );
    assert_eq!(bad.class(), ErrorClass::Handler);
    fails_at_once(Reply::Json(422, json!({}))).await;
    let missing = fails_at_once(Reply::Json(404, json!({"detail": "Not Found"}))).await;
    assert!(missing.to_string().contains("ends with `/v1`"), "{missing}");
    let moved = fails_at_once(Reply::Headers(
        307,
        "location",
        "http://localhost:1/".to_owned(),
    ))
    .await;
    assert!(
        moved.to_string().contains("redirects are not followed"),
        "{moved}"
    );
    let long = fails_at_once(Reply::Json(
        400,
        json!({"error": {"code": "context_length_exceeded"}}),
    ))
    .await;
    assert!(matches!(long, ModelError::ContextLength { .. }), "{long}");
    let flood = fails_at_once(Reply::Endless).await;
    assert!(matches!(flood, ModelError::TooLarge { .. }), "{flood}");
}

#[tokio::test]
async fn the_key_is_in_no_error() {
    for status in [401, 403] {
        let body = json!({"error": {"message": format!("Incorrect API key provided: {KEY}")}});
        let error = fails_at_once(Reply::Json(status, body)).await;
        let shown = format!("{error} {error:?} {}", telemetry::error_chain(&error));
        assert!(!shown.contains(KEY), "{shown}");
        assert!(shown.contains("`api_key`"), "{shown}");
    }
    let inside = json!({"error": {"message": format!("bad key {KEY}"), "code": 400}});
    let error = fails_at_once(Reply::Events(vec![event(&inside)])).await;
    assert_eq!(
        error.to_string(),
        "the model endpoint refused the request with status 400: bad key [redacted]"
    );
    let (_, settings) = start([]).await;
    let shown = format!("{settings:?} {:?}", client(&settings));
    assert!(!shown.contains(KEY), "{shown}");
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let turned_away = Reply::Headers(429, "retry-after", "1".to_owned());
    let turn = passes_after(turned_away).await;
    assert!(turn.latency >= Duration::from_secs(1), "{:?}", turn.latency);
}

#[tokio::test]
async fn a_try_that_drips_on_for_too_long_ends() {
    let (_, mut settings) = start([Reply::Silent(hello_events()[..2].to_vec())]).await;
    settings.request_timeout_ms = 100;
    settings.max_retries = 0;
    let error = ask(&settings).await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Timeout(late) if late.name == "model.request"),
        "{error}"
    );
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_tried_again_and_named_unreachable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let settings = ModelEndpoint {
        max_retries: 1,
        ..ModelEndpoint::new(format!("http://{}/v1", listener.local_addr().unwrap()))
    };
    drop(listener);
    let error = ask(&settings).await.unwrap_err();
    assert!(matches!(error, ModelError::Connect { .. }), "{error}");
    assert!(
        telemetry::error_chain(&error).contains("refused"),
        "{}",
        telemetry::error_chain(&error)
    );
}

#[tokio::test]
async fn a_cancelled_call_ends_at_once() {
    let (endpoint, settings) = start([Reply::Hang]).await;
    let cancel = CancellationToken::new();
    let sampling = sampling();
    let extra = Map::new();
    let request = ChatRequest {
        model: "qwen3",
        messages: &[],
        tools: &[],
        sampling: &sampling,
        extra: &extra,
        vllm_extra: &extra,
        affinity: "",
        project: "",
    };
    let client = client(&settings);
    let cancelled_once_asked = async {
        while endpoint.requests() == 0 {
            tokio::task::yield_now().await;
        }
        cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(client.chat(&request, &cancel), cancelled_once_asked);
    let error = outcome.unwrap_err();
    assert!(matches!(error, ModelError::Cancelled), "{error}");
    assert_eq!(error.class(), ErrorClass::Cancelled);
}

#[test]
fn settings_that_cannot_work_are_refused() {
    for url in [
        "",
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://u:p@x/v1",
        "http://x/v1?key=1",
    ] {
        let error = ModelClient::new(ModelEndpoint::new(url)).unwrap_err();
        assert!(error.to_string().contains("`base_url`"), "{url}: {error}");
    }
    let endpoint = ModelEndpoint {
        api_key: Some(Secret::new("line\nbreak")),
        ..ModelEndpoint::new("http://x/v1")
    };
    assert!(
        ModelClient::new(endpoint)
            .unwrap_err()
            .to_string()
            .contains("`api_key`")
    );
}

#[test]
fn a_call_can_run_in_a_task() {
    fn sendable(_: impl Future<Output: Send> + Send) {}
    sendable(ask(&ModelEndpoint::new("http://localhost:1/v1")));
}
