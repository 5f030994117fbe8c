//! What can go wrong with a model call, which of it is tried again, and what it means for an attempt.

use std::time::Duration;

use espalier_core::error::ErrorClass;

use crate::tasks::DeadlineExceeded;

/// A model call that failed for good. No message holds the API key, and none more of an endpoint's own text than a
/// line.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The caller gave up.
    #[error("the model call was cancelled")]
    Cancelled,
    /// The settings of the endpoint cannot work; nothing was sent.
    #[error("model endpoint: {rule}")]
    Settings {
        /// The rule that is broken.
        rule: String,
    },
    /// No coordinator told of an endpoint for the model yet.
    #[error(
        "no endpoint is known that serves the model `{model}`: add one to the coordinator's `model_endpoints`, or name one under `model`"
    )]
    NoEndpoint {
        /// The model.
        model: String,
    },
    /// The conversation does not fit the model. The agent loop ends the rollout on it.
    #[error("the conversation exceeds the model's context: {message}")]
    ContextLength {
        /// The endpoint's words.
        message: String,
    },
    /// The endpoint refuses the request as malformed; it would refuse it again.
    #[error("the model endpoint refused the request with status {status}: {message}")]
    BadRequest {
        /// 400, 413, 422, ….
        status: u16,
        /// The endpoint's words.
        message: String,
    },
    /// The endpoint is configured wrongly: nobody's request will work until a person acts.
    #[error("the model endpoint answered {status}: {message}; {fix}")]
    Configuration {
        /// 401, 403 or 404.
        status: u16,
        /// The endpoint's words.
        message: String,
        /// What to do about it.
        fix: String,
    },
    /// The endpoint is overloaded or broken.
    #[error("the model endpoint answered {status}: {message}")]
    Server {
        /// 408, 429, 5xx, or the code of an error inside a stream.
        status: u16,
        /// The endpoint's words.
        message: String,
        /// When it asks to be called again.
        retry_after: Option<Duration>,
    },
    /// No connection, or one that broke before the answer began.
    #[error("the model endpoint at {host} cannot be reached")]
    Connect {
        /// Host and port; the rest of its address may hold secrets.
        host: String,
        /// Why, without the address.
        source: reqwest::Error,
    },
    /// A part of the call took too long.
    #[error("the model call timed out")]
    Timeout(#[from] DeadlineExceeded),
    /// The answer broke off.
    #[error("the model's answer was cut after {bytes} bytes")]
    Cut {
        /// How much of it came.
        bytes: usize,
        /// Why, where the connection says; a stream that just ends says nothing.
        source: Option<reqwest::Error>,
    },
    /// The answer is not what the API promises: HTML of a proxy, broken JSON.
    #[error("the model's answer is not a chat completion: {what}")]
    Malformed {
        /// What came instead.
        what: String,
    },
    /// A completion without a choice in it.
    #[error("the model's answer holds no choices")]
    EmptyChoices,
    /// The answer is larger than any answer should be.
    #[error("the model's answer exceeds {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
}

impl ModelError {
    /// What it means for the attempt.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Cancelled => ErrorClass::Cancelled,
            Self::ContextLength { .. } | Self::BadRequest { .. } | Self::TooLarge { .. } => {
                ErrorClass::Handler
            }
            Self::Settings { .. }
            | Self::NoEndpoint { .. }
            | Self::Configuration { .. }
            | Self::Server { .. }
            | Self::Connect { .. }
            | Self::Timeout(_)
            | Self::Cut { .. }
            | Self::Malformed { .. }
            | Self::EmptyChoices => ErrorClass::Infra,
        }
    }

    /// The name in logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::Settings { .. } => "settings",
            Self::NoEndpoint { .. } => "no_endpoint",
            Self::ContextLength { .. } => "context_length",
            Self::BadRequest { .. } => "bad_request",
            Self::Configuration { .. } => "configuration",
            Self::Server { status: 429, .. } => "rate_limited",
            Self::Server { .. } => "server",
            Self::Connect { .. } => "connect",
            Self::Timeout(_) => "timeout",
            Self::Cut { .. } => "cut",
            Self::Malformed { .. } => "malformed",
            Self::EmptyChoices => "empty_choices",
            Self::TooLarge { .. } => "too_large",
        }
    }

    /// Whether the same request may work when it is sent again.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::NoEndpoint { .. }
            | Self::Server { .. }
            | Self::Connect { .. }
            | Self::Timeout(_)
            | Self::Cut { .. }
            | Self::Malformed { .. }
            | Self::EmptyChoices => true,
            Self::Cancelled
            | Self::Settings { .. }
            | Self::ContextLength { .. }
            | Self::BadRequest { .. }
            | Self::Configuration { .. }
            | Self::TooLarge { .. } => false,
        }
    }

    /// Whether the same request may work at another endpoint: what one person set wrongly there may be right here.
    pub(super) fn may_pass_elsewhere(&self) -> bool {
        self.may_pass() || matches!(self, Self::Configuration { .. })
    }

    /// Whether the endpoint does not work, rather than the request. One that has too much to do works.
    pub(super) fn blames_endpoint(&self) -> bool {
        self.may_pass_elsewhere() && !matches!(self, Self::Server { status: 429, .. })
    }

    /// The same error with the endpoint's own words as `change` leaves them.
    pub(super) fn with_words(mut self, change: impl FnOnce(String) -> String) -> Self {
        match &mut self {
            Self::ContextLength { message }
            | Self::BadRequest { message, .. }
            | Self::Configuration { message, .. }
            | Self::Server { message, .. } => *message = change(std::mem::take(message)),
            Self::Cancelled
            | Self::Settings { .. }
            | Self::NoEndpoint { .. }
            | Self::Connect { .. }
            | Self::Timeout(_)
            | Self::Cut { .. }
            | Self::Malformed { .. }
            | Self::EmptyChoices
            | Self::TooLarge { .. } => {}
        }
        self
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Server { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// Phrases by which servers say that a conversation is too long: OpenAI, vLLM (two generations), llama.cpp, TGI.
const CONTEXT_PHRASES: [&str; 7] = [
    "context_length_exceeded",
    "maximum context length",
    "maximum model length",
    "max_model_len",
    "exceed_context_size",
    "exceeds the available context",
    "inputs tokens + max_new_tokens",
];

/// Whether an error's body says that the conversation does not fit.
pub(super) fn says_too_long(body: &str) -> bool {
    CONTEXT_PHRASES.iter().any(|phrase| body.contains(phrase))
}

/// The error of a status that is no success. `message` is already cut and free of secrets; `body` decides only.
pub(super) fn from_status(
    status: u16,
    message: String,
    body: &str,
    model: &str,
    retry_after: Option<Duration>,
) -> ModelError {
    let too_long = says_too_long(body);
    match status {
        400 | 413 | 422 if too_long => ModelError::ContextLength { message },
        401 | 403 => ModelError::Configuration {
            status,
            message,
            fix: "check the endpoint's `api_key`".to_owned(),
        },
        404 => ModelError::Configuration {
            status,
            message,
            fix: format!(
                "check that `base_url` ends with `/v1` and that the endpoint serves the model `{model}`"
            ),
        },
        408 | 429 | 500..=599 => ModelError::Server {
            status,
            message,
            retry_after,
        },
        300..=399 => ModelError::Configuration {
            status,
            message,
            fix: "redirects are not followed: set `base_url` to where it points".to_owned(),
        },
        _ => ModelError::BadRequest { status, message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: u16, body: &str) -> ModelError {
        from_status(status, "m".to_owned(), body, "qwen3", None)
    }

    #[test]
    fn statuses_find_their_class_and_whether_they_are_tried_again() {
        for (status, name, again) in [
            (400, "bad_request", false),
            (401, "configuration", false),
            (403, "configuration", false),
            (404, "configuration", false),
            (408, "server", true),
            (422, "bad_request", false),
            (429, "rate_limited", true),
            (500, "server", true),
            (502, "server", true),
            (503, "server", true),
            (504, "server", true),
            (302, "configuration", false),
            (418, "bad_request", false),
        ] {
            let error = of(status, "");
            assert_eq!(
                (error.as_str(), error.may_pass()),
                (name, again),
                "{status}"
            );
        }
    }

    #[test]
    fn a_conversation_that_is_too_long_is_recognised() {
        for body in [
            r#"{"error":{"code":"context_length_exceeded"}}"#,
            "This model's maximum context length is 32768 tokens. However, you requested 40000",
            r#"{"error":{"type":"exceed_context_size_error"}}"#,
        ] {
            let error = of(400, body);
            assert_eq!(error.as_str(), "context_length", "{body}");
            assert_eq!(error.class(), ErrorClass::Handler);
        }
        assert_eq!(of(500, "maximum context length").as_str(), "server");
    }

    #[test]
    fn a_configuration_error_names_the_fix() {
        assert!(of(401, "").to_string().contains("`api_key`"));
        let missing = of(404, "").to_string();
        assert!(
            missing.contains("`/v1`") && missing.contains("`qwen3`"),
            "{missing}"
        );
    }
}
