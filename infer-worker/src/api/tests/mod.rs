//! The API over real sockets, in front of a scripted backend: the model says what the prompt's last message tells it to.

mod connections;
mod patience;
mod refusals;
mod scripted;
mod streams;
mod whole;

use std::sync::Arc;
use std::time::Duration;

use espalier_core::time::Timestamp;
use espalier_runtime::clock::ManualClock;
use espalier_runtime::config::Secret;
use espalier_runtime::ids::SequentialIds;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::connection::{Bounds, serve_within};
use super::{Api, Offline, Parts};
use scripted::Scripted;

/// The API in front of a backend.
fn api(backend: &Arc<Scripted>, key: Option<&str>, keep_alive: Duration) -> Api {
    let parts = Parts {
        backend: backend.clone(),
        api_key: key.map(Secret::new),
        clock: Arc::new(ManualClock::new(Timestamp::from_ms(7_000))),
        ids: Arc::new(SequentialIds::new("t")),
        seed: Some(100),
    };
    Api::with_keep_alive(parts, keep_alive)
}

/// What answers batches in front of a scripted backend.
pub(crate) fn scripted_offline() -> Offline {
    api(&Arc::default(), None, Duration::ZERO).offline()
}

/// A server on a port of its own.
struct Server {
    url: String,
    backend: Arc<Scripted>,
    shutdown: Shutdown,
    tasks: Tasks,
    client: reqwest::Client,
}

impl Server {
    async fn start() -> Self {
        Self::start_with(None, Duration::from_secs(60)).await
    }

    async fn start_with(key: Option<&str>, keep_alive: Duration) -> Self {
        Self::start_within(key, keep_alive, Bounds::default()).await
    }

    async fn start_within(key: Option<&str>, keep_alive: Duration, bounds: Bounds) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let backend = Arc::new(Scripted::default());
        let router = api(&backend, key, keep_alive).router();
        let shutdown = Shutdown::new();
        let tasks = Tasks::new(shutdown.clone());
        let drain_limit = Duration::from_secs(10);
        let serving = serve_within(listener, router, shutdown.clone(), drain_limit, bounds);
        tasks.spawn("test.server", OnFailure::Log, serving);
        Self {
            url,
            backend,
            shutdown,
            tasks,
            client: reqwest::Client::new(),
        }
    }

    fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    /// A chat whose answer is `script`, with more fields of the request.
    fn chat(&self, script: &str, more: Value) -> reqwest::RequestBuilder {
        self.post("/v1/chat/completions", &chat_body(script, more))
    }

    /// Its answer, which must be one.
    async fn chat_json(&self, script: &str, more: Value) -> Value {
        let response = self.chat(script, more).send().await.unwrap();
        let status = response.status();
        let body: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The data of its events, streamed.
    async fn chat_events(&self, script: &str, mut more: Value) -> Vec<Value> {
        more["stream"] = json!(true);
        let response = self.chat(script, more).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        events(&response.text().await.unwrap())
    }
}

fn chat_body(script: &str, more: Value) -> Value {
    let mut body = json!({"model": "toy", "messages": [{"role": "user", "content": script}]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The data of events; `[DONE]` becomes a string and must be the last.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let mut events: Vec<Value> = data
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)))
        .collect();
    assert_eq!(events.pop(), Some(json!("[DONE]")), "{text}");
    events
}

fn tools() -> Value {
    let schema =
        json!({"type": "object", "properties": {"u": {"type": "string"}}, "required": ["u"]});
    json!([{"type": "function", "function": {"name": "open", "parameters": schema}}])
}

const CALL: &str = "<tool_call>\n{\"name\": \"open\", \"arguments\": {\"u\": \"é\"}}\n</tool_call>";
