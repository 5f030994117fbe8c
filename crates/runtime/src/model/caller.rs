//! One try of one call at one endpoint, within its bounds of time and size. Which endpoint, and whether another try
//! follows, is [`ModelClient`](super::ModelClient)'s.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::chat::Message;
use espalier_core::error::shorten;
use http::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};

use super::merge::Merge;
use super::read::{self, Body};
use super::{ChatRequest, ChatTurn, ModelEndpoint, ModelError, error, retry, wire};
use crate::clock::{Clock, SystemClock};
use crate::config::Secret;
use crate::tasks::with_deadline;
use crate::telemetry;

/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle connections are dropped before common servers do it (5 s in uvicorn, which vLLM runs on), so that a request
/// rarely meets a connection that is just being closed.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// The connections to one endpoint.
pub(super) struct Caller {
    http: reqwest::Client,
    endpoint: ModelEndpoint,
    url: Arc<str>,
    clock: Arc<dyn Clock>,
}

impl Caller {
    /// Checks the settings; connects only when called.
    pub(super) fn new(endpoint: ModelEndpoint) -> Result<Self, ModelError> {
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
            endpoint,
            clock: Arc::new(SystemClock),
        })
    }

    /// Where requests go.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Asks once.
    pub(super) async fn ask(&self, request: &ChatRequest<'_>) -> Result<ChatTurn, ModelError> {
        let body = wire::request_body(request, &self.endpoint).map_err(|error| {
            let rule = format!("the request cannot be written as JSON: {error}");
            ModelError::Settings { rule }
        })?;
        let limit = Duration::from_millis(self.endpoint.request_timeout_ms);
        with_deadline(
            "model.request",
            limit,
            self.once(request, Bytes::from(body)),
        )
        .await?
    }

    async fn once(&self, request: &ChatRequest<'_>, body: Bytes) -> Result<ChatTurn, ModelError> {
        let began = Instant::now();
        let response = self.send(body).await?;
        let idle = Duration::from_millis(self.endpoint.idle_timeout_ms);
        let status = response.status();
        let headers = response.headers();
        if !status.is_success() {
            let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
            let retry_after = text(RETRY_AFTER)
                .and_then(|asked| retry::read_retry_after(asked, text(DATE), self.clock.now()));
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
        endpoint: String::new(),
        adapter_sha256: merge.adapter_sha256,
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
