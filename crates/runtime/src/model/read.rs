//! Reading an answer within its bounds: bytes, and time between two pieces.

use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::error::shorten;
use serde_json::Value;

use super::error::ModelError;
use super::merge::Merge;
use super::sse::EventParser;
use super::wire::Chunk;
use crate::tasks::with_deadline;

/// Largest answer, in bytes. The longest completion with token ids and logprobs takes a few megabytes.
pub(super) const ANSWER_BYTES_MAX: usize = 32 << 20;

/// How much of an error's body is looked at.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// How long the end of a finished stream is waited for, so that its connection can be used again.
const LINGER: Duration = Duration::from_millis(50);

/// The body of a response, counted and timed.
pub(super) struct Body {
    response: reqwest::Response,
    idle_timeout: Duration,
    received: usize,
}

impl Body {
    pub(super) fn new(response: reqwest::Response, idle_timeout: Duration) -> Self {
        Self {
            response,
            idle_timeout,
            received: 0,
        }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ModelError> {
        let piece = with_deadline("model.idle", self.idle_timeout, self.response.chunk()).await?;
        let piece = piece.map_err(|error| ModelError::Cut {
            bytes: self.received,
            source: Some(error.without_url()),
        })?;
        self.received += piece.as_ref().map_or(0, Bytes::len);
        if self.received > ANSWER_BYTES_MAX {
            return Err(ModelError::TooLarge {
                limit: ANSWER_BYTES_MAX,
            });
        }
        Ok(piece)
    }

    /// An answer in one piece.
    pub(super) async fn read_whole(mut self) -> Result<Merge, ModelError> {
        let mut body = Vec::new();
        while let Some(piece) = self.next().await? {
            body.extend_from_slice(&piece);
        }
        if body.trim_ascii_start().starts_with(b"<") {
            let what = "an HTML page".to_owned();
            return Err(ModelError::Malformed { what });
        }
        let mut merge = Merge::default();
        merge.apply(parse(&body)?)?;
        Ok(merge)
    }

    /// A stream of events, and the moment when the model's first word came.
    pub(super) async fn read_stream(mut self) -> Result<(Merge, Option<Instant>), ModelError> {
        let mut events = EventParser::default();
        let mut merge = Merge::default();
        let mut first_token = None;
        while let Some(piece) = self.next().await? {
            events.push(&piece);
            while let Some(event) = events.next_event() {
                if event.trim_ascii() == b"[DONE]" {
                    let _ = tokio::time::timeout(LINGER, self.response.chunk()).await;
                    return self.finished(merge, first_token);
                }
                if merge.apply(parse(&event)?)? && first_token.is_none() {
                    first_token = Some(Instant::now());
                }
            }
        }
        self.finished(merge, first_token)
    }

    /// Not every server sends `[DONE]`; that it said why it stopped is what counts.
    fn finished(
        &self,
        merge: Merge,
        first_token: Option<Instant>,
    ) -> Result<(Merge, Option<Instant>), ModelError> {
        if merge.had_choice() && !merge.is_finished() {
            return Err(ModelError::Cut {
                bytes: self.received,
                source: None,
            });
        }
        Ok((merge, first_token))
    }

    /// The text of an error's body, as far as it is of use. Whatever goes wrong here, the status is what counts.
    pub(super) async fn read_error(mut self) -> String {
        let mut body = Vec::new();
        while let Ok(Some(piece)) = self.next().await {
            body.extend_from_slice(&piece);
            if body.len() >= ERROR_BYTES_MAX {
                body.truncate(ERROR_BYTES_MAX);
                break;
            }
        }
        String::from_utf8_lossy(&body).into_owned()
    }
}

fn parse(json: &[u8]) -> Result<Chunk, ModelError> {
    serde_json::from_slice(json).map_err(|error| {
        // Only the place: the parser's message may quote the model's words.
        let (line, column) = (error.line(), error.column());
        let what = if error.is_data() {
            format!("JSON of another shape (line {line}, column {column})")
        } else {
            format!("broken JSON (line {line}, column {column})")
        };
        ModelError::Malformed { what }
    })
}

/// The words of an error's body, cut to a line.
pub(super) fn error_message(body: &str) -> String {
    shorten(&error_words(body))
}

/// The words of an error's body, in whatever form the server puts them.
pub(super) fn error_words(body: &str) -> String {
    match serde_json::from_str::<Value>(body) {
        Ok(json) => {
            let words = [
                json.pointer("/error/message"),
                json.get("error"),
                json.get("message"),
                json.get("detail"),
            ];
            let found = words.into_iter().flatten().find_map(Value::as_str);
            found.unwrap_or("no message").to_owned()
        }
        Err(_) if body.trim_start().starts_with('<') => "an HTML page".to_owned(),
        Err(_) => body
            .trim()
            .lines()
            .next()
            .unwrap_or("no message")
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errors_words_are_found_in_every_form() {
        for (body, words) in [
            (r#"{"error":{"message":"bad seed","code":400}}"#, "bad seed"),
            (r#"{"error":"bad seed"}"#, "bad seed"),
            (r#"{"object":"error","message":"bad seed"}"#, "bad seed"),
            (r#"{"detail":"bad seed"}"#, "bad seed"),
            (r#"{"detail":[{"loc":["body"]}]}"#, "no message"),
            ("<html>502</html>", "an HTML page"),
            ("bad seed\nmore", "bad seed"),
            ("", "no message"),
        ] {
            assert_eq!(error_message(body), words, "{body}");
        }
    }
}
