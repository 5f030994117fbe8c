//! A bounded number of lines with the engine at once, and their answers in the order of the lines.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use espalier_core::answers::{self, BadLine, BatchAnswer, BatchRequest, GenerateSummary};
use espalier_runtime::backoff::Backoff;
use espalier_runtime::ids::IdSource;
use espalier_runtime::tasks::blocking;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use serde_json::{Map, Value};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};

use super::Answering;
use super::error::GenerateError;
use super::input::Line;
use crate::api::{ApiError, OfflineAnswer};
use crate::engine::Health;

/// Requests and answers of a job that wait for each other, in bytes. One line goes on whatever its size.
const HELD_BYTES_MAX: usize = 64 << 20;
/// Lines that may be answered before one that takes long, for each place in the window: beyond, the engine idles.
const AHEAD_PER_PLACE: usize = 4;
/// Up to this size a line is read where it is.
const PARSE_INLINE_BYTES_MAX: usize = 32 << 10;
/// Waits of a line that the engine cannot take just now.
const FULL_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(100),
    max: Duration::from_secs(5),
};

/// A line that is answered.
#[derive(Debug)]
pub(super) struct Answered {
    /// Where it stood; its content is gone.
    pub(super) line: Line,
    /// The answer, as a line.
    pub(super) text: Vec<u8>,
    /// What it counts for.
    pub(super) summary: GenerateSummary,
    /// Of the line that it answers.
    pub(super) request_bytes: usize,
}

/// Answers the lines of one job.
pub(super) struct Window {
    pub(super) answering: Answering,
    pub(super) ids: Arc<dyn IdSource>,
    /// Of all jobs of the process.
    pub(super) places: Arc<Semaphore>,
    pub(super) places_max: usize,
    /// The job's own, of lines that name none. It is what the job was given to this worker for.
    pub(super) model: Option<String>,
}

impl Window {
    /// Answers `lines` until there are no more, and sends the answers in their order, beginning with number `next`.
    pub(super) async fn answer_all(
        &self,
        mut next: u64,
        mut lines: mpsc::Receiver<Line>,
        answered: mpsc::Sender<Answered>,
    ) -> Result<(), GenerateError> {
        let mut running = FuturesUnordered::new();
        let mut waiting: BTreeMap<u64, Answered> = BTreeMap::new();
        let (mut held_bytes, mut all_read) = (0, false);
        loop {
            let is_next = waiting.first_key_value().is_some_and(|(n, _)| *n == next);
            let open = running.len() + waiting.len();
            let has_room = running.len() < self.places_max
                && open < AHEAD_PER_PLACE * self.places_max
                && (open == 0 || held_bytes < HELD_BYTES_MAX);
            tokio::select! {
                biased;
                place = answered.reserve(), if is_next => {
                    // Without a receiver nobody wants the rest.
                    let Ok(place) = place else { return Ok(()) };
                    if let Some((n, first)) = waiting.pop_first() {
                        held_bytes -= first.text.len();
                        next = n + 1;
                        place.send(first);
                    }
                }
                Some(done) = running.next(), if !running.is_empty() => {
                    let done: Answered = done?;
                    held_bytes = held_bytes + done.text.len() - done.request_bytes;
                    waiting.insert(done.line.n, done);
                }
                line = lines.recv(), if has_room && !all_read => match line {
                    Some(line) => {
                        held_bytes += request_bytes(&line);
                        running.push(self.answer(line));
                    }
                    None => all_read = true,
                },
                else => return Ok(()),
            }
        }
    }

    async fn answer(&self, mut line: Line) -> Result<Answered, GenerateError> {
        let request_bytes = request_bytes(&line);
        let content = std::mem::replace(&mut line.content, Err(0));
        let (custom_id, outcome) = match parse(content).await? {
            Ok(request) => {
                let custom_id = request.custom_id.clone();
                (Some(custom_id), self.ask(request).await?)
            }
            Err(bad) => {
                let outcome = answers::Answered::Error {
                    code: "invalid_line",
                    message: bad.error.to_string(),
                };
                (bad.custom_id, (outcome, FAILED))
            }
        };
        let (outcome, summary) = outcome;
        let answer = BatchAnswer {
            id: format!("batch_req_{}", self.ids.fresh()),
            custom_id,
            outcome,
        };
        Ok(Answered {
            line,
            text: answer.to_line(),
            summary,
            request_bytes,
        })
    }

    /// What the API says, and what it counts for. While the engine runs but takes nothing more, it is asked again.
    async fn ask(&self, request: BatchRequest) -> Result<Told, GenerateError> {
        let endpoint = request.endpoint;
        let body = self.with_model(request.body);
        let named = body.get("model").and_then(Value::as_str);
        let of_job = self.model.clone().filter(|model| named == Some(model));
        let body = Bytes::from(Value::Object(body).to_string());
        let mut failures = 0;
        loop {
            // Never closed.
            let place = self.places.acquire().await;
            let answer = self.answering.offline.answer(endpoint, body.clone()).await;
            drop(place);
            let error = match answer {
                Ok(answer) => return Ok(answered(answer)),
                Err(error) => error,
            };
            let health = self.answering.health.borrow().clone();
            match (error.status().as_u16(), health) {
                (500.., health) if health != Health::Running => {
                    return Err(GenerateError::Engine(health));
                }
                (429 | 503, _) => {
                    failures += 1;
                    tokio::time::sleep(FULL_BACKOFF.jittered(failures)).await;
                }
                _ => match of_job.filter(|_| error.is_unknown_model()) {
                    // Another worker has it, or this one will again: no answer to any line.
                    Some(model) => return Err(GenerateError::NotServed { model }),
                    None => return Ok(self.refused(&error)),
                },
            }
        }
    }

    fn with_model(&self, mut body: Map<String, Value>) -> Map<String, Value> {
        if let Some(model) = &self.model
            && body.get("model").is_none_or(Value::is_null)
        {
            body.insert("model".to_owned(), Value::String(model.clone()));
        }
        body
    }

    fn refused(&self, error: &ApiError) -> Told {
        let outcome = answers::Answered::Response {
            status: error.status().as_u16(),
            request_id: format!("req-{}", self.ids.fresh()),
            body: error.to_json().to_string().into_bytes(),
        };
        (outcome, FAILED)
    }
}

/// What came of a line, and what it counts for.
type Told = (answers::Answered, GenerateSummary);

/// What a line counts for that has no answer.
const FAILED: GenerateSummary = GenerateSummary {
    lines: 1,
    failed: 1,
    prompt_tokens: 0,
    completion_tokens: 0,
};

fn answered(answer: OfflineAnswer) -> Told {
    let summary = GenerateSummary {
        lines: 1,
        failed: 0,
        prompt_tokens: answer.prompt_tokens as u64,
        completion_tokens: answer.completion_tokens as u64,
    };
    let outcome = answers::Answered::Response {
        status: 200,
        request_id: answer.id,
        body: answer.body,
    };
    (outcome, summary)
}

fn request_bytes(line: &Line) -> usize {
    line.content.as_ref().map_or(0, Bytes::len)
}

/// Reads a line. A long one takes a while.
async fn parse(
    content: Result<Bytes, u64>,
) -> Result<Result<BatchRequest, BadLine>, GenerateError> {
    Ok(match content {
        Err(bytes) => Err(BadLine::too_long(bytes)),
        Ok(line) if line.len() <= PARSE_INLINE_BYTES_MAX => BatchRequest::parse(&line),
        Ok(line) => blocking("generate.parse", move || BatchRequest::parse(&line)).await?,
    })
}
