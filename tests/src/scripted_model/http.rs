//! The scripted model's HTTP: chat completions, the list of models, health, and the control of faults.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::{StreamExt as _, stream};
use serde::Serialize;
use serde_json::{Value, json};

use super::chat::{Call, Reply, Request};
use super::faults::{Fault, Order, Orders};
use super::{Config, mistakes, policy, script, wire};

/// Largest request: a conversation with some hundred large snapshots.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// How long `hang` holds a request; longer than any client should wait.
const HANG_MS: u64 = 15 * 60 * 1000;

/// What the model has done so far, as `GET /control` tells it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    /// Requests for a completion.
    pub requests: u64,
    /// Of those, answered as asked for.
    pub completions: u64,
    /// Of those, met by a fault.
    pub faults: u64,
    /// Turns that were spoiled on purpose.
    pub mistakes: u64,
}

struct Shared {
    config: Mutex<Config>,
    orders: Mutex<Orders>,
    counters: Mutex<Counters>,
}

type App = State<Arc<Shared>>;

pub(super) fn router(config: Config) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/health", get(async || "ok"))
        .route("/control", get(counters).post(control))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Arc::new(Shared {
            config: Mutex::new(config),
            orders: Mutex::default(),
            counters: Mutex::default(),
        }))
}

/// The turn that the rules lead to: the prompt's script, or the policy for the practice site.
pub(super) fn decide(request: &Request) -> Reply {
    script::play(request).unwrap_or_else(|| policy::decide(request))
}

/// Nothing panics while it holds one of these locks, so a poisoned one is still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn models() -> Json<Value> {
    Json(json!({
        "object": "list",
        "data": [{"id": wire::MODEL, "object": "model", "created": 0, "owned_by": "espalier"}],
    }))
}

async fn counters(State(shared): App) -> Json<Counters> {
    Json(*lock(&shared.counters))
}

/// Sets what the body names: `fault` (null takes an order back), `mistakes`, `think_ms`.
async fn control(State(shared): App, Json(body): Json<Value>) -> Response {
    match body.get("fault") {
        None => {}
        Some(Value::Null) => lock(&shared.orders).set(None),
        Some(_) => match Order::from_json(&body) {
            Ok(order) => lock(&shared.orders).set(Some(order)),
            Err(error) => return (StatusCode::BAD_REQUEST, error).into_response(),
        },
    }
    let mut config = lock(&shared.config);
    if let Some(share) = body["mistakes"].as_f64() {
        if !(0.0..=1.0).contains(&share) {
            let error = format!("`mistakes` must be in [0, 1], got {share}");
            return (StatusCode::BAD_REQUEST, error).into_response();
        }
        config.mistakes = share;
    }
    if let Some(think_ms) = body["think_ms"].as_u64() {
        config.think_ms = think_ms;
    }
    Json(json!({"mistakes": config.mistakes, "think_ms": config.think_ms})).into_response()
}

async fn chat_completions(State(shared): App, Json(body): Json<Value>) -> Response {
    let request = Request::parse(&body);
    let config = lock(&shared.config).clone();
    let order = lock(&shared.orders).due(request.prompt());
    lock(&shared.counters).requests += 1;
    tokio::time::sleep(Duration::from_millis(config.think_ms)).await;
    if let Some(order) = order {
        lock(&shared.counters).faults += 1;
        if let Some(response) = refuse(order, &request).await {
            return response;
        }
    }
    let right = decide(&request);
    // A script says exactly what to do, so nothing else goes wrong in one, unless a model is asked for that errs.
    let errs = mistakes::named_share(&request.model).is_some();
    let reply = match script::play(&request) {
        Some(_) if !errs => right.clone(),
        _ => mistakes::spoil(&config, &request, right.clone()),
    };
    {
        let mut counters = lock(&shared.counters);
        counters.completions += 1;
        counters.mistakes += u64::from(reply != right);
    }
    let fault = order.map(|order| order.fault);
    send(&request, &corrupt(fault, &request, reply), fault)
}

/// Commits the faults that leave no answer; `None` for the others.
async fn refuse(order: Order, request: &Request) -> Option<Response> {
    let error = |status: StatusCode| {
        let body = json!({"error": {"message": "ordered by a test", "type": "fault"}});
        (status, Json(body)).into_response()
    };
    match order.fault {
        Fault::Slow => {
            tokio::time::sleep(Duration::from_millis(order.delay_ms)).await;
            None
        }
        Fault::Hang => {
            tokio::time::sleep(Duration::from_millis(HANG_MS)).await;
            Some(error(StatusCode::GATEWAY_TIMEOUT))
        }
        Fault::Http500 => Some(error(StatusCode::INTERNAL_SERVER_ERROR)),
        Fault::Http429 => {
            let mut response = error(StatusCode::TOO_MANY_REQUESTS);
            response.headers_mut().insert(RETRY_AFTER, 1.into());
            Some(response)
        }
        Fault::Html => {
            Some(Html("<!doctype html><title>Gateway</title><h1>Hello</h1>").into_response())
        }
        Fault::EmptyChoices if request.stream => Some(events(
            vec![wire::empty(request).to_string(), DONE.into()],
            false,
        )),
        Fault::EmptyChoices => Some(Json(wire::empty(request)).into_response()),
        Fault::Cut
        | Fault::BadArguments
        | Fault::UnknownTool
        | Fault::UnclosedToolCall
        | Fault::ReasoningField => None,
    }
}

/// Commits the faults that spoil what is said.
fn corrupt(fault: Option<Fault>, request: &Request, mut reply: Reply) -> Reply {
    let spoils_calls = matches!(
        fault,
        Some(Fault::BadArguments | Fault::UnknownTool | Fault::UnclosedToolCall)
    );
    if spoils_calls && reply.calls.is_empty() {
        reply.content.clear();
        reply.calls.push(Call {
            tool: request
                .tools
                .first()
                .cloned()
                .unwrap_or_else(|| "tool".into()),
            arguments: r#"{"text": "made up for the fault"}"#.into(),
        });
    }
    let Some(call) = reply.calls.last_mut() else {
        return reply;
    };
    match fault {
        Some(Fault::BadArguments) => call.arguments = "{\"text\": oops".into(),
        Some(Fault::UnknownTool) => call.tool = "no_such_tool".into(),
        Some(Fault::UnclosedToolCall) => {
            let half: String = call
                .arguments
                .chars()
                .take(call.arguments.len() / 2)
                .collect();
            call.arguments = if half.is_empty() { "{".into() } else { half };
            reply.cut_short = true;
        }
        _ => {}
    }
    reply
}

const DONE: &str = "[DONE]";

fn send(request: &Request, reply: &Reply, fault: Option<Fault>) -> Response {
    let thought_field = match fault {
        Some(Fault::ReasoningField) => "reasoning",
        _ => "reasoning_content",
    };
    let cut = fault == Some(Fault::Cut);
    if request.stream {
        let chunks = wire::chunks(request, reply, thought_field);
        let mut data: Vec<String> = chunks.iter().map(Value::to_string).collect();
        data.push(DONE.into());
        return events(data, cut);
    }
    let body = wire::completion(request, reply, thought_field).to_string();
    if cut {
        let half = Bytes::from(body[..floor_char(&body, body.len() / 2)].to_owned());
        return body_then_break("application/json", vec![half]);
    }
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// A stream of server-sent events; with `cut` only the first half comes and the connection breaks.
fn events(data: Vec<String>, cut: bool) -> Response {
    let count = if cut { data.len() / 2 } else { data.len() };
    let lines: Vec<Bytes> = data[..count]
        .iter()
        .map(|data| Bytes::from(format!("data: {data}\n\n")))
        .collect();
    if cut {
        return body_then_break("text/event-stream", lines);
    }
    let body = Body::from_stream(stream::iter(lines.into_iter().map(Ok::<_, Infallible>)));
    ([(CONTENT_TYPE, "text/event-stream")], body).into_response()
}

fn body_then_break(content_type: &'static str, parts: Vec<Bytes>) -> Response {
    let broken = stream::once(async {
        // The parts before are flushed first: a break in the same turn of the server would swallow them.
        tokio::task::yield_now().await;
        Err(std::io::Error::other("cut by a test"))
    });
    let body = Body::from_stream(stream::iter(parts.into_iter().map(Ok)).chain(broken));
    ([(CONTENT_TYPE, content_type)], body).into_response()
}

fn floor_char(text: &str, mut index: usize) -> usize {
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}
