//! The client of an OpenAI-compatible chat endpoint: vLLM, a hosted API, our own infer-worker.
//!
//! One call is one turn of the assistant, streamed or not, within bounds of time and size, tried again where that
//! may help. What the turn means, whether its tool calls make sense and what follows is the agent loop's. Malformed
//! tool arguments are no error here: they come back as the model wrote them.

mod error;
mod merge;
mod read;
mod retry;
mod served;
mod sse;
mod wire;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::chat::{Message, ToolDef};
use espalier_core::error::shorten;
use espalier_core::spec::Sampling;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use opentelemetry::KeyValue;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use tracing::field::Empty;

use crate::backoff::Backoff;
use crate::clock::{Clock, SystemClock};
use crate::config::Secret;
use crate::tasks::with_deadline;
use crate::telemetry::names::{attribute, operation};
use crate::telemetry::{self, Metrics};

pub use error::ModelError;
use merge::Merge;
use read::Body;
pub use served::Served;

/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle connections are dropped before common servers do it (5 s in uvicorn, which vLLM runs on), so that a request
/// rarely meets a connection that is just being closed.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Where a model is served and how patiently it is called.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelEndpoint {
    /// Up to and including the version: `http://localhost:8000/v1`.
    pub base_url: String,
    /// Sent as a bearer token.
    #[serde(default)]
    pub api_key: Option<Secret>,
    /// Longest single try, from the request to the last byte.
    #[serde(default = "request_timeout_ms")]
    pub request_timeout_ms: u64,
    /// Longest wait for the first byte of a streamed answer, which includes the server's own queue.
    #[serde(default = "first_byte_timeout_ms")]
    pub first_byte_timeout_ms: u64,
    /// Longest silence between two pieces of an answer.
    #[serde(default = "idle_timeout_ms")]
    pub idle_timeout_ms: u64,
    /// Tries after the first.
    #[serde(default = "max_retries")]
    pub max_retries: u32,
    /// Whether answers are streamed: silence is noticed earlier, and the time to the first token is known.
    #[serde(default = "yes")]
    pub streaming: bool,
    /// Whether the endpoint takes what vLLM adds to OpenAI's API: `top_k`, `min_p`, reasoning in the history.
    /// OpenAI's own API refuses these.
    #[serde(default = "yes")]
    pub vllm_extensions: bool,
}

fn request_timeout_ms() -> u64 {
    600_000
}

fn first_byte_timeout_ms() -> u64 {
    180_000
}

fn idle_timeout_ms() -> u64 {
    60_000
}

fn max_retries() -> u32 {
    4
}

fn yes() -> bool {
    true
}

impl ModelEndpoint {
    /// An endpoint with every setting at its default.
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key: None,
            request_timeout_ms: request_timeout_ms(),
            first_byte_timeout_ms: first_byte_timeout_ms(),
            idle_timeout_ms: idle_timeout_ms(),
            max_retries: max_retries(),
            streaming: true,
            vllm_extensions: true,
        }
    }
}

/// What the model is asked.
#[derive(Clone, Copy, Debug)]
pub struct ChatRequest<'a> {
    /// The model's name at the endpoint.
    pub model: &'a str,
    /// The conversation so far.
    pub messages: &'a [Message],
    /// The tools on offer; none: the request names no tools at all.
    pub tools: &'a [ToolDef],
    /// How tokens are drawn. `thinking` is not sent from here: it is a setting of the model's chat template, for
    /// Qwen3 `chat_template_kwargs.enable_thinking` among `extra`.
    pub sampling: &'a Sampling,
    /// More fields of the body, such as `return_token_ids`, `logprobs` or `chat_template_kwargs`. They never replace
    /// a field that the request has of its own.
    pub extra: &'a Map<String, Value>,
}

/// One turn of the assistant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatTurn {
    /// The visible text, as it came.
    pub content: String,
    /// The thoughts, where the endpoint separates them.
    pub reasoning: Option<String>,
    /// Calls of tools in their order, each with an id that no other call of the conversation has.
    pub tool_calls: Vec<RawToolCall>,
    /// `stop`, `tool_calls`, `length`, …; empty where the endpoint does not say.
    pub finish_reason: String,
    /// What it cost, where the endpoint counts.
    pub usage: Option<Usage>,
    /// The model as the endpoint names it, or else as it was asked for.
    pub model: String,
    /// The endpoint's id of the answer.
    pub response_id: Option<String>,
    /// Token ids of the prompt, from endpoints that give them.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Token ids that were sampled, likewise.
    pub token_ids: Option<Vec<u32>>,
    /// Log-probabilities of those tokens in nats, likewise.
    pub logprobs: Option<Vec<f32>>,
    /// From the request that was answered to its first word; only with streaming.
    pub first_token: Option<Duration>,
    /// The whole call, retries included.
    pub latency: Duration,
    /// Tries that failed before the one that was answered.
    pub retries: u32,
}

/// A call as the model wrote it. The arguments are text that should be a JSON object and may be anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawToolCall {
    /// Unique in the conversation.
    pub id: String,
    /// The name, known or not.
    pub name: String,
    /// The arguments.
    pub arguments: String,
}

/// Tokens, as the endpoint counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Sampled.
    pub completion_tokens: u64,
}

/// A client of one endpoint. Clones share its connections.
#[derive(Clone)]
pub struct ModelClient {
    http: reqwest::Client,
    endpoint: Arc<ModelEndpoint>,
    url: Arc<str>,
    clock: Arc<dyn Clock>,
    backoff: Backoff,
}

impl fmt::Debug for ModelClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelClient")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl ModelClient {
    /// Checks the settings; connects only when called.
    pub fn new(endpoint: ModelEndpoint) -> Result<Self, ModelError> {
        let refuse = |rule: String| ModelError::Settings { rule };
        let base = endpoint.base_url.trim_end_matches('/');
        let url = reqwest::Url::parse(base)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or_else(|| {
                refuse("`base_url` must be an `http://` or `https://` URL".to_owned())
            })?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(refuse(
                "`base_url` must hold no credentials and no query: use `api_key`".to_owned(),
            ));
        }
        let http = reqwest::Client::builder()
            .user_agent(concat!("espalier/", env!("CARGO_PKG_VERSION")))
            .default_headers(headers(endpoint.api_key.as_ref())?)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            // A redirect would carry prompts to a host that nobody configured.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| refuse(telemetry::error_chain(&error.without_url())))?;
        Ok(Self {
            http,
            url: format!("{base}/chat/completions").into(),
            endpoint: Arc::new(endpoint),
            clock: Arc::new(SystemClock),
            backoff: retry::BACKOFF,
        })
    }

    /// Asks for one turn. Dropping the future or cancelling `cancel` closes the connection, which stops the
    /// generation on servers that watch for it.
    pub async fn chat(
        &self,
        request: &ChatRequest<'_>,
        cancel: &CancellationToken,
    ) -> Result<ChatTurn, ModelError> {
        let span = self.span(request);
        let began = Instant::now();
        let work = self
            .try_until_answered(request, began)
            .instrument(span.clone());
        let outcome = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(ModelError::Cancelled),
            outcome = work => outcome,
        };
        record(&span, request.model, began.elapsed(), &outcome);
        outcome
    }

    async fn try_until_answered(
        &self,
        request: &ChatRequest<'_>,
        began: Instant,
    ) -> Result<ChatTurn, ModelError> {
        let (streaming, extensions) = (self.endpoint.streaming, self.endpoint.vllm_extensions);
        let body = wire::request_body(request, streaming, extensions).map_err(|error| {
            let rule = format!("the request cannot be written as JSON: {error}");
            ModelError::Settings { rule }
        })?;
        let body = Bytes::from(body);
        let limit = Duration::from_millis(self.endpoint.request_timeout_ms);
        let mut failures = 0;
        loop {
            let tried = with_deadline("model.request", limit, self.once(request, body.clone()));
            let error = match tried.await {
                Ok(Ok(turn)) => {
                    return Ok(ChatTurn {
                        latency: began.elapsed(),
                        retries: failures,
                        ..turn
                    });
                }
                Ok(Err(error)) => error,
                Err(timeout) => timeout.into(),
            };
            failures += 1;
            if !error.may_pass() || failures > self.endpoint.max_retries {
                return Err(error);
            }
            let wait = retry::wait(self.backoff, failures, error.retry_after(), rand::random());
            telemetry::metrics().model_retried(error.as_str());
            tracing::debug!(
                failures,
                wait_ms = wait.as_millis(),
                error = telemetry::error_chain(&error),
                "model call failed, trying again"
            );
            tokio::time::sleep(wait).await;
        }
    }

    async fn once(&self, request: &ChatRequest<'_>, body: Bytes) -> Result<ChatTurn, ModelError> {
        let began = Instant::now();
        let response = self.send(body).await?;
        let idle = Duration::from_millis(self.endpoint.idle_timeout_ms);
        let status = response.status();
        let headers = response.headers();
        if !status.is_success() {
            let retry_after = headers
                .get(RETRY_AFTER)
                .and_then(|value| retry::read_retry_after(value.to_str().ok()?, self.clock.now()));
            let body = Body::new(response, idle).read_error().await;
            let body = self.without_key(body);
            let message = read::error_message(&body);
            return Err(error::from_status(
                status.as_u16(),
                message,
                &body,
                request.model,
                retry_after,
            ));
        }
        let is_stream = headers
            .get(CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        let body = Body::new(response, idle);
        let read = if is_stream {
            body.read_stream().await
        } else {
            body.read_whole().await.map(|merge| (merge, None))
        };
        // Errors come inside of answers, too.
        let (merge, first_token) =
            read.map_err(|error| error.with_words(|words| shorten(&self.without_key(words))))?;
        let first_token = first_token.map(|at| at.duration_since(began));
        turn(merge, request, first_token)
    }

    async fn send(&self, body: Bytes) -> Result<reqwest::Response, ModelError> {
        let mut request = self.http.post(&*self.url).body(body);
        if let Some(parent) = telemetry::inject_traceparent() {
            request = request.header("traceparent", parent.to_string());
        }
        // Without streaming the first byte comes when everything is generated: only the whole try has a deadline.
        let limit_ms = if self.endpoint.streaming {
            self.endpoint.first_byte_timeout_ms
        } else {
            self.endpoint.request_timeout_ms
        };
        let sent = with_deadline(
            "model.first_byte",
            Duration::from_millis(limit_ms),
            request.send(),
        );
        sent.await?.map_err(|error| ModelError::Connect {
            host: error.url().map(host_of).unwrap_or_default(),
            source: error.without_url(),
        })
    }

    /// Some servers repeat the key that they refuse.
    fn without_key(&self, text: String) -> String {
        match &self.endpoint.api_key {
            Some(key) => text.replace(key.expose(), "[redacted]"),
            None => text,
        }
    }

    fn span(&self, request: &ChatRequest<'_>) -> tracing::Span {
        let name = format!("{} {}", operation::CHAT, request.model);
        tracing::info_span!(
            "chat",
            otel.name = name,
            otel.kind = "client",
            otel.status_code = Empty,
            { attribute::GEN_AI_OPERATION_NAME } = operation::CHAT,
            { attribute::GEN_AI_PROVIDER_NAME } = "openai",
            { attribute::GEN_AI_REQUEST_MODEL } = request.model,
            { attribute::GEN_AI_RESPONSE_MODEL } = Empty,
            { attribute::GEN_AI_RESPONSE_ID } = Empty,
            { attribute::GEN_AI_RESPONSE_FINISH_REASONS } = Empty,
            { attribute::GEN_AI_USAGE_INPUT_TOKENS } = Empty,
            { attribute::GEN_AI_USAGE_OUTPUT_TOKENS } = Empty,
            { attribute::ERROR_TYPE } = Empty,
        )
    }
}

fn headers(api_key: Option<&Secret>) -> Result<HeaderMap, ModelError> {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(key) = api_key {
        let mut value =
            HeaderValue::try_from(format!("Bearer {}", key.expose())).map_err(|_| {
                let rule = "`api_key` must be printable ASCII".to_owned();
                ModelError::Settings { rule }
            })?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    Ok(headers)
}

/// Host and port of an address: what an error may show of it.
fn host_of(url: &reqwest::Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port_or_known_default() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn turn(
    mut merge: Merge,
    request: &ChatRequest<'_>,
    first_token: Option<Duration>,
) -> Result<ChatTurn, ModelError> {
    if !merge.had_choice() {
        return Err(ModelError::EmptyChoices);
    }
    let used: HashSet<&str> = request.messages.iter().flat_map(ids_of_calls).collect();
    Ok(ChatTurn {
        tool_calls: merge.take_calls(&used, request.messages.len()),
        content: merge.content,
        reasoning: Some(merge.reasoning).filter(|text| !text.is_empty()),
        finish_reason: merge.finish_reason.unwrap_or_default(),
        usage: merge.usage,
        model: merge
            .model
            .filter(|model| !model.is_empty())
            .unwrap_or_else(|| request.model.to_owned()),
        response_id: merge.id,
        prompt_token_ids: merge.prompt_token_ids,
        token_ids: merge.token_ids,
        logprobs: merge.logprobs,
        first_token,
        latency: Duration::ZERO,
        retries: 0,
    })
}

fn ids_of_calls(message: &Message) -> impl Iterator<Item = &str> {
    let calls = match message {
        Message::Assistant { tool_calls, .. } => tool_calls.as_slice(),
        _ => &[],
    };
    calls.iter().map(|call| call.id.as_str())
}

/// Puts the outcome into the span and the metrics.
fn record(
    span: &tracing::Span,
    model: &str,
    took: Duration,
    outcome: &Result<ChatTurn, ModelError>,
) {
    let metrics = telemetry::metrics();
    let mut labels = vec![
        KeyValue::new(attribute::GEN_AI_OPERATION_NAME, operation::CHAT),
        KeyValue::new(attribute::GEN_AI_REQUEST_MODEL, model.to_owned()),
    ];
    match outcome {
        Ok(turn) => {
            span.record(attribute::GEN_AI_RESPONSE_MODEL, &*turn.model);
            span.record(
                attribute::GEN_AI_RESPONSE_FINISH_REASONS,
                &*turn.finish_reason,
            );
            if let Some(id) = &turn.response_id {
                span.record(attribute::GEN_AI_RESPONSE_ID, &**id);
            }
            if let Some(first) = turn.first_token {
                Metrics::record(&metrics.time_to_first_chunk, first, &labels);
            }
            if let Some(usage) = turn.usage {
                record_usage(span, usage, &labels);
            }
        }
        Err(error) => {
            span.record("otel.status_code", "ERROR");
            span.record(attribute::ERROR_TYPE, error.as_str());
            labels.push(KeyValue::new(attribute::ERROR_TYPE, error.as_str()));
        }
    }
    Metrics::record(&metrics.chat_duration, took, &labels);
}

fn record_usage(span: &tracing::Span, usage: Usage, labels: &[KeyValue]) {
    span.record(attribute::GEN_AI_USAGE_INPUT_TOKENS, usage.prompt_tokens);
    span.record(
        attribute::GEN_AI_USAGE_OUTPUT_TOKENS,
        usage.completion_tokens,
    );
    let metrics = telemetry::metrics();
    for (token_type, count) in [
        ("input", usage.prompt_tokens),
        ("output", usage.completion_tokens),
    ] {
        let mut labels = labels.to_vec();
        labels.push(KeyValue::new(attribute::GEN_AI_TOKEN_TYPE, token_type));
        metrics.token_usage.record(count, &labels);
    }
}

#[cfg(test)]
mod tests;
