//! Batches of requests: a line of the file that a user brings, a line of what is answered, and the record of a piece of
//! answers, by which a later attempt goes on where an earlier one was stopped.
//!
//! Requests and answers have the form of OpenAI's Batch API, one JSON object a line:
//!
//! ```text
//! {"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"messages":[…]}}
//! {"id":"batch_req_…","custom_id":"a","response":{"status_code":200,"request_id":"…","body":{…}},"error":null}
//! ```

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::FieldError;
use crate::spec::SpecDigest;
use crate::trace::{FileEntry, hex};

/// The version of [`Piece`] that this code writes, and the only one that it reads.
pub const PIECE_VERSION: u32 = 1;
/// Longest line of requests, in bytes: the longest body that the API takes.
pub const LINE_BYTES_MAX: usize = 16 << 20;
/// Longest `custom_id`, in bytes: it comes back with the answer, and is no place for data.
pub const CUSTOM_ID_BYTES_MAX: usize = 512;

/// What follows the body of a response in its line.
const RESPONSE_END: &[u8] = b"},\"error\":null}\n";

/// What a request asks of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The next turn of a conversation.
    Chat,
    /// A text that goes on.
    Completion,
}

impl Endpoint {
    const ALL: [Self; 2] = [Self::Chat, Self::Completion];

    /// Its path.
    pub fn url(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completion => "/v1/completions",
        }
    }
}

/// One request of a batch. Whether its body makes sense is the API's to say; further fields beside it mean nothing, as in
/// OpenAI's Batch API.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchRequest {
    /// The user's name for it.
    pub custom_id: String,
    /// What is asked.
    pub endpoint: Endpoint,
    /// As it would be sent.
    pub body: Map<String, Value>,
}

/// A line that is no request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The user's name for it, where it can be read.
    pub custom_id: Option<String>,
    /// The rule that it breaks.
    pub error: FieldError,
}

impl BatchRequest {
    /// Reads a line, which comes from outside and may be anything.
    pub fn parse(line: &[u8]) -> Result<Self, BadLine> {
        if line.len() > LINE_BYTES_MAX {
            return Err(BadLine::too_long(line.len() as u64));
        }
        let nameless = |error| BadLine {
            custom_id: None,
            error,
        };
        let mut fields = object(line).map_err(nameless)?;
        let custom_id = custom_id(&mut fields).map_err(nameless)?;
        match Self::of(fields) {
            Ok((endpoint, body)) => Ok(Self {
                custom_id,
                endpoint,
                body,
            }),
            Err(error) => Err(BadLine {
                custom_id: Some(custom_id),
                error,
            }),
        }
    }

    fn of(mut fields: Map<String, Value>) -> Result<(Endpoint, Map<String, Value>), FieldError> {
        let method = fields.remove("method").unwrap_or_default();
        if method != "POST" {
            return Err(FieldError::new("method", shown(&method), "must be `POST`"));
        }
        let url = fields.remove("url").unwrap_or_default();
        let endpoint = Endpoint::ALL.into_iter().find(|known| url == known.url());
        let endpoint = endpoint.ok_or_else(|| {
            let rule = "must be `/v1/chat/completions` or `/v1/completions`";
            FieldError::new("url", shown(&url), rule)
        })?;
        let body = match fields.remove("body").unwrap_or_default() {
            Value::Object(body) => body,
            other => {
                return Err(FieldError::new("body", shown(&other), "must be an object"));
            }
        };
        if body.get("stream") == Some(&Value::Bool(true)) {
            let rule = "must be absent or false: nobody listens to a batch";
            return Err(FieldError::new("body.stream", true, rule));
        }
        Ok((endpoint, body))
    }
}

impl BadLine {
    /// A line of `bytes` that is longer than lines may be.
    pub fn too_long(bytes: u64) -> Self {
        let rule = format!("must have at most {LINE_BYTES_MAX} bytes");
        Self {
            custom_id: None,
            error: FieldError::new("line", format!("{bytes} bytes"), rule),
        }
    }
}

fn object(line: &[u8]) -> Result<Map<String, Value>, FieldError> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(FieldError::new(
            "line",
            shown(&other),
            "must be a JSON object",
        )),
        Err(error) => {
            let rule = format!("must be a JSON object: {error}");
            Err(FieldError::new("line", String::from_utf8_lossy(line), rule))
        }
    }
}

fn custom_id(fields: &mut Map<String, Value>) -> Result<String, FieldError> {
    match fields.remove("custom_id") {
        Some(Value::String(id)) if (1..=CUSTOM_ID_BYTES_MAX).contains(&id.len()) => Ok(id),
        other => {
            let rule = format!("must be a text of 1 to {CUSTOM_ID_BYTES_MAX} bytes");
            let other = other.unwrap_or_default();
            Err(FieldError::new("custom_id", shown(&other), rule))
        }
    }
}

/// A value as an error shows it: texts without their quotes, nothing for what is absent.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// One line of answers.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchAnswer {
    /// Its own name.
    pub id: String,
    /// The user's name for the request, where it can be read.
    pub custom_id: Option<String>,
    /// What came of it.
    pub outcome: Answered,
}

/// What came of a line.
#[derive(Clone, Debug, PartialEq)]
pub enum Answered {
    /// What the API says to the request, be it a refusal.
    Response {
        /// Its status, as HTTP has it.
        status: u16,
        /// Names the answer in the server's log.
        request_id: String,
        /// Its body: JSON without line ends. As bytes, because a long answer takes ten times as much as a value.
        body: Vec<u8>,
    },
    /// The line never came to the API.
    Error {
        /// A word for programs.
        code: &'static str,
        /// The same for people.
        message: String,
    },
}

impl BatchAnswer {
    /// The line, with its end.
    pub fn to_line(&self) -> Vec<u8> {
        let (id, custom_id) = (json!(self.id), json!(self.custom_id));
        let head = format!(r#"{{"id":{id},"custom_id":{custom_id},"response":"#);
        let mut line = head.into_bytes();
        match &self.outcome {
            Answered::Response {
                status,
                request_id,
                body,
            } => {
                let request_id = json!(request_id);
                let head = format!(r#"{{"status_code":{status},"request_id":{request_id},"body":"#);
                line.reserve(head.len() + body.len() + RESPONSE_END.len());
                line.extend_from_slice(head.as_bytes());
                line.extend_from_slice(body);
                line.extend_from_slice(RESPONSE_END);
            }
            Answered::Error { code, message } => {
                let error = json!({"code": code, "message": message});
                line.extend_from_slice(format!("null,\"error\":{error}}}\n").as_bytes());
            }
        }
        line
    }

    /// Whether it is an answer, and no refusal.
    pub fn is_good(&self) -> bool {
        matches!(self.outcome, Answered::Response { status: 200, .. })
    }
}

/// What came of a file of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerateSummary {
    /// Lines that were answered, with an answer or an error.
    pub lines: u64,
    /// Of these, with an error.
    pub failed: u64,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub completion_tokens: u64,
}

impl GenerateSummary {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            lines: self.lines + other.lines,
            failed: self.failed + other.failed,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            completion_tokens: self.completion_tokens + other.completion_tokens,
        }
    }
}

/// Where in a file of requests some lines stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRange {
    /// How many requests stand before them.
    pub first_line: u64,
    /// The byte at which the first begins.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// What they say: SHA-256, in hex, of the SHA-256 of each line without its end.
    pub sha256: String,
}

/// A piece of answers that is whole: the record lies beside it and was written after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// [`PIECE_VERSION`].
    pub version: u32,
    /// What the job asked for.
    pub spec_sha256: SpecDigest,
    /// The requests that it answers.
    pub input: InputRange,
    /// The answers.
    pub answers: FileEntry,
    /// What came of them.
    pub summary: GenerateSummary,
}

impl Piece {
    /// Reads a record that another attempt wrote. None: it is of another version, or broken.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let piece: Self = serde_json::from_slice(bytes).ok()?;
        (piece.version == PIECE_VERSION).then_some(piece)
    }
}

/// The digest of lines whose own digests these are.
pub fn lines_sha256(digests: &[[u8; 32]]) -> String {
    let mut lines = LinesDigest::default();
    lines.add(digests);
    lines.sha256()
}

/// The [digest of lines](lines_sha256) that come one after the other.
#[derive(Clone, Debug, Default)]
pub struct LinesDigest(Sha256);

impl LinesDigest {
    /// Takes the digests of the lines that come next.
    pub fn add(&mut self, digests: &[[u8; 32]]) {
        self.0.update(digests.as_flattened());
    }

    /// In lower-case hex.
    pub fn sha256(self) -> String {
        hex(&self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> (Option<String>, String) {
        let bad = BatchRequest::parse(line.as_bytes()).unwrap_err();
        (bad.custom_id, bad.error.to_string())
    }

    #[test]
    fn a_line_in_the_form_of_the_batch_api_is_read() {
        let line = r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x","stream":false}}"#;
        let request = BatchRequest::parse(line.as_bytes()).unwrap();
        assert_eq!(
            (request.custom_id.as_str(), request.endpoint),
            ("a", Endpoint::Completion)
        );
        assert_eq!(json!(request.body), json!({"prompt": "x", "stream": false}));
    }

    #[test]
    fn what_is_no_request_is_named_by_field_value_and_rule() {
        let line = |fields: &str| format!(r#"{{"custom_id":"a",{fields}}}"#);
        let chat = r#""url":"/v1/chat/completions""#;
        for (line, named, error) in [
            ("{".to_owned(), false, "`line` must be a JSON object"),
            (
                "[1]".to_owned(),
                false,
                "`line` must be a JSON object, got `[1]`",
            ),
            (
                "{}".to_owned(),
                false,
                "`custom_id` must be a text of 1 to 512 bytes, got ``",
            ),
            (
                r#"{"custom_id":7}"#.to_owned(),
                false,
                "`custom_id` must be a text of 1 to 512 bytes, got `7`",
            ),
            (line(chat), true, "`method` must be `POST`, got ``"),
            (
                line(r#""method":"POST","url":"/v1/embeddings""#),
                true,
                "`url` must be",
            ),
            (
                line(&format!(r#""method":"POST",{chat},"body":[]"#)),
                true,
                "`body` must be an object, got `[]`",
            ),
            (
                line(&format!(
                    r#""method":"POST",{chat},"body":{{"stream":true}}"#
                )),
                true,
                "`body.stream` must be absent",
            ),
        ] {
            let (custom_id, said) = refused(&line);
            assert_eq!(custom_id.is_some(), named, "{line}");
            assert!(said.starts_with(error), "{line}: {said}");
        }
        let bad = BatchRequest::parse(&vec![b' '; LINE_BYTES_MAX + 1]).unwrap_err();
        assert_eq!(bad, BadLine::too_long(LINE_BYTES_MAX as u64 + 1));
    }

    #[test]
    fn an_answer_has_either_a_response_or_an_error() {
        let answer = |outcome| BatchAnswer {
            id: "batch_req_1".to_owned(),
            custom_id: Some("a".to_owned()),
            outcome,
        };
        let read = |answer: &BatchAnswer| -> Value {
            let line = answer.to_line();
            assert_eq!(
                line.iter().position(|byte| *byte == b'\n'),
                Some(line.len() - 1)
            );
            serde_json::from_slice(&line).unwrap()
        };
        let good = answer(Answered::Response {
            status: 200,
            request_id: "r".to_owned(),
            body: br#"{"id":"r"}"#.to_vec(),
        });
        assert!(good.is_good());
        assert_eq!(
            read(&good),
            json!({"id": "batch_req_1", "custom_id": "a", "error": null,
                "response": {"status_code": 200, "request_id": "r", "body": {"id": "r"}}})
        );
        let bad = answer(Answered::Error {
            code: "invalid_line",
            message: "m".to_owned(),
        });
        assert!(!bad.is_good());
        assert_eq!(
            read(&bad)["error"],
            json!({"code": "invalid_line", "message": "m"})
        );
    }
}
