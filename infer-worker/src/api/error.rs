//! Refusals in the form that OpenAI's clients read: status, type, the parameter, a code.
//!
//! A message names the field, its value and the rule. It shows nothing but the request's own words, shortened.

use std::time::Duration;

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use espalier_core::error::shorten;
use serde_json::{Value, json};

use super::backend::SubmitError;

/// The code of a model that is not served, as clients know it.
const UNKNOWN_MODEL: &str = "model_not_found";

/// A request that is not served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400: the field `param` breaks a rule. `rule` follows the field's name: "must be in (0, 1]".
    pub fn field(param: impl Into<String>, rule: &str, got: &Value) -> Self {
        let param = param.into();
        let got = shorten(&got.to_string());
        let message = format!("`{param}` {rule}, got {got}");
        Self::about(param, message)
    }

    /// 400: a message of its own about the field `param`.
    pub fn about(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }

    /// 400: the form that was asked for could not be kept to.
    pub fn grammar() -> Self {
        Self {
            code: Some("grammar_too_expensive"),
            ..Self::new(
                StatusCode::BAD_REQUEST,
                "the answer's form takes too much to follow: simplify the patterns of its schema",
            )
        }
    }

    /// 400: the body as a whole is wrong.
    pub fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400: what was asked for takes more to tell than an answer may have. Log-probabilities do that, and little else.
    pub fn answer_too_long(bytes_max: usize) -> Self {
        Self {
            code: Some("answer_too_long"),
            ..Self::new(
                StatusCode::BAD_REQUEST,
                format!("the answer must have at most {bytes_max} bytes, and it has more"),
            )
        }
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "this server needs its API key as `Authorization: Bearer …`",
            )
        }
    }

    /// 403.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// 415: a body that does not say it is JSON.
    pub fn not_json() -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the header `content-type` must be application/json",
        )
    }

    /// 404: a model that is not served.
    pub fn unknown_model(name: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            code: Some(UNKNOWN_MODEL),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("the model `{}` is not served here", shorten(name)),
            )
        }
    }

    /// 404 and 405: no such place, or not with this method.
    pub fn no_such_place(status: StatusCode, method: &str, path: &str) -> Self {
        let path = shorten(path);
        Self::new(status, format!("`{method} {path}` is not served here"))
    }

    /// 408: the request did not come in time.
    pub fn too_slow(after: Duration) -> Self {
        let seconds = after.as_secs();
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {seconds} s"),
        )
    }

    /// 409: what is asked for contradicts what is there.
    pub fn conflict(param: &str, message: String) -> Self {
        Self {
            param: Some(param.to_owned()),
            ..Self::new(StatusCode::CONFLICT, message)
        }
    }

    /// 413: a body over the limit.
    pub fn body_too_large(limit_bytes: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body must have at most {limit_bytes} bytes"),
        )
    }

    /// 413: a prompt that leaves no room for an answer. The words are those that clients look for.
    pub fn prompt_too_long(param: &str, prompt_tokens: usize, context_tokens: usize) -> Self {
        let message = format!(
            "This model's maximum context length is {context_tokens} tokens. However, your prompt has {prompt_tokens} \
             tokens, and the answer needs at least one"
        );
        Self::context_length(param, message)
    }

    /// 413: what was sent does not fit into the model's context.
    pub fn context_length(param: &str, message: String) -> Self {
        Self {
            param: Some(param.to_owned()),
            code: Some("context_length_exceeded"),
            ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
        }
    }

    /// 429: as much waits as may wait.
    pub fn full(retry_after: Duration) -> Self {
        Self {
            code: Some("queue_full"),
            retry_after: Some(retry_after),
            ..Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too many requests are waiting; try again later",
            )
        }
    }

    /// 500: what happened is in the log, not in the answer.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the answer failed for a reason inside the server; its log has it",
        )
    }

    /// 503: every connection is at work, and this one is there for other questions.
    pub fn connections_full() -> Self {
        Self {
            code: Some("connections_full"),
            retry_after: Some(Duration::from_secs(1)),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many connections are open; try again later",
            )
        }
    }

    /// 503: the bodies that are being read take all the memory there is for them.
    pub fn no_room() -> Self {
        Self {
            code: Some("bodies_full"),
            retry_after: Some(Duration::from_secs(1)),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many large requests are being read; try again later",
            )
        }
    }

    /// 503: the engine does not run.
    pub fn stopped() -> Self {
        Self {
            code: Some("engine_stopped"),
            retry_after: Some(Duration::from_secs(5)),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the engine is not running; try another replica",
            )
        }
    }

    /// 503: the engine failed. That is no fault of the request, which another process may answer.
    pub fn failed() -> Self {
        Self {
            code: Some("engine_failed"),
            message: "the engine has failed, for a reason that the log has, and the process ends; try another replica"
                .to_owned(),
            ..Self::stopped()
        }
    }

    /// 503: the engine runs, and does nothing.
    pub fn hangs(silent: Duration) -> Self {
        let seconds = silent.as_secs();
        Self {
            code: Some("engine_hangs"),
            message: format!("the engine has made no step for {seconds} s; try another replica"),
            ..Self::stopped()
        }
    }

    /// 503: the engine is busy with others for too long.
    pub fn waited(silent: Duration) -> Self {
        let seconds = silent.as_secs();
        Self {
            code: Some("wait_too_long"),
            message: format!(
                "no token came within {seconds} s, in which the engine answered other requests; try again later, or \
                 another replica"
            ),
            ..Self::stopped()
        }
    }

    /// 408: an answer waited for its reader for too long.
    pub fn not_taken() -> Self {
        Self {
            code: Some("answer_not_taken"),
            ..Self::new(
                StatusCode::REQUEST_TIMEOUT,
                "the answer was given up, because what was ready of it was not taken for too long",
            )
        }
    }

    /// What the engine says to a request, for the field that holds the prompt.
    pub fn submit(error: SubmitError, prompt_param: &str) -> Self {
        match error {
            SubmitError::Full { retry_after } => Self::full(retry_after),
            SubmitError::TooMany { answers, limit } => Self::about(
                "n",
                format!(
                    "`n` for each prompt must make at most {limit} answers, which is what may wait here, got {answers}"
                ),
            ),
            SubmitError::TooLong { tokens, limit } => {
                Self::prompt_too_long(prompt_param, tokens, limit)
            }
            SubmitError::Invalid { reason } => Self::body(reason),
            SubmitError::Stopped => Self::stopped(),
            SubmitError::Failed => Self::failed(),
        }
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Whether the model that is named is not served here.
    pub fn is_unknown_model(&self) -> bool {
        self.code == Some(UNKNOWN_MODEL)
    }

    /// The field at fault.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// The body: also an event of a stream that began well.
    pub fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code.map_or_else(|| json!(self.status.as_u16()), |code| json!(code)),
        }})
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
