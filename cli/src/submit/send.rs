//! Sending a file's chunks: opened before the first, pipelined, sent again while nobody answers, closed at the end.

use std::time::{Duration, Instant};

use espalier_core::error::FieldError;
use espalier_core::id::BatchId;
use espalier_proto::convert::draft_to_wire;
use espalier_proto::v1;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::tasks::{OnFailure, Tasks, blocking, with_deadline};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::file::{Chunk, JobFile, Piece, Refusal};
use crate::client::{Client, nobody_answered};
use crate::exit::Problem;
use crate::progress;

/// Chunks on their way at once: enough to hide a round trip, few enough that a slow coordinator is not buried.
const IN_FLIGHT_MAX: usize = 4;
/// Pieces read ahead of the network; each holds at most one chunk.
const READ_AHEAD_MAX: usize = 4;
/// How long one answer may take: a durable commit of a full chunk takes a fraction of a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Tries of one call. With the waits below: about half a minute, in which a coordinator restarts.
const TRIES_MAX: u32 = 9;
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(200),
    max: Duration::from_secs(5),
};

/// What became of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Jobs that are in the queue.
    pub accepted: u64,
    /// Jobs that are not.
    pub refused: u64,
    /// Every rule that they broke, in the order of the file.
    pub refusals: Vec<Refusal>,
    /// Chunks that were sent.
    pub chunks: u64,
    /// From the first byte read to the last answer.
    pub elapsed_ms: u64,
}

/// Sends `file` as `batch`, and closes the batch if `close` says so.
pub async fn send(
    client: &Client,
    batch: &BatchId,
    file: JobFile,
    close: bool,
) -> Result<Sent, Problem> {
    let began = Instant::now();
    let bar = progress::bytes(file.bytes, "submitting");
    let defaults = draft_to_wire(&file.defaults);
    let (pieces, mut received) = mpsc::channel(READ_AHEAD_MAX);
    let (ended, reading) = tokio::sync::oneshot::channel();
    let tasks = Tasks::new(Shutdown::new());
    tasks.spawn("submit.read", OnFailure::Log, async move {
        let read = blocking("submit.read", move || {
            file.read_all(|piece| pieces.blocking_send(piece).is_ok())
        });
        // The receiver is gone only when sending failed, which is reported instead.
        let _ = ended.send(read.await);
    });

    let mut sent = Sent::default();
    // Nothing is opened for a file without a single good job.
    if let Some(first) = first_chunk(&mut received, &mut sent).await {
        open(client, batch, defaults).await?;
        let rest = ReceiverStream::new(received);
        let stream = futures::stream::iter([Piece::Chunk(first)]).chain(rest);
        let mut answers = stream
            .map(|piece| answer(client, batch, piece))
            .buffer_unordered(IN_FLIGHT_MAX);
        while let Some(answer) = answers.next().await {
            match answer? {
                Answer::Chunk(chunk, response) => note_chunk(&mut sent, &chunk, response),
                Answer::Refused(refusal) => note_refusal(&mut sent, refusal),
                Answer::Progress(bytes) => bar.set_position(bytes),
            }
        }
        if close {
            close_batch(client, batch).await?;
        }
    }
    if let Ok(read) = reading.await {
        read.map_err(|error| Problem::failed(error.to_string()))??;
    }
    bar.finish_and_clear();
    sent.refusals.sort_by_key(|refusal| refusal.place);
    sent.elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(sent)
}

/// Everything up to the first chunk; refusals on the way are noted.
async fn first_chunk(received: &mut mpsc::Receiver<Piece>, sent: &mut Sent) -> Option<Chunk> {
    while let Some(piece) = received.recv().await {
        match piece {
            Piece::Chunk(chunk) => return Some(chunk),
            Piece::Refused(refusal) => note_refusal(sent, refusal),
            Piece::Progress(_) => {}
        }
    }
    None
}

enum Answer {
    Chunk(Chunk, v1::SubmitChunkResponse),
    Refused(Refusal),
    Progress(u64),
}

async fn answer(client: &Client, batch: &BatchId, piece: Piece) -> Result<Answer, Problem> {
    match piece {
        Piece::Refused(refusal) => Ok(Answer::Refused(refusal)),
        Piece::Progress(bytes) => Ok(Answer::Progress(bytes)),
        Piece::Chunk(mut chunk) => {
            let request = v1::SubmitChunkRequest {
                batch: batch.to_string(),
                chunk: chunk.number,
                jobs: std::mem::take(&mut chunk.jobs),
            };
            let response = again(client, || {
                let (mut jobs, request) = (client.jobs(), request.clone());
                async move { jobs.submit_chunk(request).await }
            })
            .await?;
            chunk.jobs = request.jobs;
            Ok(Answer::Chunk(chunk, response))
        }
    }
}

fn note_refusal(sent: &mut Sent, refusal: Refusal) {
    sent.refused += 1;
    sent.refusals.push(refusal);
}

fn note_chunk(sent: &mut Sent, chunk: &Chunk, response: v1::SubmitChunkResponse) {
    sent.chunks += 1;
    sent.accepted += u64::from(response.accepted);
    for rejection in response.rejected {
        sent.refused += 1;
        let index = rejection.index as usize;
        for error in rejection.errors {
            sent.refusals.push(Refusal {
                place: chunk.places.get(index).copied().unwrap_or_default(),
                id: rejection.id.clone(),
                error: FieldError {
                    field: error.field,
                    value: error.value,
                    rule: error.rule,
                },
            });
        }
    }
}

/// Opens a batch, or finds it open.
pub async fn open(client: &Client, batch: &BatchId, defaults: v1::JobSpec) -> Result<(), Problem> {
    let request = v1::OpenBatchRequest {
        batch: batch.to_string(),
        defaults: Some(defaults),
    };
    let opened = again(client, || {
        let (mut jobs, request) = (client.jobs(), request.clone());
        async move { jobs.open_batch(request).await }
    });
    opened.await.map(drop)
}

/// Says that no more chunks come.
pub async fn close_batch(client: &Client, batch: &BatchId) -> Result<(), Problem> {
    let batch = batch.to_string();
    let closed = again(client, || {
        let mut jobs = client.jobs();
        let request = v1::CloseBatchRequest {
            batch: batch.clone(),
        };
        async move { jobs.close_batch(request).await }
    });
    closed.await.map(drop)
}

/// Makes a call of `client`, again while nobody answers, at another coordinator where there is one. For idempotent calls
/// only.
pub async fn again<T, F>(client: &Client, call: impl Fn() -> F) -> Result<T, Problem>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let mut failures = 0;
    loop {
        let used = client.at();
        let status = match with_deadline("cli.answer", ANSWER_TIMEOUT, Box::pin(call())).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => status,
            Err(timeout) => Status::deadline_exceeded(timeout.to_string()),
        };
        failures += 1;
        if !nobody_answered(&status) || failures >= TRIES_MAX {
            return Err(status.into());
        }
        client.leave(used);
        tokio::time::sleep(BACKOFF.jittered(failures)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Target;
    use espalier_runtime::config::Environment;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn nobody() -> Client {
        let target = Target::named("http://127.0.0.1:1", &Environment::new());
        Client::lazy(&target, None).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_made_again_while_nobody_answers() {
        let (calls, nobody) = (AtomicU32::new(0), nobody());
        let answer = again(&nobody, || {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            async move {
                match call {
                    0 => Err(Status::unavailable("away")),
                    1 => Err(Status::from_error("the connection broke".into())),
                    _ => Ok(tonic::Response::new(call)),
                }
            }
        });
        assert_eq!(answer.await, Ok(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_final_and_tries_end() {
        let (calls, nobody) = (AtomicU32::new(0), nobody());
        let refused = again::<(), _>(&nobody, || {
            calls.fetch_add(1, Ordering::SeqCst);
            async { Err(Status::failed_precondition("closed")) }
        });
        assert!(refused.await.is_err());
        assert_eq!(calls.swap(0, Ordering::SeqCst), 1);
        let away = again::<(), _>(&nobody, || {
            calls.fetch_add(1, Ordering::SeqCst);
            async { Err(Status::unavailable("away")) }
        });
        assert!(away.await.is_err());
        assert_eq!(calls.load(Ordering::SeqCst), TRIES_MAX);
    }

    #[test]
    fn a_rejection_finds_its_line() {
        let chunk = Chunk {
            number: 0,
            jobs: Vec::new(),
            places: vec![4, 9],
        };
        let response = v1::SubmitChunkResponse {
            accepted: 1,
            rejected: vec![v1::Rejection {
                index: 1,
                id: "b".to_owned(),
                errors: vec![v1::FieldError {
                    field: "prompt".to_owned(),
                    value: String::new(),
                    rule: "must not be empty".to_owned(),
                }],
            }],
        };
        let mut sent = Sent::default();
        note_chunk(&mut sent, &chunk, response);
        assert_eq!((sent.accepted, sent.refusals[0].place), (1, 9));
    }
}
