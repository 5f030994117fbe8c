//! The queue in one file on this machine: the pure state machine in memory, journalled to redb in group commits.
//!
//! [`Embedded`] is a handle: each method sends one call to the thread of [`engine`] and waits for its answer. What it
//! gives that the trait does not promise: a second process on the same file is refused, and all of a queue's jobs are
//! in memory (about 400 bytes each), payloads excepted.

#[cfg(test)]
mod disk;
mod engine;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::FieldError;
use espalier_core::id::{BatchId, CoordinatorId, JobId, JobKey, ProjectId};
use espalier_core::queue::{
    BatchSeq, BatchView, Cancelled, Cursor, EndedJob, Event, FinishReply, Grant, JobFilter,
    JobKind, JobSeq, JobView, LeaseRequest, Machine, MachineConfig, Outcome as Bare, QueueStats,
    Refusal, RenewReply, Selector, Ticked,
};
use espalier_core::time::Timestamp;
use espalier_runtime::clock::Clock;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::limits::{check_changes, check_defaults, check_result, parted};
use super::presence::Presence;
use super::{
    Answer, Change, Chunk, ChunkReply, Condition, DUE_LOOK_MAX, EndedPage, Finish, FinishAck,
    Granted, Intake, JobDetail, JobResult, JobSpec, OpenBatch, Outcome, PAGE_MAX, Queue,
    QueueError, Renewal, Shown, Table,
};
use engine::{Call, Chain, Engine, QueueClock, Reply, Turn};
use store::{OpenDatabase, Reader, StoreError};

/// Calls that wait for the thread. A full channel makes callers wait, which is the back pressure that they pass on.
const CALLS_MAX: usize = 1_024;
/// Jobs that one call looks at, cancels, puts back or forgets, whatever it was asked for: some milliseconds of the only
/// thread. The rest follows in further calls, so that others get their turn in between.
const PAGE_JOBS_MAX: usize = 2_000;
/// Events that a slow listener may lag behind before it loses some.
const EVENTS_MAX: usize = 1_024;

/// Where the queue is and how much it may use.
#[derive(Clone)]
pub struct EmbeddedConfig {
    /// The redb file; created with its folder if it does not exist.
    pub path: PathBuf,
    /// Pages of the file that are kept in memory, in bytes. See [`EmbeddedConfig::CACHE_BYTES_DEFAULT`].
    pub cache_bytes: usize,
    /// Shares of projects.
    pub machine: MachineConfig,
    /// The only clock that counts.
    pub clock: Arc<dyn Clock>,
}

impl EmbeddedConfig {
    /// Enough for the inner pages of a file with a million jobs. An idle coordinator stays below 30 MB with it.
    pub const CACHE_BYTES_DEFAULT: usize = 8 << 20;

    /// A queue at `path` with every default.
    pub fn new(path: impl Into<PathBuf>, clock: Arc<dyn Clock>) -> Self {
        Self {
            path: path.into(),
            cache_bytes: Self::CACHE_BYTES_DEFAULT,
            machine: MachineConfig::default(),
            clock,
        }
    }
}

/// Why a queue could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process, or another handle of this one, has the file open.
    #[error("the queue's file {} is in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The folder of the file cannot be made or synced.
    #[error("the folder of the queue's file {} cannot be made or synced", path.display())]
    Folder {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be read, or holds something else.
    #[error("the queue's file {} cannot be opened: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The thread cannot be started.
    #[error("the queue's thread cannot be started")]
    Thread(#[source] std::io::Error),
}

/// The embedded queue. Dropping it stores what is under way and closes the file.
#[derive(Debug)]
pub struct Embedded {
    calls: Mutex<Option<mpsc::Sender<Call>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    clock: Arc<QueueClock>,
    events: broadcast::Sender<Event>,
    presence: Presence,
}

impl Embedded {
    /// Opens or creates the file and reads all jobs. Blocks: a few seconds for a million jobs.
    pub fn open(config: EmbeddedConfig) -> Result<Self, OpenError> {
        let folder_error = |source| OpenError::Folder {
            path: config.path.clone(),
            source,
        };
        let folder = match config.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(folder).map_err(folder_error)?;
        let queue = Self::open_with(config.clone(), store::in_file(&config.path))?;
        // A file that is new to its folder outlasts a power cut only when the folder is synced too.
        std::fs::File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(folder_error)?;
        Ok(queue)
    }

    fn open_with(config: EmbeddedConfig, open: OpenDatabase) -> Result<Self, OpenError> {
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let path = config.path.clone();
        let clock = Arc::new(QueueClock::new(Arc::clone(&config.clock)));
        let engine = Engine::open(open, config, Arc::clone(&clock), events.clone())
            .map_err(|error| open_error(&path, error))?;
        let (calls, waiting) = mpsc::channel(CALLS_MAX);
        let thread = std::thread::Builder::new()
            .name("queue".to_owned())
            .spawn(move || engine.run(waiting))
            .map_err(OpenError::Thread)?;
        Ok(Self {
            calls: Mutex::new(Some(calls)),
            thread: Mutex::new(Some(thread)),
            clock,
            events,
            presence: Presence::default(),
        })
    }

    fn check_open(&self) -> Result<(), QueueError> {
        match lock(&self.calls).is_some() {
            true => Ok(()),
            false => Err(QueueError::Closed),
        }
    }

    /// The time by which the queue decides: never behind what its file says, whatever the machine's clock was set to.
    /// Whoever reckons with the queue's deadlines and delays reads this clock.
    pub fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock) as _
    }

    /// Sends one call and waits for its answer: `apply` runs on the machine, `finish` when its effect is stored.
    async fn call<U: Send + 'static, T: Send + 'static>(
        &self,
        admits: bool,
        bytes: usize,
        apply: impl FnOnce(&mut Turn<'_>) -> Result<U, QueueError> + Send + 'static,
        finish: impl FnOnce(U, &Reader) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, QueueError> {
        let calls = lock(&self.calls).clone().ok_or(QueueError::Closed)?;
        let (answer, answered) = oneshot::channel();
        let apply = move |turn: Result<Turn<'_>, QueueError>| -> Reply {
            let applied = turn.and_then(|mut turn| apply(&mut turn));
            Box::new(move |stored| {
                let result = match (stored, applied) {
                    (Err(error), _) | (_, Err(error)) => Err(error),
                    (Ok(reader), Ok(applied)) => finish(applied, reader).map_err(|error| {
                        engine::unavailable(&Chain(&error).to_string(), Duration::from_secs(1))
                    }),
                };
                // The caller may have gone; what it asked for is done all the same.
                let _ = answer.send(result);
            })
        };
        let call = Call {
            admits,
            bytes,
            apply: Box::new(apply),
        };
        calls.send(call).await.map_err(|_| QueueError::Closed)?;
        match answered.await {
            Ok(result) => result,
            Err(_) => Err(engine::unavailable(
                "an internal rule failed; the coordinator's log has the details",
                engine::ADMISSION_PAUSE,
            )),
        }
    }

    /// A call that needs nothing from the file.
    fn ask<T: Send + 'static>(
        &self,
        apply: impl FnOnce(&mut Machine, Timestamp) -> Result<T, QueueError> + Send + 'static,
    ) -> Answer<'_, T> {
        self.call(
            false,
            0,
            |turn| apply(turn.machine, turn.now),
            |answer, _| Ok(answer),
        )
        .boxed()
    }
}

impl Embedded {
    /// Does page after page of a command on many jobs, each in a call of its own.
    async fn in_pages<T: Send + 'static>(
        &self,
        which: Selector,
        page: fn(&mut Machine, Timestamp, &mut Cursor, &Selector) -> Result<T, Refusal>,
        mut add: impl FnMut(T) + Send,
    ) -> Result<(), QueueError> {
        let which = Arc::new(which);
        let mut cursor = Cursor::default();
        while !cursor.is_at_end() {
            let (which, mut at) = (Arc::clone(&which), cursor);
            let done = self.ask(move |machine, now| {
                let done = page(machine, now, &mut at, &which)?;
                Ok((done, at))
            });
            let (done, at) = done.await?;
            add(done);
            cursor = at;
        }
        Ok(())
    }
}

fn ago(now: Timestamp, age: Duration) -> Timestamp {
    let age_us = u64::try_from(age.as_micros()).unwrap_or(u64::MAX);
    Timestamp(now.0.saturating_sub(age_us))
}

impl Drop for Embedded {
    fn drop(&mut self) {
        lock(&self.calls).take();
        if let Some(thread) = lock(&self.thread).take() {
            // It ends after the group that is under way, which is bounded; a panic in it was logged.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_error(path: &Path, error: StoreError) -> OpenError {
    let path = path.to_owned();
    match error {
        StoreError::Open(redb::DatabaseError::DatabaseAlreadyOpen) => OpenError::InUse { path },
        error => OpenError::Unusable {
            path,
            reason: Chain(&error).to_string(),
        },
    }
}

impl Queue for Embedded {
    fn open_batch(&self, request: OpenBatch) -> Answer<'_, BatchView> {
        let apply = move |turn: &mut Turn<'_>| {
            check_defaults(&request.defaults)?;
            let known = turn
                .machine
                .batch(&request.batch.project, &request.batch.batch);
            let view = turn.machine.open_batch(turn.now, &request.batch)?;
            if known.is_err() {
                turn.payloads.defaults.push((view.seq, request.defaults));
            }
            Ok(view)
        };
        self.call(true, 0, apply, |view, _| Ok(view)).boxed()
    }

    fn submit(&self, chunk: Chunk) -> Answer<'_, ChunkReply> {
        let bytes = chunk.jobs.iter().map(|job| job.spec.len()).sum();
        let apply = move |turn: &mut Turn<'_>| {
            let (jobs, mut specs) = parted("jobs", chunk.jobs)?;
            let machine = &mut *turn.machine;
            let (project, batch) = (&chunk.project, &chunk.batch);
            let answer = machine.submit(turn.now, project, batch, chunk.n, chunk.digest, jobs)?;
            keep_specs(turn, &mut specs, answer.added);
            Ok(ChunkReply {
                items: answer.items,
                repeated: answer.repeated,
            })
        };
        self.call(true, bytes, apply, |reply, _| Ok(reply)).boxed()
    }

    fn close_batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, BatchView> {
        self.ask(move |machine, now| Ok(machine.close_batch(now, &project, &batch)?))
    }

    fn lease(&self, request: LeaseRequest) -> Answer<'_, Vec<Granted>> {
        let apply = move |turn: &mut Turn<'_>| Ok(turn.machine.lease(turn.now, &request)?);
        self.call(false, 0, apply, |grants, reader| {
            with_payloads(grants, reader)
        })
        .boxed()
    }

    fn renew(&self, renewals: Vec<Renewal>) -> Answer<'_, Vec<RenewReply>> {
        self.ask(move |machine, now| {
            let replies = renewals.iter().map(|renewal| {
                let progress = renewal.progress.as_deref();
                machine.renew(now, &renewal.key, renewal.fence, progress)
            });
            Ok(replies.collect())
        })
    }

    fn finish(&self, finishes: Vec<Finish>) -> Answer<'_, Vec<FinishAck>> {
        let apply = move |turn: &mut Turn<'_>| {
            let acks = finishes.into_iter().map(|finish| finish_one(turn, finish));
            Ok(acks.collect())
        };
        self.call(false, 0, apply, |acks, _| Ok(acks)).boxed()
    }

    fn cancel(&self, which: Selector) -> Answer<'_, Cancelled> {
        async move {
            let mut done = Cancelled::default();
            let page = |machine: &mut Machine, now, cursor: &mut Cursor, which: &Selector| {
                machine.cancel_some(now, which, cursor, PAGE_JOBS_MAX)
            };
            let add = |page: Cancelled| {
                done.cancelled += page.cancelled;
                done.requested += page.requested;
            };
            self.in_pages(which, page, add).await?;
            Ok(done)
        }
        .boxed()
    }

    fn requeue_dead(&self, which: Selector) -> Answer<'_, u64> {
        async move {
            let mut back = 0;
            let page = |machine: &mut Machine, now, cursor: &mut Cursor, which: &Selector| {
                machine.requeue_some(now, which, cursor, PAGE_JOBS_MAX)
            };
            self.in_pages(which, page, |page: u64| back += page).await?;
            Ok(back)
        }
        .boxed()
    }

    fn tick(&self, limit: usize) -> Answer<'_, Ticked> {
        self.ask(move |machine, now| Ok(machine.tick(now, limit)))
    }

    fn extend_leases(&self, by: Duration) -> Answer<'_, ()> {
        self.ask(move |machine, _| {
            machine.extend_leases(by);
            Ok(())
        })
    }

    fn purge(&self, older_than: Duration, limit: usize) -> Answer<'_, Vec<(ProjectId, BatchId)>> {
        async move {
            let names = self.ask(move |machine, now| {
                let due = machine.purgeable(ago(now, older_than), limit.min(PAGE_MAX));
                for (project, batch) in &due {
                    machine.forget_name(now, project, batch)?;
                }
                Ok(due)
            });
            let names = names.await?;
            // What a call that was broken off has left goes with the rest.
            while self
                .ask(|machine, _| Ok(machine.purge_some(PAGE_JOBS_MAX)))
                .await?
            {}
            Ok(names)
        }
        .boxed()
    }

    fn close_idle(
        &self,
        idle_for: Duration,
        limit: usize,
    ) -> Answer<'_, Vec<(ProjectId, BatchId)>> {
        let limit = limit.min(PAGE_MAX);
        self.ask(move |machine, now| Ok(machine.close_idle(now, ago(now, idle_for), limit)))
    }

    fn job(&self, key: JobKey) -> Answer<'_, Option<JobDetail>> {
        let apply = move |turn: &mut Turn<'_>| Ok(turn.machine.job(&key));
        let finish = |job: Option<JobView>, reader: &Reader| {
            Ok(with_results(job.into_iter().collect(), reader)?.pop())
        };
        self.call(false, 0, apply, finish).boxed()
    }

    fn spec(&self, key: JobKey) -> Answer<'_, Option<JobSpec>> {
        let apply = move |turn: &mut Turn<'_>| Ok(turn.machine.numbers_of(&key));
        let finish = |numbers: Option<_>, reader: &Reader| {
            let Some((batch, job)) = numbers else {
                return Ok(None);
            };
            let spec = reader.specs(std::iter::once(job))?.pop();
            let defaults = reader.defaults(batch)?;
            Ok(spec.map(|spec| JobSpec { spec, defaults }))
        };
        self.call(false, 0, apply, finish).boxed()
    }

    fn batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<BatchView>> {
        self.ask(move |machine, _| Ok(machine.batch(&project, &batch).ok()))
    }

    fn defaults(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<Bytes>> {
        let apply = move |turn: &mut Turn<'_>| {
            let batch = turn.machine.batch(&project, &batch).ok();
            Ok(batch.map(|batch| batch.seq))
        };
        let finish = |batch: Option<BatchSeq>, reader: &Reader| {
            batch.map(|batch| reader.defaults(batch)).transpose()
        };
        self.call(false, 0, apply, finish).boxed()
    }

    fn intake(&self, project: ProjectId, batch: BatchId, chunk: u32) -> Answer<'_, Option<Intake>> {
        let apply = move |turn: &mut Turn<'_>| {
            let Ok(found) = turn.machine.batch(&project, &batch) else {
                return Ok(None);
            };
            let digest = turn.machine.chunk_digest(&project, &batch, chunk);
            Ok(Some((found.seq, digest, turn.machine.waiting(&project))))
        };
        let finish = |found: Option<_>, reader: &Reader| {
            let intake = |(batch, digest, waiting)| {
                let defaults = reader.defaults(batch)?;
                Ok(Intake {
                    defaults,
                    digest,
                    waiting,
                })
            };
            found.map(intake).transpose()
        };
        self.call(false, 0, apply, finish).boxed()
    }

    fn chunk_digest(
        &self,
        project: ProjectId,
        batch: BatchId,
        n: u32,
    ) -> Answer<'_, Option<[u8; 32]>> {
        self.ask(move |machine, _| Ok(machine.chunk_digest(&project, &batch, n)))
    }

    fn batches(
        &self,
        project: ProjectId,
        after: Option<BatchId>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>> {
        let limit = limit.min(PAGE_MAX);
        self.ask(move |machine, _| Ok(machine.batches(&project, after.as_ref(), limit)))
    }

    fn batches_newest(
        &self,
        project: ProjectId,
        before: Option<BatchSeq>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>> {
        let limit = limit.min(PAGE_MAX);
        self.ask(move |machine, _| Ok(machine.batches_newest(&project, before, limit)))
    }

    fn jobs(
        &self,
        project: ProjectId,
        batch: BatchId,
        filter: JobFilter,
        after: Option<JobId>,
        limit: usize,
    ) -> Answer<'_, Vec<JobDetail>> {
        let limit = limit.min(PAGE_MAX);
        let of = Arc::new((project, batch, filter));
        async move {
            let (mut found, mut after) = (Vec::new(), after);
            loop {
                let (of, from) = (Arc::clone(&of), after);
                let left = limit - found.len();
                let apply = move |turn: &mut Turn<'_>| {
                    let (project, batch, filter) = &*of;
                    let (of, from) = ((project, batch), from.as_ref());
                    Ok(turn
                        .machine
                        .jobs_among(of, filter, from, left, PAGE_JOBS_MAX)?)
                };
                let finish = |(jobs, next): (Vec<JobView>, Option<JobId>), reader: &Reader| {
                    Ok((with_results(jobs, reader)?, next))
                };
                let (jobs, next) = self.call(false, 0, apply, finish).await?;
                found.extend(jobs);
                after = next;
                if after.is_none() || found.len() == limit {
                    return Ok(found);
                }
            }
        }
        .boxed()
    }

    fn ended_after(
        &self,
        project: ProjectId,
        batch: BatchId,
        after: u64,
        limit: usize,
    ) -> Answer<'_, EndedPage> {
        let limit = limit.min(PAGE_MAX);
        let apply = move |turn: &mut Turn<'_>| {
            let ended = turn.machine.ended_after(&project, &batch, after, limit)?;
            Ok((ended, turn.machine.batch(&project, &batch)?))
        };
        let finish = |(ended, batch): (Vec<EndedJob>, BatchView), reader: &Reader| {
            let (numbers, jobs): (Vec<_>, Vec<_>) = ended
                .into_iter()
                .map(|ended| (ended.seq, ended.job))
                .unzip();
            let jobs = numbers.into_iter().zip(with_results(jobs, reader)?);
            Ok(EndedPage {
                jobs: jobs.collect(),
                batch,
            })
        };
        self.call(false, 0, apply, finish).boxed()
    }

    fn stats(&self) -> Answer<'_, QueueStats> {
        self.ask(|machine, now| Ok(machine.stats(now)))
    }

    fn due_soon(&self, within: Duration) -> Answer<'_, BTreeMap<JobKind, u64>> {
        self.ask(move |machine, now| Ok(machine.due_soon(now, within, DUE_LOOK_MAX)))
    }

    fn announce(&self, by: CoordinatorId, changes: Vec<Change>) -> Answer<'_, bool> {
        async move {
            self.check_open()?;
            check_changes(&changes)?;
            Ok(self.presence.announce(by, changes, self.clock.now()))
        }
        .boxed()
    }

    fn shown(&self, table: Table) -> Answer<'_, Vec<Shown>> {
        async move {
            self.check_open()?;
            Ok(self.presence.shown(table, self.clock.now()))
        }
        .boxed()
    }

    fn tell(&self, notice: Bytes) -> Answer<'_, ()> {
        async move {
            self.check_open()?;
            // Nobody listens: nobody is to be told.
            let _ = self.events.send(Event::Notice(notice.into()));
            Ok(())
        }
        .boxed()
    }

    fn restarts(&self) -> Option<u64> {
        None
    }

    fn condition(&self) -> BoxFuture<'_, Condition> {
        // A call that would bring work is refused for the reason for which work is.
        let asked = self.call(true, 0, |_| Ok(()), |(), _| Ok(()));
        async move {
            match asked.await {
                Ok(()) => Condition::Serving,
                Err(QueueError::Unavailable { reason, .. }) => Condition::Full { reason },
                Err(error) => Condition::Away {
                    reason: error.to_string(),
                },
            }
        }
        .boxed()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            lock(&self.calls).take();
            let thread = lock(&self.thread).take();
            if let Some(thread) = thread {
                let ended = espalier_runtime::tasks::blocking("queue.close", || thread.join());
                // A panic of the thread was logged by the hook.
                let _ = ended.await;
            }
        }
        .boxed()
    }
}

fn keep_specs(turn: &mut Turn<'_>, specs: &mut [Bytes], added: Vec<(usize, JobSeq)>) {
    let kept = added
        .into_iter()
        .map(|(n, seq)| (seq, std::mem::take(&mut specs[n])));
    turn.payloads.specs.extend(kept);
}

fn finish_one(turn: &mut Turn<'_>, finish: Finish) -> FinishAck {
    match try_finish(turn, finish) {
        Ok(ack) => ack,
        Err(error) => FinishAck::Refused(error),
    }
}

fn try_finish(turn: &mut Turn<'_>, finish: Finish) -> Result<FinishAck, FieldError> {
    let (outcome, mut specs, result) = match finish.outcome {
        Outcome::Succeeded { result, spawn } => {
            check_result(&result)?;
            let (spawn, specs) = parted("spawn", spawn)?;
            (Bare::Succeeded { spawn }, specs, Some(result))
        }
        Outcome::Failed {
            class,
            message,
            log_tail,
            retry_after,
        } => {
            let failed = Bare::Failed {
                class,
                message,
                log_tail,
                retry_after,
            };
            (failed, Vec::new(), None)
        }
        Outcome::Released => (Bare::Released, Vec::new(), None),
    };
    let machine = &mut *turn.machine;
    Ok(
        match machine.finish(turn.now, &finish.key, finish.fence, outcome) {
            FinishReply::Accepted { seq, spawned } => {
                keep_specs(turn, &mut specs, spawned);
                let kept = result.filter(|result| *result != JobResult::default());
                turn.payloads
                    .results
                    .extend(kept.map(|result| (seq, result)));
                FinishAck::Accepted
            }
            FinishReply::AlreadyFinished => FinishAck::AlreadyFinished,
            FinishReply::Stale => FinishAck::Stale,
            FinishReply::SpawnRefused(error) => FinishAck::Refused(error),
        },
    )
}

fn with_payloads(grants: Vec<Grant>, reader: &Reader) -> Result<Vec<Granted>, StoreError> {
    let specs = reader.specs(grants.iter().map(|grant| grant.seq))?;
    let mut last: Option<(BatchSeq, Bytes)> = None;
    let mut granted = Vec::with_capacity(grants.len());
    for (grant, spec) in grants.into_iter().zip(specs) {
        let defaults = match &last {
            Some((batch, defaults)) if *batch == grant.batch_seq => defaults.clone(),
            _ => reader.defaults(grant.batch_seq)?,
        };
        last = Some((grant.batch_seq, defaults.clone()));
        granted.push(Granted {
            grant,
            spec,
            defaults,
        });
    }
    Ok(granted)
}

fn with_results(jobs: Vec<JobView>, reader: &Reader) -> Result<Vec<JobDetail>, StoreError> {
    let results = reader.results(jobs.iter().map(|job| job.seq))?;
    let details = jobs.into_iter().zip(results);
    Ok(details
        .map(|(job, result)| JobDetail { job, result })
        .collect())
}
