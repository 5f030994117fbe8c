//! Giving the queue again what is kept.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, JobId, ProjectId};
use espalier_core::layout::{self, ChunkRange, JournalEntry};
use espalier_core::queue::{ItemResult, Refusal};
use espalier_runtime::store::StoreError;
use espalier_runtime::tasks;
use espalier_runtime::telemetry::{self, metrics};
use futures::FutureExt;
use futures::future::try_join_all;

use super::{Journal, JournalError, RETRY_AFTER, record};
use crate::queue::{Chunk, QueueError};

/// Chunks about which the queue is asked at once.
const ASKED_MAX: usize = 64;

/// What came of giving the queue a chunk again.
#[derive(Debug, Default)]
pub struct Given {
    /// Jobs that it had lost.
    pub new: u64,
    /// Jobs that it does not take, and why.
    pub rejected: Vec<(JobId, FieldError)>,
}

impl Journal {
    /// Gives the queue chunks as they are kept; nothing, where the entry is gone since it was listed.
    pub async fn give(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        range: ChunkRange,
    ) -> Result<Given, JournalError> {
        let chunks = match self.read_chunks(project, batch, range).await {
            Err(JournalError::Store(error)) if error.is_not_found() => return Ok(Given::default()),
            chunks => chunks?,
        };
        let mut given = Given::default();
        for (n, chunk) in chunks {
            let chunk = chunk.map_err(JournalError::from);
            let taken = match chunk {
                Ok(chunk) => self.give_chunk(chunk, &mut given).await,
                Err(error) => Err(error),
            };
            match taken {
                Ok(()) => {}
                // No try brings it back; the chunks beside it are not to share its fate.
                Err(
                    error @ (JournalError::Unreadable(_)
                    | JournalError::Queue(QueueError::Refused(_))),
                ) => {
                    tracing::error!(%project, %batch, chunk = n, error = %error, "an acknowledged chunk cannot be given again");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(given)
    }

    async fn give_chunk(&self, chunk: Chunk, given: &mut Given) -> Result<(), JournalError> {
        let ids: Vec<_> = chunk.jobs.iter().map(|job| job.job.id.clone()).collect();
        let reply = self.queue.submit(chunk).await?;
        let mut new = 0;
        for (job, item) in ids.into_iter().zip(reply.items) {
            match item {
                ItemResult::Accepted => new += 1,
                ItemResult::AlreadyThere => {}
                ItemResult::Rejected(error) => given.rejected.push((job, error)),
            }
        }
        metrics().queue_redriven.add(new, &[]);
        given.new += new;
        Ok(())
    }

    /// Those of the objects that hold chunks which the queue does not know.
    pub async fn lacking(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        chunks: &[ChunkRange],
    ) -> Result<Vec<ChunkRange>, QueueError> {
        let numbers = chunks.iter().flat_map(|range| range.numbers());
        let numbers: Vec<u32> = numbers.collect();
        let mut lacking = BTreeSet::new();
        for some in numbers.chunks(ASKED_MAX) {
            let asked = some
                .iter()
                .map(|n| self.queue.chunk_digest(project.clone(), batch.clone(), *n));
            let digests = try_join_all(asked).await?;
            let unknown = some
                .iter()
                .zip(digests)
                .filter(|(_, known)| known.is_none());
            lacking.extend(unknown.map(|(n, _)| *n));
        }
        let mut found = Vec::new();
        for range in chunks {
            let unknown: BTreeSet<u32> = lacking.range(range.numbers()).copied().collect();
            if !unknown.is_empty() && self.holds(project, batch, *range, &unknown).await? {
                found.push(*range);
            }
        }
        Ok(found)
    }

    /// Whether the object with this name holds one of these numbers: some between its first and its last may be missing.
    async fn holds(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        range: ChunkRange,
        numbers: &BTreeSet<u32>,
    ) -> Result<bool, QueueError> {
        if range.first == range.last {
            return Ok(true);
        }
        let entry = JournalEntry::Chunks(range);
        let read = self.read(project, batch, entry).boxed();
        let bytes = self.in_time("journal.read", read).await?;
        // One that cannot be read is told of by whoever gives it again.
        let held = tasks::blocking("journal.decode", move || record::digests(bytes));
        let held = held.await.map_err(|error| self.away(&error))?;
        Ok(held.map_or(true, |held| held.keys().any(|n| numbers.contains(n))))
    }

    /// Gives the queue what it lacks of a batch that is about to be closed: a closed batch takes nothing new. Until all is
    /// driven it may lack parts of chunks that it knows.
    pub(super) async fn complete(
        &self,
        project: &ProjectId,
        batch: &BatchId,
    ) -> Result<(), QueueError> {
        let found = self.queue.batch(project.clone(), batch.clone()).await?;
        let Some(found) = found else {
            let (project, batch) = (project.clone(), batch.clone());
            return Err(Refusal::UnknownBatch { project, batch }.into());
        };
        if found.closed {
            return Ok(());
        }
        let (restarts, is_whole) = (self.restarts(), self.is_whole());
        let chunks = self.chunks(project, batch, 0..=u32::MAX).boxed();
        let mut chunks = self.in_time("journal.list", chunks).await?;
        if is_whole {
            chunks = self.lacking(project, batch, &chunks).await?;
        }
        for range in chunks {
            let given = self.give(project, batch, range).await;
            self.judge(project, batch, given, is_whole)?;
        }
        if self.restarts() != restarts {
            return Err(not_yet(batch));
        }
        Ok(())
    }

    /// Whether a batch may be closed after what came of a chunk of it: what no try can bring back must not keep it open.
    fn judge(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        given: Result<Given, JournalError>,
        is_whole: bool,
    ) -> Result<(), QueueError> {
        let error = match given {
            // Jobs that they depend on may not be there yet.
            Ok(given) if !given.rejected.is_empty() && !is_whole => return Err(not_yet(batch)),
            Ok(given) => {
                for (job, error) in given.rejected {
                    tracing::error!(%project, %batch, %job, error = %error, "an acknowledged job cannot be given again");
                }
                return Ok(());
            }
            Err(error) => error,
        };
        match error {
            JournalError::Store(error) => {
                let url = self.store.url();
                let error = telemetry::error_chain(&error);
                tracing::error!(%project, %batch, error, "a chunk that the queue lost cannot be read");
                Err(QueueError::Unavailable {
                    reason: format!(
                        "the queue has lost a part of batch `{batch}`, and the object store {url} does not give it back"
                    ),
                    retry_after: RETRY_AFTER,
                })
            }
            JournalError::Unreadable(_) | JournalError::Queue(QueueError::Refused(_)) => {
                tracing::error!(%project, %batch, error = %error, "acknowledged work cannot be given again");
                Ok(())
            }
            JournalError::Queue(error) => Err(error),
        }
    }

    /// The objects with chunks of a batch that are kept and whose first number is one of these, in the order of those.
    pub(super) async fn chunks(
        &self,
        project: &ProjectId,
        batch: &BatchId,
        first: RangeInclusive<u32>,
    ) -> Result<Vec<ChunkRange>, StoreError> {
        let prefix = layout::journal_batch(&self.name, project, batch);
        let mut after = layout::journal_chunks_from(&self.name, project, batch, *first.start());
        let mut chunks = Vec::new();
        loop {
            let (entries, next) = self.list_under(&prefix, Some(&after)).await?;
            let ranges = entries.iter().filter_map(|entry| match entry.entry {
                JournalEntry::Chunks(range) => Some(range),
                _ => None,
            });
            let before = chunks.len();
            chunks.extend(ranges.take_while(|range| range.first <= *first.end()));
            let is_past = chunks.len() - before < entries.len();
            match next {
                Some(next) if !is_past => after = next,
                _ => return Ok(chunks),
            }
        }
    }
}

fn not_yet(batch: &BatchId) -> QueueError {
    QueueError::Unavailable {
        reason: format!("the queue has lost a part of batch `{batch}` and is being given it again"),
        retry_after: RETRY_AFTER,
    }
}
