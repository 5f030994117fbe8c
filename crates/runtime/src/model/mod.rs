//! The client of OpenAI-compatible chat endpoints: vLLM, a hosted API, our own infer-worker. One that the configuration
//! names, or those that a coordinator tells of.
//!
//! One call is one turn of the assistant, streamed or not, within bounds of time and size, tried again where that
//! may help. What the turn means, whether its tool calls make sense and what follows is the agent loop's. Malformed
//! tool arguments are no error here: they come back as the model wrote them.

mod caller;
mod error;
mod merge;
mod read;
pub(crate) mod retry;
mod route;
mod served;
mod sse;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use espalier_core::chat::{Message, ToolDef};
use espalier_core::spec::Sampling;
use opentelemetry::KeyValue;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use tracing::field::Empty;

use crate::backoff::Backoff;
use crate::config::Secret;
use crate::telemetry::names::{attribute, operation, provider};
use crate::telemetry::{self, Metrics};

pub use error::ModelError;
pub use served::Served;
pub use sse::EventParser;

use route::{Member, lock};

/// Begins the `system_fingerprint` of an answer that an adapter gave, and is followed by the SHA-256 of the adapter's
/// content in hexadecimal. Other servers put words of their own there, which this tells apart; as a field of OpenAI's it
/// passes every proxy.
pub const ADAPTER_FINGERPRINT: &str = "adapter-sha256:";

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
    /// Whether calls ask for the log-probability of each sampled token where a request's `extra` says nothing of it.
    /// Some servers refuse it, and to some it costs.
    #[serde(default)]
    pub logprobs: bool,
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
            logprobs: false,
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
    /// The same for endpoints that take what vLLM adds; `extra` wins.
    pub vllm_extra: &'a Map<String, Value>,
    /// What calls have in common whose prompts begin alike: they go to the same endpoint, which has that part in its
    /// cache. A rollout's is its job's name, whatever the attempt.
    pub affinity: &'a str,
    /// Who asks: of models of one name, that of the project answers. Empty: no project does.
    pub project: &'a str,
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
    /// The name of the endpoint that answered; empty where the configuration names one.
    pub endpoint: String,
    /// SHA-256 of the adapter that answered, in hexadecimal, from endpoints that say it as
    /// [`ADAPTER_FINGERPRINT`] describes.
    pub adapter_sha256: Option<String>,
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

/// A client of one endpoint, or of all those that a coordinator tells of. Clones share connections and what is known
/// of the endpoints' health.
#[derive(Clone)]
pub struct ModelClient {
    endpoints: Arc<Mutex<Vec<Arc<Member>>>>,
    /// Keys of endpoints that a coordinator tells of, by name. None: the one endpoint is fixed.
    keys: Option<Arc<BTreeMap<String, Secret>>>,
    retries_max: u32,
    backoff: Backoff,
}

impl fmt::Debug for ModelClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints = self.endpoints();
        f.debug_list()
            .entries(endpoints.iter().map(|member| member.url()))
            .finish()
    }
}

impl ModelClient {
    /// A client of `endpoint` alone, which serves every model. Checks the settings; connects only when called.
    pub fn new(endpoint: ModelEndpoint) -> Result<Self, ModelError> {
        let retries_max = endpoint.max_retries;
        let only = Arc::new(Member::only(endpoint)?);
        Ok(Self {
            endpoints: Arc::new(Mutex::new(vec![only])),
            keys: None,
            retries_max,
            backoff: retry::BACKOFF,
        })
    }

    /// A client of the endpoints that [`update`](Self::update) will name; `keys` are those that they ask for by name.
    pub fn told(keys: BTreeMap<String, Secret>) -> Self {
        Self {
            endpoints: Arc::default(),
            keys: Some(Arc::new(keys)),
            retries_max: max_retries(),
            backoff: retry::BACKOFF,
        }
    }

    /// Takes the present list of endpoints. Those that cannot be called are named in the log and left out; those that are
    /// named no more are called for a while where no other is left. A client of a fixed endpoint stays with that one.
    pub fn update(&self, served: &[Served]) {
        let Some(keys) = &self.keys else {
            return;
        };
        let known = self.endpoints();
        let same = |served: &Served| known.iter().find(|member| member.is(served)).cloned();
        let found = served.iter().filter_map(|served| {
            if let Some(member) = same(served) {
                member.is_back();
                return Some(member);
            }
            match Member::told(served.clone(), keys) {
                Ok(member) => Some(Arc::new(member)),
                Err(error) => {
                    let error = telemetry::error_chain(&error);
                    tracing::warn!(endpoint = served.name, error, "model endpoint left out");
                    None
                }
            }
        });
        let mut found: Vec<Arc<Member>> = found.collect();
        tracing::info!(endpoints = found.len(), "model endpoints changed");
        let now = tokio::time::Instant::now();
        let gone = known.iter().filter(|member| {
            let is_named = served.iter().any(|served| served.name == member.name());
            !is_named && member.is_gone(now)
        });
        found.extend(gone.cloned());
        *lock(&self.endpoints) = found;
    }

    fn endpoints(&self) -> Vec<Arc<Member>> {
        lock(&self.endpoints).clone()
    }

    /// Asks for one turn. Dropping the future or cancelling `cancel` closes the connection, which stops the
    /// generation on servers that watch for it.
    pub async fn chat(
        &self,
        request: &ChatRequest<'_>,
        cancel: &CancellationToken,
    ) -> Result<ChatTurn, ModelError> {
        let span = span(request);
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

    /// A failed try is followed by one at the next endpoint, at once where there is one that was not tried yet, and
    /// after a wait otherwise. The number of tries is that of one endpoint.
    async fn try_until_answered(
        &self,
        request: &ChatRequest<'_>,
        began: Instant,
    ) -> Result<ChatTurn, ModelError> {
        let mut tried: Vec<Arc<Member>> = Vec::new();
        let mut failures = 0;
        loop {
            let endpoints = self.endpoints();
            let error =
                match route::choose(&endpoints, request, &tried, tokio::time::Instant::now()) {
                    None => ModelError::NoEndpoint {
                        model: request.model.to_owned(),
                    },
                    Some(member) => {
                        tried.push(Arc::clone(&member));
                        match member.ask(request).await {
                            Ok(turn) => {
                                return Ok(ChatTurn {
                                    endpoint: member.name().to_owned(),
                                    latency: began.elapsed(),
                                    retries: failures,
                                    ..turn
                                });
                            }
                            Err(error) => error,
                        }
                    }
                };
            failures += 1;
            let elsewhere = error.may_pass_elsewhere()
                && route::has_fresh(&endpoints, request, &tried, tokio::time::Instant::now());
            if failures > self.retries_max || !(elsewhere || error.may_pass()) {
                return Err(error);
            }
            let wait = match elsewhere {
                true => Duration::ZERO,
                false => retry::wait(self.backoff, failures, error.retry_after(), rand::random()),
            };
            note_retry(&error, failures, wait);
            tokio::time::sleep(wait).await;
        }
    }
}

fn note_retry(error: &ModelError, failures: u32, wait: Duration) {
    telemetry::metrics().model_retried(error.as_str());
    tracing::debug!(
        failures,
        wait_ms = wait.as_millis(),
        error = telemetry::error_chain(error),
        "model call failed, trying again"
    );
}

fn span(request: &ChatRequest<'_>) -> tracing::Span {
    let name = format!("{} {}", operation::CHAT, request.model);
    tracing::info_span!(
        "chat",
        otel.name = name,
        otel.kind = "client",
        otel.status_code = Empty,
        { attribute::GEN_AI_OPERATION_NAME } = operation::CHAT,
        { attribute::GEN_AI_PROVIDER_NAME } = provider::OPENAI,
        { attribute::GEN_AI_REQUEST_MODEL } = request.model,
        { attribute::MODEL_ENDPOINT } = Empty,
        { attribute::GEN_AI_RESPONSE_MODEL } = Empty,
        { attribute::GEN_AI_RESPONSE_ID } = Empty,
        { attribute::GEN_AI_USAGE_INPUT_TOKENS } = Empty,
        { attribute::GEN_AI_USAGE_OUTPUT_TOKENS } = Empty,
        { attribute::ERROR_TYPE } = Empty,
    )
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
            if !turn.endpoint.is_empty() {
                span.record(attribute::MODEL_ENDPOINT, &*turn.endpoint);
            }
            span.record(attribute::GEN_AI_RESPONSE_MODEL, &*turn.model);
            let reasons = [&*turn.finish_reason];
            telemetry::record_texts(span, attribute::GEN_AI_RESPONSE_FINISH_REASONS, &reasons);
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
