//! What telemetry is told of one request: a span that continues the caller's trace, and the durations that the
//! conventions for servers of models name. No words of the request are in it.

use std::time::{Duration, Instant};

use axum::http::{HeaderMap, StatusCode};
use espalier_runtime::telemetry::names::{attribute, operation, provider};
use espalier_runtime::telemetry::{self, Metrics, TraceParent, metrics};
use opentelemetry::KeyValue;
use tracing::Span;
use tracing::field::Empty;

use super::reply::{Dialect, Usage};

/// One request on its way.
#[derive(Clone, Debug)]
pub(super) struct Observed {
    span: Span,
    operation: &'static str,
    labels: Vec<KeyValue>,
}

/// When one answer was asked for, and when its tokens came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) began: Instant,
    pub(super) first: Option<Instant>,
    pub(super) last: Option<Instant>,
    pub(super) tokens: u32,
}

impl Progress {
    pub(super) fn new(began: Instant) -> Self {
        Self {
            began,
            first: None,
            last: None,
            tokens: 0,
        }
    }

    /// Another token came; gives when the one before it did.
    pub(super) fn token(&mut self, now: Instant) -> Option<Instant> {
        self.first.get_or_insert(now);
        self.tokens += 1;
        self.last.replace(now)
    }

    /// Time for each token after the first.
    fn per_token(&self) -> Option<Duration> {
        let more = self.tokens.checked_sub(1).filter(|more| *more > 0)?;
        Some(self.last?.duration_since(self.first?) / more)
    }
}

impl Observed {
    /// A request that came with these headers.
    pub(super) fn begin(dialect: Dialect, headers: &HeaderMap) -> Self {
        let operation = match dialect {
            Dialect::Chat => operation::CHAT,
            Dialect::Completion => operation::TEXT_COMPLETION,
        };
        let span = tracing::info_span!(
            "serve",
            otel.name = operation,
            otel.kind = "server",
            otel.status_code = Empty,
            { attribute::GEN_AI_OPERATION_NAME } = operation,
            { attribute::GEN_AI_PROVIDER_NAME } = provider::ESPALIER,
            { attribute::GEN_AI_REQUEST_MODEL } = Empty,
            { attribute::GEN_AI_RESPONSE_MODEL } = Empty,
            { attribute::GEN_AI_RESPONSE_ID } = Empty,
            { attribute::GEN_AI_USAGE_INPUT_TOKENS } = Empty,
            { attribute::GEN_AI_USAGE_OUTPUT_TOKENS } = Empty,
            { attribute::ERROR_TYPE } = Empty,
        );
        let caller = headers
            .get("traceparent")
            .and_then(|value| value.to_str().ok());
        // What is no traceparent is no reason to refuse a request.
        if let Some(Ok(caller)) = caller.map(str::parse::<TraceParent>) {
            telemetry::continue_from(&span, caller);
        }
        Self {
            span,
            operation,
            labels: vec![
                KeyValue::new(attribute::GEN_AI_OPERATION_NAME, operation),
                KeyValue::new(attribute::GEN_AI_PROVIDER_NAME, provider::ESPALIER),
            ],
        }
    }

    pub(super) fn span(&self) -> Span {
        self.span.clone()
    }

    /// The model that was asked for is known, and is one that is served: a label may name it. `answers` is what it is called
    /// in the answer.
    pub(super) fn named(&mut self, asked: &str, answers: &str) {
        telemetry::rename(&self.span, format!("{} {asked}", self.operation));
        self.span.record(attribute::GEN_AI_REQUEST_MODEL, asked);
        self.span.record(attribute::GEN_AI_RESPONSE_MODEL, answers);
        self.labels.push(KeyValue::new(
            attribute::GEN_AI_REQUEST_MODEL,
            asked.to_owned(),
        ));
    }

    /// The answer has a name.
    pub(super) fn answered_as(&self, id: &str) {
        self.span.record(attribute::GEN_AI_RESPONSE_ID, id);
    }

    /// The first token of an answer.
    pub(super) fn first_token(&self, took: Duration) {
        Metrics::record(&metrics().server_time_to_first_token, took, &self.labels);
    }

    /// One answer has ended well.
    pub(super) fn answer_ended(&self, progress: &Progress) {
        if let Some(per_token) = progress.per_token() {
            Metrics::record(
                &metrics().server_time_per_output_token,
                per_token,
                &self.labels,
            );
        }
    }

    /// All answers have, for these reasons.
    pub(super) fn ended(&self, took: Duration, usage: Usage, reasons: &[&str]) {
        let name = attribute::GEN_AI_RESPONSE_FINISH_REASONS;
        telemetry::record_texts(&self.span, name, reasons);
        self.span
            .record(attribute::GEN_AI_USAGE_INPUT_TOKENS, usage.prompt_tokens);
        self.span.record(
            attribute::GEN_AI_USAGE_OUTPUT_TOKENS,
            usage.completion_tokens,
        );
        Metrics::record(&metrics().server_request_duration, took, &self.labels);
    }

    /// It failed, or was refused. That is the server's error only from 500 on.
    pub(super) fn failed(&self, took: Duration, status: StatusCode) {
        if status.is_server_error() {
            self.span.record("otel.status_code", "ERROR");
        }
        self.span.record(attribute::ERROR_TYPE, status.as_str());
        let mut labels = self.labels.clone();
        labels.push(KeyValue::new(
            attribute::ERROR_TYPE,
            status.as_str().to_owned(),
        ));
        Metrics::record(&metrics().server_request_duration, took, &labels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_per_token_leaves_the_first_out() {
        let began = Instant::now();
        let mut progress = Progress::new(began);
        let at = |ms| began + Duration::from_millis(ms);
        assert_eq!(progress.token(at(500)), None);
        assert_eq!(progress.per_token(), None);
        assert_eq!(progress.token(at(510)), Some(at(500)));
        progress.token(at(540));
        assert_eq!(progress.per_token(), Some(Duration::from_millis(20)));
    }
}
