//! Looks after the journal of a queue that may lose what it acknowledged: gives the queue again what it does not know,
//! and removes the entries of batches that have ended.
//!
//! All that is kept is driven when this process starts, and when the queue's server was restarted or replaced, by every
//! coordinator: what the queue has is found there and changes nothing. In between, a batch that the queue does not know
//! at all is driven as soon as it is noticed.
//!
//! A batch that ended and was forgotten is never driven: its entries go when it ends, at the latest before its rows, and
//! entries that have grown as old as batches are kept are removed, not driven. Those of a batch that takes longer are
//! written again before that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::JournalEntry;
use espalier_core::queue::{BatchView, ItemResult, Selector};
use espalier_core::time::Timestamp;
use espalier_runtime::store::StoreError;
use espalier_runtime::telemetry::{self, metrics};

use crate::api::Shared;
use crate::journal::{Entry, Journal, JournalError};
use crate::queue::{Condition, OpenBatch, Queue, QueueError};

/// Time between two looks at whether the queue's server is still the same.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two rounds where nothing happened: entries of ended batches cost room only.
const ROUND_INTERVAL: Duration = Duration::from_secs(300);
/// Time after a round that stopped early.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// How often chunks are given again of which jobs were rejected, since they may depend on jobs of later ones.
const TRIES_MAX: usize = 5;

/// Why a round stopped early. The next one goes on.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the queue could not be asked")]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl From<StoreError> for RoundError {
    fn from(error: StoreError) -> Self {
        Self::Journal(error.into())
    }
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Done {
    /// Batches whose entries were removed.
    removed: u64,
    /// Batches that the queue did not know.
    opened: u64,
    /// Jobs that it did not know.
    jobs: u64,
}

/// Runs rounds until the process aborts; ends at once where the queue loses nothing.
pub async fn run(shared: Arc<Shared>) {
    // At the start nobody knows what happened before.
    let (mut seen, mut drive) = (shared.queue.restarts(), true);
    let mut due = Instant::now();
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while seen.is_some() {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        let restarts = shared.queue.restarts();
        if restarts != seen {
            (seen, drive, due) = (restarts, true, Instant::now());
        }
        if Instant::now() < due || shared.queue.condition().await != Condition::Serving {
            continue;
        }
        let on = Round {
            queue: shared.queue.as_ref(),
            journal: &shared.journal,
            now: shared.now(),
            keep: shared.config.keep(),
            drive,
        };
        let round = tokio::select! {
            round = on.run() => round,
            () = shared.shutdown.aborted() => return,
        };
        let pause = match round {
            Ok(done) => {
                report(done);
                drive = false;
                ROUND_INTERVAL
            }
            Err(error) => {
                let error = telemetry::error_chain(&error);
                tracing::warn!(error, "the journal was not gone through");
                RETRY_INTERVAL
            }
        };
        due = Instant::now() + pause;
    }
}

fn report(done: Done) {
    if done.removed > 0 {
        tracing::debug!(batches = done.removed, "entries of ended batches removed");
    }
    if done.opened > 0 || done.jobs > 0 {
        tracing::warn!(
            batches = done.opened,
            jobs = done.jobs,
            "the queue had lost acknowledged work, and was given it again"
        );
    }
}

/// What is kept of one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    opened: Option<Timestamp>,
    closed: bool,
    cancelled: bool,
    chunks: Vec<u32>,
    /// When the newest entry was written.
    newest: Timestamp,
}

impl Kept {
    fn add(&mut self, entry: &Entry) {
        self.newest = self.newest.max(entry.modified);
        match entry.entry {
            JournalEntry::Open => self.opened = Some(entry.modified),
            JournalEntry::Chunk(n) => self.chunks.push(n),
            JournalEntry::Closed => self.closed = true,
            JournalEntry::Cancelled => self.cancelled = true,
        }
    }
}

/// What becomes of the entries of one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Todo {
    Leave,
    /// It has ended, or is too old to tell.
    Remove,
    /// It takes long: its entries must not look old.
    Refresh,
    /// The queue may lack some of it.
    Drive,
}

/// Decides by what is kept, what the queue knows, the time, how long ended batches are kept in the queue, and whether it
/// may have lost parts of batches that it knows.
fn verdict(
    kept: &Kept,
    found: Option<&BatchView>,
    now: Timestamp,
    keep: Duration,
    drive: bool,
) -> Todo {
    let age = |at: Timestamp| now.since(at);
    match found {
        Some(batch) if batch.completed_at.is_some() || batch.cancelled => Todo::Remove,
        Some(_) if drive => Todo::Drive,
        Some(_) if kept.opened.is_some_and(|at| age(at) >= keep / 2) => Todo::Refresh,
        Some(_) => Todo::Leave,
        None if age(kept.newest) >= keep || kept.cancelled => Todo::Remove,
        None if kept.opened.is_some() => Todo::Drive,
        // It was never opened, or that is under way.
        None => Todo::Leave,
    }
}

/// One round.
struct Round<'a> {
    queue: &'a dyn Queue,
    journal: &'a Journal,
    /// The queue's time.
    now: Timestamp,
    /// How long ended batches are kept in the queue.
    keep: Duration,
    /// The queue may have lost parts of batches that it knows.
    drive: bool,
}

impl Round<'_> {
    async fn run(&self) -> Result<Done, RoundError> {
        let mut done = Done::default();
        let mut lost = Vec::new();
        for ((project, batch), kept) in self.all().await? {
            let found = self.queue.batch(project.clone(), batch.clone()).await?;
            match verdict(&kept, found.as_ref(), self.now, self.keep, self.drive) {
                Todo::Leave => {}
                Todo::Remove => {
                    self.journal.forget(&project, &batch).await?;
                    done.removed += 1;
                }
                Todo::Refresh => self.journal.refresh(&project, &batch).await?,
                Todo::Drive => lost.extend(self.lost(project, batch, kept, found).await?),
            }
        }
        // A job may depend on one of a batch that was opened earlier.
        lost.sort_by_key(|lost| lost.opened_at);
        self.give_again(&lost, &mut done).await?;
        Ok(done)
    }

    /// All entries, by batch.
    async fn all(&self) -> Result<BTreeMap<(ProjectId, BatchId), Kept>, StoreError> {
        let mut all: BTreeMap<_, Kept> = BTreeMap::new();
        let mut after = None;
        loop {
            let (entries, next) = self.journal.list(after.as_deref()).await?;
            for entry in entries {
                let name = (entry.project.clone(), entry.batch.clone());
                all.entry(name).or_default().add(&entry);
            }
            after = next;
            if after.is_none() {
                return Ok(all);
            }
        }
    }

    /// None where the entries are gone, or cannot be read by this version.
    async fn lost(
        &self,
        project: ProjectId,
        batch: BatchId,
        kept: Kept,
        found: Option<BatchView>,
    ) -> Result<Option<Lost>, RoundError> {
        let (open, opened_at) = if let Some(view) = found {
            (None, view.opened_at)
        } else {
            let read = self.journal.opened(&project, &batch).await;
            let Some((open, opened_at)) = readable(read, &project, &batch)? else {
                return Ok(None);
            };
            (Some(open), opened_at)
        };
        Ok(Some(Lost {
            project,
            batch,
            kept,
            opened_at,
            open,
        }))
    }

    /// Opens what is not known, submits every chunk, and closes and cancels at the end: a closed batch takes nothing new.
    async fn give_again(&self, lost: &[Lost], done: &mut Done) -> Result<(), RoundError> {
        for one in lost {
            if let Some(open) = one.open.clone() {
                let opened = refused(self.queue.open_batch(open).await, one)?;
                done.opened += u64::from(opened.is_some());
            }
        }
        let chunks = lost
            .iter()
            .flat_map(|one| one.kept.chunks.iter().map(move |n| (one, *n)));
        let mut chunks: Vec<(&Lost, u32)> = chunks.collect();
        for tries in 1..=TRIES_MAX {
            let mut rejected = Vec::new();
            for (one, n) in chunks {
                if !self.submit(one, n, tries == TRIES_MAX, done).await? {
                    rejected.push((one, n));
                }
            }
            chunks = rejected;
            if chunks.is_empty() {
                break;
            }
        }
        for one in lost {
            let (project, batch) = (one.project.clone(), one.batch.clone());
            if one.kept.cancelled {
                let all = Selector::Batch(project, batch);
                refused(self.queue.cancel(all).await, one)?;
            } else if one.kept.closed {
                refused(self.queue.close_batch(project, batch).await, one)?;
            }
        }
        Ok(())
    }

    /// Submits one chunk; false: jobs of it were rejected.
    async fn submit(
        &self,
        one: &Lost,
        n: u32,
        is_last: bool,
        done: &mut Done,
    ) -> Result<bool, RoundError> {
        let (project, batch) = (&one.project, &one.batch);
        let read = self.journal.chunk(project, batch, n).await;
        let Some(chunk) = readable(read, project, batch)? else {
            return Ok(true);
        };
        let ids: Vec<_> = chunk.jobs.iter().map(|job| job.job.id.clone()).collect();
        let Some(reply) = refused(self.queue.submit(chunk).await, one)? else {
            return Ok(true);
        };
        let is_new = |item: &&ItemResult| **item == ItemResult::Accepted;
        let new = reply.items.iter().filter(is_new).count() as u64;
        done.jobs += new;
        metrics().queue_redriven.add(new, &[]);
        let mut all = true;
        for (job, item) in ids.iter().zip(&reply.items) {
            if let ItemResult::Rejected(error) = item {
                all = false;
                if is_last {
                    tracing::error!(%project, %batch, %job, error = %error, "an acknowledged job cannot be given again");
                }
            }
        }
        Ok(all)
    }
}

/// A batch of which the queue may lack something.
struct Lost {
    project: ProjectId,
    batch: BatchId,
    kept: Kept,
    opened_at: Timestamp,
    /// What it is opened with where the queue does not know it.
    open: Option<OpenBatch>,
}

/// None, where an entry is gone since it was listed, or was written by another version: the others go on.
fn readable<T>(
    read: Result<T, JournalError>,
    project: &ProjectId,
    batch: &BatchId,
) -> Result<Option<T>, RoundError> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(JournalError::Store(error)) if error.is_not_found() => Ok(None),
        Err(JournalError::Unreadable(error)) => {
            tracing::error!(%project, %batch, error = %error, "acknowledged work cannot be given again");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// None, and a line in the log, where the queue refuses: asking again would not help.
fn refused<T>(answer: Result<T, QueueError>, one: &Lost) -> Result<Option<T>, QueueError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(QueueError::Refused(refusal)) => {
            let (project, batch) = (&one.project, &one.batch);
            tracing::error!(%project, %batch, error = %refusal, "acknowledged work cannot be given again");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
