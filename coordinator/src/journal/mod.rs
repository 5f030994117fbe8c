//! What a queue that may lose what it acknowledged was given is kept in object storage until its batch has ended, so
//! that what was lost can be given to it again.
//!
//! The API opens, fills, closes and cancels batches through [`Journal`]: an answer goes out when the queue has the
//! change and the store has its entry, so that nothing is acknowledged that only the queue holds. Where the queue loses
//! nothing, nothing is kept. `maintenance::journal` removes entries and drives them again. Jobs that results spawn are
//! not in here: a result that was lost is found again by adoption.

mod record;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{self, JournalEntry};
use espalier_core::queue::{BatchView, Cancelled, ItemResult, Refusal, Selector};
use espalier_core::time::Timestamp;
use espalier_runtime::store::{LIST_MAX, Store, StoreError};
use espalier_runtime::tasks::{self, with_deadline};
use espalier_runtime::telemetry;
use tokio::sync::Semaphore;

use crate::queue::{Answer, Chunk, ChunkReply, OpenBatch, Queue, QueueError};

pub use record::Unreadable;

/// How long the store may take to keep an entry, and an entry may wait for its turn. Clients send again what was not
/// acknowledged.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Chunks that are written at once, each of at most 8 MiB: bounds memory, and hides the latency of a store.
const WRITES_MAX: usize = 16;
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
    places: Semaphore,
}

impl Journal {
    /// Of the queue with this name.
    pub fn new(queue: Arc<dyn Queue>, store: Store, name: &str) -> Self {
        Self {
            queue,
            store,
            name: name.to_owned(),
            places: Semaphore::new(WRITES_MAX),
        }
    }

    /// Opens a batch. Kept after the queue has it: one that is open with other defaults stays as it is.
    pub async fn open_batch(&self, request: OpenBatch) -> Result<BatchView, QueueError> {
        if self.queue.restarts().is_none() {
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
    /// refused, and must not take the place of what was taken.
    pub async fn submit(
        &self,
        chunk: Chunk,
        known: Option<[u8; 32]>,
    ) -> Result<ChunkReply, QueueError> {
        let is_other = known.is_some_and(|digest| digest != chunk.digest);
        if self.queue.restarts().is_none() || is_other {
            return self.queue.submit(chunk).await;
        }
        let turn = with_deadline("journal.turn", WRITE_LIMIT, self.places.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(self.away("it takes too long"));
        };
        let (project, batch) = (chunk.project.clone(), chunk.batch.clone());
        let entry = JournalEntry::Chunk(chunk.n);
        let encoded = tasks::blocking("journal.encode", move || {
            let row = record::encode_chunk(&chunk);
            (chunk, row)
        });
        let (chunk, row) = encoded
            .await
            .map_err(|error| self.away(&error.to_string()))?;
        self.unless_replaced(async {
            let asked = self.queue.submit(chunk);
            let reply = self
                .both(&project, &batch, entry, row.clone(), asked)
                .await?;
            let is_rejected = |item: &ItemResult| matches!(item, ItemResult::Rejected(_));
            if reply.items.iter().any(is_rejected) {
                // What the client was told is not in the queue must not enter it later.
                let left = record::without_rejected(row, &reply.items);
                let left = left.map_err(|error| self.away(&error.to_string()))?;
                self.keep(&project, &batch, entry, left).await?;
            }
            Ok(reply)
        })
        .await
    }

    /// Closes a batch.
    pub async fn close_batch(
        &self,
        project: ProjectId,
        batch: BatchId,
    ) -> Result<BatchView, QueueError> {
        let asked = self.queue.close_batch(project.clone(), batch.clone());
        self.marked(&project, &batch, JournalEntry::Closed, asked)
            .await
    }

    /// Cancels. A whole batch stays cancelled; single jobs may lose that together with all else that is lost.
    pub async fn cancel(&self, which: Selector) -> Result<Cancelled, QueueError> {
        let asked = self.queue.cancel(which.clone());
        match &which {
            Selector::Batch(project, batch) => {
                self.marked(project, batch, JournalEntry::Cancelled, asked)
                    .await
            }
            _ => asked.await,
        }
    }

    async fn marked<T>(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        mark: JournalEntry,
        asked: Answer<'_, T>,
    ) -> Result<T, QueueError> {
        if self.queue.restarts().is_none() {
            return asked.await;
        }
        let both = self.both(project, batch, mark, Bytes::new(), asked);
        self.unless_replaced(both).await
    }

    /// Asks the queue and keeps the entry side by side. An entry is taken away if the batch was closed before, or never
    /// opened; where the queue has lost the batch, it will be driven.
    async fn both<T>(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        entry: JournalEntry,
        row: Bytes,
        asked: Answer<'_, T>,
    ) -> Result<T, QueueError> {
        let (answer, kept) = tokio::join!(asked, self.keep(project, batch, entry, row));
        let error = match answer {
            Ok(answer) => return kept.map(|()| answer),
            Err(error) => error,
        };
        let is_refused = match &error {
            QueueError::Refused(Refusal::BatchClosed { .. }) => true,
            QueueError::Refused(Refusal::UnknownBatch { .. }) => {
                !self.has(project, batch).await.unwrap_or(true)
            }
            _ => false,
        };
        if is_refused && let Err(error) = self.remove(project, batch, entry).await {
            let error = telemetry::error_chain(&error);
            tracing::warn!(%project, %batch, error, "an entry of what was refused stays in the journal");
        }
        Err(error)
    }

    /// Does not acknowledge what may have gone to a server that was replaced meanwhile: whoever drives the journal after
    /// that may have listed it before the entry was there.
    async fn unless_replaced<T>(
        &self,
        done: impl Future<Output = Result<T, QueueError>>,
    ) -> Result<T, QueueError> {
        let before = self.queue.restarts();
        let done = done.await?;
        if self.queue.restarts() == before {
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
        match with_deadline("journal.write", WRITE_LIMIT, self.store.put(&path, row)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                tracing::error!(
                    error = telemetry::error_chain(&error),
                    "an entry of the journal could not be written"
                );
                Err(self.away(error.kind.as_str()))
            }
            Err(timeout) => Err(self.away(&timeout.to_string())),
        }
    }

    fn away(&self, why: &str) -> QueueError {
        let url = self.store.url();
        QueueError::Unavailable {
            reason: format!(
                "what was asked could not be kept in the object store {url} ({why}), and a failover of Redis would lose it"
            ),
            retry_after: RETRY_AFTER,
        }
    }

    /// The entries after `after`, by path, and where to go on if there are more.
    pub async fn list(
        &self,
        after: Option<&str>,
    ) -> Result<(Vec<Entry>, Option<String>), StoreError> {
        let prefix = layout::journal(&self.name);
        let page = self.store.list(&prefix, after, LIST_MAX).await?;
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
        if self.queue.restarts().is_none() {
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

    /// A chunk as the queue was given it, less what it did not take.
    pub async fn chunk(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        n: u32,
    ) -> Result<Chunk, JournalError> {
        let bytes = self.read(project, batch, JournalEntry::Chunk(n)).await?;
        let (project, batch) = (project.clone(), batch.clone());
        let decoded = tasks::blocking("journal.decode", move || {
            record::decode_chunk(&project, &batch, n, bytes)
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

    /// Removes one entry.
    pub async fn remove(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        entry: JournalEntry,
    ) -> Result<(), StoreError> {
        let path = layout::journal_entry(&self.name, project, batch, entry);
        self.store.delete(&path).await
    }

    /// Removes all entries of a batch.
    pub async fn forget(&self, project: &ProjectId, batch: &BatchId) -> Result<(), StoreError> {
        if self.queue.restarts().is_none() {
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

#[cfg(test)]
mod tests;
