//! The machine's state as others see it: copies with full names instead of numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{AttemptError, BatchSeq, Budgets, Counters, JobKind, JobSeq, JobState, StateName};
use crate::id::{BatchId, JobKey, ProjectId};
use crate::time::Timestamp;

/// One job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    /// Its full name.
    pub key: JobKey,
    /// Its number.
    pub seq: JobSeq,
    /// The number of its batch.
    pub batch_seq: BatchSeq,
    /// The sort of work.
    pub kind: JobKind,
    /// 0 to 9; higher goes first.
    pub priority: u8,
    /// Where it is.
    pub state: JobState,
    /// Tags that a worker must offer.
    pub needs: BTreeSet<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Jobs that must succeed first, as far as they have not been purged.
    pub deps: Vec<JobKey>,
    /// How many of them have not succeeded.
    pub waits_for: u32,
    /// Grants so far.
    pub attempts: u32,
    /// What it may spend and has spent.
    pub budgets: Budgets,
    /// When it was submitted.
    pub submitted_at: Timestamp,
    /// When its state last changed.
    pub changed_at: Timestamp,
    /// Not to be granted before this moment.
    pub not_before: Option<Timestamp>,
    /// Longest time of one attempt.
    pub max_runtime: Option<Duration>,
    /// W3C trace context of the submitter.
    pub traceparent: Option<String>,
    /// Why the last attempt that failed did so.
    pub error: Option<AttemptError>,
    /// Digest of the submission.
    pub spec_digest: [u8; 32],
}

/// One batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchView {
    /// The tenant.
    pub project: ProjectId,
    /// The name within the project.
    pub batch: BatchId,
    /// Its number.
    pub seq: BatchSeq,
    /// Digest of what it was opened with.
    pub params_digest: [u8; 32],
    /// When it was opened.
    pub opened_at: Timestamp,
    /// It takes no more jobs.
    pub closed: bool,
    /// It was cancelled as a whole.
    pub cancelled: bool,
    /// When it was closed and the last of its jobs had ended.
    pub completed_at: Option<Timestamp>,
    /// Its jobs by state.
    pub counters: Counters,
    /// The number of the newest end in it; 0 if there is none.
    pub last_end: u64,
}

/// Which jobs of a batch to list. An empty part lets all through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobFilter {
    /// In one of these states.
    pub states: Vec<StateName>,
    /// Of one of these kinds.
    pub kinds: Vec<JobKind>,
    /// With all of these labels.
    pub labels: BTreeMap<String, String>,
}

/// One job that ended, for watchers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndedJob {
    /// Its place in the order of ends: ask for what comes after it.
    pub seq: u64,
    /// The job.
    pub job: JobView,
}

/// The depth of one project's work of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatLine {
    /// The tenant.
    pub project: ProjectId,
    /// The sort of work.
    pub kind: JobKind,
    /// Jobs by state.
    pub counters: Counters,
    /// How long the job that waits at the head of the line has been ready; the longest, where there are several
    /// lines.
    pub oldest_ready: Option<Duration>,
}

/// The whole queue in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Ordered by project and kind.
    pub lines: Vec<StatLine>,
    /// Batches that are not complete.
    pub batches_open: u64,
    /// Leases that were refused a finish since the machine was made.
    pub stale_fences: u64,
    /// Leases that ended unrenewed since the machine was made.
    pub expired_leases: u64,
}
