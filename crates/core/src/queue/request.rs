//! What is asked of the machine, and what it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{BatchSeq, GRANTS_MAX, JobKind, JobSeq, NewJob};
use crate::error::{ErrorClass, FieldError};
use crate::id::{BatchId, Fence, JobKey, ProjectId, WorkerId};
use crate::time::Timestamp;

/// Most tags that a worker may offer: more than any one job may need, for a good number of servers.
const OFFERS_MAX: usize = 256;
/// The shortest and the longest lease: less is lost to a hiccup, more is a hang that nobody notices.
const TTL_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3_600));
/// A whole command that cannot be done. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such batch.
    #[error("batch {project}/{batch} is not known")]
    UnknownBatch {
        /// The tenant.
        project: ProjectId,
        /// The batch.
        batch: BatchId,
    },
    /// No such job.
    #[error("job {0} is not known")]
    UnknownJob(JobKey),
    /// The batch takes no more jobs.
    #[error("batch {project}/{batch} is closed")]
    BatchClosed {
        /// The tenant.
        project: ProjectId,
        /// The batch.
        batch: BatchId,
    },
    /// The project has to close batches before it opens others.
    #[error("project {project} has {max} batches that are not closed, and may have no more")]
    TooManyOpenBatches {
        /// The tenant.
        project: ProjectId,
        /// How many it may have.
        max: usize,
    },
    /// A field of the request breaks its rule.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// What became of one job of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ItemResult {
    /// It is in the queue now.
    Accepted,
    /// The same job was there before.
    AlreadyThere,
    /// It breaks a rule and is not in the queue.
    Rejected(FieldError),
}

/// The answer to a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkAnswer {
    /// One result for each job, in the order of the chunk.
    pub items: Vec<ItemResult>,
    /// The chunk had been taken before: what it brought then is there already.
    pub repeated: bool,
    /// The numbers of the jobs that are in the queue since this call: position in the chunk and number.
    pub added: Vec<(usize, JobSeq)>,
}

/// A worker asks for work of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who asks.
    pub worker: WorkerId,
    /// The same number within [`LEASE_REPEAT`](super::LEASE_REPEAT) gets the same grants: a reply may be lost. Zero asks for no such memory.
    pub request: u64,
    /// The sort of work.
    pub kind: JobKind,
    /// The tags that the worker offers.
    pub offers: BTreeSet<String>,
    /// Most jobs to grant.
    pub n: u32,
    /// How long each lease lasts, if not as long as its kind has it.
    pub ttl: Option<Duration>,
}

impl LeaseRequest {
    /// How long each lease lasts, if the request keeps to its limits.
    pub fn check(&self) -> Result<Duration, FieldError> {
        if self.n > GRANTS_MAX {
            let rule = format!("must be at most {GRANTS_MAX}");
            return Err(FieldError::new("n", self.n, rule));
        }
        if self.offers.len() > OFFERS_MAX {
            let rule = format!("must be at most {OFFERS_MAX} tags");
            return Err(FieldError::new("offers", self.offers.len(), rule));
        }
        let (min, max) = TTL_RANGE;
        match self.ttl {
            Some(ttl) if ttl < min || ttl > max => {
                let rule = format!("must be from {} to {}", min.as_millis(), max.as_millis());
                Err(FieldError::new("ttl_ms", ttl.as_millis(), rule))
            }
            ttl => Ok(ttl.unwrap_or(self.kind.lease_ttl())),
        }
    }
}

/// A job that a worker may run now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Which job.
    pub key: JobKey,
    /// Its number, under which the backend keeps the spec.
    pub seq: JobSeq,
    /// The number of its batch, under which the backend keeps the defaults.
    pub batch_seq: BatchSeq,
    /// The sort of work.
    pub kind: JobKind,
    /// The number of the lease.
    pub fence: Fence,
    /// Which grant of this job it is, from 1.
    pub attempt: u32,
    /// When the lease ends unless renewed.
    pub deadline: Timestamp,
    /// When the attempt has run too long, whatever is renewed.
    pub run_until: Option<Timestamp>,
    /// When the job was submitted.
    pub submitted_at: Timestamp,
    /// Since when it was ready.
    pub ready_since: Timestamp,
    /// Labels of the job.
    pub labels: BTreeMap<String, String>,
    /// W3C trace context of the submitter.
    pub traceparent: Option<String>,
}

/// The answer to one renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenewReply {
    /// The lease holds.
    Held {
        /// Until when.
        deadline: Timestamp,
        /// The worker should stop and finish with [`Outcome::Failed`] of class `cancelled`.
        cancel_requested: bool,
    },
    /// The lease is no more: stop, and publish nothing.
    Lost,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The job is done. `spawn` joins the same batch together with this finish.
    Succeeded {
        /// Jobs that follow from the result.
        spawn: Vec<NewJob>,
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
    /// Stopped in good order before the end: the job is ready again at once and has spent nothing.
    Released,
}

/// The answer to a finish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReply {
    /// It counts. The numbers are those of the spawned jobs that are new, with their positions in `spawn`.
    Accepted {
        /// The job.
        seq: JobSeq,
        /// Positions in `spawn`, and numbers.
        spawned: Vec<(usize, JobSeq)>,
    },
    /// It counted before; this is a repetition.
    AlreadyFinished,
    /// The lease is not the job's present one. Nothing changed.
    Stale,
    /// A spawned job breaks a rule. Nothing changed, and the lease holds: finish in another way.
    SpawnRefused(FieldError),
}

/// Which jobs a cancel or a requeue means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// One job.
    Job(JobKey),
    /// All jobs of a batch.
    Batch(ProjectId, BatchId),
    /// All jobs of a project that carry a label.
    Label {
        /// The tenant.
        project: ProjectId,
        /// Label key.
        key: String,
        /// Label value.
        value: String,
    },
}

impl Selector {
    /// The tenant whose jobs are meant.
    pub fn project(&self) -> &ProjectId {
        match self {
            Self::Job(key) => &key.project,
            Self::Batch(project, _) | Self::Label { project, .. } => project,
        }
    }
}

/// What a cancel did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cancelled {
    /// Jobs that are cancelled now.
    pub cancelled: u64,
    /// Running jobs whose workers are asked to stop.
    pub requested: u64,
}

/// What a tick did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticked {
    /// Delayed jobs that are ready now.
    pub promoted: u64,
    /// Leases that ended.
    pub reaped: u64,
    /// The limit was met; there may be more to do at once.
    pub more: bool,
}
