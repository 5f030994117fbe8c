//! The job queue behind one trait: what every backend promises, and what goes in and out.
//!
//! The rules are those of [`espalier_core::queue`]; a backend adds durability and the payloads that the rules do not
//! look at (specs, defaults, results). The API layer and the maintenance tasks call it. It knows nothing of gRPC, of
//! workers' streams or of what a spec says.
//!
//! [`Queue`] is used as `Arc<dyn Queue>`: the backend is chosen by configuration at start, and an enum or a type
//! parameter would carry that choice through every signature of the API layer. The price is one allocated future per
//! call, and every method takes a batch, so that the price is paid once for many jobs.

pub mod bench;
#[cfg(test)]
mod conformance;
mod embedded;
mod limits;
mod presence;
mod redis;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use espalier_core::error::{ErrorClass, FieldError};
use espalier_core::id::{BatchId, CoordinatorId, Fence, JobKey, ProjectId};
use espalier_core::queue::{
    BatchSeq, BatchView, Cancelled, Event, Grant, ItemResult, JobFilter, JobKind, JobView,
    LeaseRequest, NewBatch, NewJob, QueueStats, Refusal, RenewReply, Selector, Ticked,
};
use futures::future::BoxFuture;
use tokio::sync::broadcast;

pub use embedded::{Embedded, EmbeddedConfig, OpenError};
pub use redis::{Acknowledge, Aspect, ConnectError, Grade, Redis, RedisConfig, Unfit, examine};

/// Largest spec of one job, in bytes: what is bigger lives in object storage by reference (`design.md` §4 puts the
/// border for clients lower; this is what a backend must be able to keep).
pub const SPEC_BYTES_MAX: usize = 64 * 1024;
/// Largest summary of a result, in bytes.
pub const SUMMARY_BYTES_MAX: usize = 4 * 1024;
/// Longest path of a manifest, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 1_024;
/// Most rows that one read returns, whatever was asked.
pub const PAGE_MAX: usize = 1_000;

/// Most delayed jobs that [`Queue::due_soon`] looks at, of each part of the queue.
pub const DUE_LOOK_MAX: usize = 1_000;

/// How long what a coordinator shows is seen after the last time it announced something, by the queue's clock.
pub const PRESENCE_TTL: Duration = Duration::from_secs(15);
/// Most changes of one announcement.
pub const ANNOUNCE_MAX: usize = 1_000;
/// Longest key of what a coordinator shows, in bytes.
pub const SHOWN_KEY_BYTES_MAX: usize = 512;
/// Largest value of it: a worker with as many and as long tags as it may have.
pub const SHOWN_VALUE_BYTES_MAX: usize = 128 * 1024;

/// Why a queue did not do what it was asked to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QueueError {
    /// The request as a whole breaks a rule; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The backend cannot store or answer now. Whether the request took effect is unknown only if the connection
    /// to it was lost; every request may be repeated as it was.
    #[error("the queue is unavailable: {reason}")]
    Unavailable {
        /// What failed, on what, and what helps where somebody has to do something; for clients too, so no secrets.
        reason: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The queue was closed by this process.
    #[error("the queue is closed")]
    Closed,
}

impl From<FieldError> for QueueError {
    fn from(error: FieldError) -> Self {
        Self::Refused(Refusal::Field(error))
    }
}

/// The lists that the coordinators of a queue show each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// The workers that are connected to them.
    Workers,
    /// The MCP servers that those offer.
    Servers,
    /// What rollouts ask.
    Questions,
    /// What operators and people have decided, for whoever it concerns.
    Orders,
    /// The providers of workers that they may ask.
    Scalers,
}

impl Table {
    /// Its name, which is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Workers => "workers",
            Self::Servers => "servers",
            Self::Questions => "questions",
            Self::Orders => "orders",
            Self::Scalers => "scalers",
        }
    }
}

/// What becomes of one entry that a coordinator shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// In which list.
    pub table: Table,
    /// Unique among the entries of this coordinator in that list; at most [`SHOWN_KEY_BYTES_MAX`].
    pub key: String,
    /// At most [`SHOWN_VALUE_BYTES_MAX`], opaque; `None` takes the entry away.
    pub value: Option<Bytes>,
}

/// An entry that a coordinator shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Who shows it.
    pub by: CoordinatorId,
    /// As announced.
    pub key: String,
    /// As announced.
    pub value: Bytes,
}

/// How a queue is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It takes and answers everything.
    Serving,
    /// It takes no new work; what is there goes on.
    Full {
        /// Of what there is too little, and what helps; for clients too, so no secrets.
        reason: String,
    },
    /// It cannot be asked.
    Away {
        /// What failed; for clients too, so no secrets.
        reason: String,
    },
}

/// The answer of a queue.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, QueueError>>;

/// A batch to open.
#[derive(Clone, Debug)]
pub struct OpenBatch {
    /// What the rules look at.
    pub batch: NewBatch,
    /// What the jobs of the batch have in common; opaque.
    pub defaults: Bytes,
}

/// A job to submit.
#[derive(Clone, Debug)]
pub struct Submission {
    /// What the rules look at.
    pub job: NewJob,
    /// The rest; opaque, at most [`SPEC_BYTES_MAX`].
    pub spec: Bytes,
}

/// Some jobs of a batch, submitted together.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The tenant.
    pub project: ProjectId,
    /// The batch, which is open.
    pub batch: BatchId,
    /// The number of the chunk within the batch, chosen by the client.
    pub n: u32,
    /// Digest of the chunk as the client sent it, whatever the caller left out of `jobs`.
    pub digest: [u8; 32],
    /// At most [`espalier_core::queue::CHUNK_JOBS_MAX`].
    pub jobs: Vec<Submission>,
}

/// The answer to a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkReply {
    /// One result for each job, in the order of the chunk.
    pub items: Vec<ItemResult>,
    /// The chunk had been taken before: what it brought then is there already.
    pub repeated: bool,
}

/// A grant with its payloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// What the rules say.
    pub grant: Grant,
    /// The job's spec as submitted.
    pub spec: Bytes,
    /// The batch's defaults as opened.
    pub defaults: Bytes,
}

/// A lease to prolong.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// Which job.
    pub key: JobKey,
    /// Under which lease.
    pub fence: Fence,
    /// One line about how far it is; shown, not stored. `None` keeps the last one.
    pub progress: Option<String>,
}

/// What a successful attempt leaves in the queue; the rest is in object storage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobResult {
    /// Opaque, at most [`SUMMARY_BYTES_MAX`].
    pub summary: Bytes,
    /// Path of the manifest in the object store.
    pub manifest: String,
}

/// How an attempt ended, with payloads.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The job is done. `spawn` joins the same batch together with this finish, closed or not.
    Succeeded {
        /// What it leaves.
        result: JobResult,
        /// Jobs that follow from it.
        spawn: Vec<Submission>,
    },
    /// It failed, or was cancelled, or was stopped: the class says which.
    Failed {
        /// What sort of failure.
        class: ErrorClass,
        /// One line for people.
        message: String,
        /// The last lines of the attempt's log.
        log_tail: String,
        /// Earliest next try, from now.
        retry_after: Option<Duration>,
    },
    /// Stopped in good order before the end; spends nothing.
    Released,
}

/// The end of one attempt.
#[derive(Clone, Debug)]
pub struct Finish {
    /// Which job.
    pub key: JobKey,
    /// Under which lease.
    pub fence: Fence,
    /// How.
    pub outcome: Outcome,
}

/// The answer to one finish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishAck {
    /// It counts, and is stored.
    Accepted,
    /// It counted before; this is a repetition.
    AlreadyFinished,
    /// The lease is not the job's present one. Nothing changed.
    Stale,
    /// A part of the outcome breaks a rule. Nothing changed and the lease holds: finish in another way.
    Refused(FieldError),
}

/// A job with what it left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobDetail {
    /// The job.
    pub job: JobView,
    /// What it left, if it succeeded.
    pub result: Option<JobResult>,
}

/// What a job was submitted with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSpec {
    /// The job's spec.
    pub spec: Bytes,
    /// The batch's defaults.
    pub defaults: Bytes,
}

/// One page of a batch's ended jobs, in the order in which they ended.
#[derive(Clone, Debug)]
pub struct EndedPage {
    /// End number and job. Ask again with the last number.
    pub jobs: Vec<(u64, JobDetail)>,
    /// The batch at the moment of the page.
    pub batch: BatchView,
}

/// What taking in a chunk has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intake {
    /// The defaults that the batch was opened with: what the chunk's jobs are read on top of.
    pub defaults: Bytes,
    /// The digest under which the chunk was taken before.
    pub digest: Option<[u8; 32]>,
    /// Jobs of the project that wait: blocked, delayed or ready.
    pub waiting: u64,
}

/// A durable queue of jobs.
///
/// # What every backend promises
/// - **Durability.** What a method has answered `Ok` to survives a kill of this process (renewals excepted: after a
///   restart every lease lasts for a fresh TTL). What it answered `Err` to may be repeated as it was: every method is
///   idempotent, by batch id, (batch, chunk number), job id and digest, (worker, request), or (job, fence).
/// - **One result.** At most one finish of a job is accepted; fences only grow, over all jobs and restarts; a finish
///   or renewal with a fence that is not the job's present one changes nothing.
/// - **Leases end by their deadline only**, by the queue's own clock, and are ended by `lease` and `tick`.
/// - **Order.** Within the lanes that a request may draw from: projects by stride fairness, then higher priority
///   first within a project, then the order of submission.
/// - **Budgets.** Handler failures count against `max_attempts`, expired leases and infrastructure failures against
///   `max_infra`, releases against nothing.
/// - **Reads** see every write that was answered before they were asked.
/// - **Bounds.** Requests above the limits of [`espalier_core::queue`] and of this module are refused by field;
///   pages are cut to [`PAGE_MAX`].
pub trait Queue: Send + Sync + std::fmt::Debug + 'static {
    /// Opens a batch. The same id with the same digest answers with the batch as it is; with another digest it is
    /// refused. So is a new one of a project that has as many open ones as it may have.
    fn open_batch(&self, request: OpenBatch) -> Answer<'_, BatchView>;

    /// Adds jobs to an open batch: each is accepted, found there already, or rejected by itself. The same number with
    /// the same digest is judged again: what is there is found there, what was rejected is rejected unless the reason
    /// has gone. The same number with another digest is refused by the field `chunk`. A closed batch takes a chunk
    /// that it knows, and of that nothing new. A chunk of which nothing is in the queue is not remembered.
    fn submit(&self, chunk: Chunk) -> Answer<'_, ChunkReply>;

    /// Lets the batch take no more chunks. It is complete when all its jobs have ended.
    fn close_batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, BatchView>;

    /// Grants up to `n` ready jobs. An empty answer means that there are none now; [`Queue::events`] says when to
    /// ask again.
    fn lease(&self, request: LeaseRequest) -> Answer<'_, Vec<Granted>>;

    /// Prolongs leases. One reply for each, in order; a job that is not known is `Lost`.
    fn renew(&self, renewals: Vec<Renewal>) -> Answer<'_, Vec<RenewReply>>;

    /// Ends attempts. One reply for each, in order; a job that is not known is `Stale`.
    fn finish(&self, finishes: Vec<Finish>) -> Answer<'_, Vec<FinishAck>>;

    /// Cancels what waits at once; asks the workers of what runs to stop. A cancelled batch is closed as well.
    fn cancel(&self, which: Selector) -> Answer<'_, Cancelled>;

    /// Puts dead jobs back, with fresh budgets, and with them those that are dead only because of them. Returns how
    /// many. A job whose dependency stays dead stays dead.
    fn requeue_dead(&self, which: Selector) -> Answer<'_, u64>;

    /// Promotes due jobs and reaps expired leases, at most `limit` of each.
    fn tick(&self, limit: usize) -> Answer<'_, Ticked>;

    /// Prolongs every lease by the length of an outage during which nobody could renew.
    fn extend_leases(&self, by: Duration) -> Answer<'_, ()>;

    /// Forgets batches that have been complete for `older_than`, at most `limit` of them, oldest first. Returns
    /// their names, so that the caller can remove their objects.
    fn purge(&self, older_than: Duration, limit: usize) -> Answer<'_, Vec<(ProjectId, BatchId)>>;

    /// Closes batches that are open, have no active job and in which nothing has ended or begun for `idle_for`, at most
    /// `limit` of them. Returns their names.
    fn close_idle(&self, idle_for: Duration, limit: usize)
    -> Answer<'_, Vec<(ProjectId, BatchId)>>;

    /// One job.
    fn job(&self, key: JobKey) -> Answer<'_, Option<JobDetail>>;

    /// What a job was submitted with.
    fn spec(&self, key: JobKey) -> Answer<'_, Option<JobSpec>>;

    /// One batch.
    fn batch(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<BatchView>>;

    /// The defaults that a batch was opened with: what a chunk's jobs are read on top of.
    fn defaults(&self, project: ProjectId, batch: BatchId) -> Answer<'_, Option<Bytes>>;

    /// What taking in a chunk has to know of its batch and its project, in one look; none where there is no such batch.
    fn intake(&self, project: ProjectId, batch: BatchId, chunk: u32) -> Answer<'_, Option<Intake>>;

    /// The digest of a chunk that was taken.
    fn chunk_digest(
        &self,
        project: ProjectId,
        batch: BatchId,
        n: u32,
    ) -> Answer<'_, Option<[u8; 32]>>;

    /// Batches of a project by name, after `after`.
    fn batches(
        &self,
        project: ProjectId,
        after: Option<BatchId>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>>;

    /// Batches of a project with a number below `before`, the newest first.
    fn batches_newest(
        &self,
        project: ProjectId,
        before: Option<BatchSeq>,
        limit: usize,
    ) -> Answer<'_, Vec<BatchView>>;

    /// Jobs of a batch that pass `filter`, by name, after the job named `after`. At most `limit` are returned, fewer
    /// only at the end: the page is the last when it is short.
    fn jobs(
        &self,
        project: ProjectId,
        batch: BatchId,
        filter: JobFilter,
        after: Option<espalier_core::id::JobId>,
        limit: usize,
    ) -> Answer<'_, Vec<JobDetail>>;

    /// Jobs of a batch that ended after the end number `after` (0 for all), in the order of their ends.
    fn ended_after(
        &self,
        project: ProjectId,
        batch: BatchId,
        after: u64,
        limit: usize,
    ) -> Answer<'_, EndedPage>;

    /// Depths, ages and counts.
    fn stats(&self) -> Answer<'_, QueueStats>;

    /// How many jobs of each kind are delayed until a moment that is at most `within` from now. The [`DUE_LOOK_MAX`] that are
    /// due first are counted, so that the price has a bound; what comes after them counts when it is ready.
    fn due_soon(&self, within: Duration) -> Answer<'_, BTreeMap<JobKind, u64>>;

    /// Says that coordinator `by` is here, and changes what it shows: at most [`ANNOUNCE_MAX`] entries at once, or none.
    /// All that it shows is taken away [`PRESENCE_TTL`] after it last said so. False: nothing of what it showed before
    /// this is seen any more, since it is new or was silent for too long.
    fn announce(&self, by: CoordinatorId, changes: Vec<Change>) -> Answer<'_, bool>;

    /// What all coordinators that are here show in a list, in no order.
    fn shown(&self, table: Table) -> Answer<'_, Vec<Shown>>;

    /// Reaches every coordinator, this one too, as [`Event::Notice`]. A hint, as all events are.
    fn tell(&self, notice: Bytes) -> Answer<'_, ()>;

    /// How often what keeps the jobs was restarted or replaced while this process looked, each of which may have lost
    /// what was acknowledged. None: it loses nothing.
    fn restarts(&self) -> Option<u64>;

    /// How the queue is, as far as this process knows it now.
    fn condition(&self) -> BoxFuture<'_, Condition>;

    /// What happens from now on. A hint: whoever lags loses events and finds the same by asking. Sent after the
    /// change is durable.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Stops taking requests, stores what is under way and lets go of the files or connections. Idempotent.
    fn close(&self) -> BoxFuture<'_, ()>;
}
