//! The OpenAI-compatible API: HTTP in, ids out, and the way back.
//!
//! A request is read within bounds, checked, rendered and encoded off the async threads, and submitted. Past
//! [`backend`] there are token ids only. What it is not: it knows no scheduler, no model and no tokenizer; the
//! [`Backend`](backend::Backend) brings them.

mod adapters;
mod answers;
mod auth;
pub mod backend;
mod body;
mod chat;
mod choice;
mod completion;
mod connection;
mod conversation;
mod error;
mod fields;
mod format;
mod limits;
mod logprobs;
mod metrics;
mod observe;
mod offline;
mod options;
mod patience;
mod places;
mod prepare;
mod reply;
mod stop;
mod unserved;
mod whole;

use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use espalier_runtime::clock::Clock;
use espalier_runtime::config::Secret;
use espalier_runtime::ids::IdSource;
use futures::StreamExt as _;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

pub use connection::serve;
pub use error::ApiError;
pub use offline::{Offline, OfflineAnswer};

use answers::Answers;
use auth::Gate;
use backend::{Backend, Condition};
use body::Bodies;
use metrics::Metrics;
use observe::Observed;
use reply::Dialect;

/// Names the fields of a request that mean nothing here.
const IGNORED: &str = "x-espalier-ignored-fields";

/// What the API is made of.
pub struct Parts {
    /// Everything behind it.
    pub backend: Arc<dyn Backend>,
    /// What requests must show, if anything. `/health` and `/metrics` are open to all.
    pub api_key: Option<Secret>,
    /// Dates answers.
    pub clock: Arc<dyn Clock>,
    /// Names answers.
    pub ids: Arc<dyn IdSource>,
    /// Where the seeds of requests begin that bring none; without, somewhere else in each process.
    pub seed: Option<u64>,
}

#[derive(Clone)]
struct App {
    backend: Arc<dyn Backend>,
    gate: Gate,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdSource>,
    metrics: Arc<Metrics>,
    bodies: Bodies,
    preparing: Arc<Semaphore>,
    /// Most log-probabilities of a request that is answered whole.
    logprobs_max: usize,
    seeds: Arc<Seeds>,
    keep_alive: Duration,
}

/// Seeds of requests that bring none: far apart, because the answers of one request count on from theirs.
struct Seeds(AtomicU64);

impl Seeds {
    /// An odd number without a pattern (2⁶⁴ divided by the golden ratio): no seed comes twice.
    const STRIDE: u64 = 0x9E37_79B9_7F4A_7C15;

    fn new(first: Option<u64>) -> Self {
        let random = || std::hash::RandomState::new().hash_one(());
        Self(AtomicU64::new(first.unwrap_or_else(random)))
    }

    fn next(&self) -> u64 {
        self.0.fetch_add(Self::STRIDE, Ordering::Relaxed)
    }
}

/// All of the API: over HTTP, and for batches.
pub struct Api(App);

impl Api {
    /// Over `parts`.
    pub fn new(parts: Parts) -> Self {
        Self::with_keep_alive(parts, limits::KEEP_ALIVE)
    }

    fn with_keep_alive(parts: Parts, keep_alive: Duration) -> Self {
        Self(App {
            backend: parts.backend,
            gate: Gate::new(parts.api_key.as_ref()),
            clock: parts.clock,
            ids: parts.ids,
            metrics: Arc::default(),
            bodies: Bodies::default(),
            preparing: Arc::new(Semaphore::new(limits::PREPARING_MAX)),
            logprobs_max: limits::LOGPROBS_MAX,
            seeds: Arc::new(Seeds::new(parts.seed)),
            keep_alive,
        })
    }

    /// What is served over HTTP.
    pub fn router(&self) -> Router {
        router(self.0.clone())
    }

    /// What answers batches, under the same metrics.
    pub fn offline(&self) -> Offline {
        Offline::new(self.0.clone())
    }
}

fn router(app: App) -> Router {
    let keyed = Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(adapters::models))
        .route("/v1/adapters", get(adapters::list).post(adapters::load))
        .route("/v1/adapters/{*name}", delete(adapters::unload))
        .route("/v1/load_lora_adapter", post(adapters::load_as_vllm))
        .route("/v1/unload_lora_adapter", post(adapters::unload_as_vllm))
        .fallback(no_such_place)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::from_fn(check_form))
        .layer(axum::middleware::from_fn_with_state(app.clone(), check_key));
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(render_metrics))
        .merge(keyed)
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            count_failures,
        ))
        .with_state(app)
}

async fn check_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    app.gate.check(request.headers())?;
    Ok(next.run(request).await)
}

/// A page that a browser on this machine shows can send any body here, but none that says it is JSON: for that the browser
/// asks first, and is not answered.
async fn check_form(request: Request, next: Next) -> Result<Response, ApiError> {
    let form = request.headers().get(CONTENT_TYPE);
    let form = form.and_then(|form| form.to_str().ok()).unwrap_or_default();
    let (form, _) = form.split_once(';').unwrap_or((form, ""));
    let is_json = form.trim().eq_ignore_ascii_case("application/json");
    if request.method() == Method::POST && !is_json {
        return Err(ApiError::not_json());
    }
    Ok(next.run(request).await)
}

async fn count_failures(State(app): State<App>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status().as_u16();
    if status >= 400 {
        app.metrics.failed(status);
    }
    response
}

async fn no_such_place(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_place(StatusCode::NOT_FOUND, method.as_str(), uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::no_such_place(StatusCode::METHOD_NOT_ALLOWED, method.as_str(), uri.path())
}

async fn health(State(app): State<App>) -> Result<&'static str, ApiError> {
    match app.backend.load().condition {
        Condition::Running => Ok("ok"),
        Condition::Ending => Err(ApiError::stopped()),
        Condition::Failed => Err(ApiError::failed()),
    }
}

async fn render_metrics(State(app): State<App>) -> Response {
    let models = app.backend.models();
    let base = models.first().map_or("", |base| &base.name);
    let page = app.metrics.render(&app.backend.load(), base);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
}

async fn chat_completions(
    State(app): State<App>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    complete(app, &headers, body, Dialect::Chat).await
}

async fn completions(
    State(app): State<App>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    complete(app, &headers, body, Dialect::Completion).await
}

async fn complete(
    app: App,
    headers: &HeaderMap,
    body: Body,
    dialect: Dialect,
) -> Result<Response, ApiError> {
    let began = Instant::now();
    let mut observed = Observed::begin(dialect, headers);
    let span = observed.span();
    let answered = answer(app, body, dialect, began, &mut observed).instrument(span);
    let answered = answered.await;
    if let Err(error) = &answered {
        observed.failed(began.elapsed(), error.status());
    }
    answered
}

async fn answer(
    app: App,
    body: Body,
    dialect: Dialect,
    began: Instant,
    observed: &mut Observed,
) -> Result<Response, ApiError> {
    let body = app.bodies.read(body, limits::BODY_BYTES_MAX).await?;
    let prepared = app.prepare(body, dialect).await?;
    let (asked, answers) = prepared.model();
    observed.named(asked, answers);
    let (ignored, stream) = (prepared.ignored.clone(), prepared.stream);
    let answers = app.submit(prepared, began, observed.clone()).await?;
    let mut response = match stream {
        true => app.stream(answers),
        false => {
            let whole = answers
                .whole()
                .await?
                .into_bytes(limits::ANSWER_BYTES_MAX)
                .await?;
            ([(CONTENT_TYPE, "application/json")], whole).into_response()
        }
    };
    if !ignored.is_empty() {
        tracing::debug!(ignored, "fields that mean nothing here");
        if let Ok(ignored) = HeaderValue::from_str(&ignored) {
            response.headers_mut().insert(IGNORED, ignored);
        }
    }
    Ok(response)
}

impl App {
    fn stream(&self, answers: Answers) -> Response {
        let events = answers.stream().map(Ok::<_, std::convert::Infallible>);
        let keep_alive = KeepAlive::new().interval(self.keep_alive);
        Sse::new(events).keep_alive(keep_alive).into_response()
    }
}

#[cfg(test)]
pub(crate) mod tests;
