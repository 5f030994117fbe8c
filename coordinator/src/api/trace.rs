//! `GetTrace`: the published trace of a job, verified against its manifest, as JSON in pieces.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use espalier_core::id::{JobKey, ProjectId};
use espalier_core::queue::StateName;
use espalier_core::trace::Manifest;
use espalier_proto::status::ApiError;
use espalier_proto::v1;
use espalier_runtime::store::StoreError;
use espalier_runtime::{tasks, telemetry};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Status;

use super::{Shared, no_job, queue_error};

/// Bytes of one piece.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces that wait for a slow client, and the error that may end them.
pub const PIECES_MAX: usize = 3;
/// Traces that are read at once: each is in memory as it is stored, and takes a thread.
const READERS_MAX: usize = 8;
/// Traces of one project that are read at once: a slow reader keeps only its own project waiting, until four projects
/// hold two each.
const READERS_OF_PROJECT_MAX: usize = 2;
/// How long a call waits for its turn.
const TURN_LIMIT: Duration = Duration::from_secs(30);
/// How long a client may take to read one piece before the stream is given up.
const SEND_LIMIT: Duration = Duration::from_secs(60);
/// How long a client may take to read the whole: readers are few, and a slow one keeps others waiting.
const STREAM_LIMIT: Duration = Duration::from_secs(600);
/// Longest trace, unpacked, in bytes: what is compressed came from a worker and may claim anything.
const TRACE_BYTES_MAX: u64 = 512 << 20;

/// The turns of readers: few of all, and fewer of each project.
#[derive(Debug)]
pub struct Readers {
    all: Arc<Semaphore>,
    /// Of projects that have read a trace. Those whose turns are all free are forgotten when another asks.
    of_project: Mutex<BTreeMap<ProjectId, Arc<Semaphore>>>,
}

/// The turn of one reader, which ends when this is dropped.
#[derive(Debug)]
pub struct Turn(
    #[expect(dead_code, reason = "held until it is dropped")] [OwnedSemaphorePermit; 2],
);

impl Default for Readers {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(READERS_MAX)),
            of_project: Mutex::default(),
        }
    }
}

impl Readers {
    /// Waits for a turn of `project`, then for one of all.
    pub async fn turn(&self, project: &ProjectId) -> Result<Turn, ApiError> {
        let own = {
            let mut shares = self
                .of_project
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            shares.retain(|_, share| Arc::strong_count(share) > 1);
            let new = || Arc::new(Semaphore::new(READERS_OF_PROJECT_MAX));
            Arc::clone(shares.entry(project.clone()).or_insert_with(new))
        };
        let all = Arc::clone(&self.all);
        let both = async {
            Some(Turn([
                own.acquire_owned().await.ok()?,
                all.acquire_owned().await.ok()?,
            ]))
        };
        let turn = tasks::with_deadline("api.trace.turn", TURN_LIMIT, both).await;
        turn.ok().flatten().ok_or_else(|| {
            ApiError::Unavailable("too many traces are being read; try again".to_owned())
        })
    }
}

/// The compressed trace of a job, as it was published.
pub async fn find(shared: &Shared, key: JobKey) -> Result<Bytes, ApiError> {
    let detail = shared.queue.job(key.clone()).await.map_err(queue_error)?;
    let detail = detail.ok_or_else(|| no_job(&key))?;
    let state = detail.job.state.name();
    let Some(result) = detail.result.filter(|_| state == StateName::Succeeded) else {
        return Err(ApiError::Conflict(format!(
            "job `{}/{}` has no published trace: it is {}",
            key.batch,
            key.job,
            state.as_str()
        )));
    };
    let manifest = read(shared, &result.manifest).await?;
    let manifest = Manifest::parse(&manifest, &key).map_err(|error| damaged(&error))?;
    if manifest.summary.rollout().is_none() {
        return Err(ApiError::Conflict(format!(
            "job `{}/{}` has no trace: it is no rollout",
            key.batch, key.job
        )));
    }
    let file = manifest
        .trace_file()
        .ok_or_else(|| damaged(&"the manifest names no trace"))?;
    let packed = read(shared, &file.path).await?;
    let (file, packed, whole) = {
        let file = file.clone();
        let hashed = tasks::blocking("trace.verify", move || {
            let whole = file.holds(&packed);
            (file, packed, whole)
        });
        hashed.await.map_err(super::blocking_error)?
    };
    if !whole {
        return Err(damaged(&format_args!(
            "{} is not what the manifest names",
            file.path
        )));
    }
    Ok(packed)
}

/// Unpacks `packed` and sends it piece by piece, on a thread of its own. `turn` is kept until the end.
pub async fn stream(
    packed: Bytes,
    pieces: mpsc::Sender<Result<v1::TraceChunk, Status>>,
    turn: Turn,
) {
    stream_within(SEND_LIMIT, packed, pieces, turn).await;
}

async fn stream_within(
    send_limit: Duration,
    packed: Bytes,
    pieces: mpsc::Sender<Result<v1::TraceChunk, Status>>,
    turn: Turn,
) {
    let unpack = move || {
        let _turn = turn;
        // Kept for the end: a stream that breaks off must not look like one that is complete.
        let Ok(last) = pieces.try_reserve() else {
            return;
        };
        if let Err(error) = send_pieces(send_limit, &packed, &pieces) {
            last.send(Err(error.into()));
        }
    };
    if let Err(error) = tasks::blocking("trace.stream", unpack).await {
        tracing::error!(error = %error, "a trace could not be streamed");
    }
}

fn send_pieces(
    send_limit: Duration,
    packed: &[u8],
    pieces: &mpsc::Sender<Result<v1::TraceChunk, Status>>,
) -> Result<(), ApiError> {
    let until = Instant::now() + STREAM_LIMIT;
    let unpacked = zstd::Decoder::new(packed).map_err(|error| damaged(&error))?;
    let mut unpacked = unpacked.take(TRACE_BYTES_MAX + 1);
    let mut sent = 0;
    loop {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        unpacked
            .by_ref()
            .take(PIECE_BYTES as u64)
            .read_to_end(&mut piece)
            .map_err(|error| damaged(&error))?;
        if piece.is_empty() {
            return Ok(());
        }
        sent += piece.len() as u64;
        if sent > TRACE_BYTES_MAX {
            let limit = format_args!("it must have at most {TRACE_BYTES_MAX} bytes unpacked");
            return Err(damaged(&limit));
        }
        let data = piece.into();
        let taken = pieces.send(Ok(v1::TraceChunk { data }));
        let limit = send_limit.min(until.saturating_duration_since(Instant::now()));
        let taken = tasks::with_deadline("api.trace", limit, taken);
        match Handle::current().block_on(taken) {
            Ok(Ok(())) => {}
            // The client has gone.
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                let slow = "the trace was not read in time; read it again";
                return Err(ApiError::Unavailable(slow.to_owned()));
            }
        }
    }
}

async fn read(shared: &Shared, path: &str) -> Result<Bytes, ApiError> {
    shared
        .store
        .get(path)
        .await
        .map_err(|error| store_error(&error))
}

fn store_error(error: &StoreError) -> ApiError {
    tracing::error!(
        error = telemetry::error_chain(error),
        "a trace could not be read"
    );
    if error.is_not_found() {
        return damaged(&error);
    }
    ApiError::Unavailable("the object store cannot be read; try again".to_owned())
}

fn damaged(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::Internal(format!("the published trace is damaged: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    fn turn() -> Turn {
        let one = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Turn([one(), one()])
    }

    #[tokio::test]
    async fn a_project_that_reads_slowly_keeps_no_other_waiting() {
        let readers = Readers::default();
        let (slow, other) = ("slow".parse().unwrap(), "other".parse().unwrap());
        let mut turns = Vec::new();
        for _ in 0..READERS_OF_PROJECT_MAX {
            turns.push(readers.turn(&slow).await.unwrap());
        }
        let waits = futures::FutureExt::now_or_never(readers.turn(&slow));
        assert!(waits.is_none());
        readers.turn(&other).await.unwrap();
        turns.pop();
        readers.turn(&slow).await.unwrap();
    }

    #[tokio::test]
    async fn pieces_add_up_to_the_text() {
        let text: Vec<u8> = (0..3 * PIECE_BYTES / 2).map(|i| i as u8).collect();
        let packed = zstd::encode_all(&text[..], 1).unwrap();
        let (pieces, mut received) = mpsc::channel(4);
        stream(packed.into(), pieces, turn()).await;
        let mut joined = Vec::new();
        let mut count = 0;
        while let Some(piece) = received.recv().await {
            joined.extend_from_slice(&piece.unwrap().data);
            count += 1;
        }
        assert_eq!((count, joined), (2, text));
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_gets_an_error_and_no_silent_end() {
        let packed = zstd::encode_all(&vec![7; 9 * PIECE_BYTES][..], 1).unwrap();
        let (pieces, mut received) = mpsc::channel(PIECES_MAX);
        stream_within(Duration::from_millis(1), packed.into(), pieces, turn()).await;
        let mut last = None;
        while let Some(piece) = received.recv().await {
            last = Some(piece);
        }
        assert_eq!(last.unwrap().unwrap_err().code(), tonic::Code::Unavailable);
    }

    #[tokio::test]
    async fn what_is_not_compressed_is_an_error_of_the_stream() {
        let (pieces, mut received) = mpsc::channel(4);
        stream(Bytes::from_static(b"{}"), pieces, turn()).await;
        let status = received.recv().await.unwrap().unwrap_err();
        assert!(status.message().contains("damaged"), "{status}");
    }
}
