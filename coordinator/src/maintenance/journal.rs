//! Looks after the journal of a queue that may lose what it acknowledged: gives the queue again what it does not know,
//! and removes the entries of batches that have ended.
//!
//! All that is kept is driven when this process starts, and when the queue's server was restarted or replaced, by every
//! coordinator: what the queue has is found there and changes nothing. Half a minute later it is driven once more, for
//! what another coordinator acknowledged by an answer of the server before. In between, a batch that the queue does not
//! know at all is driven as soon as it is noticed. One entry that cannot be read stands in the way of its own batch only,
//! and a drive that stopped early goes on where it was.
//!
//! A batch that ended and was forgotten is never driven: its entries go a minute after its end, since the end may be lost
//! too until then, at the latest before its rows; and entries that have grown as old as batches are kept are removed, not
//! driven. Those of a batch that takes longer are written again before that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_core::id::{BatchId, ProjectId};
use espalier_core::layout::{ChunkRange, JournalEntry};
use espalier_core::queue::{BatchView, Selector};
use espalier_core::time::Timestamp;
use espalier_runtime::backoff::Backoff;
use espalier_runtime::store::StoreError;
use espalier_runtime::telemetry;

use crate::api::Shared;
use crate::journal::{Entry, Journal, JournalError};
use crate::queue::{Condition, OpenBatch, Queue, QueueError};

/// Time between two looks at whether the queue's server is still the same.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Time between two rounds where nothing happened: entries of ended batches cost room only.
const ROUND_INTERVAL: Duration = Duration::from_secs(300);
/// Time after a round that stopped early. Coordinators that all saw the same do not come back together.
const RETRY: Backoff = Backoff {
    first: Duration::from_secs(2),
    max: ROUND_INTERVAL,
};
/// Time after a drive to the one that makes up for late acknowledgements: longer than one may take to notice that the
/// server is another one, and to write its entry.
const ONCE_MORE: Duration = Duration::from_secs(30);
/// How long the end of a batch may still be lost.
const SETTLED: Duration = Duration::from_secs(60);
/// How often chunks are given again of which jobs were rejected, since they may depend on jobs of later ones.
const TRIES_MAX: usize = 5;
/// So many entries that cannot be used say that the store is away.
const FAILED_MAX: usize = 10;

/// Why a round stopped early, or is to be gone through again.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the queue could not be asked")]
    Queue(#[from] QueueError),
    #[error("the journal could not be listed")]
    List(#[from] StoreError),
    #[error("{0} entries could not be used; the lines before this one name their batches")]
    Entries(usize),
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
    /// Entries that could not be used.
    failed: usize,
    /// When the end of the next batch is settled.
    next: Option<Duration>,
}

impl Done {
    fn fail(
        &mut self,
        project: &ProjectId,
        batch: &BatchId,
        error: &StoreError,
    ) -> Result<(), RoundError> {
        let error = telemetry::error_chain(error);
        tracing::warn!(%project, %batch, error, "an entry of the journal cannot be used");
        self.failed += 1;
        match self.failed {
            FAILED_MAX.. => Err(RoundError::Entries(self.failed)),
            _ => Ok(()),
        }
    }
}

/// A batch by name.
type Name = (ProjectId, BatchId);

/// When rounds are due, and how far the present drive is.
#[derive(Debug)]
struct Plan {
    /// The restarts of the queue that were seen.
    seen: Option<u64>,
    drive: bool,
    /// When to drive once more.
    again: Option<Instant>,
    /// All was driven once since the restart.
    is_second: bool,
    due: Instant,
    failures: u32,
    /// Batches that this drive is done with.
    driven: BTreeSet<Name>,
}

impl Plan {
    /// At the start nobody knows what happened before.
    fn new(seen: Option<u64>, now: Instant) -> Self {
        Self {
            seen,
            drive: true,
            again: None,
            is_second: false,
            due: now,
            failures: 0,
            driven: BTreeSet::new(),
        }
    }

    /// Whether a round is due.
    fn is_due(&mut self, restarts: Option<u64>, now: Instant) -> bool {
        if restarts != self.seen {
            *self = Self::new(restarts, now);
        }
        if !self.drive && self.again.is_some_and(|at| at <= now) {
            self.drive = true;
            self.driven.clear();
            self.due = now;
        }
        self.due <= now
    }

    fn note(&mut self, done: &Done, is_complete: bool, now: Instant) {
        let pause = if is_complete {
            if std::mem::take(&mut self.drive) {
                let is_first = !std::mem::replace(&mut self.is_second, true);
                self.again = is_first.then(|| now + ONCE_MORE);
            }
            self.failures = 0;
            let next = done.next.unwrap_or(ROUND_INTERVAL);
            next.clamp(LOOK_INTERVAL, ROUND_INTERVAL)
        } else {
            self.failures += 1;
            RETRY.jittered(self.failures)
        };
        self.due = now + pause;
    }
}

/// Runs rounds until the process aborts; ends at once where the queue loses nothing.
pub async fn run(shared: Arc<Shared>) {
    let mut plan = Plan::new(shared.journal.restarts(), Instant::now());
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while plan.seen.is_some() {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shared.shutdown.aborted() => return,
        }
        if !plan.is_due(shared.journal.restarts(), Instant::now())
            || shared.queue.condition().await != Condition::Serving
        {
            continue;
        }
        let on = Round {
            queue: shared.queue.as_ref(),
            journal: &shared.journal,
            now: shared.now(),
            keep: shared.config.keep(),
            drive: plan.drive,
        };
        let mut done = Done::default();
        let round = tokio::select! {
            round = on.run(&mut plan.driven, &mut done) => round,
            () = shared.shutdown.aborted() => return,
        };
        report(done);
        if let Err(error) = &round {
            let error = telemetry::error_chain(error);
            tracing::warn!(error, "the journal was not gone through");
        }
        plan.note(&done, round.is_ok(), Instant::now());
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
    chunks: Vec<ChunkRange>,
    /// When the newest entry was written.
    newest: Timestamp,
}

impl Kept {
    fn add(&mut self, entry: &Entry) {
        self.newest = self.newest.max(entry.modified);
        match entry.entry {
            JournalEntry::Open => self.opened = Some(entry.modified),
            JournalEntry::Chunks(range) => self.chunks.push(range),
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
        Some(batch) if batch.completed_at.is_some_and(|at| age(at) >= SETTLED) => Todo::Remove,
        Some(batch) if batch.completed_at.is_some() => Todo::Leave,
        // One that is cancelled is closed too, and takes nothing.
        Some(batch) if drive && !batch.cancelled => Todo::Drive,
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
    /// Passes over what was driven already, and adds to it. What was done is told after an error too.
    async fn run(&self, driven: &mut BTreeSet<Name>, done: &mut Done) -> Result<(), RoundError> {
        let restarts = self.queue.restarts();
        let mut lost = Vec::new();
        for ((project, batch), kept) in self.all().await? {
            let found = self.queue.batch(project.clone(), batch.clone()).await?;
            let name = (project, batch);
            let drive = self.drive && !driven.contains(&name);
            match verdict(&kept, found.as_ref(), self.now, self.keep, drive) {
                Todo::Leave => {}
                Todo::Remove => self.remove(&name, &kept, found.as_ref(), done).await?,
                Todo::Refresh => {
                    if let Err(error) = self.journal.refresh(&name.0, &name.1).await {
                        done.fail(&name.0, &name.1, &error)?;
                    }
                }
                Todo::Drive => lost.extend(self.lost(name, kept, found.as_ref(), done).await?),
            }
            if let Some(at) = found.and_then(|batch| batch.completed_at) {
                let left = SETTLED.checked_sub(self.now.since(at));
                done.next = [done.next, left].into_iter().flatten().min();
            }
        }
        self.give_again(lost, driven, done).await?;
        if done.failed > 0 {
            return Err(RoundError::Entries(done.failed));
        }
        if let Some(restarts) = restarts.filter(|_| self.drive) {
            self.journal.note_whole(restarts);
        }
        Ok(())
    }

    /// Removes what is kept of one batch, unless the queue brought it to an end without a chunk that was acknowledged.
    async fn remove(
        &self,
        (project, batch): &Name,
        kept: &Kept,
        found: Option<&BatchView>,
        done: &mut Done,
    ) -> Result<(), RoundError> {
        if found.is_some_and(|found| !found.cancelled) {
            let lacking = self.journal.lacking(project, batch, &kept.chunks).await?;
            if !lacking.is_empty() {
                tracing::error!(
                    %project, %batch, chunks = ?lacking,
                    "a batch ended without chunks that were acknowledged: they stay in the journal until it is forgotten"
                );
                return Ok(());
            }
        }
        match self.journal.forget(project, batch).await {
            Ok(()) => done.removed += 1,
            Err(error) => done.fail(project, batch, &error)?,
        }
        Ok(())
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

    /// None where the entries are gone, or cannot be read.
    async fn lost(
        &self,
        (project, batch): Name,
        kept: Kept,
        found: Option<&BatchView>,
        done: &mut Done,
    ) -> Result<Option<Lost>, RoundError> {
        let (open, opened_at) = if let Some(view) = found {
            (None, view.opened_at)
        } else {
            match self.journal.opened(&project, &batch).await {
                Ok((open, opened_at)) => (Some(open), opened_at),
                Err(JournalError::Store(error)) if error.is_not_found() => return Ok(None),
                Err(error) => {
                    is_final(error, &project, &batch, done)?;
                    return Ok(None);
                }
            }
        };
        Ok(Some(Lost {
            name: (project, batch),
            kept,
            opened_at,
            open,
            is_partial: false,
        }))
    }

    /// Opens what is not known, submits every chunk, and closes and cancels at the end: a closed batch takes nothing new.
    async fn give_again(
        &self,
        mut lost: Vec<Lost>,
        driven: &mut BTreeSet<Name>,
        done: &mut Done,
    ) -> Result<(), RoundError> {
        // A job may depend on one of a batch that was opened earlier.
        lost.sort_by_key(|one| one.opened_at);
        for one in &lost {
            if let Some(open) = one.open.clone() {
                let opened = refused(self.queue.open_batch(open).await, one)?;
                done.opened += u64::from(opened.is_some());
            }
        }
        for tries in 1..=TRIES_MAX {
            let mut rejected = Vec::new();
            for mut one in lost {
                self.give_chunks(&mut one, tries == TRIES_MAX, done).await?;
                if !one.kept.chunks.is_empty() {
                    rejected.push(one);
                } else if !one.is_partial {
                    self.end(&one).await?;
                    driven.insert(one.name);
                }
            }
            lost = rejected;
            if lost.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Submits the chunks of one batch; those of which jobs were rejected are left in it.
    async fn give_chunks(
        &self,
        one: &mut Lost,
        is_last: bool,
        done: &mut Done,
    ) -> Result<(), RoundError> {
        let (project, batch) = &one.name;
        for range in std::mem::take(&mut one.kept.chunks) {
            let given = match self.journal.give(project, batch, range).await {
                Ok(given) => given,
                Err(error) => {
                    one.is_partial |= !is_final(error, project, batch, done)?;
                    continue;
                }
            };
            done.jobs += given.new;
            if !given.rejected.is_empty() && !is_last {
                one.kept.chunks.push(range);
                continue;
            }
            for (job, error) in given.rejected {
                tracing::error!(%project, %batch, %job, error = %error, "an acknowledged job cannot be given again");
            }
        }
        Ok(())
    }

    async fn end(&self, one: &Lost) -> Result<(), QueueError> {
        let (project, batch) = one.name.clone();
        if one.kept.cancelled {
            let all = Selector::Batch(project, batch);
            refused(self.queue.cancel(all).await, one)?;
        } else if one.kept.closed {
            refused(self.queue.close_batch(project, batch).await, one)?;
        }
        Ok(())
    }
}

/// A batch of which the queue may lack something.
struct Lost {
    name: Name,
    kept: Kept,
    opened_at: Timestamp,
    /// What it is opened with where the queue does not know it.
    open: Option<OpenBatch>,
    /// A chunk of it could not be read, so that it must stay open.
    is_partial: bool,
}

/// Whether no try will bring back what an entry holds, so that its batch goes on without it. Ends the round where that
/// cannot be told, or too many entries fail.
fn is_final(
    error: JournalError,
    project: &ProjectId,
    batch: &BatchId,
    done: &mut Done,
) -> Result<bool, RoundError> {
    match error {
        JournalError::Store(error) => done.fail(project, batch, &error).map(|()| false),
        JournalError::Unreadable(_) | JournalError::Queue(QueueError::Refused(_)) => {
            tracing::error!(%project, %batch, error = %error, "acknowledged work cannot be given again");
            Ok(true)
        }
        JournalError::Queue(error) => Err(error.into()),
    }
}

/// None, and a line in the log, where the queue refuses: asking again would not help.
fn refused<T>(answer: Result<T, QueueError>, one: &Lost) -> Result<Option<T>, QueueError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(QueueError::Refused(refusal)) => {
            let (project, batch) = &one.name;
            tracing::error!(%project, %batch, error = %refusal, "acknowledged work cannot be given again");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
