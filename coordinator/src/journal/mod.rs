//! What a queue that may lose what it acknowledged was given is kept in object storage until its batch has ended, so
//! that what was lost can be given to it again.
//!
//! The API opens, fills, closes and cancels batches through [`Journal`]: an answer goes out when the queue has the
//! change and after that the store has its entry, so that nothing is acknowledged that only the queue holds, and nothing
//! is kept that the queue refused. Where the queue loses nothing, or the configuration has it so, nothing is kept.
//! `maintenance::journal` removes entries and drives them again. Jobs that results spawn are not in here: a result that was lost is found again by adoption.

mod again;
mod record;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{self, ChunkRange, JournalEntry};
use espalier_core::queue::{BatchView, Cancelled, ItemResult, Selector};
use espalier_core::time::Timestamp;
use espalier_runtime::shutdown::Shutdown;
use espalier_runtime::store::{LIST_MAX, Store, StoreError};
use espalier_runtime::tasks::{self, Tasks, with_deadline};
use espalier_runtime::telemetry;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::queue::{Chunk, ChunkReply, OpenBatch, Queue, QueueError, Submission};

pub use record::Unreadable;
use writer::{WRITE_LIMIT, Writer};

/// How long a chunk may wait for room. Clients send again what was not acknowledged.
const ROOM_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to be kept: the write of its batch that is under way, and its own.
const KEEP_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of chunks that are on their way at once: bounds memory.
const ROOM_BYTES: usize = 128 << 20;
/// What a job takes of it beside its spec, labels and names.
const JOB_BYTES: usize = 256;
/// What the name of a dependency or a need takes.
const NAME_BYTES: usize = 128;
/// Chunks whose number is looked up in the store at once: each reads an object or more of some MiB.
const LOOKS_MAX: usize = 8;
/// The unit in which room is counted.
const ROOM_UNIT: usize = 1 << 10;
/// Bytes of a chunk above which encoding it is work for another thread.
const ENCODED_APART: usize = 64 << 10;
/// When a client should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why an entry could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The store has it not, or does not answer.
    #[error("the journal cannot be asked")]
    Store(#[from] StoreError),
    /// It is not what this version writes.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// The queue was given it, and did not take it.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

/// An object of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The tenant.
    pub project: ProjectId,
    /// The batch.
    pub batch: BatchId,
    /// What it keeps of the batch.
    pub entry: JournalEntry,
    /// When it was written, by the store's clock.
    pub modified: Timestamp,
}

/// The way to the queue for what must not be lost.
#[derive(Debug)]
pub struct Journal {
    queue: Arc<dyn Queue>,
    store: Store,
    /// Tells queues that share a store apart.
    name: String,
    /// Whether anything is kept.
    keeps: bool,
    writer: Writer,
    /// In units of [`ROOM_UNIT`].
    room: Semaphore,
    /// Of objects that are read for chunks whose number may be taken.
    looks: Semaphore,
    /// One more than the queue's restarts when all that is kept was driven last; 0 before that.
    whole: AtomicU64,
}

impl Journal {
    /// Of the queue with this name; with `keeps` false it passes on and keeps nothing. Writes until `shutdown` aborts.
    pub fn start(
        queue: Arc<dyn Queue>,
        store: Store,
        name: &str,
        keeps: bool,
        tasks: &Tasks,
        shutdown: &Shutdown,
    ) -> Self {
        Self {
            writer: Writer::start(store.clone(), name, tasks, shutdown),
            room: Semaphore::new(ROOM_BYTES / ROOM_UNIT),
            looks: Semaphore::new(LOOKS_MAX),
            queue,
            store,
            name: name.to_owned(),
            keeps,
            whole: AtomicU64::new(0),
        }
    }

    /// As if so many chunks were on their way that only a small one finds room.
    #[cfg(test)]
    pub(crate) fn leave_room_for_one(&self) {
        self.room.forget_permits(ROOM_BYTES / ROOM_UNIT - 1);
    }

    /// How often the queue may have lost something so far; none where nothing is kept, as it never does or must not matter.
    pub fn restarts(&self) -> Option<u64> {
        self.queue.restarts().filter(|_| self.keeps)
    }

    /// Whether the queue has all that is kept, as far as this process knows: it was driven since the server was restarted
    /// or replaced last.
    pub fn is_whole(&self) -> bool {
        let restarts = self.restarts();
        restarts.is_none_or(|restarts| self.whole.load(Ordering::Acquire) == restarts + 1)
    }

    /// All that is kept was driven after so many restarts.
    pub fn note_whole(&self, restarts: u64) {
        self.whole.fetch_max(restarts + 1, Ordering::AcqRel);
    }

    /// Opens a batch. Kept after the queue has it: one that is open with other defaults stays as it is.
    pub async fn open_batch(&self, request: OpenBatch) -> Result<BatchView, QueueError> {
        if self.restarts().is_none() {
            return self.queue.open_batch(request).await;
        }
        self.unless_replaced(async {
            let view = self.queue.open_batch(request.clone()).await?;
            let row = record::encode_open(&request, view.opened_at);
            self.keep(&view.project, &view.batch, JournalEntry::Open, row)
                .await?;
            Ok(view)
        })
        .await
    }

    /// Adds a chunk. `known` is the digest under which the queue knows its number: one that comes with another is
    /// refused.
    pub async fn submit(
        &self,
        chunk: Chunk,
        known: Option<[u8; 32]>,
    ) -> Result<ChunkReply, QueueError> {
        let is_other = known.is_some_and(|digest| digest != chunk.digest);
        if self.restarts().is_none() || is_other {
            return self.queue.submit(chunk).await;
        }
        let room = self.room.acquire_many(room_of(&chunk));
        let room = with_deadline("journal.room", ROOM_LIMIT, room).await;
        let Ok(Ok(_room)) = room else {
            return Err(self.busy());
        };
        self.unless_replaced(self.submit_and_keep(chunk)).await
    }

    async fn submit_and_keep(&self, chunk: Chunk) -> Result<ChunkReply, QueueError> {
        self.check_number(&chunk).await?;
        let (project, batch) = (chunk.project.clone(), chunk.batch.clone());
        let n = chunk.n;
        let (chunk, row) = self.encoded(chunk).await?;
        let reply = self.queue.submit(chunk).await?;
        let row = if reply.items.iter().any(is_rejected) {
            // What the client was told is not in the queue must not enter it later.
            let taken = record::taken(row, &reply.items);
            taken.map_err(|error| self.away(&error))?
        } else {
            Some(row)
        };
        if let Some(row) = row {
            let kept = self.writer.keep((project, batch), n, row);
            let kept = with_deadline("journal.keep", KEEP_LIMIT, kept).await;
            let kept = kept.map_err(|timeout| self.away(&timeout))?;
            kept.map_err(|why| self.away(&why))?;
        }
        Ok(reply)
    }

    async fn encoded(&self, chunk: Chunk) -> Result<(Chunk, Bytes), QueueError> {
        let encode = |chunk: Chunk| {
            let row = record::encode_chunk(&chunk);
            (chunk, row)
        };
        if bytes_of(&chunk) < ENCODED_APART {
            return Ok(encode(chunk));
        }
        let encoded = tasks::blocking("journal.encode", move || encode(chunk));
        encoded.await.map_err(|error| self.away(&error))
    }

    /// Until all is driven the queue may not know that a number is taken. What took it was acknowledged.
    async fn check_number(&self, chunk: &Chunk) -> Result<(), QueueError> {
        if self.is_whole() {
            return Ok(());
        }
        let look = with_deadline("journal.look", ROOM_LIMIT, self.looks.acquire()).await;
        let Ok(Ok(_look)) = look else {
            return Err(self.busy());
        };
        let kept = self.kept_of(&chunk.project, &chunk.batch, chunk.n).boxed();
        for bytes in self.in_time("journal.read", kept).await? {
            let digests = tasks::blocking("journal.decode", move || record::digests(bytes));
            let digests = digests.await.map_err(|error| self.away(&error))?;
            // One that cannot be read cannot be driven either.
            let known = digests.ok().and_then(|of| of.get(&chunk.n).copied());
            if known.is_some_and(|digest| digest != chunk.digest) {
                let rule = "was submitted before with other jobs; give new jobs a new number";
                return Err(FieldError::new("chunk", chunk.n, rule).into());
            }
        }
        Ok(())
    }

    /// The objects in which a chunk may lie.
    async fn kept_of(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        n: u32,
    ) -> Result<Vec<Bytes>, StoreError> {
        let mut kept = Vec::new();
        // The first number of an object that holds it is not farther away.
        let from = n.saturating_sub(ChunkRange::LEN_MAX);
        for range in self.chunks(project, batch, from..=n).await? {
            if range.numbers().contains(&n) {
                let entry = JournalEntry::Chunks(range);
                match self.read(project, batch, entry).await {
                    Err(error) if error.is_not_found() => {}
                    read => kept.push(read?),
                }
            }
        }
        Ok(kept)
    }

    /// Closes a batch.
    pub async fn close_batch(
        &self,
        project: ProjectId,
        batch: BatchId,
    ) -> Result<BatchView, QueueError> {
        if self.restarts().is_none() {
            return self.queue.close_batch(project, batch).await;
        }
        self.unless_replaced(async {
            self.complete(&project, &batch).await?;
            let asked = self.queue.close_batch(project.clone(), batch.clone());
            let view = asked.await?;
            self.keep(&project, &batch, JournalEntry::Closed, Bytes::new())
                .await?;
            Ok(view)
        })
        .await
    }

    /// Cancels. A whole batch stays cancelled; single jobs may lose that together with all else that is lost.
    pub async fn cancel(&self, which: Selector) -> Result<Cancelled, QueueError> {
        let (project, batch) = match &which {
            Selector::Batch(project, batch) if self.restarts().is_some() => {
                (project.clone(), batch.clone())
            }
            _ => return self.queue.cancel(which).await,
        };
        self.unless_replaced(async {
            self.complete(&project, &batch).await?;
            let cancelled = self.queue.cancel(which).await?;
            self.keep(&project, &batch, JournalEntry::Cancelled, Bytes::new())
                .await?;
            Ok(cancelled)
        })
        .await
    }

    /// Does not acknowledge what may have gone to a server that was replaced meanwhile: whoever drives the journal after
    /// that may have listed it before the entry was there.
    async fn unless_replaced<T>(
        &self,
        done: impl Future<Output = Result<T, QueueError>>,
    ) -> Result<T, QueueError> {
        let before = self.restarts();
        let done = done.await?;
        if self.restarts() == before {
            return Ok(done);
        }
        Err(QueueError::Unavailable {
            reason: "the server of the queue was restarted or replaced meanwhile".to_owned(),
            retry_after: RETRY_AFTER,
        })
    }

    async fn keep(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        entry: JournalEntry,
        row: Bytes,
    ) -> Result<(), QueueError> {
        let path = layout::journal_entry(&self.name, project, batch, entry);
        self.in_time("journal.write", self.store.put(&path, row).boxed())
            .await
    }

    /// What the store answers within the limit, in the terms of a queue that cannot answer without it.
    async fn in_time<T>(
        &self,
        what: &'static str,
        asked: BoxFuture<'_, Result<T, StoreError>>,
    ) -> Result<T, QueueError> {
        match with_deadline(what, WRITE_LIMIT, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::error!(
                    error = telemetry::error_chain(&error),
                    "the store did not do what the journal asked"
                );
                Err(self.away(&error.kind.as_str()))
            }
            Err(timeout) => Err(self.away(&timeout)),
        }
    }

    fn away(&self, why: &dyn std::fmt::Display) -> QueueError {
        let url = self.store.url();
        QueueError::Unavailable {
            reason: format!(
                "what was asked could not be kept in the object store {url} ({why}), and a failover of Redis would lose it"
            ),
            retry_after: RETRY_AFTER,
        }
    }

    fn busy(&self) -> QueueError {
        QueueError::Unavailable {
            reason: format!(
                "{} MiB of chunks are on their way into Redis and the object store {}, and none of them made room for \
                 another within {} s",
                ROOM_BYTES >> 20,
                self.store.url(),
                ROOM_LIMIT.as_secs()
            ),
            retry_after: RETRY_AFTER,
        }
    }

    /// The entries after `after`, by path, and where to go on if there are more.
    pub async fn list(
        &self,
        after: Option<&str>,
    ) -> Result<(Vec<Entry>, Option<String>), StoreError> {
        self.list_under(&layout::journal(&self.name), after).await
    }

    async fn list_under(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<(Vec<Entry>, Option<String>), StoreError> {
        let page = self.store.list(prefix, after, LIST_MAX).await?;
        let next = page.last().filter(|_| page.len() == LIST_MAX);
        let next = next.map(|object| object.path.clone());
        let entries = page.into_iter().filter_map(|object| {
            let (project, batch, entry) = layout::journal_entry_of(&self.name, &object.path)?;
            Some(Entry {
                project,
                batch,
                entry,
                modified: object.modified,
            })
        });
        Ok((entries.collect(), next))
    }

    /// Whether a batch was opened and has not ended, as far as is kept.
    pub async fn has(&self, project: &ProjectId, batch: &BatchId) -> Result<bool, StoreError> {
        if self.restarts().is_none() {
            return Ok(false);
        }
        let path = layout::journal_entry(&self.name, project, batch, JournalEntry::Open);
        match self.store.head(&path).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// How a batch was opened, and when.
    pub async fn opened(
        &self,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<(OpenBatch, Timestamp), JournalError> {
        let bytes = self.read(project, batch, JournalEntry::Open).await?;
        Ok(record::decode_open(project, batch, bytes)?)
    }

    /// Chunks of one object as the queue was given them, by number, less what it did not take.
    async fn read_chunks(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        range: ChunkRange,
    ) -> Result<record::Chunks, JournalError> {
        let entry = JournalEntry::Chunks(range);
        let bytes = self.read(project, batch, entry).await?;
        let (project, batch) = (project.clone(), batch.clone());
        let decoded = tasks::blocking("journal.decode", move || {
            record::decode_chunks(&project, &batch, bytes)
        });
        let decoded = decoded.await.map_err(|error| Unreadable::because(&error))?;
        Ok(decoded?)
    }

    /// Writes the entry of an open batch again, so that it does not look old.
    pub async fn refresh(&self, project: &ProjectId, batch: &BatchId) -> Result<(), StoreError> {
        let bytes = self.read(project, batch, JournalEntry::Open).await?;
        let path = layout::journal_entry(&self.name, project, batch, JournalEntry::Open);
        self.store.put(&path, bytes).await
    }

    async fn read(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        entry: JournalEntry,
    ) -> Result<Bytes, StoreError> {
        let path = layout::journal_entry(&self.name, project, batch, entry);
        self.store.get(&path).await
    }

    /// Removes all entries of a batch.
    pub async fn forget(&self, project: &ProjectId, batch: &BatchId) -> Result<(), StoreError> {
        if self.restarts().is_none() {
            return Ok(());
        }
        let prefix = layout::journal_batch(&self.name, project, batch);
        loop {
            let page = self.store.list(&prefix, None, LIST_MAX).await?;
            for object in &page {
                self.store.delete(&object.path).await?;
            }
            if page.len() < LIST_MAX {
                return Ok(());
            }
        }
    }
}

fn is_rejected(item: &ItemResult) -> bool {
    matches!(item, ItemResult::Rejected(_))
}

fn bytes_of(chunk: &Chunk) -> usize {
    let jobs = chunk.jobs.iter();
    jobs.map(|Submission { job, spec }| {
        let labels = job
            .labels
            .iter()
            .map(|(key, value)| key.len() + value.len());
        spec.len()
            + labels.sum::<usize>()
            + (job.needs.len() + job.deps.len()) * NAME_BYTES
            + JOB_BYTES
    })
    .sum()
}

/// Room that a chunk takes on its way, at most all there is.
fn room_of(chunk: &Chunk) -> u32 {
    let units = bytes_of(chunk).min(ROOM_BYTES) / ROOM_UNIT;
    u32::try_from(units).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests;
